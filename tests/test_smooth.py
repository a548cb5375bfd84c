"""Smoothing: readers and producers are found, folding is exact, outliers cost less, a changed function is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, batches, build, error, output
from helpers import assert_bits_equal, seeded
from torch import nn

import qkernels as qk
import qkernels.smooth
from qkernels.nn import QuantLinear
from qkernels.probe import find_groups
from qkernels.smoothed import attached
from qkernels.survey import survey

pytestmark = pytest.mark.usefixtures("one_thread")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {x.name: x.module for x in survey(model) if x.kind in ("linear", "conv1d") and x.reason is None}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert_bits_equal(tensor, before[name], name)


def tail(names) -> tuple[str, ...]:
    return tuple(name.split(".")[-1] for name in names)


# -- who reads what, and who produces it ----------------------------------------------------------------------

# The groups of one layer: readers -> producer, or None where only run-time smoothing is exact.
STRUCTURE = {
    "opt": {
        ("q_proj", "k_proj", "v_proj"): "self_attn_layer_norm",
        ("out_proj",): "v_proj",
        ("fc1",): "final_layer_norm",
        ("fc2",): "fc1",
    },
    "gpt2": {("c_attn",): "ln_1", ("c_proj",): "c_attn", ("c_fc",): "ln_2"},
    "bert": {("query", "key", "value"): None, ("dense",): "value"},
    "distilbert": {("q_lin", "k_lin", "v_lin"): None, ("out_lin",): "v_lin", ("lin1",): None, ("lin2",): None},
    "llama": {
        ("q_proj", "k_proj", "v_proj"): "input_layernorm",
        ("o_proj",): "v_proj",
        ("gate_proj", "up_proj"): "post_attention_layernorm",
        ("down_proj",): "up_proj",
    },
    "gemma": {("q_proj", "k_proj", "v_proj"): "input_layernorm", ("o_proj",): "v_proj", ("down_proj",): "up_proj"},
    "phi3": {
        ("qkv_proj",): "input_layernorm",
        ("o_proj",): "qkv_proj",
        ("gate_up_proj",): "post_attention_layernorm",
        ("down_proj",): "gate_up_proj",
    },
    "mixtral": {("q_proj", "k_proj", "v_proj"): "input_layernorm", ("o_proj",): "v_proj"},
}


@pytest.mark.parametrize("family", STRUCTURE)
def test_probe_finds_readers_and_producers(family):
    model = build(family, layers=1)
    before = bits(model)
    found = {}
    for group in find_groups(model, linears(model), batches(family)[0]):
        found.setdefault(tail(group.layers), None if group.producer is None else tail([group.producer.name])[0])
    for readers, producer in STRUCTURE[family].items():
        assert found[readers] == producer, f"{family}: {readers}"
    assert_same_bits(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_probe_sees_heads_that_share_values():
    model = build("llama", layers=1)
    group = next(g for g in find_groups(model, linears(model), batches("llama")[0]) if tail(g.layers) == ("o_proj",))
    expected = [8 * (head // 2) + i for head in range(4) for i in range(8)]
    assert group.producer.channel.tolist() == expected


def test_probe_finds_the_slice_of_a_fused_projection():
    model = build("gpt2", layers=1)
    groups = find_groups(model, linears(model), batches("gpt2")[0])
    group = next(g for g in groups if g.producer is not None and g.producer.name.endswith("c_attn"))
    assert group.producer.channel.tolist() == list(range(64, 96))


class Custom(nn.Module):
    """Two Linears in a row with a ReLU, a side exit for the first one's output on request."""

    def __init__(self, *, side: bool = False, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 6)
        self.activation = activation or nn.ReLU()
        self.side = side

    def forward(self, x):
        hidden = self.first(x)
        y = self.second(self.activation(hidden))
        return (y, hidden.sum(-1)) if self.side else y


@pytest.mark.parametrize(
    "model, folds",
    [
        (Custom(), True),
        (Custom(activation=nn.Identity()), True),
        (Custom(activation=nn.LeakyReLU()), True),
        (Custom(activation=nn.GELU()), False),
        (Custom(activation=nn.Tanh()), False),
        (Custom(activation=nn.Softmax(-1)), False),
        (Custom(activation=nn.LayerNorm(12, elementwise_affine=False)), False),
        (Custom(side=True), False),
    ],
)
def test_probe_folds_only_what_passes_factors_on(model, folds):
    groups = find_groups(model, linears(model), seeded(32, 8))
    assert groups[0].producer is None
    assert (groups[1].producer is not None) == folds
    assert folds or groups[1].reason


class Beside(nn.Module):
    """One channel computed beside the way from input to output, and used for nothing that shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.second = nn.Linear(8, 1), nn.Linear(8, 6)

    def forward(self, x):
        idle = self.gate(x)
        return self.second(torch.tanh(x)) + 0 * idle


def test_probe_does_not_take_a_single_channel_for_a_producer():
    model = Beside()
    groups = find_groups(model, linears(model), seeded(32, 8))
    assert [tail(group.layers) for group in groups] == [("gate",), ("second",)]
    assert groups[1].producer is None
    qk.smooth_(model, [seeded(32, 8)])


class Routed(nn.Module):
    """A norm that a Linear reads and a bare parameter too, behind which only another norm and Linear follow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc, self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.router = nn.Parameter(seeded(8, 8))

    def forward(self, x):
        h = self.norm(x)
        return self.head(self.last(x + self.fc(h) * torch.sigmoid(h @ self.router)))


def test_probe_sees_readers_that_are_no_linears_behind_another_group():
    model = Routed()
    first, second = find_groups(model, linears(model), seeded(32, 8))
    assert first.producer is None
    assert "others read the output of norm too" in first.reason
    assert second.producer.name == "last"
    report = qk.smooth_(model, [seeded(32, 8)])
    assert [group.how for group in report.groups] == ["runtime", "folded"]


def test_probe_refuses_layers_called_twice_and_shared_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.norm(self.fc(self.norm(x))))

    model = Twice()
    (group,) = find_groups(model, linears(model), seeded(16, 8))
    assert group.producer is None
    assert "called several times" in group.reason
    shared = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    shared[3].weight = shared[1].weight
    for group in find_groups(shared, linears(shared), seeded(16, 8)):
        assert "shares its weight" in group.reason


# -- the function stays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ("auto", "runtime"))
@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_keeps_the_function(family, fold):
    model, data = build(family, layers=2 if family == "llama" else 1), batches(family)
    before = [output(model, batch) for batch in data]
    report = qk.smooth_(model, data, fold=fold, verify=data[1])
    how = [group.how for group in report.groups]
    assert "runtime" in how or "folded" in how
    assert fold == "auto" or "folded" not in how
    assert report.difference < 1e-5
    for batch, expected in zip(data, before, strict=True):
        assert error(model, batch, expected) < 1e-5
    qk.quantize_(model, "w8a8")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for group in report.groups:
        for name in group.layers:
            if name in layers:
                assert ("inv_smooth" in layers[name].canonical()) == (group.how == "runtime")
                assert not layers[name]._forward_pre_hooks
    for batch, expected in zip(data, before, strict=True):
        assert error(model, batch, expected) < 0.15  # one flipped expert of Mixtral


def inject(model: nn.Module, family: str, *, factor: float = 60.0) -> None:
    """Outlier channels: the gain of every norm up in three channels, and what reads the norm down."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for group in find_groups(model, linears(model), batches(family)[0]):
            if group.producer is None or group.producer.kind == "linear":
                continue
            channels = torch.randperm(group.in_features, generator=generator)[:3]
            for parameter in group.producer.module.parameters():
                parameter[channels] *= factor
            for module in group.layers.values():
                module.weight[:, channels] /= factor
        if family == "bert":  # the residual reads its norms too, so this is another model, but one with outliers
            named = dict(model.named_modules())
            for name in [name for name in named if name.endswith("LayerNorm")][:-1]:
                named[name].weight[:3] *= factor
            for name in [name for name in named if name.endswith(("query", "key", "value", "intermediate.dense"))]:
                named[name].weight[:, :3] /= factor


@pytest.mark.parametrize("fold", ("auto", "runtime"))
@pytest.mark.parametrize("family", ("llama", "opt", "bert"))
def test_smoothing_wins_back_what_outliers_cost(family, fold):
    model, data = build(family, width=64), batches(family, rows=4)
    plain = [output(model, batch) for batch in data]
    inject(model, family)
    if family == "bert":
        plain = [output(model, batch) for batch in data]
    assert error(model, data[0], plain[0]) < 1e-5
    rough = copy.deepcopy(model)
    qk.quantize_(rough, "w8a8")
    qk.smooth_(model, data, fold=fold)
    qk.quantize_(model, "w8a8")
    before, after = error(rough, data[0], plain[0]), error(model, data[0], plain[0])
    assert before >= 5 * after, f"{before:.4f} -> {after:.4f}"


def test_auto_alpha_is_no_worse_than_none():
    model, data = build("llama", width=64), batches("llama", rows=4)
    expected = output(model, data[0])
    inject(model, "llama")
    rough = copy.deepcopy(model)
    qk.quantize_(rough, "w8a8")
    report = qk.quantize_(model, "w8a8", smooth="auto", calibration=data)
    assert len(report.quantized) == 14
    assert error(model, data[0], expected) < error(rough, data[0], expected) / 5


def test_smoothing_half_precision_folds_by_powers_of_two():
    model, data = build("llama").to(torch.bfloat16), batches("llama")
    before = output(model, data[0])
    report = qk.smooth_(model, data)
    assert report.difference == 0.0
    assert_bits_equal(output(model, data[0]), before)
    assert any(group.how == "folded" for group in report.groups)


def test_dead_channels_keep_their_scale():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[1].weight[:, 5] = 0.0
    before = model(seeded(16, 8))
    qk.smooth_(model, [seeded(16, 8)])
    torch.testing.assert_close(model(seeded(16, 8)), before)
    assert model[0].weight[2] == 0.0
    assert torch.isfinite(model[1].weight).all()


# -- within quantize_ -----------------------------------------------------------------------------------------


def test_quantize_smooth_equals_smooth_then_quantize():
    one, two, data = build("bert"), build("bert"), batches("bert")
    qk.quantize_(one, "w8a8", smooth=0.5, calibration=data)
    qk.smooth_(two, data)
    qk.quantize_(two, "w8a8")
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert_bits_equal(a, b, name)


def test_smoothing_from_statistics_serves_static_schemes():
    data = batches("llama")
    results = []
    for use_stats in (True, False):
        model = build("llama")
        expected = output(model, data[0])
        if use_stats:
            with qk.calibrate(model) as stats:
                for batch in data:
                    output(model, batch)
            qk.quantize_(model, "w8a8_static", smooth=0.5, calibration=stats)
        else:
            qk.quantize_(model, "w8a8_static", smooth=0.5, calibration=data)
        assert error(model, data[0], expected) < 0.1
        results.append(model)
    for (name, a), b in zip(results[0].named_modules(), results[1].modules(), strict=True):
        if isinstance(a, QuantLinear):
            torch.testing.assert_close(a.canonical()["act_scale"], b.canonical()["act_scale"], rtol=1e-4, atol=0)
            assert name


def test_smoothed_float_model_copies_and_smooths_again():
    model, data = build("bert"), batches("bert")
    before = output(model, data[0])
    qk.smooth_(model, data, alpha=0.3)
    again = copy.deepcopy(model)
    assert error(again, data[0], before) < 1e-5
    qk.smooth_(again, data, alpha=0.7)
    assert error(again, data[0], before) < 1e-5
    assert sum(attached(module) is not None for module in again.modules()) == 11  # all but the two that fold
    assert "encoder.layer.0.attention.self.query.inv_smooth" in model.state_dict()


def test_dequantize_after_run_time_smoothing_gives_the_function_back():
    model, data = build("bert"), batches("bert")
    before = output(model, data[0])
    qk.quantize_(model, "w8a8", smooth=0.5, calibration=data)
    qk.dequantize_(model)
    assert error(model, data[0], before) < 0.05


# -- refusals: the model is as it was -------------------------------------------------------------------------


def test_a_fold_that_would_change_the_function_is_refused_by_name(monkeypatch):
    model, data = build("llama"), batches("llama")
    before = bits(model)
    real = qkernels.smooth._row_factor

    def wrong(producer, scale):
        factor = real(producer, scale)
        return factor * 1.5 if producer.name == "model.layers.1.self_attn.v_proj" else factor

    monkeypatch.setattr(qkernels.smooth, "_row_factor", wrong)
    with pytest.raises(ValueError, match=r"verify: .*first at 'model.layers.1.self_attn.o_proj'"):
        qk.smooth_(model, data)
    assert_same_bits(model, before)
    with pytest.raises(ValueError, match="verify: "):
        qk.quantize_(model, "w8a8", smooth=0.5, calibration=data)
    assert_same_bits(model, before)


def test_run_time_smoothing_is_taken_back_when_a_later_step_fails(monkeypatch):
    model, data = build("bert"), batches("bert")
    before, x = bits(model), output(model, data[0])

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("qkernels.convert.adapt_parents", fail)
    with pytest.raises(OSError, match="disk full"):
        qk.quantize_(model, "w8a8", smooth=0.5, calibration=data)
    assert_same_bits(model, before)
    assert_bits_equal(output(model, data[0]), x)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failed_quantize_keeps_an_earlier_smoothing(monkeypatch):
    model, data = build("bert"), batches("bert")
    qk.smooth_(model, data)
    before, x = bits(model), output(model, data[0])

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("qkernels.convert.adapt_parents", fail)
    with pytest.raises(OSError):
        qk.quantize_(model, "w8a8")
    assert_same_bits(model, before)
    assert_bits_equal(output(model, data[0]), x)


def test_nan_activations_and_unreached_layers_are_refused():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    before = bits(model)
    with pytest.raises(ValueError, match="NaN or infinite values entered '1'"):
        qk.smooth_(model, [torch.full((4, 8), torch.nan)])
    with qk.calibrate(model) as stats:
        pass
    with pytest.raises(ValueError, match="verify: expected a batch"):
        qk.smooth_(model, stats)
    with pytest.raises(ValueError, match="no batch reached '1'"):
        qk.smooth_(model, stats, verify=seeded(4, 8))
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"alpha": 1.5}, ValueError, "alpha: expected a number from 0 to 1"),
        ({"alpha": "best"}, ValueError, "alpha: expected"),
        ({"alpha": True}, TypeError, "alpha: expected"),
        ({"fold": "always"}, ValueError, "fold: expected 'auto' or 'runtime'"),
        ({"include": ("nothing",)}, ValueError, "holds none that are chosen"),
    ],
)
def test_smooth_refuses(options, kind, message):
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(kind, match=message):
        qk.smooth_(model, [seeded(4, 8)], **options)


def test_report_reads_well():
    report = qk.smooth_(build("bert", layers=1), batches("bert"))
    text = str(report)
    assert "others read the output of embeddings.LayerNorm too" in text
    assert "outputs moved by" in text
    assert report.to_dict()["groups"][0]["how"] == "runtime"
