"""``group_scales="int"``: scales of groups that are whole multiples of their channel's, and products that add up as
integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_bits_equal, seeded

import qkernels as qk
from qkernels import reference
from qkernels.backends import prepare
from qkernels.checks import canonical_specs
from qkernels.scheme import PRESETS, Scheme

INT = PRESETS["w4a8_intscale"]
SCHEMES = {
    "auto": INT,
    "g32": INT.replace(group_size=32),
    "g40": INT.replace(group_size=40),
    "asymmetric": INT.replace(weight_symmetric=False),
    "asymmetric inputs": INT.replace(activation_symmetric=False, group_size=64),
    "asymmetric both": INT.replace(activation_symmetric=False, weight_symmetric=False, group_size=32),
}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


def varied(n: int, k: int) -> torch.Tensor:
    """A weight whose groups differ much in size; a row and a group of zeros in it."""
    w = seeded(n, k) * torch.exp(2.0 * seeded(n, -(-k // 8)).repeat_interleave(8, 1)[:, :k])
    w[1] = 0.0
    w[2, :32] = 0.0
    return w


def decoded(tensors: dict[str, torch.Tensor], scheme: Scheme, k: int) -> np.ndarray:
    """multiplier * (q - zero point), nibble by nibble."""
    weight = tensors["weight"].numpy()
    codes = np.stack((weight & 15, weight >> 4), -1).reshape(len(weight), -1)[:, :k].astype(np.int64)
    group = np.arange(k) // scheme.resolve_group_size(k)
    zero = tensors["weight_zero_point"].numpy()[:, group].astype(np.int64) if not scheme.weight_symmetric else 8
    return (codes - zero) * tensors["weight_multiplier"].numpy()[:, group].astype(np.int64)


@by_scheme
@pytest.mark.parametrize("k", [1, 40, 201, 256])
def test_weights_are_signed_bytes_near_what_they_were(scheme: Scheme, k: int) -> None:
    w = varied(9, k)
    tensors = reference.quantize_weight(w, scheme)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtypes[0])
        for name, spec in canonical_specs(scheme, k, 9).items()
        if name in tensors or (spec.required and not name.startswith("act"))
    }
    whole = decoded(tensors, scheme, k)
    assert np.abs(whole).max() <= 127
    np.testing.assert_array_equal(reference.multiplied_codes(tensors, scheme, k).numpy(), whole)
    scale = tensors["weight_scale"].numpy()
    expected = whole.astype(np.float32) * scale[:, None]
    stands_for = reference.dequantize_weight(tensors, scheme, k)
    assert_bits_equal(stands_for, torch.from_numpy(expected))
    # Half a step of the group; the largest of a group may lie a little outside, since its multiplier is rounded.
    step = reference.group_scale(tensors).repeat_interleave(scheme.resolve_group_size(k), 1)[:, :k]
    multiplier = tensors["weight_multiplier"].repeat_interleave(scheme.resolve_group_size(k), 1)[:, :k]
    off = (stands_for - w).abs() / step
    assert float(off.max()) <= 0.5 + 15 * 0.5 / float(multiplier.min())
    inside = off[multiplier == scheme.largest_multiplier]
    assert float(inside.max()) <= 1.01  # no more than the zero point's own rounding


def test_multipliers_are_the_nearest() -> None:
    scales = torch.tensor([[15.0, 7.4, 7.6, 0.1, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    live = torch.tensor([[True, True, True, True, False], [True] * 5])
    found = reference.integer_scales(scales, live, INT)
    assert_bits_equal(found["weight_scale"], torch.tensor([1.0, 2.0]) / torch.tensor([1.0, 15.0]))
    assert found["weight_multiplier"].tolist() == [[15, 7, 8, 1, 1], [15] * 5]
    nothing = reference.integer_scales(scales, torch.zeros_like(live), INT)
    assert nothing["weight_scale"].tolist() == [1.0, 1.0]
    assert nothing["weight_multiplier"].tolist() == [[1] * 5] * 2


def test_zero_points_put_the_middle_of_the_codes_next_to_that_of_the_range() -> None:
    hi, lo, scale = torch.tensor([[9.0, 15.0, 0.0, 2.0]]), torch.tensor([[-6.0, 0.0, -15.0, -15.0]]), torch.ones(1, 4)
    scheme = INT.replace(weight_symmetric=False)
    assert reference.centred_zero(hi, lo, scale, scheme).tolist() == [[6, 0, 15, 14]]
    # Half as wide as the range: of the 15 steps that are missing 8 are below, 7 above.
    assert reference.centred_zero(hi, lo, scale / 2, scheme).tolist() == [[4, 0, 15, 15]]


def test_a_float_grid_becomes_multiples_that_cover_its_range() -> None:
    scheme = INT.replace(weight_symmetric=False, group_size=8)
    w = torch.ones(1, 24)
    w[:, 16:] = 0.0  # its scale of 1 is not one
    found = {
        "weight_scale": torch.tensor([[0.8, 0.37, 1.0]]),
        "weight_zero_point": torch.tensor([[5, 12, 0]], dtype=torch.uint8),
    }
    made = reference.integer_grid(w, found, scheme)
    assert_bits_equal(made["weight_scale"], torch.tensor([0.8]) / torch.tensor([8.0]))
    assert made["weight_multiplier"].tolist() == [[8, 4, 1]]
    # -12 to 3 steps of 0.37, -4.44 to 1.11: the middle is 4.1625 steps of 0.4 below zero, 7.5 + 4.16 is 12.
    assert made["weight_zero_point"].tolist()[0][:2] == [5, 12]
    given = reference.integer_grid(w, found, scheme, torch.tensor([0.05]))
    assert_bits_equal(given["weight_scale"], torch.tensor([0.05]))
    assert given["weight_multiplier"].tolist() == [[8, 7, 1]]  # 16 would be wanted, and there is none


@by_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_that_of_eight_bit_weights(scheme: Scheme, dtype: torch.dtype) -> None:
    k, x = 201, (seeded(5, 201) * 3).to(dtype)
    x[3] = torch.nan
    tensors = {**reference.quantize_weight(varied(9, k), scheme), "bias": seeded(9)}
    q, x_scale, x_zero = reference.quantize_activations(x, symmetric=scheme.activation_symmetric)
    a = q.numpy().astype(np.int64) - (0 if x_zero is None else x_zero.numpy().astype(np.int64)[:, None])
    acc = (a @ decoded(tensors, scheme, k).T).astype(np.float32)
    y = acc * x_scale.numpy()[:, None] * tensors["weight_scale"].numpy() + tensors["bias"].numpy()
    assert_bits_equal(reference.linear(x, tensors, scheme, k), torch.from_numpy(y).to(dtype))


@by_scheme
def test_layer_keeps_its_state(scheme: Scheme) -> None:
    layer = qk.nn.QuantLinear.from_float(varied(33, 201), seeded(33), scheme)
    x = seeded(4, 201)
    y = layer(x)
    assert_bits_equal(y, reference.linear(x, layer.canonical(), scheme, 201))
    state = layer.state_dict()
    assert state["weight_scale"].shape == (33,)
    assert state["weight_multiplier"].dtype == torch.uint8
    other = qk.nn.QuantLinear.empty(201, 33, scheme)
    other.load_state_dict(state, assign=True)
    assert_bits_equal(other(x), y)
    assert_bits_equal(layer.weight, reference.dequantize_weight(layer.canonical(), scheme, 201))


@pytest.mark.parametrize("bad", [0, 16])
def test_multipliers_out_of_range_are_refused(bad: int) -> None:
    tensors = reference.quantize_weight(varied(9, 64), INT)
    tensors["weight_multiplier"][3, 0] = bad
    with pytest.raises(ValueError, match="weight_multiplier: expected values from 1 to 15"):
        prepare(tensors, INT, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 3}, "weight_bits: expected 4 with group_scales='int'"),
        ({"weight_granularity": "per_channel", "group_size": None}, "weight_granularity: expected 'per_group'"),
        ({"weight_symmetric": False, "weight_zero": "float"}, "weight_zero: expected 'int'"),
        ({"activation_bits": None}, "activation_bits: expected 8"),
        ({"scale_dtype": torch.float16}, "scale_dtype: expected torch.float32"),
        ({"group_scales": "whole"}, "group_scales: expected one of 'float', 'int'"),
    ],
)
def test_scheme_refuses_what_has_no_meaning(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        INT.replace(**changes)
