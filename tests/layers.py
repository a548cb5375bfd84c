"""Small quantized layers for the tests of modules, and equality of two of them."""

from __future__ import annotations

import helpers as H
import pytest
import torch
from torch import Tensor, nn

from qkernels import reference
from qkernels.nn import QuantLinear
from qkernels.scheme import PRESETS, Scheme

N, K = 33, 70
STATIC_ASYMMETRIC = PRESETS["w8a8_static"].replace(activation_symmetric=False)
SCHEMES = [*PRESETS.values(), STATIC_ASYMMETRIC, PRESETS["w4a16"].replace(weight_symmetric=False)]
by_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)


def make(scheme: Scheme | str = "w8a8", *, bias: bool = True, smooth: bool = False, seed: int = 0) -> QuantLinear:
    scheme = Scheme.resolve(scheme)
    made = reference.quantize_weight(H.seeded(N, K, seed=seed), scheme)
    made["bias"] = H.seeded(N, seed=seed + 1) if bias else None
    made |= H.static_grid(scheme, 0.02 + seed / 100, 99 + seed)
    if smooth:
        made["inv_smooth"] = torch.linspace(0.5, 2.0, K)
    return QuantLinear(K, N, made, scheme)


def same(layer: nn.Module, other: nn.Module, x: Tensor | None = None) -> None:
    """Equal state and equal outputs, to the bit."""
    state, expected = layer.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        H.assert_bits_equal(state[name], tensor, name)
    x = H.seeded(3, K) if x is None else x
    H.assert_bits_equal(layer(x), other(x))
