"""Weight algorithms under ``group_scales="int"``: scales stay whole multiples, and each lowers what it minimizes."""

from __future__ import annotations

import copy

import pytest
import torch
from families import batches, build, error, output
from helpers import assert_bits_equal, seeded
from test_gptq import correlated, output_error
from test_integer_scales import SCHEMES, by_scheme, varied
from test_refine import positive, refined, rounded_to_nearest, stored
from test_weight_search import INT, heavy, norm_error

import qkernels as qk
from qkernels import reference
from qkernels.checks import check_canonical
from qkernels.gptq import gptq_weight
from qkernels.grids import codes_and_tensors, search_multiples, search_range
from qkernels.hqq import hqq_weight
from qkernels.qat import QATLinear
from qkernels.scheme import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")

ASYMMETRIC = INT.replace(weight_symmetric=False)
both = pytest.mark.parametrize("scheme", (INT, ASYMMETRIC), ids=("symmetric", "zero points"))


def rounded(w: torch.Tensor, grid: dict[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    return codes_and_tensors(reference.round_to_grid(w, grid, scheme), grid, scheme)


@pytest.mark.parametrize("weighted", (False, True))
@both
def test_search_finds_the_best_of_all_multipliers(scheme: Scheme, weighted: bool, monkeypatch) -> None:
    """Group by group, as the definition has it; in one piece, and in many."""
    w = heavy(70, 104)
    importance = seeded(104, seed=3).square() if weighted else None
    channel = reference.weight_grid(w, scheme)["weight_scale"]
    groups = torch.nn.functional.pad(w, (0, 24)).unflatten(1, (4, 32))
    hi, lo = groups.amax(-1).clamp(min=0.0), groups.amin(-1).clamp(max=0.0)
    losses, zeros = [], []
    for m in range(1, scheme.largest_multiplier + 1):
        grid = {"weight_scale": channel, "weight_multiplier": torch.full((70, 4), m, dtype=torch.uint8)}
        if not scheme.weight_symmetric:
            zeros.append(reference.centred_zero(hi, lo, reference.group_scale(grid), scheme))
            grid["weight_zero_point"] = zeros[-1]
        off = (reference.dequantize_weight(rounded(w, grid, scheme), scheme, 104) - w).double().abs()
        off = off.pow(2.4) if importance is None else off.square() * importance
        losses.append(torch.stack([part.sum(1) for part in off.split(32, 1)], 1))
    least = torch.stack(losses).amin(0)
    for elements in (64 * 8, 1 << 20):
        monkeypatch.setattr("qkernels.grids.CPU_ELEMENTS", elements)
        found = search_multiples(w, scheme, channel, importance=importance)
        assert_bits_equal(found["weight_scale"], channel)
        chosen = found["weight_multiplier"].long().unsqueeze(0) - 1
        torch.testing.assert_close(torch.stack(losses).gather(0, chosen)[0], least, rtol=1e-4, atol=0.0)
        if zeros:
            assert torch.equal(torch.stack(zeros).gather(0, chosen)[0], found["weight_zero_point"])
    assert len(found["weight_multiplier"].unique()) > 3


@both
def test_search_beats_multiples_of_searched_float_scales(scheme: Scheme) -> None:
    w = heavy()
    floats = search_range(w, scheme.replace(group_scales="float", scale_dtype=torch.float32))
    snapped = norm_error(w, rounded(w, reference.integer_grid(w, floats, scheme), scheme), scheme, 2.4)
    searched = norm_error(w, rounded(w, search_range(w, scheme), scheme), scheme, 2.4)
    assert searched < (1.0 if scheme.weight_symmetric else 0.97) * snapped


@by_scheme
def test_searches_take_zeros_and_short_groups(scheme: Scheme) -> None:
    """A row and a group of zeros have no say in their channel's scale."""
    w = varied(9, 201)
    h = torch.eye(201)
    for tensors in (
        rounded(w, search_range(w, scheme), scheme),
        hqq_weight(w, scheme),
        gptq_weight(w, h, scheme, refine=2),
        gptq_weight(w, h, scheme, act_order=False, refine=2),
        gptq_weight(w, h, scheme, act_order=False, search=False),
    ):
        check_canonical(tensors, scheme, 201, 9)
        stands_for = reference.dequantize_weight(tensors, scheme, 201)
        assert not stands_for[1].any()
        assert not stands_for[2, :32].any()
        live = w[torch.arange(9) != 1]
        assert float((stands_for - w).norm()) < 0.2 * float(live.norm())


@both
def test_hqq_makes_multiples_of_what_it_fits(scheme: Scheme) -> None:
    w = heavy()
    floats = hqq_weight(w, scheme.replace(group_scales="float", scale_dtype=torch.float32))
    found = hqq_weight(w, scheme)
    for name, tensor in reference.integer_grid(w, floats, scheme).items():
        assert_bits_equal(found[name], tensor)


@pytest.mark.parametrize("search", (True, False))
@both
def test_measured_grids_share_the_scale_that_was_measured_first(scheme: Scheme, search: bool) -> None:
    x, w = correlated(256, 104), seeded(24, 104, seed=5)
    h = x.t() @ x
    found = gptq_weight(w, h, scheme, act_order=False, search=search)
    grid = search_range(w, scheme, importance=h.diagonal(), smallest=0.5, steps=20)
    expected = grid if search else reference.weight_grid(w, scheme)
    assert_bits_equal(found["weight_scale"], expected["weight_scale"])
    assert not torch.equal(found["weight_multiplier"], expected["weight_multiplier"])
    # The first group is as it was.
    first, channel, importance = w[:, :32], found["weight_scale"], h.diagonal()[:32]
    floats = reference.weight_grid(first, scheme.replace(group_scales="float", scale_dtype=torch.float32))
    alone = (
        search_multiples(first, scheme, channel, importance=importance)
        if search
        else reference.integer_grid(first, floats, scheme, channel)
    )
    for name in set(alone) - {"weight_scale"}:
        assert torch.equal(found[name][:, :1], alone[name])
    plain = reference.quantize_weight(w, scheme)
    assert output_error(x, w, found, scheme) < 0.7 * output_error(x, w, plain, scheme)


@both
def test_refinement_finds_the_best_scale_of_a_channel_and_leaves_multipliers(scheme: Scheme, monkeypatch) -> None:
    x, w = correlated(256, 104), seeded(24, 104, seed=5)
    before, after = (gptq_weight(w, x.t() @ x, scheme, refine=rounds) for rounds in (0, 3))
    for name in set(before) - {"weight", "weight_scale"}:
        assert_bits_equal(after[name], before[name])
    assert not torch.equal(after["weight_scale"], before["weight_scale"])
    assert output_error(x, w, after, scheme) < 0.98 * output_error(x, w, before, scheme)

    # Codes held still: the scale is that of least error, row by row.
    monkeypatch.setattr("qkernels.refine.round_block", lambda targets, before, *rest: torch.zeros_like(targets))
    h = positive(x)
    units, tensors = rounded_to_nearest(w, scheme)
    hat = reference.dequantize_weight(stored(units, tensors, scheme), scheme, 104).double()
    pull = hat @ h.double()
    best = tensors["weight_scale"].double() * (pull * w).sum(1) / (pull * hat).sum(1)
    found = refined(w, units, h, tensors, scheme, 1)["weight_scale"]
    torch.testing.assert_close(found.double(), best, rtol=1e-4, atol=0.0)
    assert not torch.equal(found, tensors["weight_scale"])


def test_refinement_leaves_the_scale_of_a_channel_of_zeros() -> None:
    w = seeded(4, 64, seed=5)
    w[1] = 0.0
    units, tensors = rounded_to_nearest(w, INT)
    found = refined(w, units, torch.eye(64), tensors, INT, 2)["weight_scale"]
    assert found[1] == tensors["weight_scale"][1] == 1.0
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("algorithm", ("mse", "hqq", "awq", "gptq"))
@pytest.mark.parametrize("name", ("g32", "asymmetric both"))
def test_algorithms_better_models(algorithm: str, name: str) -> None:
    data, scheme = batches("llama", count=6, rows=4), SCHEMES[name].replace(group_size=8)
    model = build("llama")
    expected, plain = output(model, data[0]), copy.deepcopy(model)
    qk.quantize_(plain, scheme)
    report = qk.quantize_(model, scheme, algorithm=algorithm, calibration=data)
    assert {row.scheme for row in report.quantized} == {scheme.name}
    # Without data a smaller error of the weights need not be one of the outputs.
    limit = 0.9 if algorithm in ("awq", "gptq") else 1.1
    assert error(model, data[0], expected) < limit * error(plain, data[0], expected)


def test_bias_correction_centres_the_error() -> None:
    x = seeded(300, 64) + 0.7
    for algorithm in (qk.MSE(bias_correction=True), qk.GPTQ(bias_correction=True)):
        model = torch.nn.Sequential(torch.nn.Linear(64, 16))
        expected = model(x)
        qk.quantize_(model, INT, algorithm=algorithm, calibration=[x])
        assert (model(x) - expected).mean(0).abs().max() < 2e-3  # the rounding of inputs remains


@pytest.mark.parametrize("alpha", (0.5, "auto"))
def test_smoothing_takes_the_scheme(alpha: float | str) -> None:
    data = batches("bert", count=4, rows=4)
    model = build("bert")
    expected = output(model, data[0])
    report = qk.quantize_(model, INT, smooth=alpha, calibration=data)
    assert {row.scheme for row in report.quantized} == {INT.name}
    assert error(model, data[0], expected) < 0.15


@pytest.mark.parametrize("fuse", (True, False))
def test_fused_models_give_the_same(fuse: bool) -> None:
    data = batches("llama")[0]
    model, plain = build("llama"), build("llama")
    qk.quantize_(model, INT, fuse=fuse)
    qk.quantize_(plain, INT, fuse=False)
    torch.testing.assert_close(output(model, data), output(plain, data), rtol=1e-4, atol=1e-4)


# -- training ---------------------------------------------------------------------------------------------------------


def test_learned_scales_are_stored_as_multiples() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 24))
    with torch.no_grad():
        model[0].weight[3, :32] = 0.0
    scheme = INT.replace(group_size=16)
    qk.prepare_qat_(model, scheme, learnable_scale=True)
    layer = model[0]
    assert isinstance(layer, QATLinear)
    assert tuple(layer.weight_scale.shape) == (24, 4)
    plain = reference.weight_grid(layer.weight.detach(), scheme)  # training starts where rounding does
    assert torch.equal(layer.tensors()["weight_multiplier"], plain["weight_multiplier"])
    with torch.no_grad():
        layer.weight_scale[5] = torch.tensor([0.15, 0.031, -0.049, 0.001])
    made = layer.tensors()
    assert_bits_equal(made["weight_scale"][5:6], torch.tensor([0.15]) / torch.tensor([15.0]))
    assert made["weight_multiplier"][5].tolist() == [15, 3, 5, 1]


def test_gradients_of_learned_scales_are_those_at_the_multiple() -> None:
    scheme = INT.replace(group_size=8)
    layer = QATLinear(torch.nn.Linear(16, 3, bias=False), scheme, learnable_scale=True)
    with torch.no_grad():
        layer.weight.copy_(seeded(3, 16))
        layer.weight_scale.copy_(torch.tensor([[0.3, 0.13]] * 3))  # multiples of 0.02: 15 and 6.5, that is 6
    layer(torch.eye(16)).sum().backward()
    scale = torch.tensor([0.3, 0.12]).repeat_interleave(8)
    v = layer.weight.detach() / scale
    inside = (v >= -8) & (v <= 7)
    slope = torch.where(inside, v.round() - v, v.clamp(-8, 7)).unflatten(1, (2, 8)).sum(-1) / (8 * 7) ** 0.5
    torch.testing.assert_close(layer.weight_scale.grad, slope, rtol=1e-2, atol=1e-2)
    assert torch.equal(layer.weight.grad != 0, inside)


def test_learnable_scales_with_zero_points_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 24))
    with pytest.raises(ValueError, match="learnable_scale: expected a symmetric scheme"):
        qk.prepare_qat_(model, ASYMMETRIC, learnable_scale=True)
    assert type(model[0]) is torch.nn.Linear
