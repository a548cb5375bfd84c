"""Experts in 3-D parameters: taken apart they compute the same, everything that works on layers works on them, and they
come back as they were."""

from __future__ import annotations

import copy
import json
import pickle
import re
import weakref

import pytest
import torch
from families import EXPERTS, batches, build, error, output
from helpers import assert_bits_equal, seeded
from test_smooth import assert_same_bits, bits
from torch import nn
from toys import assert_unchanged, snapshot

import qkernels as qk
from qkernels.experts import SplitExperts, take_apart
from qkernels.nn import QuantLinear

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = "model.layers.0.mlp.experts"


def experts(family: str = "mixtral") -> nn.Module:
    return build(family, layers=1).get_submodule(MODULE)


def split(module: nn.Module) -> SplitExperts:
    parent = nn.ModuleDict({"experts": module})
    assert list(take_apart(parent).modules) == ["experts"]
    return parent["experts"]


# -- the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EXPERTS)
def test_split_model_computes_the_same_over_the_same_memory(family):
    model, data = build(family), batches(family)
    before, expected = snapshot(model), output(model, data[0])
    stack = model.get_submodule(MODULE).down_proj
    names = qk.split_experts_(model)
    assert names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert error(model, data[0], expected) < 1e-6
    weights = [model.get_submodule(f"{MODULE}.{i}.down_proj").weight for i in range(4)]
    assert all(w.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr() for w in weights)
    assert qk.split_experts_(model) == []
    assert qk.join_experts_(model) == names
    assert qk.join_experts_(model) == []
    assert list(model.state_dict()) == [n for n in before[1] if n in model.state_dict()]
    for name, value in before[2].items():
        assert_bits_equal(model.get_parameter(name), value, name)
    assert_bits_equal(output(model, data[0]), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("tokens", (0, 1, 7))
def test_forward_with_experts_nobody_chose_and_places_left_empty(family, dtype, tokens):
    module = experts(family).to(dtype)
    x = seeded(tokens, 32).to(dtype)
    index = torch.tensor([[2, 0], [2, 3], [0, 2], [3, 0], [0, 3], [2, 0], [3, 2]])[:tokens]  # never 1
    weights = seeded(7, 2, seed=1).abs()[:tokens].to(dtype)
    module.config._experts_implementation = "eager"
    expected = module(x, index, weights)
    taken = split(module)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(taken(x, index, weights), expected, rtol=limit, atol=limit)
    if tokens:
        index[0, 1] = index[-1, 0] = 4  # the number of experts: none
        y = taken(x, index, weights)
        whole = torch.where(index.unsqueeze(-1) < 4, weights.unsqueeze(-1), 0.0)
        one_by_one = sum(taken(x, index.clamp(max=3)[:, [k]], whole[:, k]) for k in range(2))
        torch.testing.assert_close(y, one_by_one.to(dtype), rtol=limit, atol=limit)
        none = taken(x, torch.full_like(index, 4), weights)
        assert not none.any()
        assert none.dtype == dtype


def test_forward_takes_keywords_and_gives_gradients():
    module = experts("gpt_oss")
    x, index, weights = seeded(5, 32).requires_grad_(), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    module(x, index, weights).sum().backward()
    expected, x.grad = x.grad, None
    taken = split(module)
    taken(x, router_indices=index, routing_weights=weights).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert taken.get_submodule("1.down_proj").weight.grad.abs().sum() > 0
    assert taken.get_submodule("3.down_proj").weight.grad is None


class Lying(nn.Module):
    """Says that it is gated as usual, and multiplies by two besides."""

    has_bias = is_transposed = has_post_expert_norm = False

    def __init__(self) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed, self.has_post_expert_norm = True, False, False, False
        self.gate_up_proj, self.down_proj = nn.Parameter(seeded(3, 16, 8)), nn.Parameter(seeded(3, 8, 8))
        self.factor = 2.0

    def _apply_gate(self, y: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, -1)
        return torch.relu(gate) * up

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for token, (chosen, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
            for expert, share in zip(chosen, shares, strict=True):
                hidden = self._apply_gate(self.gate_up_proj[expert] @ x[token])
                y[token] += self.factor * share * (self.down_proj[expert] @ hidden)
        return y


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: None, "compute something else"),
        (lambda m: setattr(m, "factor", None), "unsupported operand"),
        (lambda m: setattr(m, "_is_expert_parallel", True), "several processes"),
        (lambda m: setattr(m, "forward", m.forward), "replaced on the instance"),
        (lambda m: m.register_parameter("more", nn.Parameter(seeded(3))), "expected the parameters down_proj, gate_up"),
        (lambda m: m.to(torch.float64), "float64"),
        (lambda m: setattr(m, "down_proj", nn.Parameter(seeded(4, 8, 8))), "different numbers of experts"),
        (lambda m: setattr(m, "down_proj", nn.Parameter(seeded(3, 8))), r"shape \[3, 8\]"),
    ],
)
def test_what_is_not_what_it_says_is_left_with_the_reason(change, reason):
    model = nn.ModuleDict({"experts": Lying(), "fc": nn.Linear(8, 8)})
    change(model["experts"])
    before = snapshot(model)
    row = qk.quantize_(model, "w8a8")["experts"]
    assert not row.quantized
    assert row.bytes_before == row.bytes_after > 0
    assert "experts in 3-D parameters, left as they are" in row.reason
    assert re.search(reason, row.reason), row.reason
    after = snapshot(model)
    assert after[0]["experts"] is before[0]["experts"]
    assert all(after[1][n] is p for n, p in before[1].items() if n.startswith("experts"))


def test_an_honest_module_of_ones_own_is_quantized():
    model = nn.ModuleDict({"experts": Lying()})
    model["experts"].factor = 1.0
    args = (seeded(6, 8), torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5))
    expected = model["experts"](*args)
    report = qk.quantize_(model, "w8a8")
    assert len(report.quantized) == 6
    assert (model["experts"](*args) - expected).norm() < 0.03 * expected.norm()


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ("w8a8", "w8a16", "w4a8", "w4a8_intscale", "w4a16", "w3a16"))
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_quantized_stored_and_put_together(family, scheme, tmp_path):
    model, data = build(family), batches(family)
    expected, float_state = output(model, data[0]), model.state_dict()
    size = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    stack = weakref.ref(model.get_submodule(MODULE).down_proj)
    del float_state
    report = qk.quantize_(model, scheme)
    rows = [layer for layer in report.quantized if ".experts." in layer.name]
    assert len(rows) == 2 * 4 * 2
    assert report[f"{MODULE}.3.gate_up_proj"].scheme == scheme
    assert report.bytes_before == size
    assert report.bytes_after == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert stack() is None, "the stacked parameter is still in memory"
    y = output(model, data[0])
    limit = {"w8a8": 0.15, "w8a16": 0.1, "w4a8": 0.5, "w4a8_intscale": 0.5, "w4a16": 0.5, "w3a16": 0.8}[scheme]
    assert error(model, data[0], expected) < limit

    qk.save(model, tmp_path / "out")
    with torch.device("meta"):
        empty = build(family)
    for other in (build(family, seed=1), empty):
        if any(b.is_meta for b in other.buffers()):
            other = other.to_empty(device="cpu") if family == "none" else other
        qk.load(other, tmp_path / "out")
        if not any(b.is_meta for b in other.buffers()):
            assert_bits_equal(output(other, data[0]), y)
        again = pickle.loads(pickle.dumps(copy.deepcopy(other)))
        assert list(again.state_dict()) == list(other.state_dict())

    back = qk.dequantize_(model)
    assert back.bytes_before == report.bytes_after
    assert back.bytes_after == size
    assert not any(isinstance(m, (SplitExperts, QuantLinear)) for m in model.modules())
    assert list(model.state_dict()) == list(build(family).state_dict())
    assert error(model, data[0], expected) < limit
    qk.quantize_(model, scheme)


def test_stacked_weights_are_let_go_while_the_conversion_runs():
    model = build("mixtral")
    stack = weakref.ref(model.get_submodule(MODULE).down_proj)
    alive = []
    qk.quantize_(model, "w8a8", progress=lambda done, total, name: alive.append(stack() is not None))
    assert len(alive) == 25
    assert not any(alive)


def test_patterns_name_experts_one_by_one():
    model = build("mixtral", layers=1)
    report = qk.quantize_(
        model, "w8a8", exclude=("*lm_head", "*.experts.1.*"), overrides={"*.experts.*.down_proj": "w4a16"}
    )
    assert report[f"{MODULE}.0.down_proj"].scheme == "w4a16"
    assert report[f"{MODULE}.0.gate_up_proj"].scheme == "w8a8"
    row = report[f"{MODULE}.1.gate_up_proj"]
    assert not row.quantized
    assert "excluded by '*.experts.1.*'" in row.reason
    qk.dequantize_(model)
    assert model.get_submodule(MODULE).down_proj.shape == (4, 32, 64)


def test_excluded_experts_stay_the_very_same_module():
    model = build("mixtral")
    before = snapshot(model)
    report = qk.quantize_(model, "w8a8", exclude=("*lm_head", "*.experts.*"))
    row = report[MODULE]
    assert row.bytes_before == row.bytes_after == 4 * 4 * (128 * 32 + 32 * 64)
    assert row.reason == "excluded by '*.experts.*'"
    for name in (MODULE, "model.layers.1.mlp.experts"):
        assert model.get_submodule(name) is before[0][name]
        assert model.get_submodule(name).down_proj is before[1][f"{name}.down_proj"]


@pytest.mark.parametrize("holding", (True, False))
@pytest.mark.parametrize("failing", ("qkernels.convert.adapt_parents", "qkernels.convert.make_plan"))
def test_a_failed_conversion_puts_the_experts_back(failing, holding, monkeypatch):
    model, data = build("gpt_oss"), batches("gpt_oss")
    before = snapshot(model) if holding else None
    state, expected = bits(model), output(model, data[0])
    kinds = [type(m) for m in model.modules()]

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="disk full"):
        qk.quantize_(model, "w4a8", smooth=0.5, calibration=data)
    assert [type(m) for m in model.modules()] == kinds
    assert_same_bits(model, state)
    assert_bits_equal(output(model, data[0]), expected)
    if before is not None:
        assert_unchanged(model, before)


def test_a_failed_way_back_leaves_the_quantized_experts(monkeypatch):
    model, data = build("mixtral"), batches("mixtral")
    qk.quantize_(model, "w8a8")
    expected, kinds = output(model, data[0]), [type(m) for m in model.modules()]

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("qkernels.convert.adapt_parents", fail)
    with pytest.raises(OSError):
        qk.dequantize_(model)
    assert [type(m) for m in model.modules()] == kinds
    assert_bits_equal(output(model, data[0]), expected)


def test_files_with_another_number_of_experts_are_refused(tmp_path):
    model = build("mixtral", layers=1)
    qk.quantize_(model, "w8a8")
    qk.save(model, tmp_path / "out")
    other = build("mixtral", layers=1)
    path = tmp_path / "out" / "qkernels.json"
    data = json.loads(path.read_text())
    for key in [k for k in data["layers"] if ".experts.3." in k]:
        data["layers"][key.replace(".3.", ".7.")] = data["layers"].pop(key)
    path.write_text(json.dumps(data))
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"experts.7"):
        qk.load(other, tmp_path / "out")
    assert_unchanged(other, before)


# -- calibration and what builds on it ---------------------------------------------------------------------------------


def test_calibration_watches_experts_and_leaves_the_model():
    model, data = build("mixtral"), batches("mixtral", rows=8)
    before = snapshot(model)
    with qk.calibrate(model) as stats:
        for batch in data:
            output(model, batch)
    assert_unchanged(model, before)
    assert stats.layers[f"{MODULE}.2.down_proj"].rows > 0
    assert sum(stats.layers[f"{MODULE}.{i}.gate_up_proj"].rows for i in range(4)) == 2 * 8 * 16 * 2  # two of four
    expected = output(model, data[0])
    qk.quantize_(model, "w8a8_static", calibration=stats)
    assert error(model, data[0], expected) < 0.3


def test_an_expert_that_no_batch_reaches_is_named():
    model = build("mixtral", layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[1] = 0
        model.model.layers[0].mlp.gate.weight[2:] = 0  # experts 0 and 1, or 1 and 2: never 3
    before = snapshot(model)
    one = [{"input_ids": torch.tensor([[5]])}]
    for options in ({"algorithm": "gptq"}, {"algorithm": "awq"}, {"smooth": 0.5}):
        with pytest.raises(ValueError, match=r"no batch reached .*experts\.\d\."):
            qk.quantize_(model, "w8a8" if "smooth" in options else "w4a16", calibration=one, **options)
        assert_unchanged(model, before)


@pytest.mark.parametrize("algorithm", ("gptq", "awq"))
def test_calibrated_algorithms_beat_rounding_to_nearest(algorithm):
    data = batches("qwen2_moe", count=6, rows=4)
    model = build("qwen2_moe", layers=1)
    args = (seeded(64, 32), torch.arange(128).view(64, 2) % 4, torch.full((64, 2), 0.5))
    expected, plain = output(model, data[0]), copy.deepcopy(model)
    scheme = qk.Scheme(4, "per_group", 16, activation_bits=None)
    qk.quantize_(plain, scheme)
    report = qk.quantize_(model, scheme, algorithm=algorithm, calibration=data)
    assert report[f"{MODULE}.0.down_proj"].scheme == scheme.name
    assert error(model, data[0], expected) < 0.95 * error(plain, data[0], expected)
    assert model.get_submodule(MODULE)(*args).isfinite().all()


@pytest.mark.parametrize("fold", ("auto", "runtime"))
@pytest.mark.parametrize("family", EXPERTS)
def test_smoothing_keeps_the_function_of_split_experts(family, fold):
    model, data = build(family, layers=1), batches(family, rows=8)
    expected = output(model, data[0])
    left = [g for g in qk.smooth_(copy.deepcopy(model), data, fold=fold).groups if g.layers == (MODULE,)]
    assert [g.how for g in left] == ["left"]
    assert "split_experts_" in left[0].reason
    qk.split_experts_(model)
    report = qk.smooth_(model, data, fold=fold)
    groups = {g.layers[0]: g for g in report.groups if ".experts." in g.layers[0]}
    assert len(groups) == 8
    assert {g.how for g in groups.values()} <= {"folded", "runtime"}
    down = groups[f"{MODULE}.0.down_proj"]
    gated = family != "gpt_oss"  # its gate adds one to the other half: nothing passes a factor on
    assert (down.producer == f"{MODULE}.0.gate_up_proj") == (fold == "auto" and gated)
    assert error(model, data[0], expected) < 1e-5
    assert qk.join_experts_(model) == [], "run-time factors would be lost"
    qk.quantize_(model, "w8a8")
    assert error(model, data[0], expected) < 0.2
    qk.dequantize_(model)
    assert type(model.get_submodule(MODULE)).__name__.endswith("Experts")
    assert error(model, data[0], expected) < 0.2


@pytest.mark.parametrize("fold", (0.5, "auto"))
def test_smoothing_within_quantize_reaches_the_experts(fold):
    model, data = build("mixtral", layers=1), batches("mixtral", rows=8)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] *= 60
        model.get_submodule(MODULE).gate_up_proj[:, :, 3] /= 60
        model.model.layers[0].mlp.gate.weight[:, 3] /= 60
    expected, rough = output(model, data[0]), copy.deepcopy(model)
    qk.quantize_(rough, "w8a8")
    qk.quantize_(model, "w8a8", smooth=fold, calibration=data)
    assert "inv_smooth" in model.get_submodule(f"{MODULE}.0.gate_up_proj").canonical()
    assert error(rough, data[0], expected) > 1.5 * error(model, data[0], expected)  # a token may change its expert


def test_sensitivity_and_plan_rank_experts_and_leave_the_model():
    model, data = build("mixtral", layers=1), batches("mixtral", rows=4)
    before = snapshot(model)
    size = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    ranking = qk.sensitivity(model, data, "w4a16")
    assert f"{MODULE}.1.down_proj" in {layer.name for layer in ranking.layers}
    plan = qk.plan(model, data, max_bytes=size // 2)
    assert_unchanged(model, before)
    report = qk.quantize_(model, "w8a8", overrides=plan.overrides)
    quantized = sum(layer.bytes_after for layer in report)
    assert quantized <= 1.1 * plan.bytes  # padding of packed weights besides
    with pytest.raises(ValueError, match="max_bytes: expected at least"):
        qk.plan(build("mixtral", layers=1), data, max_bytes=1000)


def test_training_prepares_experts_and_converts_to_what_was_trained():
    model, data = build("qwen2_moe", layers=1), batches("qwen2_moe", rows=4)
    names = qk.prepare_qat_(model, "w4a8")
    assert f"{MODULE}.2.gate_up_proj" in names
    model(**data[0])[0].square().mean().backward()
    assert model.get_submodule(f"{MODULE}.2.gate_up_proj").weight.grad.abs().sum() > 0
    trained = output(model, data[0])
    qk.convert_(model)
    assert_bits_equal(output(model, data[0]), trained)
    other = build("qwen2_moe", layers=1)
    before = snapshot(other)
    with pytest.raises(ValueError, match="matches no layer"):
        qk.prepare_qat_(other, "w4a8", include=("nothing",))
    assert_unchanged(other, before)


def test_a_code_book_is_fitted_to_experts_too():
    model = build("mixtral", layers=1)
    before = snapshot(model)
    assert qk.fit_codebook(model, include=("*.experts.*",)) != qk.NF4
    assert_unchanged(model, before)


def test_what_is_no_model_is_refused():
    for function in (qk.split_experts_, qk.join_experts_, qk.quantize_, qk.fit_codebook, qk.prepare_qat_):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
            function("model")
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        qk.sensitivity("model", [seeded(2, 2)])
