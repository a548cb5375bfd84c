"""Training through quantization: exact forward pass, straight-through and LSQ gradients, exact conversion."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn

import qkernels as qk
from qkernels.nn import QuantLinear
from qkernels.qat import QATLinear

G16 = qk.Scheme(weight_bits=4, weight_granularity="per_group", group_size=16)
MULTIPLES = qk.Scheme(weight_bits=4, weight_granularity="per_group", group_size=16, group_scales="int")
EXACT = {
    "w8a8": "w8a8",
    "w4a8 g16": G16,
    "w8a8 asymmetric": qk.Scheme(activation_symmetric=False),
    "w4a8 g16 multiples": MULTIPLES,
}


def mlp(*, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24, bias=bias), nn.GELU(), nn.Linear(24, 8))


@pytest.mark.parametrize("learnable", (False, True))
@pytest.mark.parametrize("scheme", EXACT.values(), ids=list(EXACT))
def test_conversion_keeps_the_outputs_to_the_bit(scheme, learnable):
    model, x = mlp(), seeded(9, 40)
    assert qk.prepare_qat_(model, scheme, learnable_scale=learnable) == ["0", "2"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    expected = model(x).detach()
    report = qk.convert_(model)
    assert len(report.quantized) == 2
    assert isinstance(model[0], QuantLinear)
    assert_bits_equal(model(x), expected)


def test_weight_only_conversion_keeps_the_outputs():
    model, x = mlp(), seeded(9, 40)
    qk.prepare_qat_(model, G16.replace(activation_bits=None))
    expected = model(x).detach()
    qk.convert_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_prepared_layers_equal_quantized_ones_from_the_start():
    one, two, x = mlp(), mlp(), seeded(5, 40)
    qk.prepare_qat_(one, "w8a8")
    qk.quantize_(two, "w8a8", fuse=False)
    assert_bits_equal(one(x).detach(), two(x))


def test_straight_through_gradients_are_those_of_the_rounded_layer():
    model, x = nn.Sequential(nn.Linear(40, 24)), seeded(9, 40).requires_grad_()
    qk.prepare_qat_(model, "w8a8")
    weight = model[0].weight
    g = seeded(9, 24, seed=3)
    model(x).backward(g)
    from qkernels import reference

    rounded = reference.dequantize_weight(reference.quantize_weight(weight, qk.Scheme()), qk.Scheme(), 40)
    codes, step, _ = reference.quantize_activations(x.detach())
    torch.testing.assert_close(x.grad, g @ rounded)
    torch.testing.assert_close(weight.grad, g.t() @ (codes.float() * step.unsqueeze(1)))
    torch.testing.assert_close(model[0].bias.grad, g.sum(0))


def test_lsq_gradients_follow_the_paper():
    scheme = qk.Scheme(weight_bits=4, activation_bits=None)
    model, x = nn.Sequential(nn.Linear(6, 3, bias=False)), torch.eye(6)
    qk.prepare_qat_(model, scheme, learnable_scale=True)
    layer = model[0]
    with torch.no_grad():
        layer.weight.copy_(seeded(3, 6))
        layer.weight_scale.fill_(0.2)  # most weights are outside of -8..7 steps of 0.2? some are
        layer.weight[0, 0], layer.weight[1, 1] = 5.0, -5.0
    g = seeded(6, 3, seed=1)
    model(x).backward(g)
    v = layer.weight.detach() / 0.2
    inside = (v >= -8) & (v <= 7)
    slope = torch.where(inside, v.round() - v, v.clamp(-8, 7))
    torch.testing.assert_close(layer.weight.grad, g.t() * inside)
    torch.testing.assert_close(layer.weight_scale.grad, (g.t() * slope).sum(1) / math.sqrt(6 * 7), rtol=1e-4, atol=1e-5)
    assert not inside[0, 0]


@pytest.mark.parametrize("learnable", (False, True))
def test_training_wins_back_what_four_bits_cost(learnable):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    student = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    student.load_state_dict(teacher.state_dict())
    qk.prepare_qat_(student, qk.Scheme(weight_bits=4), learnable_scale=learnable)
    mixing = seeded(6, 32, seed=7)  # inputs have few directions, as real ones do: there is room to make errors good
    held_out = seeded(256, 6, seed=99) @ mixing

    def loss(x):
        return (student(x) - teacher(x).detach()).square().mean()

    before = float(loss(held_out).detach())
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-4)
    for step in range(250):
        optimizer.zero_grad()
        loss(seeded(64, 6, seed=step) @ mixing).backward()
        optimizer.step()
    qk.convert_(student)
    assert float(loss(held_out)) < 0.8 * before


def test_pruned_layers_quantize_after_pruning_is_made_permanent():
    from torch.nn.utils import prune

    model, x = mlp(), seeded(9, 40)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"no layer|none"):
        qk.prepare_qat_(model, include=("0",))
    prune.remove(model[0], "weight")
    qk.prepare_qat_(model)
    qk.convert_(model)
    weight = model[0].canonical()["weight"]
    assert float((weight == 0).float().mean()) >= 0.5
    assert torch.isfinite(model(x)).all()


def test_shared_and_excluded_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 4)
            self.again = self.a

        def forward(self, x):
            return self.lm_head(self.again(self.a(x)))

    model = Model()
    assert qk.prepare_qat_(model) == ["a"]
    assert model.a is model.again
    assert isinstance(model.a, QATLinear)
    assert type(model.lm_head) is nn.Linear
    qk.convert_(model)
    assert model.a is model.again


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scheme": "w8a8_static"}, "scheme: expected dynamic"),
        ({"scheme": "w9"}, "scheme: expected one of"),
        (
            {"scheme": G16.replace(weight_symmetric=False), "learnable_scale": True},
            "learnable_scale: expected a symmetric",
        ),
        ({"include": ("nothing",)}, "matches no layer"),
        ({"exclude": ("*",)}, "holds none that are chosen"),
    ],
)
def test_prepare_refuses(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        qk.prepare_qat_(model, **options)
    assert type(model[0]) is nn.Linear


def test_convert_refuses():
    with pytest.raises(ValueError, match="expected layers that prepare_qat_ made"):
        qk.convert_(mlp())
    model = mlp()
    qk.prepare_qat_(model)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        qk.convert_(model)
    assert isinstance(model[0], QATLinear)
