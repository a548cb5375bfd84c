"""HQQ, AWQ and range search: each better than rounding to nearest at what it minimizes, in canonical tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from families import batches, build, error, output
from helpers import assert_bits_equal, seeded
from test_smooth import inject
from torch import nn

import qkernels as qk
from qkernels import reference
from qkernels.grids import codes_and_tensors, search_range
from qkernels.hqq import hqq_weight

pytestmark = pytest.mark.usefixtures("one_thread")

G32 = qk.Scheme(weight_bits=4, weight_granularity="per_group", group_size=32, activation_bits=None)
SCHEMES = {
    "symmetric": G32,
    "asymmetric": G32.replace(weight_symmetric=False),
    "minimum": G32.replace(weight_symmetric=False, weight_zero="float"),
    "per channel": qk.Scheme(weight_bits=4, activation_bits=None),
}
INT = qk.Scheme(weight_bits=4, weight_granularity="per_group", group_size=32, group_scales="int")
MULTIPLES = {"multiples": INT, "multiples asymmetric": INT.replace(weight_symmetric=False)}
EVERY = SCHEMES | MULTIPLES

SEARCHED = SCHEMES | {
    "code book": G32.replace(codebook=tuple(v * abs(v) / 64 for v in (*range(8), *range(-8, 0)))),
    "w8": qk.Scheme(),
}


def heavy(rows: int = 32, columns: int = 104, seed: int = 0) -> torch.Tensor:
    """Weights with tails, on a slope that makes groups one-sided."""
    w = seeded(rows, columns, seed=seed)
    return (w * w.abs() ** 0.7 + 0.5) * 0.02


def norm_error(w: torch.Tensor, tensors: dict, scheme: qk.Scheme, p: float) -> float:
    return float((reference.dequantize_weight(tensors, scheme, w.shape[1]) - w).abs().pow(p).sum())


@pytest.mark.parametrize("scheme", EVERY.values(), ids=list(EVERY))
def test_hqq_lowers_its_norm(scheme):
    w = heavy()
    tensors, plain = hqq_weight(w, scheme), reference.quantize_weight(w, scheme)
    assert {k: (v.shape, v.dtype) for k, v in tensors.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    assert norm_error(w, tensors, scheme, 0.7) < 0.999 * norm_error(w, plain, scheme, 0.7)


def test_hqq_keeps_eight_bits_and_code_books_and_zeros():
    w = heavy()
    for scheme in (qk.Scheme(), G32.replace(codebook=tuple(range(-8, 8)))):
        for name, tensor in reference.quantize_weight(w, scheme).items():
            assert_bits_equal(hqq_weight(w, scheme)[name], tensor)
    for scheme in EVERY.values():
        zero = hqq_weight(torch.zeros(4, 64), scheme)
        assert not reference.dequantize_weight(zero, scheme, 64).any()


@pytest.mark.parametrize("scheme", EVERY.values(), ids=list(EVERY))
def test_range_search_lowers_its_norm(scheme):
    w = heavy()
    grid = search_range(w, scheme)
    tensors = codes_and_tensors(reference.round_to_grid(w, grid, scheme), grid, scheme)
    plain = reference.quantize_weight(w, scheme)
    assert {k: (v.shape, v.dtype) for k, v in tensors.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    assert norm_error(w, tensors, scheme, 2.4) < 0.97 * norm_error(w, plain, scheme, 2.4)


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("scheme", SEARCHED.values(), ids=list(SEARCHED))
def test_range_search_finds_the_best_of_all_shares(scheme, weighted, monkeypatch):
    """Group by group and share by share, as the definition has it; in one piece, and in many."""
    w = heavy(70, 104)
    importance = seeded(104, seed=3).square() if weighted else None
    size = scheme.group_size or 104
    losses, grids = [], []
    for step in range(11):
        share = 1.0 - 0.8 * step / 10
        shrunk = w * share  # its bounds are the ones that count
        grids.append(reference.weight_grid(shrunk, scheme))
        tensors = codes_and_tensors(reference.round_to_grid(w, grids[-1], scheme), grids[-1], scheme)
        error = (reference.dequantize_weight(tensors, scheme, 104) - w).double().abs()
        error = error.pow(2.4) if importance is None else error.square() * importance
        losses.append(torch.stack([part.sum(1) for part in error.split(size, 1)], 1))
    least = torch.stack(losses).amin(0)
    for elements in (64 * 8, 1 << 20):
        monkeypatch.setattr("qkernels.grids.CPU_ELEMENTS", elements)
        found = search_range(w, scheme, importance=importance, smallest=0.2, steps=10)
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in grids[0].items()}
        index = torch.zeros_like(least)
        for loss, grid in zip(losses, grids, strict=True):
            same = torch.stack([(found[k] == grid[k]).reshape(index.shape) for k in found]).all(0)
            index = torch.where(same & (index == 0), loss, index)
        torch.testing.assert_close(index, least, rtol=1e-5, atol=0.0)


def test_range_search_favours_what_is_important():
    w = heavy(8, 64)
    importance = torch.ones(64)
    importance[:8] = 100.0
    scheme = SCHEMES["per channel"]
    errors = []
    for weight in (None, importance):
        grid = search_range(w, scheme, importance=weight)
        tensors = codes_and_tensors(reference.round_to_grid(w, grid, scheme), grid, scheme)
        rounded = reference.dequantize_weight(tensors, scheme, 64)
        errors.append(float((rounded - w)[:, :8].square().sum()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("algorithm", ("mse", "hqq"))
def test_algorithms_without_data_run_in_quantize(algorithm):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    report = qk.quantize_(model, "w4a16", algorithm=algorithm)
    assert [layer.scheme for layer in report.quantized] == ["w4a16", "w4a16"]


def test_awq_beats_rounding_where_few_inputs_dominate():
    data = batches("llama", count=4, rows=4)
    model = build("llama", width=64)
    inject(model, "llama", factor=20.0)
    expected, plain = output(model, data[0]), copy.deepcopy(model)
    scheme = G32.replace(group_size=64)
    qk.quantize_(plain, scheme)
    report = qk.quantize_(model, scheme, algorithm="awq", calibration=data)
    assert len(report.quantized) == 14
    assert error(model, data[0], expected) < 0.7 * error(plain, data[0], expected)
    assert not any("inv_smooth" in name for name in model.state_dict())


def test_awq_folds_are_taken_back_when_a_later_step_fails(monkeypatch):
    model, data = build("llama"), batches("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("qkernels.convert.adapt_parents", fail)
    with pytest.raises(OSError, match="disk full"):
        qk.quantize_(model, G32, algorithm="awq", calibration=data)
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name], name)


def test_bias_correction_centres_the_error():
    x = seeded(300, 64) + 0.7
    model = nn.Sequential(nn.Linear(64, 16))
    expected = model(x)
    qk.quantize_(model, "w4a16", algorithm=qk.MSE(bias_correction=True), calibration=[x])
    assert (model(x) - expected).mean(0).abs().max() < 1e-4
    with pytest.raises(ValueError, match="bias correction needs batches"):
        qk.quantize_(nn.Sequential(nn.Linear(64, 16)), "w4a16", algorithm=qk.MSE(bias_correction=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: qk.HQQ(p=1.5), "p: expected"),
        (lambda: qk.HQQ(beta=-1), "beta, kappa, iterations: expected"),
        (lambda: qk.MSE(smallest=0), "smallest, steps: expected"),
    ],
)
def test_knobs_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_awq_needs_data():
    with pytest.raises(ValueError, match="algorithm 'awq' needs batches"):
        qk.quantize_(nn.Sequential(nn.Linear(64, 16)), "w4a16", algorithm="awq")
