"""W8A16 GEMM in Triton over the canonical weight:  y [M, N] = scale[n] * (x [M, K] @ w [N, K]^T) + bias.

A program owns BLOCK_M tokens x BLOCK_N channels.  Codes are exact in the dtype of ``x``, sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .raster import grouped_tile

__all__ = ["gemm_w8a16"]

BLOCK_K = 64


@triton.jit
def _gemm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    x_stride,
    weight_stride,
    y_stride,
    K: tl.constexpr,  # a layer's own: one compilation per layer shape, and a loop whose length is known
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BIAS: tl.constexpr,
):
    program = tl.program_id(0)
    tile_m, tile_n = grouped_tile(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows outside wrap around to rows that exist: what they give is not stored.
    x_block = x_ptr + (tokens % M).to(tl.int64)[:, None] * x_stride + ks[None, :]
    weight_block = weight_ptr + (channels % N).to(tl.int64)[:, None] * weight_stride + ks[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_block + k)
            codes = tl.load(weight_block + k)
        else:
            inside = ks[None, :] + k < K
            x = tl.load(x_block + k, mask=inside, other=0.0)
            codes = tl.load(weight_block + k, mask=inside, other=0)
        total = tl.dot(x, tl.trans(codes.to(tl.float32).to(x.dtype)), total, input_precision="ieee")
    token_mask = tokens < M
    channel_mask = channels < N
    total = total * tl.load(scale_ptr + channels, mask=channel_mask, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + channels, mask=channel_mask, other=0.0)[None, :]
    to = y_ptr + tokens.to(tl.int64)[:, None] * y_stride + channels[None, :]
    tl.store(to, total.to(y_ptr.dtype.element_ty), mask=token_mask[:, None] & channel_mask[None, :])


def gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """:func:`qkernels.reference.linear_w8a16` of ``x [M, K]``, within the rounding of float32 sums.

    Args:
        x: float32, bfloat16 or float16, rows of contiguous values.
        weight: int8 ``[N, K]`` contiguous; weight_scale, bias: float32 ``[N]``.
        block: tokens and channels of a program; None: as many tokens as there are up to 128, and 64 or 128 channels.
    """
    rows, features = x.shape
    channels = weight.shape[0]
    out = torch.empty((rows, channels), dtype=out_dtype or x.dtype, device=x.device)
    if not rows or not channels:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    if block is None:
        tokens = max(16, min(128 if x.dtype != torch.float32 else 64, triton.next_power_of_2(rows)))
        block = (tokens, 64 if tokens <= 64 else 128)
    _gemm_kernel[(triton.cdiv(rows, block[0]) * triton.cdiv(channels, block[1]),)](
        x,
        weight,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        rows,
        channels,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        K=features,
        BLOCK_M=block[0],
        BLOCK_N=block[1],
        BLOCK_K=BLOCK_K,
        GROUP_M=8,
        BIAS=bias is not None,
        num_warps=8 if block[0] >= 128 else 4,
        num_stages=4,
    )
    return out
