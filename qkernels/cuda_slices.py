"""What weight-only layers on a GPU share where no fused kernel is the faster one.

The weight is dequantized slice by slice, each smaller than the L2 of a large GPU, and multiplied by the vendor's
library; float32 activations enter kernels of 16-bit products as three bfloat16 terms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["aligned_rows", "by_slices", "by_terms", "split_float32"]

_SLICE_BYTES = 32 << 20
"""Of a weight that is dequantized at one time: all that is ever there twice."""

_SLICE_ROWS = 128


def split_float32(x: Tensor) -> Tensor:
    """float32 ``[M, K]`` as ``[3 * M, K]`` in bfloat16, three terms whose sum is ``x``: nothing of it is lost.

    The leading terms are cut off, not rounded, so that none overflows; what an infinity leaves over is zero.
    """
    high = (x.view(torch.int32) & -65536).view(torch.float32)
    rest = torch.where(x.isinf(), 0.0, x - high)
    middle = (rest.view(torch.int32) & -65536).view(torch.float32)
    return torch.cat((high, middle, rest - middle)).to(torch.bfloat16)


def by_terms(x: Tensor, product: Callable[[Tensor], Tensor], bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """``product`` of float32 ``x [M, K]``, from that of its three terms ``[3 * M, K]`` in float32; plus ``bias``."""
    terms = product(split_float32(x.contiguous())).view(3, x.shape[0], -1)
    y = (terms[2] + terms[1]) + terms[0]
    return (y if bias is None else y + bias).to(out_dtype)


def aligned_rows(x: Tensor) -> Tensor:
    """16-bit ``[M, K]`` whose rows begin at multiples of 16 bytes: ``x`` itself where it is so."""
    rows, features = x.shape
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= features and x.data_ptr() % 16 == 0:
        return x
    return x.new_empty(rows, -(-features // 8) * 8)[:, :features].copy_(x)


def by_slices(
    x: Tensor,
    channels: int,
    dequantize: Callable[[int, int, Tensor], object],
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``x [M, K]`` times the weight ``[channels, K]``, plus ``bias``, in the dtype of ``x``.

    Args:
        dequantize: ``(first, rows, out)`` writes rows ``first ... first + rows - 1`` into ``out``; ``first`` is a
            multiple of 128.
        bias: float32 ``[channels]``.
    """
    features = x.shape[1]
    out = torch.empty((x.shape[0], channels), dtype=x.dtype, device=x.device)
    step = max(1, _SLICE_BYTES // (features * x.element_size()) // _SLICE_ROWS) * _SLICE_ROWS
    buffer = torch.empty((min(step, channels), features), dtype=x.dtype, device=x.device)
    shift = None if bias is None else bias.to(x.dtype)
    with torch.autocast("cuda", enabled=False):
        for first in range(0, channels, step):
            last = min(first + step, channels)
            part = buffer[: last - first]
            dequantize(first, last - first, part)
            if shift is None:
                torch.mm(x, part.t(), out=out[:, first:last])
            else:
                torch.addmm(shift[first:last], x, part.t(), out=out[:, first:last])
    return out.to(out_dtype)
