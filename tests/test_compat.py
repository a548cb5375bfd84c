"""quantize_dynamic: the call of torch, and what it refuses."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn
from toys import IDS, toy

import qkernels as qk
from qkernels.nn import QuantLinear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao.quantization import (
        default_dynamic_qconfig,
        float16_dynamic_qconfig,
        float_qparams_weight_only_qconfig,
        per_channel_dynamic_qconfig,
    )
    from torch.ao.quantization import quantize_dynamic as torchs


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def test_quantize_dynamic_has_torchs_signature():
    ours, theirs = inspect.signature(qk.quantize_dynamic), inspect.signature(torchs)
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize(
    "spec",
    [
        None,
        {nn.Linear},
        [nn.Linear],
        {nn.Linear: default_dynamic_qconfig},
        {"": None, nn.Linear: per_channel_dynamic_qconfig},
    ],
)
def test_quantize_dynamic_converts_every_linear_of_a_copy(spec):
    model = toy(tied=True).train()
    y = model(IDS)
    quantized = qk.quantize_dynamic(model, spec, dtype=torch.qint8)
    assert linears(quantized) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "lm_head"]
    assert not linears(model)
    assert model.training
    assert not quantized.training
    assert_bits_equal(model(IDS), y)
    assert nn.functional.cosine_similarity(quantized(IDS).flatten(), y.flatten(), dim=0) > 0.99


def test_quantize_dynamic_inplace():
    model = toy()
    assert qk.quantize_dynamic(model, {nn.Linear}, inplace=True) is model
    assert linears(model)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ({"blocks.1"}, ["blocks.1.up", "blocks.1.down"]),
        ({"lm_head"}, ["lm_head"]),
        ({nn.ModuleDict}, ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (
            {nn.Linear: default_dynamic_qconfig, "blocks.0.up": None, "lm_head": None},
            ["blocks.0.down", "blocks.1.up", "blocks.1.down"],
        ),
        ({"blocks": default_dynamic_qconfig, "blocks.0": None}, ["blocks.1.up", "blocks.1.down"]),
    ],
)
def test_quantize_dynamic_spec_selects_as_torch_does(spec, expected):
    model = toy()
    assert linears(qk.quantize_dynamic(model, spec)) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchs(model, spec)
    assert [n for n, m in theirs.named_modules() if type(m).__module__.endswith("dynamic.modules.linear")] == expected


@pytest.mark.parametrize(
    "arguments, error, word",
    [
        ({"dtype": torch.float16}, ValueError, "qint8"),
        ({"dtype": torch.quint8}, ValueError, "qint8"),
        ({"mapping": {}}, ValueError, "mapping"),
        ({"qconfig_spec": {nn.LSTM}}, ValueError, "LSTM"),
        ({"qconfig_spec": {nn.Embedding}}, ValueError, "Embedding"),
        ({"qconfig_spec": {nn.Linear: float16_dynamic_qconfig}}, ValueError, "qint8"),
        ({"qconfig_spec": {"lm_head": float_qparams_weight_only_qconfig}}, ValueError, "qint8"),
        ({"qconfig_spec": {nn.Linear: 3}}, TypeError, "QConfig"),
        ({"qconfig_spec": {3}}, TypeError, "classes and names"),
        ({"qconfig_spec": "lm_head"}, TypeError, "set"),
        ({"qconfig_spec": nn.Linear}, TypeError, "set"),
    ],
)
def test_quantize_dynamic_refuses_what_it_does_not_offer(arguments, error, word):
    with pytest.raises(error, match=word):
        qk.quantize_dynamic(toy(), **arguments)


def test_quantize_dynamic_wrong_model():
    with pytest.raises(TypeError, match="model"):
        qk.quantize_dynamic(lambda x: x)


def test_quantize_dynamic_warns_of_what_stays_float():
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="LSTM"):
        assert linears(qk.quantize_dynamic(model)) == ["fc"]
    with pytest.warns(UserWarning, match="no Linear"):
        qk.quantize_dynamic(nn.Sequential(nn.ReLU()))


def test_quantize_dynamic_is_nearer_to_float_than_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x = seeded(8, 256)
    x[:, 3] *= 20  # one loud feature
    y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchs(model, {nn.Linear})(x)
    ours = qk.quantize_dynamic(model, {nn.Linear})(x)
    assert (ours - y).norm() < (theirs - y).norm()
