"""Weights of the reference (8, 4, 3 and 2 bits, groups, zero points, code books) and the products that use them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    assert_bits_equal,
    hazard_rows,
    oracle_linear_grouped_a8,
    oracle_unpack,
    oracle_weight_w8,
    seeded,
    widen,
)

from qkernels import reference
from qkernels._rounding import pack_codes, unpack_codes
from qkernels.scheme import PRESETS, Scheme


def _w8(n: int, k: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = reference.quantize_weight(seeded(n, k, seed=seed), Scheme())
    return tensors["weight"], tensors["weight_scale"]


# -- weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 64, 129])
def test_quantize_weight_w8_per_channel(dtype: torch.dtype, k: int) -> None:
    rows = hazard_rows(k).to(dtype) if k else torch.zeros(3, 0, dtype=dtype)
    w = rows[torch.isfinite(rows).all(-1)]
    tensors = reference.quantize_weight(w, Scheme())
    codes, scales = oracle_weight_w8(widen(w))
    assert_bits_equal(tensors["weight"], torch.from_numpy(codes), "weight")
    assert_bits_equal(tensors["weight_scale"], torch.from_numpy(scales), "weight_scale")
    assert set(tensors) == {"weight", "weight_scale"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_quantize_weight_rejects_nan(bad: float, name: str) -> None:
    w = seeded(4, 32)
    w[2, 5] = bad
    with pytest.raises(ValueError, match="weight: expected finite values"):
        reference.quantize_weight(w, PRESETS[name])


def test_quantize_weight_bad_arguments() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        reference.quantize_weight(torch.ones(4), Scheme())
    with pytest.raises(TypeError, match="weight: expected float32"):
        reference.quantize_weight(torch.ones(4, 4, dtype=torch.int8), Scheme())
    with pytest.raises(TypeError, match="float64"):
        reference.quantize_weight(torch.ones(4, 4).double(), Scheme())
    with pytest.raises(ValueError, match="overflows"):
        reference.quantize_weight(torch.tensor([[3e38, -3e38]]), Scheme(4, weight_symmetric=False))


INT4 = [
    Scheme(4),
    Scheme(4, "per_group", 8),
    Scheme(4, "per_group", 32),
    Scheme(4, "per_group", "auto"),
    Scheme(4, "per_group", 32, scale_dtype=torch.float32),
    Scheme(4, weight_symmetric=False),
    Scheme(4, "per_group", 32, weight_symmetric=False),
    Scheme(4, weight_symmetric=False, weight_zero="float"),
    Scheme(4, "per_group", 32, weight_symmetric=False, weight_zero="float"),
]


LOW_BITS = [scheme.replace(weight_bits=bits) for bits in (3, 2) for scheme in INT4]


def _oracle_low_bits(
    w: np.ndarray, scheme: Scheme
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Codes [N, K] and, per group, scale, zero point, minimum: loops over groups, no padding."""
    f, half = np.float32, scheme.scale_dtype == torch.float16
    top, middle = 2**scheme.weight_bits - 1, 2 ** (scheme.weight_bits - 1)
    n, k = w.shape
    size = scheme.resolve_group_size(k)
    count = 1 if scheme.weight_granularity == "per_channel" else -(-k // size)
    scale = np.ones((n, count), f)
    lows, zeros, codes = np.zeros((n, count), f), np.zeros((n, count), np.int64), np.zeros((n, k), np.int64)
    cuts = [slice(g * size, min(k, g * size + size)) for g in range(count)]
    for i in range(n):
        for g, cut in enumerate(cuts):
            group = w[i, cut]
            if not group.size:
                continue
            hi, lo = group.max(), group.min()
            if scheme.weight_symmetric:
                absmax = np.abs(group).max()
                scale[i, g] = f(1) if absmax < 2.0**-100 else absmax / f(middle - 1)
                continue
            if scheme.weight_zero == "int":
                hi, lo = max(hi, f(0)), min(lo, f(0))
            step = f(hi - lo) / f(top)
            with np.errstate(all="ignore"):
                scale[i, g] = step if np.isfinite(f(1) / step) else f(1)
            lows[i, g] = lo
    kept = [scale, lows] if scheme.weight_zero == "float" else [scale]
    with np.errstate(all="ignore"):
        fits = all(
            bool(np.all(np.isfinite(v.astype(np.float16)) & ((v == 0) | (np.abs(v.astype(np.float16)) >= 2.0**-14))))
            for v in kept
        )
    if half and fits:
        scale, lows = scale.astype(np.float16).astype(f), lows.astype(np.float16).astype(f)
    for i in range(n):
        for g, cut in enumerate(cuts):
            inv = f(1) / scale[i, g]
            if scheme.weight_zero == "float":
                codes[i, cut] = np.clip(np.rint((w[i, cut] - lows[i, g]) * inv), 0, top)
            elif scheme.weight_symmetric:
                codes[i, cut] = np.clip(np.rint(w[i, cut] * inv), -middle, middle - 1) + middle
            else:
                lo = min(w[i, cut].min(initial=0), f(0))
                zeros[i, g] = np.clip(np.rint(-lo * inv), 0, top)
                codes[i, cut] = np.clip(np.rint(w[i, cut] * inv) + zeros[i, g], 0, top)
    return codes, scale, None if scheme.weight_symmetric else zeros, lows if scheme.weight_zero == "float" else None


@pytest.mark.parametrize("scheme", INT4 + LOW_BITS, ids=lambda s: s.name)
@pytest.mark.parametrize("k", [0, 1, 8, 31, 64, 129, 200])
@pytest.mark.parametrize("magnitude", [1.0, 1e-6, 1e6])
def test_quantize_weight_low_bits(scheme: Scheme, k: int, magnitude: float) -> None:
    w = seeded(6, k, seed=k) * magnitude
    w[1] = 0
    w[2] = 0.25 * magnitude
    w[3, k // 2 :] = w[3, k // 2 :].abs()
    w[4] *= 2.0**-101 / magnitude
    if k and magnitude == 1.0:
        w[4] = 1.0  # keeps the layer's scales in float16
    tensors = reference.quantize_weight(w, scheme)
    codes, scale, zeros, lows = _oracle_low_bits(w.numpy(), scheme)
    bits = scheme.weight_bits
    shape = (6,) if scheme.weight_granularity == "per_channel" else scale.shape
    assert tensors["weight"].shape == (6, -(-k * bits // 8))
    assert tensors["weight_scale"].shape == shape
    np.testing.assert_array_equal(oracle_unpack(tensors["weight"], k, bits), codes)
    if k * bits % 8:
        assert (tensors["weight"][:, -1] >> k * bits % 8 == 0).all(), "the rest of the last byte is 0"
    assert_bits_equal(tensors["weight_scale"].float(), torch.from_numpy(scale).reshape(shape), "scale")
    value = torch.from_numpy(codes).float()
    size = scheme.resolve_group_size(k)
    wide = [np.repeat(v, size, 1)[:, :k] if v is not None else None for v in (scale, zeros, lows)]
    if lows is not None:
        assert_bits_equal(tensors["weight_min"].float(), torch.from_numpy(lows).reshape(shape), "min")
        assert tensors["weight_min"].dtype == tensors["weight_scale"].dtype
        value = torch.from_numpy(codes.astype(np.float32) * wide[0] + wide[2])
    elif zeros is not None:
        assert_bits_equal(tensors["weight_zero_point"], torch.from_numpy(zeros).to(torch.uint8).reshape(shape), "zero")
        value = torch.from_numpy((codes - wide[1]).astype(np.float32) * wide[0])
    else:
        value = torch.from_numpy((codes - 2 ** (bits - 1)).astype(np.float32) * wide[0])
    assert_bits_equal(reference.dequantize_weight(tensors, scheme, k), value, "dequantized")


@pytest.mark.parametrize(
    "extreme", [1e-9, 7 * 2.0**-15, 7 * 65536.0, 1e30], ids=["tiny", "subnormal", "overflow", "huge"]
)
def test_quantize_weight_scale_that_float16_cannot_hold(extreme: float) -> None:
    w = seeded(4, 128)
    assert reference.quantize_weight(w, PRESETS["w4a16"])["weight_scale"].dtype == torch.float16
    w[3] = torch.where(torch.arange(128) % 2 == 0, extreme, -extreme)
    tensors = reference.quantize_weight(w, PRESETS["w4a16"])
    assert tensors["weight_scale"].dtype == torch.float32
    torch.testing.assert_close(reference.dequantize_weight(tensors, PRESETS["w4a16"], 128)[3], w[3])


def test_quantize_weight_zero_groups_stay_in_float16() -> None:
    w = seeded(4, 256)
    w[1, :128] = 0
    w[2, :128] = 2.0**-101
    tensors = reference.quantize_weight(w, PRESETS["w4a16"])
    assert tensors["weight_scale"].dtype == torch.float16
    assert tensors["weight_scale"][1:3, 0].tolist() == [1.0, 1.0]
    assert (reference.dequantize_weight(tensors, PRESETS["w4a16"], 256)[1:3, :128] == 0).all()


def test_quantize_weight_float_minimum_keeps_a_constant_group() -> None:
    scheme = Scheme(4, "per_group", 32, weight_symmetric=False, weight_zero="float")
    w = torch.full((2, 64), 0.75)
    tensors = reference.quantize_weight(w, scheme)
    assert_bits_equal(reference.dequantize_weight(tensors, scheme, 64), w)


def test_quantize_weight_codebook() -> None:
    codebook = (-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    scheme = Scheme(4, "per_group", 32, codebook=codebook, activation_bits=None)
    w = seeded(5, 70)
    w[1] = 0
    tensors = reference.quantize_weight(w, scheme)
    codes, table = oracle_unpack(tensors["weight"], 70), np.array(codebook, np.float32)
    scale = np.repeat(tensors["weight_scale"].float().numpy(), 32, 1)[:, :70]
    for i in range(5):
        for j in range(70):
            distance = np.abs(w[i, j].numpy() * (np.float32(1) / scale[i, j]) - table)
            assert codes[i, j] == int(np.argmin(distance))
    assert_bits_equal(
        reference.dequantize_weight(tensors, scheme, 70), torch.from_numpy(table[codes] * scale), "dequantized"
    )
    x = seeded(3, 70)
    y = reference.linear(x, tensors, scheme, 70)
    torch.testing.assert_close(y, x @ torch.from_numpy(table[codes] * scale).T)


def test_round_to_grid_is_what_quantize_weight_does() -> None:
    w = seeded(5, 100)
    for scheme in INT4 + LOW_BITS:
        tensors = reference.quantize_weight(w, scheme)
        codes = reference.round_to_grid(w, tensors, scheme)
        assert_bits_equal(reference.weight_codes(codes, scheme), tensors["weight"], scheme.name)
        again = reference.round_to_grid(reference.dequantize_weight(tensors, scheme, 100), tensors, scheme)
        assert torch.equal(again, codes), f"{scheme.name}: the grid's own points move"


@pytest.mark.parametrize("k", [0, 1, 2, 7, 16])
def test_pack_int4_layout(k: int) -> None:
    q = torch.arange(3 * k, dtype=torch.uint8).reshape(3, k) % 16
    packed = reference.pack_int4(q)
    assert packed.shape == (3, (k + 1) // 2)
    np.testing.assert_array_equal(oracle_unpack(packed, k), q.numpy())
    assert torch.equal(reference.unpack_int4(packed, k), q)
    if k >= 2:
        assert packed[0, 0] == 0 | 1 << 4, "the first value is in the low nibble"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("k", [0, 1, 2, 7, 8, 9, 16, 171])
def test_codes_of_any_width_are_packed_without_gaps(bits: int, k: int) -> None:
    q = torch.randint(0, 2**bits, (2, 3, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
    packed = pack_codes(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, math.ceil(k * bits / 8))
    np.testing.assert_array_equal(oracle_unpack(packed[1], k, bits), q[1].numpy())
    assert torch.equal(unpack_codes(packed, bits, k), q)


def test_pack_int4_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"q: expected values in 0..15, got 16"):
        reference.pack_int4(torch.tensor([16], dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        reference.pack_int4(torch.tensor([1]))
    with pytest.raises(ValueError, match="packed: expected uint8 with a last dimension of 2"):
        reference.unpack_int4(torch.zeros(3, dtype=torch.uint8), 3)


# -- W4A8 and weight-only -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 31, 64, 100, 129])
@pytest.mark.parametrize("kind", ["symmetric", "zero_point", "minimum"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("act_symmetric", [True, False])
def test_linear_grouped_a8(k: int, kind: str, bits: int, act_symmetric: bool) -> None:
    if bits == 8 and kind != "symmetric":
        pytest.skip("8-bit weights have no zero points")
    scheme = Scheme(
        bits,
        "per_group",
        32,
        weight_symmetric=kind == "symmetric",
        weight_zero="float" if kind == "minimum" else "int",
        activation_symmetric=act_symmetric,
    )
    w, x, bias = seeded(4, k, seed=k), hazard_rows(k), seeded(4, seed=9)
    tensors = reference.quantize_weight(w, scheme)
    y = reference.linear(x, {**tensors, "bias": bias}, scheme, k)
    zero: np.ndarray | int = 2 ** (bits - 1) if kind == "symmetric" and bits < 8 else 0
    if kind == "zero_point":
        zero = tensors["weight_zero_point"].numpy()
    codes = tensors["weight"].numpy() if bits == 8 else oracle_unpack(tensors["weight"], k, bits)
    expected = oracle_linear_grouped_a8(
        x,
        codes,
        tensors["weight_scale"].float().numpy(),
        bias.numpy(),
        group_size=32,
        zero=zero,
        minimum=tensors["weight_min"].float().numpy() if kind == "minimum" else None,
        symmetric=act_symmetric,
    )
    assert_bits_equal(y, expected)


def test_linear_w4a8_per_channel_is_one_group() -> None:
    x, w = hazard_rows(40), seeded(3, 40)
    tensors = reference.quantize_weight(w, Scheme(4))
    y = reference.linear(x, tensors, Scheme(4), 40)
    scale = tensors["weight_scale"].numpy()[:, None]
    expected = oracle_linear_grouped_a8(x, oracle_unpack(tensors["weight"], 40), scale, group_size=40)
    assert_bits_equal(y, expected)


def test_linear_w4a8_more_groups_than_fit_is_an_error() -> None:
    tensors = reference.quantize_weight(seeded(3, 96), PRESETS["w4a8"].replace(group_size=32))
    with pytest.raises(ValueError, match=r"weight_scale: expected shape \[N, 2\]"):
        reference.linear_w4a8(
            torch.ones(1, 96), tensors["weight"], tensors["weight_scale"], in_features=96, group_size=64
        )
    with pytest.raises(ValueError, match="weight_min"):
        reference.linear_w4a8(
            torch.ones(1, 96),
            tensors["weight"],
            tensors["weight_scale"],
            in_features=96,
            group_size=32,
            weight_min=tensors["weight_scale"],
            weight_zero_point=tensors["weight_scale"],
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
@pytest.mark.parametrize("k", [0, 1, 129])
def test_linear_weight_only(dtype: torch.dtype, name: str, k: int) -> None:
    scheme, x, w, bias = PRESETS[name], seeded(4, k).to(dtype), seeded(6, k), seeded(6, seed=3)
    tensors = {**reference.quantize_weight(w, scheme), "bias": bias}
    y = reference.linear(x, tensors, scheme, k)
    deq = reference.dequantize_weight(tensors, scheme, k)
    exact = x.double() @ deq.double().T + bias.double()
    assert y.dtype == dtype
    # |sum of K products, float32| <= K * eps * sum |x w|; the cast to the output dtype adds half an ulp of it.
    bound = (k + 2) * 2.0**-24 * (x.double().abs() @ deq.double().abs().T + bias.abs()) + exact.abs() * (
        torch.finfo(dtype).eps / 2
    )
    assert (y.double() - exact).abs().le(bound + 1e-30).all()


@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_linear_weight_only_is_not_narrowed_by_autocast(name: str) -> None:
    scheme, x = PRESETS[name], seeded(4, 256)
    tensors = reference.quantize_weight(seeded(8, 256), scheme)
    plain = reference.linear(x, tensors, scheme, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bits_equal(reference.linear(x, tensors, scheme, 256), plain)


@pytest.mark.parametrize("scheme", [*PRESETS.values(), *INT4], ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(0, 7, 3), (1, 1, 1), (3, 0, 2), (2, 65, 0), (5, 130, 9)])
def test_linear_every_scheme_approximates(scheme: Scheme, shape: tuple[int, int, int], device: torch.device) -> None:
    m, k, n = shape
    x, w, bias = seeded(m, k), seeded(n, k, seed=1), seeded(n, seed=2)
    tensors = {**reference.quantize_weight(w.to(device), scheme), "bias": bias.to(device)}
    if not scheme.activation_dynamic:
        tensors["act_scale"] = torch.tensor(4 / 127, device=device)
    y = reference.linear(x.to(device), tensors, scheme, k).cpu()
    assert y.shape == (m, n)
    # Each of K terms is off by at most half a step of either operand.
    step = reference.dequantize_weight(tensors, scheme, k).cpu() - w
    bound = (
        x.abs() @ step.abs().T
        + 0.03 * x.abs().amax(-1, keepdim=True).clamp(min=4.0) * (w.abs().sum(-1) + step.abs().sum(-1))
        if k and m
        else torch.zeros(m, n)
    )
    assert (y - (x @ w.T + bias)).abs().le(bound + 1e-4).all()


def test_linear_missing_tensors() -> None:
    weight, scale = _w8(4, 8)
    tensors = {"weight": weight, "weight_scale": scale}
    with pytest.raises(ValueError, match="tensors: expected act_scale for scheme w8a8_static"):
        reference.linear(torch.ones(1, 8), tensors, PRESETS["w8a8_static"], 8)
    with pytest.raises(ValueError, match="weight_scale"):
        reference.linear(torch.ones(1, 8), {"weight": weight}, PRESETS["w8a8"], 8)
    with pytest.raises(ValueError, match="weight_min"):
        reference.linear(torch.ones(1, 8), tensors, Scheme(4, weight_symmetric=False, weight_zero="float"), 8)


def test_linear_records_no_gradient() -> None:
    weight, scale = _w8(4, 8)
    x = torch.ones(2, 8, requires_grad=True)
    assert not reference.linear_w8a8(x, weight, scale).requires_grad
