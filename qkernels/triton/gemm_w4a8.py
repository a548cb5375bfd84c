"""W4A8 GEMM in Triton over the canonical weight, groups added in order, every step rounded once:

    d_g[m, n] = sum over k of group g of (q[m, k] - x_zero[m]) * (w[n, k] - zero[n, g])          int32
    total     = total + float(d_g) * scale[n, g]   (+ min[n, g] * float(sum of q[m, k] - x_zero[m])),   g = 0, 1, ...
    y [M, N]  = round(total * x_scale[m] + bias[n])

A program owns BLOCK_M tokens x BLOCK_N channels and walks K in blocks that lie in one group.  A byte holds the codes of
an even and an odd k, which are interleaved in registers on their way to ``tl.dot``.  ``enable_fp_fusion=False``: no
multiplication and addition are contracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm_w4a16 import block_for
from .raster import grouped_tile

__all__ = ["gemm_w4a8"]


@triton.jit
def _step(
    acc,
    sums,
    weight_sums,
    q_block,
    weight_block,
    zero,
    k,
    end,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    SHIFTED: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """One block of k, up to ``end``, into the sums of its group."""
    ks = k + tl.arange(0, BLOCK_K)
    pairs = k // 2 + tl.arange(0, BLOCK_K // 2)
    if MASKED:
        q = tl.load(q_block + ks[None, :], mask=ks[None, :] < end, other=0)
        codes = tl.load(weight_block + pairs[None, :], mask=2 * pairs[None, :] < end, other=0)
    else:
        q = tl.load(q_block + ks[None, :])
        codes = tl.load(weight_block + pairs[None, :])
    w = tl.interleave((codes & 15).to(tl.int8), (codes >> 4).to(tl.int8)) - zero[:, None]
    acc = tl.dot(q, tl.trans(w), acc, out_dtype=tl.int32)
    if SHIFTED:  # q - x_zero = stored - shift: what the shift adds
        if MASKED:
            w = tl.where(ks[None, :] < end, w, 0)
        weight_sums += tl.sum(w.to(tl.int32), axis=1)
    if MINIMUM:
        sums += tl.sum(q.to(tl.int32), axis=1)
    return acc, sums, weight_sums


@triton.jit
def _gemm_kernel(
    q_ptr,
    weight_ptr,
    x_scale_ptr,
    x_zero_point_ptr,
    scale_ptr,
    zero_ptr,
    min_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    q_stride,
    weight_stride,
    scale_stride,
    y_stride,
    K: tl.constexpr,  # a layer's own: one compilation per layer shape, and loops whose lengths are known
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SHIFTED: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    MINIMUM: tl.constexpr,
    BIAS: tl.constexpr,
):
    program = tl.program_id(0)
    tile_m, tile_n = grouped_tile(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token_mask = tokens < M
    channel_mask = channels < N
    # Rows outside wrap around to rows that exist: what they give is not stored.
    channel_rows = (channels % N).to(tl.int64)
    q_block = q_ptr + (tokens % M).to(tl.int64)[:, None] * q_stride
    weight_block = weight_ptr + channel_rows[:, None] * weight_stride
    if SHIFTED:
        shift = tl.load(x_zero_point_ptr + tokens, mask=token_mask, other=0) - 128
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g in range(tl.cdiv(K, GROUP)):
        first = g * GROUP
        place = channel_rows * scale_stride + g
        if ZERO_POINT:
            zero = tl.load(zero_ptr + place).to(tl.int8)
        elif MINIMUM:
            zero = tl.zeros((BLOCK_N,), dtype=tl.int8)
        else:
            zero = tl.full((BLOCK_N,), 8, dtype=tl.int8)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        sums = tl.zeros((BLOCK_M,), dtype=tl.int32)
        weight_sums = tl.zeros((BLOCK_N,), dtype=tl.int32)
        if GROUP == BLOCK_K:
            acc, sums, weight_sums = _step(
                acc,
                sums,
                weight_sums,
                q_block,
                weight_block,
                zero,
                first,
                K,
                BLOCK_K,
                K % BLOCK_K != 0,
                SHIFTED,
                MINIMUM,
            )
        else:
            end = tl.minimum(first + GROUP, K)
            for k in range(first, end, BLOCK_K):
                acc, sums, weight_sums = _step(
                    acc,
                    sums,
                    weight_sums,
                    q_block,
                    weight_block,
                    zero,
                    k,
                    end,
                    BLOCK_K,
                    K % BLOCK_K != 0 or GROUP % BLOCK_K != 0,
                    SHIFTED,
                    MINIMUM,
                )
        if SHIFTED:
            acc = acc - shift[:, None] * weight_sums[None, :]
        scale = tl.load(scale_ptr + place).to(tl.float32)
        total = total + acc.to(tl.float32) * scale[None, :]
        if MINIMUM:
            if SHIFTED:
                sums = sums - shift * (tl.minimum(first + GROUP, K) - first)
            low = tl.load(min_ptr + place).to(tl.float32)
            total = total + low[None, :] * sums.to(tl.float32)[:, None]
    y = total * tl.load(x_scale_ptr + tokens, mask=token_mask, other=0.0)[:, None]
    if BIAS:
        y = y + tl.load(bias_ptr + channels, mask=channel_mask, other=0.0)[None, :]
    to = y_ptr + tokens.to(tl.int64)[:, None] * y_stride + channels[None, :]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=token_mask[:, None] & channel_mask[None, :])


def gemm_w4a8(
    q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int | None = None,
    weight_zero_point: Tensor | None = None,
    weight_min: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """:func:`qkernels.reference.linear_w4a8` of quantized rows, asymmetric codes as ``q - 128``.

    Args:
        q: int8 ``[M, K]``, rows of contiguous bytes; x_scale: float32 ``[M]``; x_zero_point: int32 ``[M]`` or None.
        weight: uint8 ``[N, ceil(K / 2)]``; weight_scale: ``[N]`` or ``[N, G]``; bias: float32 ``[N]``.
        group_size: a multiple of 32, or None (one group).
        weight_zero_point (at most 128), weight_min: shaped like weight_scale, at most one; neither: zero point 8.
        block: tokens and channels of a program; None: as many tokens as there are up to 128, and 64 or 128 channels.

    Raises:
        ValueError: no block of k fits the group size.
    """
    rows, features = q.shape
    channels = weight.shape[0]
    group = features if group_size is None else min(group_size, features)
    size = block_for(features, group)
    if not size:
        raise ValueError(f"group_size: expected a multiple of 32, or at least {features}, got {group_size}")
    out = torch.empty((rows, channels), dtype=out_dtype, device=q.device)
    if not rows or not channels:
        return out
    weight, scales = weight.contiguous(), weight_scale.contiguous().view(channels, -1)
    if block is None:
        tokens = max(16, min(128, triton.next_power_of_2(rows)))
        lean = x_zero_point is None and weight_min is None  # no sums beside the products: registers for wide tiles
        block = (tokens, 128 if tokens > 32 and lean else 64)
    _gemm_kernel[(triton.cdiv(rows, block[0]) * triton.cdiv(channels, block[1]),)](
        q,
        weight,
        x_scale,
        x_scale if x_zero_point is None else x_zero_point,
        scales,
        weight if weight_zero_point is None else weight_zero_point.contiguous(),
        scales if weight_min is None else weight_min.contiguous(),
        scales if bias is None else bias,
        out,
        rows,
        channels,
        q.stride(0),
        weight.stride(0),
        scales.stride(0),
        out.stride(0),
        K=features,
        GROUP=group,
        BLOCK_M=block[0],
        BLOCK_N=block[1],
        BLOCK_K=size,
        GROUP_M=8,
        SHIFTED=x_zero_point is not None,
        ZERO_POINT=weight_zero_point is not None,
        MINIMUM=weight_min is not None,
        BIAS=bias is not None,
        num_warps=8 if block[0] >= 128 else 4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out
