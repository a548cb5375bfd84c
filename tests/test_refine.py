"""Refinement of rounded weights: the sums it claims to lower, and which inputs GPTQ counts how much."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from families import batches, build, error, output
from helpers import seeded
from test_gptq import G16, SCHEMES, correlated
from torch import nn

import qkernels as qk
from qkernels import reference
from qkernels.blocks import Inputs, run_by_blocks
from qkernels.gptq import gptq_weight, matched_weight
from qkernels.grids import Grid, codes_and_tensors, round_units
from qkernels.hooks import Target
from qkernels.refine import _step, refine_weight, round_columns


def rounded_to_nearest(w: torch.Tensor, scheme: qk.Scheme) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Units ``[K, N]`` and the grid."""
    grid = reference.weight_grid(w, scheme)
    codes = reference.round_to_grid(w, grid, scheme).t()
    return Grid.of(grid, scheme, w.shape[1]).units(codes).contiguous(), grid


def stored(units: torch.Tensor, tensors: dict, scheme: qk.Scheme) -> dict[str, torch.Tensor]:
    codes = Grid.of(tensors, scheme, len(units)).codes(units)
    return codes_and_tensors(codes.t(), tensors, scheme)


def objective(w: torch.Tensor, units: torch.Tensor, tensors: dict, h: torch.Tensor, scheme: qk.Scheme) -> float:
    error = (w - reference.dequantize_weight(stored(units, tensors, scheme), scheme, w.shape[1])).double()
    return float(((error @ h.double()) * error).sum())


def refined(
    w: torch.Tensor, units: torch.Tensor, h: torch.Tensor, tensors: dict, scheme: qk.Scheme, rounds: int
) -> dict:
    grid = Grid.of(tensors, scheme, w.shape[1])
    wanted = w.t().contiguous()
    wanted = wanted if grid.low is None else wanted - grid.widen(grid.low, len(wanted))
    return refine_weight(wanted, units, h, tensors, scheme, rounds=rounds)


def positive(x: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    h = x.t() @ x
    h.diagonal().add_(damping * h.diagonal().mean())
    return h


@pytest.mark.parametrize("block_size", (1, 7, 40, 300))
def test_round_columns_equals_one_column_after_the_other(block_size):
    w, factor = seeded(300, 3), seeded(300, 300, seed=1) / 300
    scheme = G16.replace(scale_dtype=torch.float32)
    grid = Grid.of(reference.weight_grid(w.t(), scheme), scheme, 300)
    errors = torch.zeros(300, 3, dtype=torch.float64)
    for i in range(300):
        scale = grid.scale[i // 16].double()
        target = w[i].double() + factor[:i, i].double() @ errors[:i]
        errors[i] = w[i] - (target / scale).round().clamp(-8, 7) * scale
    lines = [grid.line(i // 16) for i in range(300)]
    units, found = round_columns(w, factor, lines, block_size=block_size)
    torch.testing.assert_close(found.double(), errors, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w - units * grid.widen(grid.scale, 300), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_grid_values_are_what_codes_stand_for(scheme):
    w = seeded(5, 40)
    units, tensors = rounded_to_nearest(w, scheme)
    expected = reference.dequantize_weight(stored(units, tensors, scheme), scheme, 40)
    grid = Grid.of(tensors, scheme, 40)
    torch.testing.assert_close(grid.values(units).t(), expected, rtol=1e-6, atol=1e-6)
    codes = reference.round_to_grid(w, tensors, scheme).t().to(torch.float32)
    assert torch.equal(grid.codes(units), codes)


def test_a_code_book_in_any_order_is_rounded_to_the_nearest_entry():
    book = tuple(float(v) for v in torch.randperm(16, generator=torch.Generator().manual_seed(0)) - 7)
    scheme = G16.replace(codebook=book)
    w = seeded(5, 40)
    units, tensors = rounded_to_nearest(w, scheme)
    grid = Grid.of(tensors, scheme, 40)
    for column in range(40):
        line = grid.line(column // 16)
        found = round_units(w[:, column] * line.inv, line, torch.empty(5))
        assert torch.equal(found, units[column])
    assert torch.equal(grid.codes(units), reference.round_to_grid(w, tensors, scheme).t().to(torch.float32))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_every_round_of_refinement_lowers_the_error(scheme):
    w, h = seeded(24, 72, seed=5), positive(correlated(256, 72))
    units, tensors = rounded_to_nearest(w, scheme)
    found = [objective(w, units, tensors, h, scheme)]
    for _ in range(3):
        tensors = refined(w, units, h, tensors, scheme, 1)
        found.append(objective(w, units, tensors, h, scheme))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(found)), found
    assert found[-1] < (0.5 if scheme.weight_bits == 4 else 0.8) * found[0], found


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_refined_codes_cannot_be_bettered_one_at_a_time(scheme):
    w, h = seeded(3, 24, seed=5), positive(correlated(64, 24))
    units, tensors = rounded_to_nearest(w, scheme)
    for _ in range(50):
        before = units.clone(), tensors["weight_scale"]
        tensors = refined(w, units, h, tensors, scheme, 1)
        if torch.equal(units, before[0]) and torch.equal(tensors["weight_scale"], before[1]):
            break
    least = objective(w, units, tensors, h, scheme)
    grid = Grid.of(tensors, scheme, 24)
    codes = grid.codes(units)
    low, high = scheme.code_range
    for row in range(3):
        for column in range(24):
            for step in (-1, 1):
                other = codes.clone()
                other[column, row] = min(max(float(other[column, row]) + step, low), high)
                assert objective(w, grid.units(other), tensors, h, scheme) >= least * (1 - 1e-5)


@pytest.mark.parametrize("size", (16, 200))
def test_refined_scales_are_the_best_for_their_group_and_the_codes_that_it_found(size, monkeypatch):
    """Codes held still: what moves is each scale, to the least error given the groups before and after it."""
    monkeypatch.setattr("qkernels.refine.round_block", lambda targets, before, *rest: torch.zeros_like(targets))
    scheme = G16.replace(scale_dtype=torch.float32, group_size=size)
    w, h = seeded(4, 400, seed=5), positive(correlated(512, 400)).double()
    units, tensors = rounded_to_nearest(w, scheme)
    expected = tensors["weight_scale"].double().clone()
    hat = reference.dequantize_weight(stored(units, tensors, scheme), scheme, 400).double()
    for g in range(expected.shape[1]):
        part = torch.zeros(4, 400, dtype=torch.float64)
        columns = slice(g * size, (g + 1) * size)
        part[:, columns] = units.t()[:, columns]
        step = ((w - hat) @ h * part).sum(1) / ((part @ h) * part).sum(1)
        expected[:, g] += step
        hat += step.unsqueeze(1) * part
    found = refined(w, units, h.float(), tensors, scheme, 1)["weight_scale"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0.0)
    assert not torch.equal(found, tensors["weight_scale"])


def test_refinement_leaves_scales_that_nothing_determines():
    w = seeded(4, 32, seed=5)
    w[1, :16] = 0.0
    units, tensors = rounded_to_nearest(w, G16)
    found = refined(w, units, torch.eye(32), tensors, G16, 2)["weight_scale"]
    assert found[1, 0] == tensors["weight_scale"][1, 0]
    assert torch.isfinite(found).all()
    assert (found > 0).all()
    assert not torch.equal(found, tensors["weight_scale"])


def test_a_scale_moves_as_far_as_it_can_be_stored_and_stays_near_where_it_was():
    first = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 7e-5])
    step = torch.tensor([0.25001, 1.5, -0.75, torch.nan, torch.inf, -2e-5])
    expected = torch.tensor([0.25, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert torch.equal(_step(step, first, first, torch.float16), expected)
    moved = _step(step, first, first, torch.float32)
    assert moved[5] == torch.tensor(7e-5) + torch.tensor(-2e-5) - torch.tensor(7e-5), "float32 goes on below 2^-14"


def test_gptq_refines_its_result():
    x, w = correlated(256, 72), seeded(24, 72, seed=5)
    h = x.t() @ x

    def error(refine: int) -> float:
        tensors = gptq_weight(w, h, G16, refine=refine)
        return float((x @ (reference.dequantize_weight(tensors, G16, 72) - w).t()).norm())

    assert error(2) < 0.98 * error(0)
    with pytest.raises(ValueError, match="refine: expected an integer from 0 on, got -1"):
        qk.GPTQ(refine=-1)


# -- which inputs count ---------------------------------------------------------------------------------------


def moments(model: nn.Module, data: list, **options: bool) -> dict[str, Inputs]:
    targets = [
        Target(n, m, G16, False) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_" not in n
    ]
    found: dict[str, Inputs] = {}

    def visit(target: Target, inputs: Inputs) -> torch.Tensor:
        found[target.name] = inputs
        return target.weight()

    run_by_blocks(model, targets, data, visit, **options)
    return found


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def test_padding_does_not_count():
    model = build("bert")
    rows = [torch.arange(2, 2 + n) for n in (3, 9, 5)]
    apart = moments(model, [{"input_ids": row.unsqueeze(0)} for row in rows])
    for name, inputs in moments(model, [padded(rows)]).items():
        if "pooler" not in name:
            assert inputs.rows == 17
            torch.testing.assert_close(inputs.moments, apart[name].moments, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(inputs.sums, apart[name].sums, rtol=1e-3, atol=1e-3)


def test_sequences_count_alike_however_long():
    model = build("bert")
    rows = [torch.arange(2, 2 + n) for n in (2, 12)]
    single = [moments(model, [{"input_ids": row.unsqueeze(0)}]) for row in rows]
    name = "encoder.layer.0.intermediate.dense"
    expected = single[0][name].moments / 2 + single[1][name].moments / 12
    for data in ([padded(rows)], [{"input_ids": row.unsqueeze(0)} for row in rows]):
        inputs = moments(model, data, by_sequence=True)[name]
        assert inputs.rows == pytest.approx(2.0)
        torch.testing.assert_close(inputs.moments, expected, rtol=1e-3, atol=1e-3)


# -- the float model's outputs --------------------------------------------------------------------------------


def test_matched_weight_is_that_of_least_squares():
    x, w = correlated(512, 24), seeded(6, 24, seed=3)
    changed = x + 0.3 * seeded(512, 24, seed=4)
    fitted = matched_weight(w, changed.t() @ changed, x.t() @ changed, 0.0)
    expected = torch.linalg.lstsq(changed.double(), (x @ w.t()).double()).solution.t()
    torch.testing.assert_close(fitted.double(), expected, rtol=1e-3, atol=1e-3)
    same = matched_weight(w, x.t() @ x, x.t() @ x, 0.01)
    torch.testing.assert_close(same, w)
    assert torch.equal(matched_weight(w, torch.zeros(24, 24), torch.zeros(24, 24), 0.01), w)


def test_layers_are_compared_with_the_float_model_and_see_quantized_ones_before_them():
    model, data = build("llama"), batches("llama", count=1)
    targets = [
        Target(name, module, G16, False)
        for name, module in model.named_modules()
        if name.endswith(("v_proj", "o_proj", "down_proj"))
    ]
    seen: dict[str, Inputs] = {}
    order: list[str] = []

    def visit(target: Target, inputs: Inputs) -> torch.Tensor:
        seen[target.name] = inputs
        order.append(target.name)
        return target.weight() * (0.5 if "v_proj" in target.name else 1.0)

    run_by_blocks(model, targets, data, visit, compare=True)
    assert [name.rsplit(".", 1)[1] for name in order] == ["v_proj", "o_proj", "down_proj"] * 2
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.self_attn.v_proj.weight.mul_(0.5)

    def entering(which: nn.Module, name: str) -> torch.Tensor:
        inputs: list[torch.Tensor] = []
        handle = which.get_submodule(name).register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
        output(which, data[0])
        handle.remove()
        return inputs[0].reshape(-1, inputs[0].shape[-1])

    for name in order:
        if name == "model.layers.0.self_attn.v_proj":
            continue
        before, after = entering(model, name), entering(changed, name)
        if name == "model.layers.1.self_attn.v_proj":
            assert not torch.allclose(before, after)
        torch.testing.assert_close(seen[name].moments, after.t() @ after, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[name].cross, before.t() @ after, rtol=1e-4, atol=1e-4)


def test_runs_end_where_nothing_more_is_waited_for():
    model, data = build("llama", layers=1), batches("llama", count=1)
    targets = [
        Target(name, module, G16, False)
        for name, module in model.named_modules()
        if name.endswith(("v_proj", "o_proj", "down_proj"))
    ]
    finished: list[str] = []
    for target in targets:
        target.module.register_forward_hook(lambda module, args, y, name=target.name: finished.append(name))
    run_by_blocks(model, targets, data, lambda target, inputs: target.weight(), compare=True)
    times = {target.name.rsplit(".", 1)[1]: finished.count(target.name) for target in targets}
    # Recorded and put in order: twice.  Then for every layer behind, once quantized and once in float.
    assert times == {"v_proj": 2 + 4, "o_proj": 2 + 2, "down_proj": 2}


class Routed(nn.Module):
    """A block whose layers see the tokens that a threshold lets through."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.after = nn.ModuleDict({str(i): nn.Linear(16, 16) for i in range(layers)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = router = self.before(x)
        for i, layer in enumerate(self.after.values()):
            chosen = router[..., i % 16] > 0
            x = x.masked_scatter(chosen.unsqueeze(-1), layer(x[chosen]))
        return x


@pytest.mark.parametrize("layers, compared", [(2, True), (20, False)])
def test_layers_whose_tokens_changed_are_not_compared(layers, compared):
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([Routed(layers)])
    model.forward = lambda x: model.blocks[0](x)
    data = [seeded(4, 8, 16, seed=s) for s in range(3)]
    targets = [Target(n, m, G16, False) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found: dict[str, Inputs] = {}

    def visit(target: Target, inputs: Inputs) -> torch.Tensor:
        found[target.name] = inputs
        return target.weight() + (0.5 * seeded(16, 16, seed=9) if "before" in target.name else 0.0)

    run_by_blocks(model, targets, data, visit, compare=True)
    assert (found["blocks.0.before"].cross is not None) == compared
    assert found["blocks.0.after.0"].cross is None
    report = qk.quantize_(model, G16, algorithm="gptq", calibration=data)
    assert len(report.quantized) == layers + 1


@pytest.mark.parametrize("family", ("llama", "gpt2", "bert"))
def test_matching_the_float_model_betters_outputs_for_data_not_seen(family):
    model, data = build(family), batches(family, count=24, rows=4)
    calibration, judged = data[:12], data[12:]
    expected = [output(model, batch) for batch in judged]

    def harm(**options: bool) -> float:
        rough = copy.deepcopy(model)
        qk.quantize_(rough, G16, algorithm=qk.GPTQ(**options), calibration=calibration)
        return sum(error(rough, batch, y) for batch, y in zip(judged, expected, strict=True))

    plain = harm(match=False)
    assert harm(match=True) < 0.92 * plain
    assert harm(match=True, bias_correction=True) < 0.95 * plain


def test_calibration_text_is_not_what_quality_is_judged_on():
    from qkernels.commands.calibration import calibration_text
    from qkernels.demo.language import held_out_text
    from qkernels.demo.sentences import PROMPTS, all_sentences

    lines = {line.strip() for line in calibration_text(None).splitlines() if line.strip()}
    assert not lines & set(all_sentences())
    assert not lines & {line.strip() for line in held_out_text().splitlines()}
    assert not any(prompt in line for prompt in PROMPTS for line in lines)
