"""The reference against a second implementation of the contract, on the bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    assert_bits_equal,
    hazard_rows,
    narrow,
    oracle_activations,
    oracle_linear_w8a8,
    seeded,
    strided,
    widen,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import reference
from qkernels.scheme import MAX_INTEGER_K, Scheme

SIZES = st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(4, 70))
SMOOTH = 2.0 ** torch.linspace(-3, 3, 512)


def _w8(n: int, k: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = reference.quantize_weight(seeded(n, k, seed=seed), Scheme())
    return tensors["weight"], tensors["weight_scale"]


# -- activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 7, 64, 129])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_quantize_activations_hazards(
    dtype: torch.dtype, k: int, symmetric: bool, static: bool, smooth: bool, device: torch.device
) -> None:
    x = hazard_rows(k).to(dtype)
    scale, zero_point = (0.037, None if symmetric else 77) if static else (None, None)
    inv_smooth = SMOOTH[:k] * 1.1 if smooth else None
    q, got_scale, got_zero = reference.quantize_activations(
        x.to(device),
        symmetric=symmetric,
        scale=scale,
        zero_point=zero_point,
        inv_smooth=None if inv_smooth is None else inv_smooth.to(device),
    )
    codes, scales, zeros = oracle_activations(
        widen(x),
        symmetric=symmetric,
        scale=scale,
        zero_point=zero_point,
        inv_smooth=None if inv_smooth is None else inv_smooth.numpy(),
    )
    assert_bits_equal(q, torch.from_numpy(codes).to(torch.int8 if symmetric else torch.uint8), "q")
    assert_bits_equal(got_scale, torch.from_numpy(scales), "scale")
    if symmetric:
        assert got_zero is None
        assert int(q.min()) >= -127
    else:
        assert got_zero is not None
        assert_bits_equal(got_zero, torch.from_numpy(zeros).to(torch.int32), "zero_point")


@given(k=SIZES, m=st.integers(0, 4), exponent=st.integers(-130, 120), seed=st.integers(0, 999), symmetric=st.booleans())
@settings(max_examples=60, deadline=None)
def test_quantize_activations_any_magnitude(k: int, m: int, exponent: int, seed: int, symmetric: bool) -> None:
    x = (seeded(m, k, seed=seed).double() * 2.0**exponent).float()
    q, scale, zero = reference.quantize_activations(x, symmetric=symmetric)
    codes, scales, zeros = oracle_activations(x.numpy(), symmetric=symmetric)
    assert_bits_equal(q, torch.from_numpy(codes).to(q.dtype), "q")
    assert_bits_equal(scale, torch.from_numpy(scales), "scale")
    if zero is not None:
        assert_bits_equal(zero, torch.from_numpy(zeros).to(torch.int32), "zero_point")


def test_quantize_activations_division_is_not_a_reciprocal() -> None:
    # Among many maxima some differ between 127 / t in one rounding and 127 * (1 / t) in two: both kinds must be right.
    x = (torch.rand(4096, 1, generator=torch.Generator().manual_seed(3)) + 0.5) * 3
    _, scale, _ = reference.quantize_activations(x)
    exact = (x.double() / 127).float().flatten()  # 127 has 7 bits: the double quotient is rounded once, then once
    expected = torch.from_numpy(x.numpy().flatten() / np.float32(127))
    assert_bits_equal(scale, expected)
    assert torch.equal(scale, exact)
    grid = reference.rounding.symmetric_grid(x, bits=8)
    assert_bits_equal(grid.inv, torch.from_numpy(np.float32(127) / x.numpy().flatten()))
    assert not torch.equal(grid.inv, 127 * (1 / x.flatten())), "the inputs do not tell the two apart"


def test_quantize_activations_ties_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale, _ = reference.quantize_activations(x)
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_quantize_activations_smoothing_overflow_makes_a_nan_row() -> None:
    x = torch.tensor([[1e38, 1.0], [1.0, 1.0]])
    q, scale, _ = reference.quantize_activations(x, inv_smooth=torch.tensor([100.0, 1.0]))
    assert q[0].tolist() == [0, 0]
    assert math.isnan(scale[0])
    assert not math.isnan(scale[1])


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-45, torch.tensor(0.0), torch.tensor([1.0, 2.0])])
def test_quantize_activations_bad_static_scale(scale: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="scale: expected"):
        reference.quantize_activations(torch.ones(2, 3), scale=scale)


def test_quantize_activations_bad_arguments() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="zero_point"):
        reference.quantize_activations(x, zero_point=3)
    with pytest.raises(ValueError, match="zero_point"):
        reference.quantize_activations(x, symmetric=False, scale=1.0)
    with pytest.raises(ValueError, match=r"zero_point: expected 0..255, got 256"):
        reference.quantize_activations(x, symmetric=False, scale=1.0, zero_point=256)
    with pytest.raises(ValueError, match=r"inv_smooth: expected shape \[3\]"):
        reference.quantize_activations(x, inv_smooth=torch.ones(2))
    with pytest.raises(TypeError, match=r"x: expected float32, bfloat16 or float16, got torch.float64"):
        reference.quantize_activations(x.double())
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor"):
        reference.quantize_activations([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dimension"):
        reference.quantize_activations(torch.tensor(1.0))


# -- W8A8 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("k", [1, 63, 130])
def test_linear_w8a8_hazards(dtype: torch.dtype, symmetric: bool, static: bool, k: int, device: torch.device) -> None:
    x, bias = hazard_rows(k).to(dtype), seeded(5, seed=2)
    weight, scale = _w8(5, k)
    act_scale, act_zero = (0.05, None if symmetric else 100) if static else (None, None)
    y = reference.linear_w8a8(
        x.to(device),
        weight.to(device),
        scale.to(device),
        bias.to(device),
        act_symmetric=symmetric,
        act_scale=act_scale,
        act_zero_point=act_zero,
    )
    expected = oracle_linear_w8a8(
        x,
        weight.numpy(),
        scale.numpy(),
        bias.numpy(),
        symmetric=symmetric,
        act_scale=act_scale,
        act_zero_point=act_zero,
    )
    assert_bits_equal(y, expected)
    bad = ~torch.isfinite(x).all(-1)
    assert y.cpu()[bad].isnan().all()
    assert bad.any()


@given(m=SIZES, k=SIZES, n=SIZES, seed=st.integers(0, 99), symmetric=st.booleans(), bias=st.booleans())
@settings(max_examples=60, deadline=None)
def test_linear_w8a8_any_shape(m: int, k: int, n: int, seed: int, symmetric: bool, bias: bool) -> None:
    x, b = seeded(m, k, seed=seed), seeded(n, seed=seed + 1) if bias else None
    weight, scale = _w8(n, k, seed)
    y = reference.linear_w8a8(x, weight, scale, b, act_symmetric=symmetric)
    expected = oracle_linear_w8a8(
        x, weight.numpy(), scale.numpy(), None if b is None else b.numpy(), symmetric=symmetric
    )
    assert_bits_equal(y, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_w8a8_foreign_minus_128(symmetric: bool) -> None:
    weight = torch.full((3, 200), -128, dtype=torch.int8)
    weight[1, ::2] = 127
    x = torch.where(torch.arange(200) % 3 == 0, -1.0, 1.0).repeat(2, 1)
    scale = torch.tensor([0.5, 1.0, 2.0])
    y = reference.linear_w8a8(x, weight, scale, act_symmetric=symmetric)
    assert_bits_equal(y, oracle_linear_w8a8(x, weight.numpy(), scale.numpy(), symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_linear_w8a8_largest_k(symmetric: bool, sign: float) -> None:
    # The largest sums there are: every product 127 * -128, or 255 * -128, over K = 65,536.
    weight = torch.full((2, MAX_INTEGER_K), -128, dtype=torch.int8)
    weight[1] = 127
    x = torch.full((1, MAX_INTEGER_K), sign)
    y = reference.linear_w8a8(x, weight, torch.ones(2), act_symmetric=symmetric)
    assert_bits_equal(y, oracle_linear_w8a8(x, weight.numpy(), np.ones(2, np.float32), symmetric=symmetric))
    assert y[0, 0].item() == pytest.approx(-128.0 * MAX_INTEGER_K * sign, rel=1e-2)


def test_linear_w8a8_k_beyond_int32() -> None:
    k = MAX_INTEGER_K + 1
    x, weight = torch.zeros(1, k), torch.zeros(1, k, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"in_features: expected <= 65536 for exact int32 sums, got 65537"):
        reference.linear_w8a8(x, weight, torch.ones(1))
    with pytest.raises(ValueError, match="65537"):
        reference.linear_w8a8_prequantized(x.to(torch.int8), torch.ones(1), None, weight, torch.ones(1))
    packed = torch.zeros(1, (k + 1) // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="65537"):
        reference.linear_w4a8(x, packed, torch.ones(1), in_features=k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [*DTYPES, None])
def test_linear_w8a8_output_dtype(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    x = (hazard_rows(40) * 3).to(dtype)
    weight, scale = _w8(4, 40)
    y = reference.linear_w8a8(x, weight, scale, out_dtype=out_dtype)
    assert_bits_equal(y, oracle_linear_w8a8(x, weight.numpy(), scale.numpy(), out_dtype=out_dtype))


def test_linear_w8a8_leading_dimensions_and_strides() -> None:
    weight, scale = _w8(6, 33)
    x = seeded(2, 3, 5, 33)
    expected = reference.linear_w8a8(x.reshape(-1, 33), weight, scale)
    for view in (x, strided(x), x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)):
        y = reference.linear_w8a8(view, weight, scale)
        assert_bits_equal(y, expected.reshape(2, 3, 5, 6))
    row = reference.linear_w8a8(x[0, 0, 0], weight, scale)
    assert_bits_equal(row, expected[0])
    assert_bits_equal(reference.linear_w8a8(x[:, :0], weight, scale), x.new_empty(2, 0, 5, 6))


@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_w8a8_smoothing(symmetric: bool) -> None:
    x, smooth = hazard_rows(48), SMOOTH[:48] * 0.9
    weight, scale = _w8(4, 48)
    y = reference.linear_w8a8(x, weight, scale, inv_smooth=smooth, act_symmetric=symmetric)
    expected = oracle_linear_w8a8(x, weight.numpy(), scale.numpy(), inv_smooth=smooth.numpy(), symmetric=symmetric)
    assert_bits_equal(y, expected)


def test_linear_w8a8_large_weight_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, scale) = seeded(3, 64), _w8(50, 64)
    whole = reference.linear_w8a8(x, weight, scale)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 64 * 7)
    assert_bits_equal(reference.linear_w8a8(x, weight, scale), whole)


def test_linear_w8a8_bad_arguments() -> None:
    weight, scale = _w8(4, 8)
    with pytest.raises(ValueError, match=r"x: expected a last dimension of 8, got shape \[2, 7\]"):
        reference.linear_w8a8(torch.ones(2, 7), weight, scale)
    with pytest.raises(TypeError, match=r"weight: expected torch.int8, got torch.float32"):
        reference.linear_w8a8(torch.ones(2, 8), weight.float(), scale)
    with pytest.raises(ValueError, match=r"weight_scale: expected shape \[4\]"):
        reference.linear_w8a8(torch.ones(2, 8), weight, scale[:3])
    with pytest.raises(ValueError, match=r"bias: expected shape \[4\]"):
        reference.linear_w8a8(torch.ones(2, 8), weight, scale, torch.ones(3))
    with pytest.raises(TypeError, match="out_dtype"):
        reference.linear_w8a8(torch.ones(2, 8), weight, scale, out_dtype=torch.float64)
    with pytest.raises(ValueError, match="group_size"):
        reference.linear_w8a8(torch.ones(2, 8), weight, torch.ones(4, 1))


def test_narrow_agrees_with_torch() -> None:
    # The helper's own rounding, so that the expected values above can be trusted.
    values = torch.cat([hazard_rows(33).flatten(), seeded(1000) * 1e5, torch.tensor([65519.99, 65520.0, 1.00390625])])
    for dtype in DTYPES:
        assert_bits_equal(narrow(values.numpy(), dtype), values.to(dtype), str(dtype))
        assert_bits_equal(torch.from_numpy(widen(values.to(dtype))), values.to(dtype).float(), str(dtype))
