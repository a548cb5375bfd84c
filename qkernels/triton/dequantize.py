"""4-bit weights in Triton as floating-point ones, computed in float32 and rounded once:

    w [N, K] = scale * (q - zero_point),  scale * q + min,  or  scale * codebook[q]

Each program writes a block of channels and of k, of one group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["dequantize_w4"]

BLOCK_N = 16


@triton.jit
def _dequantize_kernel(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    min_ptr,
    book_ptr,
    out_ptr,
    N,
    K,
    weight_stride,
    scale_stride,
    GROUP,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    MINIMUM: tl.constexpr,
    CODEBOOK: tl.constexpr,
):
    channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = channels < N
    k = tl.program_id(1) * BLOCK_K
    pairs = k // 2 + tl.arange(0, BLOCK_K // 2)
    ks = k + tl.arange(0, BLOCK_K)
    # Rows outside are the last one there is; what they give is not stored.
    rows = tl.minimum(channels, N - 1).to(tl.int64)
    mask = (2 * pairs < K)[None, :]
    codes = tl.load(weight_ptr + rows[:, None] * weight_stride + pairs[None, :], mask=mask, other=0).to(tl.int32)
    q = tl.interleave(codes & 15, codes >> 4)
    place = rows * scale_stride + k // GROUP
    scale = tl.load(scale_ptr + place).to(tl.float32)[:, None]
    if CODEBOOK:
        w = tl.load(book_ptr + q) * scale
    elif ZERO_POINT:
        w = (q.to(tl.float32) - tl.load(zero_ptr + place).to(tl.float32)[:, None]) * scale
    elif MINIMUM:
        w = q.to(tl.float32) * scale + tl.load(min_ptr + place).to(tl.float32)[:, None]
    else:
        w = (q - 8).to(tl.float32) * scale
    to = out_ptr + rows[:, None] * K + ks[None, :]
    tl.store(to, w.to(out_ptr.dtype.element_ty), mask=there[:, None] & (ks < K)[None, :])


def dequantize_w4(
    weight: Tensor,
    scales: Tensor,
    zero_point: Tensor | None,
    minimum: Tensor | None,
    codebook: Tensor | None,
    out: Tensor,
    *,
    group: int,
    block: int,
) -> Tensor:
    """Rows of a canonical weight into ``out [N, K]``, contiguous, which is returned.

    Args:
        weight: uint8 ``[N, ceil(K / 2)]``; codebook: float32 ``[16]``.
        scales, zero_point, minimum: ``[N, G]``.
        block: of k, in one group.
    """
    channels, features = out.shape
    _dequantize_kernel[(triton.cdiv(channels, BLOCK_N), triton.cdiv(features, block))](
        weight,
        scales,
        weight if zero_point is None else zero_point,
        scales if minimum is None else minimum,
        scales if codebook is None else codebook,
        out,
        channels,
        features,
        weight.stride(0),
        scales.stride(0),
        group,
        BLOCK_N=BLOCK_N,
        BLOCK_K=block,
        ZERO_POINT=zero_point is not None,
        MINIMUM=minimum is not None,
        CODEBOOK=codebook is not None,
        num_warps=4,
        enable_fp_fusion=False,  # the product with a scale rounds before a minimum is added
    )
    return out
