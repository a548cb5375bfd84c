"""W8A8 GEMM in Triton over the canonical weight:

    y [M, N] = round(((float(acc) * scale_x[m]) * scale_w[n]) + bias[n]),   acc = sum_k (q[m, k] - zero[m]) * w[n, k]

A program owns BLOCK_M tokens x BLOCK_N channels and walks K; programs are ordered in groups of GROUP_M token tiles, so
that those under way at one time share operands in the L2.  The weight stays ``[N, K]`` and is transposed on its way
into ``tl.dot``, which needs no copy for it.  ``enable_fp_fusion=False``: no step of the epilogue is contracted.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .raster import grouped_tile
from .tiles import ENOUGH_INT8_PROGRAMS, Tile

__all__ = ["Tile", "gemm_w8a8", "tile_for"]


@triton.jit
def _gemm_kernel(
    q_ptr,
    weight_ptr,
    x_scale_ptr,
    x_zero_point_ptr,
    colsum_ptr,
    weight_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    q_stride,
    weight_stride,
    y_stride,
    K: tl.constexpr,  # a layer's own: one compilation per layer shape, and a loop whose length is known
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
):
    program = tl.program_id(0)
    tile_m, tile_n = grouped_tile(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows outside wrap around to rows that exist: loads stay unmasked along them, and the store drops what they gave.
    token_rows = (tokens % M).to(tl.int64)
    channel_rows = (channels % N).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    q_block = q_ptr + token_rows[:, None] * q_stride + ks[None, :]
    weight_block = weight_ptr + channel_rows[:, None] * weight_stride + ks[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(q_block + k)
            b = tl.load(weight_block + k)
        else:
            inside = ks[None, :] + k < K
            a = tl.load(q_block + k, mask=inside, other=0)
            b = tl.load(weight_block + k, mask=inside, other=0)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)

    token_mask = tokens < M
    channel_mask = channels < N
    if ZERO_POINT:
        zero = tl.load(x_zero_point_ptr + tokens, mask=token_mask, other=0) - 128
        colsum = tl.load(colsum_ptr + channels, mask=channel_mask, other=0)
        acc = acc - zero[:, None] * colsum[None, :]
    x_scale = tl.load(x_scale_ptr + tokens, mask=token_mask, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + channels, mask=channel_mask, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None]
    y = y * weight_scale[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + channels, mask=channel_mask, other=0.0)[None, :]
    place = y_ptr + tokens.to(tl.int64)[:, None] * y_stride + channels[None, :]
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=token_mask[:, None] & channel_mask[None, :])


WIDE_TILES = (Tile(128, 128, 128, 4, 3), Tile(64, 128, 128, 4, 4), Tile(64, 64, 128, 4, 5))
"""Widest first. Triton waits for each product of int8 before it goes on, which only another program of the
multiprocessor hides: at most 96 KB of stages each."""

MANY_ROWS = 2048
"""From here on larger groups of token tiles, whose channels are read from memory less often."""


def tile_for(rows: int, channels: int) -> Tile:
    """The tile for a product: as many tokens as there are up to 64, then the widest one with enough programs."""
    if rows <= 16:
        return Tile(16, 64, 256, 4, 4)
    if rows <= 32:
        return Tile(32, 64, 256, 4, 4)
    if rows <= 64:
        return Tile(64, 64, 128, 4, 5)
    tiles = [tile for tile in WIDE_TILES if tile.programs(rows, channels) > ENOUGH_INT8_PROGRAMS]
    tile = tiles[0] if tiles else WIDE_TILES[-1]
    return replace(tile, group=16) if rows >= MANY_ROWS else tile


def gemm_w8a8(
    q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    colsum: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
) -> Tensor:
    """:func:`qkernels.reference.linear_w8a8_prequantized`, with asymmetric codes as ``q - 128``.

    Args:
        q: int8 ``[M, K]``, rows of contiguous bytes; x_scale: float32 ``[M]``; x_zero_point: int32 ``[M]`` or None.
        weight: int8 ``[N, K]`` contiguous; weight_scale: float32 ``[N]``; bias: float32 ``[N]`` or None.
        colsum: int32 ``[N]``, the sum of each weight row; needed with zero points.
        tile: None: :func:`tile_for`.
    """
    rows, features = q.shape
    channels = weight.shape[0]
    if x_zero_point is not None and colsum is None:
        raise ValueError("colsum: expected a tensor beside x_zero_point, got None")
    out = torch.empty((rows, channels), dtype=out_dtype, device=q.device)
    if not rows or not channels:
        return out
    tile = tile_for(rows, channels) if tile is None else tile
    grid = (tile.programs(rows, channels),)
    _gemm_kernel[grid](
        q,
        weight,
        x_scale,
        x_scale if x_zero_point is None else x_zero_point,
        x_scale if colsum is None else colsum,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        rows,
        channels,
        q.stride(0),
        weight.stride(0),
        out.stride(0),
        K=features,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=tile.group,
        ZERO_POINT=x_zero_point is not None,
        BIAS=bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    return out
