"""``group_scales="int"``: scales of groups that are whole multiples of their channel's, and products that add up as
integers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import DTYPES, assert_bits_equal, assert_ran, hazard_rows, seeded, strided

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


# -- kernels of the CPU -----------------------------------------------------------------------------------------------


def check(layer: qk.nn.QuantLinear, x: torch.Tensor, tier: str) -> None:
    assert layer.kernel == f"w4a8.{tier}"
    actual = layer(x)
    rows = x[..., 0].numel()
    if rows:  # else no kernel runs
        assert_ran("w4a8", tier, rows)
    assert_bits_equal(actual, reference.linear(x, layer.canonical(), layer.scheme, layer.in_features))


def made(n: int, k: int, scheme: Scheme, **options: torch.Tensor) -> qk.nn.QuantLinear:
    return qk.nn.QuantLinear.from_float(varied(n, k), seeded(n, seed=k), scheme, **options)


@by_scheme
@pytest.mark.parametrize(("n", "k"), [(3, 1), (65, 40), (70, 201), (130, 1100)])
def test_kernel_equals_the_reference(isa: str, threads: int, scheme: Scheme, n: int, k: int) -> None:
    layer = made(n, k, scheme)
    for rows in (1, 2, 5, 16, 33, 100, 200):
        check(layer, seeded(rows, k, seed=rows) + 0.3, isa)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric inputs"])
@pytest.mark.parametrize("group_size", [8, 128, 1000, 5000])
def test_kernel_over_slices_of_k(isa: str, group_size: int, symmetric: bool) -> None:
    """Tiers unpack up to 4096 k at a time; groups may be as long, and end anywhere."""
    layer = made(70, 4300, INT.replace(group_size=group_size, activation_symmetric=symmetric))
    for rows in (3, 7, 40):
        check(layer, seeded(rows, 4300, seed=rows) - 0.2, isa)


@by_scheme
def test_kernel_around_the_change_of_path(isa: str, scheme: Scheme) -> None:
    layer = made(70, 328, scheme)
    for rows in (3, 4, 6, 7, 8, 15, 17, 23, 24, 25, 31, 32, 95, 96, 97):
        check(layer, seeded(rows, 328, seed=rows) + 0.4, isa)


@pytest.mark.parametrize("scheme", [INT, INT.replace(weight_symmetric=False)], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("k", [128, 4160])
def test_largest_weights_and_inputs_do_not_saturate(isa: str, scheme: Scheme, k: int) -> None:
    """Multiplier 15 and code 0 or 15, or multiplier 8 and zero points at the other end; inputs of +-127."""
    layer = made(64, k, scheme)
    state = layer.state_dict()
    for code, zero in ((0, 15), (15, 0)):
        state["weight"] = torch.full_like(state["weight"], code * 17)
        state["weight_multiplier"] = torch.full_like(state["weight_multiplier"], scheme.largest_multiplier)
        if not scheme.weight_symmetric:
            state["weight_zero_point"] = torch.full_like(state["weight_zero_point"], zero)
        layer.load_state_dict(state)
        assert int(reference.multiplied_codes(layer.canonical(), scheme, k).abs().min()) in (105, 120)
        for rows in (1, 7, 40):
            for value in (-3.0, 3.0):
                check(layer, torch.full((rows, k), value), isa)
                x = torch.full((rows, k), value)
                x[:, ::2] *= -1.0
                check(layer, x, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_on_hazard_rows(isa: str, threads: int, dtype: torch.dtype) -> None:
    """NaN, Inf, zero, tiny and extreme rows; direct (few rows) and other paths; any strides."""
    x = hazard_rows(136).to(dtype)
    for scheme in (INT.replace(group_size=40), SCHEMES["asymmetric both"]):
        layer = made(67, 136, scheme, inv_smooth=seeded(136).exp())
        check(layer, x, isa)
        check(layer, torch.cat([x] * 3), isa)
        for row in x:
            check(layer, row, isa)
        check(layer, strided(x), isa)
        check(layer, x.t().contiguous().t(), isa)
        check(layer, x[:0], isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_symmetric", [True, False])
def test_kernel_of_static_activations(isa: str, dtype: torch.dtype, weight_symmetric: bool) -> None:
    scheme = INT.replace(
        group_size=64, weight_symmetric=weight_symmetric, activation_granularity="per_tensor", activation_dynamic=False
    )
    scale, zero = torch.tensor(0.03), torch.tensor(90, dtype=torch.int32)
    layers = [
        made(70, 200, scheme, act_scale=scale),
        made(70, 200, scheme.replace(activation_symmetric=False), act_scale=scale, act_zero_point=zero),
    ]
    for layer in layers:
        for rows in (1, 9, 40):
            x = (seeded(rows, 200) + 0.7).to(dtype)
            if rows == 9:
                x[4, 7] = torch.nan
            check(layer, x, isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["relu", "gelu", "silu"])
def test_kernel_with_functions_and_residuals(isa: str, dtype: torch.dtype, epilogue: str) -> None:
    """As the layer of 8-bit weights that it is; no bias, and columns that no vector fills."""
    layer = qk.nn.QuantLinear.from_float(varied(70, 201), None, INT)
    tensors, eight_bits = layer.canonical(), qk.nn.QuantLinear.empty(201, 70, "w8a8", bias=False)
    whole = reference.multiplied_codes(tensors, INT, 201)
    eight_bits.load_state_dict({"weight": whole, "weight_scale": tensors["weight_scale"]}, assign=True)
    layer.epilogue = eight_bits.epilogue = epilogue
    for rows in (2, 9, 40):
        x, residual = seeded(rows, 201).to(dtype), seeded(rows, 70, seed=5).to(dtype)
        assert_bits_equal(layer(x), eight_bits(x))
        assert_bits_equal(layer(x, residual=residual), eight_bits(x, residual=residual))


@by_scheme
def test_resident_memory_round_trip(scheme: Scheme) -> None:
    """What is packed comes back, also through the memory that a layer has already, and through copies."""
    layer, other = made(70, 201, scheme), qk.nn.QuantLinear.from_float(seeded(70, 201), seeded(70), scheme)
    tensors = reference.quantize_weight(varied(70, 201), scheme)
    for name, tensor in tensors.items():
        assert_bits_equal(layer.canonical()[name], tensor, name)
    x, y = seeded(5, 201), layer(seeded(5, 201))
    before = {name: t.data_ptr() for name, t in other._prepared.resident().items()}
    assert not torch.equal(other(x), y)
    other.load_state_dict(layer.state_dict())
    assert {name: t.data_ptr() for name, t in other._prepared.resident().items()} == before
    assert before.keys() >= {"packed", "packed_scale", "packed_multiplier"}
    for twin in (other, copy.deepcopy(layer)):
        assert_bits_equal(twin(x), y)
        for name, tensor in layer.state_dict().items():
            assert_bits_equal(twin.state_dict()[name], tensor, name)


def test_operator_refuses_what_would_be_read_wrongly() -> None:
    prepared = made(70, 201, INT)._prepared
    op, x = torch.ops.qkernels.linear_packed, seeded(3, 201)
    resident = {name: prepared.tensors.get(name) for name in prepared.names}
    rest = (70, 201, None)
    float_key = made(70, 201, PRESETS["w4a8"])._prepared.scheme_key
    assert_bits_equal(op(x, *resident.values(), prepared.scheme_key, *rest), prepared.run(x))
    for changes, key in (
        ({"packed_multiplier": None}, prepared.scheme_key),
        ({}, float_key),
        ({"packed_scale": resident["packed_scale"][:64]}, prepared.scheme_key),
        ({"packed_multiplier": resident["packed_multiplier"][:64]}, prepared.scheme_key),
        ({"packed_scale": resident["packed_scale"].half()}, prepared.scheme_key),
    ):
        with pytest.raises((ValueError, TypeError), match="expected"):
            op(x, *{**resident, **changes}.values(), key, *rest)
