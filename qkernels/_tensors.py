"""The tensor half of the reference: any tensor to 8 or 4 bits and back, two codes per byte included."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import _rounding as rounding
from qkernels._granules import Layout


@torch.no_grad()
def quantize(
    x: Tensor,
    *,
    bits: int = 8,
    signed: bool = True,
    granularity: str = "token",
    axis: int | None = -1,
    group_size: int | None = None,
    symmetric: bool = True,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize any tensor; ``qkernels.quantize`` documents the arguments, ``_granules.Layout`` the geometry.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        scale, zero_point: given for static quantization; measured from ``x`` otherwise.

    Returns:
        Codes as stored (int8, uint8, or uint8 with two 4-bit codes per byte), float32 scales, and int32 zero
        points (None for a symmetric layout).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    wide = rounding.widen(x, "x")
    layout = Layout(tuple(x.shape), bits, signed, granularity, axis, group_size, symmetric)
    given_scale, given_zero_point = check_static(layout, scale, zero_point, wide.device)
    lines = layout.split(wide)
    if given_scale is not None:
        given_scale = layout.scale_to_lines(given_scale)
    if symmetric:
        grid = rounding.symmetric_grid(lines, bits=bits, scale=given_scale)
        low, high = layout.bounds
        codes = rounding.to_integers(lines, grid, low=low, high=high, offset=layout.zero)
        return layout.store(layout.join(codes)).contiguous(), layout.scale_from_lines(grid.scale).contiguous(), None
    # int8 with a zero point is uint8 with everything moved down by 128.
    shift = 128 if layout.signed else 0
    if given_zero_point is not None:
        given_zero_point = layout.scale_to_lines(given_zero_point) + shift
    grid = rounding.asymmetric_grid(lines, bits=bits, scale=given_scale, zero_point=given_zero_point)
    codes = rounding.to_integers(lines, grid, low=0, high=255 if bits == 8 else 15) - shift
    zeros = torch.zeros_like(grid.scale, dtype=torch.int32) if grid.zero_point is None else grid.zero_point
    return (
        layout.store(layout.join(codes)).contiguous(),
        layout.scale_from_lines(grid.scale).contiguous(),
        (layout.scale_from_lines(zeros) - shift).contiguous(),
    )


def check_static(
    layout: Layout, scale: Tensor | float | None, zero_point: Tensor | int | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Given scale and zero point, validated and expanded to one per granule; (None, None) for dynamic.

    Raises:
        ValueError: a scale that is not finite and > 0, a zero point out of range or where none belongs.
    """
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point: expected None where no scale is given, got a value")
        return None, None
    expanded = layout.check_scale(scale, device)
    if layout.symmetric:
        if zero_point is not None:
            raise ValueError("zero_point: expected None with symmetric=True, got a value")
        return expanded, None
    if zero_point is None:
        raise ValueError("zero_point: expected a value beside scale with symmetric=False, got None")
    return expanded, layout.check_zero_point(zero_point, device)


@torch.no_grad()
def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    shape: tuple[int, ...],
    bits: int = 8,
    signed: bool = True,
    granularity: str = "token",
    axis: int | None = -1,
    group_size: int | None = None,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``scale * (q - zero_point)``: an exact integer difference, one float32 product, one cast to ``dtype``."""
    layout = Layout(tuple(shape), bits, signed, granularity, axis, group_size, symmetric)
    if tuple(q.shape) != layout.data_shape or q.dtype != layout.dtype:
        raise ValueError(
            f"q: expected {layout.dtype} of shape {list(layout.data_shape)}, got {q.dtype} {list(q.shape)}"
        )
    lines = layout.split(layout.load(q))
    zero: Tensor | int = layout.zero
    if zero_point is not None:
        zero = layout.scale_to_lines(zero_point).unsqueeze(-1)
    values = (lines - zero).to(torch.float32) * layout.scale_to_lines(scale).unsqueeze(-1)
    return layout.join(values).to(rounding.check_dtype(dtype, "dtype")).contiguous()


def pack_int4(q: Tensor) -> Tensor:
    """uint8 ``[..., K]`` of 0..15 -> uint8 ``[..., ceil(K / 2)]``: element 2i in the low nibble, 2i + 1 in the high.

    Raises:
        ValueError: not uint8, no dimension, or a value above 15.
    """
    if q.dtype != torch.uint8 or not q.dim():
        raise ValueError(f"q: expected uint8 with at least one dimension, got {q.dtype} {list(q.shape)}")
    if bool((q > 15).any()):
        raise ValueError(f"q: expected values in 0..15, got {int(q.max())}")
    return rounding.pack_nibbles(q)


def unpack_int4(packed: Tensor, count: int) -> Tensor:
    """uint8 ``[..., ceil(count / 2)]`` -> uint8 ``[..., count]``: inverse of :func:`pack_int4`.

    Raises:
        ValueError: not uint8, or the last dimension is not ``ceil(count / 2)``.
    """
    if packed.dtype != torch.uint8 or not packed.dim() or packed.shape[-1] != (count + 1) // 2:
        expected = f"uint8 with a last dimension of {(count + 1) // 2}"
        raise ValueError(f"packed: expected {expected}, got {packed.dtype} {list(packed.shape)}")
    return rounding.unpack_nibbles(packed, count)
