"""Calibration: the ranges that static schemes are made from, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn
from toys import IDS, assert_unchanged, snapshot, toy

import qkernels as qk
from qkernels.nn import QuantLinear
from qkernels.observe import run_batches


def test_static_activations_come_from_the_calibration():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    batches = [seeded(5, 8, seed=s) for s in range(3)]
    absmax = max(b.abs().max() for b in batches)
    with torch.no_grad():
        inner = max(model[0](b).abs().max() for b in batches)
    model.train()
    qk.quantize_(model, "w8a8_static", calibration=iter(batches))
    assert model.training
    assert_bits_equal(model[0].canonical()["act_scale"], absmax / torch.tensor(127.0))
    assert_bits_equal(model[1].canonical()["act_scale"], inner / torch.tensor(127.0))
    assert not model[0]._forward_pre_hooks


def test_static_asymmetric_activations():
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.rand(4, 8) * 3 - 1
    scheme = qk.Scheme(activation_granularity="per_tensor", activation_dynamic=False, activation_symmetric=False)
    qk.quantize_(model, scheme, calibration=[x])
    canonical = model[0].canonical()
    scale = x.max() / torch.tensor(255.0) - x.min() / torch.tensor(255.0)
    assert_bits_equal(canonical["act_scale"], scale)
    assert int(canonical["act_zero_point"]) == int(torch.round(-x.min() * (torch.tensor(1.0) / scale)))


def test_static_scale_of_zero_activations_is_one():
    model = nn.Sequential(nn.Linear(8, 8))
    qk.quantize_(model, "w8a8_static", calibration=[torch.zeros(2, 8)])
    assert float(model[0].canonical()["act_scale"]) == 1.0


def test_static_with_a_tied_head():
    model = toy(tied=True)
    y = model(IDS)
    report = qk.quantize_(model, "w8a8_static", embeddings=True, calibration=[IDS])
    assert report["lm_head"].scheme == "w8a8_static"
    assert torch.nn.functional.cosine_similarity(model(IDS).flatten(), y.flatten(), dim=0) > 0.99


def test_calibration_takes_tensors_tuples_and_mappings():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, a, b=None):
            return self.fc(a if b is None else a + b)

    x = seeded(2, 4)
    for batch in (x, (x, x), {"a": x, "b": x}):
        model = Two()
        qk.quantize_(model, "w8a8_static", calibration=[batch])
        assert isinstance(model.fc, QuantLinear)


@pytest.mark.parametrize(
    "calibration, error, word",
    [
        (None, ValueError, "calibration"),
        ([], ValueError, "at least one batch"),
        (torch.zeros(2, 8), TypeError, "list"),
        ({"x": torch.zeros(2, 8)}, TypeError, "list"),
        (["text"], TypeError, "str"),
        ([torch.full((2, 8), float("nan"))], ValueError, "NaN"),
        ([torch.zeros(0, 8)], ValueError, "no batch reached"),
    ],
)
def test_static_bad_calibration_leaves_the_model(calibration, error, word):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(error, match=word):
        qk.quantize_(model, "w8a8_static", calibration=calibration)
    assert_unchanged(model, before)
    assert not model[0]._forward_pre_hooks


def test_static_layer_that_no_batch_reaches_is_named():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="unused"):
        qk.quantize_(Partly(), "w8a8_static", calibration=[seeded(1, 8)])


def test_run_batches_restores_modes_when_the_model_fails():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError):
        run_batches(model, [seeded(1, 7)])
    assert model.training
    assert not model[1].training
