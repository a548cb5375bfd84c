"""Code books: NF4 as published, and a fitted one that is better on its own weights."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded
from torch import nn

import qkernels as qk
from qkernels import reference

# QLoRA, appendix E.
PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def scheme(codebook: tuple[float, ...] | None) -> qk.Scheme:
    return qk.Scheme(4, weight_granularity="per_group", group_size=64, activation_bits=None, codebook=codebook)


def error(w: torch.Tensor, how: qk.Scheme) -> float:
    return float((reference.dequantize_weight(reference.quantize_weight(w, how), how, w.shape[1]) - w).square().sum())


def test_nf4_is_the_published_table():
    assert torch.tensor(qk.NF4) == pytest.approx(torch.tensor(PUBLISHED), abs=1e-6)


def test_nf4_beats_even_steps_on_normal_weights():
    w = seeded(64, 256)
    assert error(w, scheme(qk.NF4)) < error(w, scheme(None))


def test_a_fitted_code_book_beats_nf4_on_its_model():
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 40))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(seeded(*layer.weight.shape).sign() * seeded(*layer.weight.shape, seed=1).abs() ** 2)
    fitted = qk.fit_codebook(model, group_size=64)
    assert fitted[0] == -1.0
    assert fitted[-1] == 1.0
    assert sorted(fitted) == list(fitted)
    total = [sum(error(layer.weight.detach(), scheme(book)) for layer in model) for book in (fitted, qk.NF4)]
    assert total[0] < 0.97 * total[1]


def test_code_books_run_in_quantize_and_gptq():
    x = seeded(64, 128)
    for algorithm in ("rtn", "mse", "gptq"):
        model = nn.Sequential(nn.Linear(128, 32))
        expected = model(x)
        qk.quantize_(model, scheme(qk.NF4), algorithm=algorithm, calibration=[x])
        assert (model(x) - expected).norm() < 0.15 * expected.norm()


def test_fit_refuses():
    with pytest.raises(ValueError, match="group_size: expected a positive integer"):
        qk.fit_codebook(nn.Sequential(nn.Linear(8, 8)), group_size=0)
    with pytest.raises(ValueError, match="holds none that are chosen"):
        qk.fit_codebook(nn.Sequential(nn.ReLU()))
    assert len(qk.fit_codebook(nn.Sequential(nn.Linear(8, 8)), group_size=3)) == 16
