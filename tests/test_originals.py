"""Copies of parameters come back to the bit, from memory and from the file, into whatever module stands there."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_bits_equal
from torch import nn

from qkernels.originals import Originals


@pytest.mark.parametrize("keep", (0, 40, 1 << 20))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_restore_gives_the_bits_back(keep, dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    originals, calls = Originals(model, keep=keep), []
    for module in ("0", "1"):
        for name in ("weight", "bias"):
            originals.keep(module, name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.7)
    originals.keep("0", "weight")  # the first copy counts
    originals.on_restore(lambda: calls.append("first"))
    originals.on_restore(lambda: calls.append("second"))
    model[0] = copy.deepcopy(model[0])  # exchanged in between
    originals.restore()
    assert calls == ["second", "first"]
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name], name)


def test_absent_parameters_are_nothing_to_keep():
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    originals = Originals(model)
    originals.keep("0", "bias")
    originals.restore()
