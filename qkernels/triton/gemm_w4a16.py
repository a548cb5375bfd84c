"""W4A16 GEMM in Triton over the canonical weight:

    y [M, N] = x [M, K] @ w [N, K]^T + bias,   w = scale * (q - zero_point),  scale * q + min,  or  scale * codebook[q]

A program owns BLOCK_M tokens x BLOCK_N channels and walks K in blocks that lie in one group.  A byte holds the codes
of an even and an odd k, so the even and the odd columns of ``x`` are multiplied apart: nibbles need not be interleaved.
Codes less their zero point are exact in the dtype of ``x``; a block's sum is multiplied by its scale in float32.  Only
a codebook's entries are rounded, to that dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["block_for", "gemm_w4a16"]


@triton.jit
def _gemm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    min_ptr,
    book_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    x_stride,
    weight_stride,
    scale_stride,
    y_stride,
    K: tl.constexpr,  # a layer's own: one compilation per layer shape, and a loop whose length is known
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    MINIMUM: tl.constexpr,
    CODEBOOK: tl.constexpr,
    BIAS: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows outside wrap around to rows that exist: what they give is not stored.
    token_rows = (tokens % M).to(tl.int64)
    channel_rows = (channels % N).to(tl.int64)
    pairs = tl.arange(0, BLOCK_K // 2)
    x_block = x_ptr + token_rows[:, None] * x_stride + 2 * pairs[None, :]
    weight_block = weight_ptr + channel_rows[:, None] * weight_stride + pairs[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        even_inside = 2 * pairs[None, :] + k < K
        even = tl.load(x_block + k, mask=even_inside, other=0.0)
        odd = tl.load(x_block + k + 1, mask=2 * pairs[None, :] + k + 1 < K, other=0.0)
        codes = tl.load(weight_block + k // 2, mask=even_inside, other=0)
        low = (codes & 15).to(tl.int32)
        high = (codes >> 4).to(tl.int32)
        place = channel_rows * scale_stride + k // GROUP
        if CODEBOOK:
            low_values = tl.load(book_ptr + low).to(even.dtype)
            high_values = tl.load(book_ptr + high).to(even.dtype)
        else:
            if ZERO_POINT:
                zero = tl.load(zero_ptr + place).to(tl.int32)[:, None]
            elif MINIMUM:
                zero = 0
            else:
                zero = 8
            low_values = (low - zero).to(tl.float32).to(even.dtype)
            high_values = (high - zero).to(tl.float32).to(even.dtype)
        part = tl.dot(even, tl.trans(low_values), input_precision="ieee")
        part = tl.dot(odd, tl.trans(high_values), part, input_precision="ieee")
        total += part * tl.load(scale_ptr + place).to(tl.float32)[None, :]
        if MINIMUM:
            sums = tl.sum(even.to(tl.float32), axis=1) + tl.sum(odd.to(tl.float32), axis=1)
            total += sums[:, None] * tl.load(min_ptr + place).to(tl.float32)[None, :]
    token_mask = tokens < M
    channel_mask = channels < N
    if BIAS:
        total += tl.load(bias_ptr + channels, mask=channel_mask, other=0.0)[None, :]
    to = y_ptr + tokens.to(tl.int64)[:, None] * y_stride + channels[None, :]
    tl.store(to, total.to(y_ptr.dtype.element_ty), mask=token_mask[:, None] & channel_mask[None, :])


def block_for(features: int, group: int) -> int:
    """The largest block of k that lies in one group; 0 where there is none of a size that a dot takes."""
    return next((size for size in (128, 64, 32) if group >= features or group % size == 0), 0)


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int | None = None,
    weight_zero_point: Tensor | None = None,
    weight_min: Tensor | None = None,
    codebook: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """:func:`qkernels.reference.linear_w4a16` of ``x [M, K]``, within the rounding of float32 sums.

    Args:
        x: float32, bfloat16 or float16, rows of contiguous values.
        weight: uint8 ``[N, ceil(K / 2)]`` contiguous; weight_scale: ``[N]`` or ``[N, G]``; bias: float32 ``[N]``.
        group_size: a multiple of 32, or None (one group).
        weight_zero_point, weight_min: shaped like weight_scale, at most one; neither: zero point 8.
        codebook: float32 ``[16]``.
        block: tokens and channels of a program; None: as many tokens as there are up to 64, and 64 channels.

    Raises:
        ValueError: no block of k fits the group size.
    """
    rows, features = x.shape
    channels = weight.shape[0]
    group = features if group_size is None else group_size
    size = block_for(features, group)
    if not size:
        raise ValueError(f"group_size: expected a multiple of 32, or at least {features}, got {group_size}")
    out = torch.empty((rows, channels), dtype=out_dtype or x.dtype, device=x.device)
    if not rows or not channels:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    block_m, block_n = block or (max(16, min(64, triton.next_power_of_2(rows))), 64)
    scales = weight_scale.view(channels, -1)
    _gemm_kernel[(triton.cdiv(rows, block_m), triton.cdiv(channels, block_n))](
        x,
        weight,
        scales,
        weight if weight_zero_point is None else weight_zero_point,
        scales if weight_min is None else weight_min,
        scales if codebook is None else codebook,
        scales if bias is None else bias,
        out,
        rows,
        channels,
        x.stride(0),
        weight.stride(0),
        scales.stride(0),
        out.stride(0),
        K=features,
        GROUP=max(1, min(group, features)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=size,
        ZERO_POINT=weight_zero_point is not None,
        MINIMUM=weight_min is not None,
        CODEBOOK=codebook is not None,
        BIAS=bias is not None,
        num_warps=4,
        num_stages=3,
    )
    return out
