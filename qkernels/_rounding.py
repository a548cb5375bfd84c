"""The rounding half of the reference: ranges, scales and integers of granules.

A *granule* is a set of values that share one scale.  Every function here takes granules along the last
dimension, ``x [..., n]`` in float32, and returns one scale per granule, ``[...]``.  The operations are
elementwise float32, each rounded once; a quotient is always tensor by tensor, because ``127 / t`` with a Python
number is a reciprocal and a product in torch (two roundings), and CUDA turns ``t / 127`` into a product.

    symmetric, 8 bits    scale = absmax / 127    inv = 127 / absmax   q = clamp(rne(x * inv), -127, 127)
    symmetric, b < 8     scale = absmax / (half - 1)   inv = 1 / scale   q = clamp(rne(x * inv) + half, 0, levels)
    asymmetric, 8 bits   scale = hi / 255 - lo / 255                  with hi = max(x, 0), lo = min(x, 0)
    asymmetric, b < 8    scale = (hi - lo) / levels
      both               inv = 1 / scale         zero_point = clamp(rne(-lo * inv), 0, levels)
                         q = clamp(rne(x * inv) + zero_point, 0, levels)
    given scale          inv = 1 / scale, then the same q

``levels`` is 2**bits - 1, ``half`` is 2**(bits - 1).
``rne`` rounds to nearest, ties to even.  A symmetric granule with ``absmax < 2**-100``, or an asymmetric one whose
``1 / scale`` is not finite, counts as zero: scale 1, zero point 0, every q the code of zero.  A granule that
holds NaN or Inf has scale NaN, zero point 0 and every q the code of zero, so all that is made of it is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TINY = 2.0**-100
"""Below this absmax a granule counts as zero; 127 / absmax stays finite above it."""
HALF_MIN_NORMAL = 2.0**-14


def widen(x: Tensor, name: str) -> Tensor:
    """``x`` in float32.  TypeError unless it is a float32, bfloat16 or float16 tensor (no silent narrowing)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    return x.detach().to(torch.float32)


def check_dtype(dtype: torch.dtype, name: str) -> torch.dtype:
    """``dtype``; TypeError unless it is float32, bfloat16 or float16."""
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {dtype}")
    return dtype


def all_finite(x: Tensor) -> bool:
    """No NaN and no Inf in ``x``: one pass for its bounds, which NaN enters."""
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def quotient(numerator: float, divisor: Tensor) -> Tensor:
    """``numerator / divisor``, one correctly rounded division per element."""
    return torch.full_like(divisor, numerator) / divisor


def divide(dividend: Tensor, divisor: float) -> Tensor:
    """``dividend / divisor``, one correctly rounded division per element."""
    return dividend / torch.full_like(dividend, divisor)


@dataclass(frozen=True)
class Grid:
    """The grids of granules ``[...]``: what maps values to integers.

    Attributes:
        scale: float32; NaN where the granule is not finite, 1 where it counts as zero.
        zero_point: int32, or None for a grid around zero.
        inv: float32, the factor values are multiplied by (0 where ``live`` is False).
        live: bool; False where every q is the code of zero.
    """

    scale: Tensor
    zero_point: Tensor | None
    inv: Tensor
    live: Tensor


def _absmax(x: Tensor) -> Tensor:
    return x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def _bounds_with_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    """(hi, lo) of every granule with zero included; NaN propagates."""
    if not x.shape[-1]:
        return x.new_zeros(x.shape[:-1]), x.new_zeros(x.shape[:-1])
    return x.amax(-1).clamp(min=0.0), x.amin(-1).clamp(max=0.0)


def _finish(scale: Tensor, zero_point: Tensor | None, inv: Tensor, live: Tensor, finite: Tensor) -> Grid:
    scale = torch.where(live, scale, torch.where(finite, torch.ones_like(scale), torch.full_like(scale, torch.nan)))
    if zero_point is not None:
        zero_point = torch.where(live, zero_point, torch.zeros_like(zero_point)).to(torch.int32)
    return Grid(scale, zero_point, torch.where(live, inv, torch.zeros_like(inv)), live)


def symmetric_grid(x: Tensor, *, bits: int, scale: Tensor | None = None) -> Grid:
    """The grid around zero of ``x [..., n]``: measured, or of a given ``scale [...]``."""
    absmax = _absmax(x)
    finite = torch.isfinite(absmax)
    if scale is not None:
        return _finish(scale, None, quotient(1.0, scale), finite, finite)
    live = finite & (absmax >= TINY)
    absmax = torch.where(live, absmax, torch.ones_like(absmax))
    if bits == 8:
        return _finish(divide(absmax, 127.0), None, quotient(127.0, absmax), live, finite)
    measured = divide(absmax, 2.0 ** (bits - 1) - 1.0)
    return _finish(measured, None, quotient(1.0, measured), live, finite)


def asymmetric_grid(
    x: Tensor,
    *,
    bits: int,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    measured: Tensor | None = None,
) -> Grid:
    """The grid of ``x [..., n]`` over [min(x, 0), max(x, 0)], zero points from 0.

    ``scale`` and ``zero_point`` given: a static grid.  ``measured``: the measured scale after rounding to the
    dtype it is stored in, from which the rest is computed.
    """
    hi, lo = _bounds_with_zero(x)
    finite = torch.isfinite(hi) & torch.isfinite(lo)
    if scale is not None and zero_point is not None:
        return _finish(scale, zero_point, quotient(1.0, scale), finite, finite)
    if measured is None:
        measured = asymmetric_scale(hi, lo, bits=bits)
    inv = quotient(1.0, measured)
    live = finite & torch.isfinite(inv)
    levels = 2.0**bits - 1.0
    offset = torch.where(live, torch.round(-lo * inv), torch.zeros_like(lo)).clamp(0.0, levels)
    return _finish(measured, offset, inv, live, finite)


def asymmetric_scale(hi: Tensor, lo: Tensor, *, bits: int) -> Tensor:
    """The scale of a range that includes zero, before any rule about zero or non-finite granules."""
    if bits == 8:
        return divide(hi, 255.0) - divide(lo, 255.0)
    return divide(hi - lo, 2.0**bits - 1.0)


def to_integers(x: Tensor, grid: Grid, *, low: int, high: int, offset: int = 0) -> Tensor:
    """``clamp(rne(x * inv) + zero, low, high)`` in int32, ``x [..., n]``.

    ``zero`` is the grid's zero point, or ``offset`` for a grid around zero.  Granules that are not live hold it
    (0 for one with a zero point, since that is 0 too).
    """
    live = grid.live.unsqueeze(-1)
    zero: Tensor | int = offset if grid.zero_point is None else grid.zero_point.unsqueeze(-1).to(torch.float32)
    steps = torch.round(torch.where(live, x, torch.zeros_like(x)) * grid.inv.unsqueeze(-1))
    return (steps + zero).clamp(low, high).to(torch.int32)


def pack_nibbles(q: Tensor) -> Tensor:
    """uint8 ``[..., n]`` of 0..15 -> uint8 ``[..., ceil(n / 2)]``: element 2i low, 2i + 1 high, an odd tail pads 0."""
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    pairs = q.unflatten(-1, (q.shape[-1] // 2, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Inverse of :func:`pack_nibbles`: uint8 ``[..., count]`` of 0..15."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :count]


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """uint8 ``[..., n]`` of codes of ``bits`` (1..7) -> uint8 ``[..., ceil(n * bits / 8)]``.

    A line of bytes read as one little-endian number holds code ``i`` in its bits ``bits * i`` and up: low nibble first
    for 4 bits, four codes per byte for 2, eight in three bytes for 3.  What is left of the last byte is 0.
    """
    if bits == 4:
        return pack_nibbles(q)
    count = q.shape[-1]
    q = torch.nn.functional.pad(q, (0, -count % 8)).unflatten(-1, (-1, 8)).to(torch.int64)
    places = torch.arange(8, device=q.device) * bits
    words = (q << places).sum(-1, keepdim=True)  # eight codes are `bits` whole bytes
    lines = (words >> torch.arange(bits, device=q.device) * 8) & 255
    return lines.flatten(-2)[..., : -(-count * bits // 8)].to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_codes`: uint8 ``[..., count]``."""
    if bits == 4:
        return unpack_nibbles(packed, count)
    lines = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    words = (lines << torch.arange(bits, device=packed.device) * 8).sum(-1, keepdim=True)
    codes = (words >> torch.arange(8, device=packed.device) * bits) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def split_groups(x: Tensor, group_size: int, *, replicate: bool = False) -> Tensor:
    """``[..., K] -> [..., ceil(K / group_size), group_size]``; a short last group is filled with 0.

    ``replicate=True`` fills with the last value instead, which leaves minimum and maximum as they are.
    """
    in_features = x.shape[-1]
    groups = -(-in_features // group_size)
    missing = groups * group_size - in_features
    if missing:
        fill = x[..., -1:].expand(*x.shape[:-1], missing) if replicate else x.new_zeros((*x.shape[:-1], missing))
        x = torch.cat((x, fill), -1)
    return x.unflatten(-1, (groups, group_size))


def join_groups(x: Tensor, in_features: int) -> Tensor:
    """``[..., G, group_size] -> [..., in_features]``, dropping what :func:`split_groups` filled in."""
    return x.flatten(-2)[..., :in_features]


def storage_dtype(requested: torch.dtype, *values: Tensor) -> torch.dtype:
    """float16 where it was asked for and every value survives it as zero or a normal number, else float32."""
    if requested == torch.float16:
        for value in values:
            half = value.to(torch.float16).to(torch.float32).abs()
            if not bool((torch.isfinite(half) & ((half >= HALF_MIN_NORMAL) | (value == 0))).all()):
                return torch.float32
    return requested
