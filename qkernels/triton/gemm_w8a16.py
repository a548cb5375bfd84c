"""W8A16 GEMM in Triton over the canonical weight:  y [M, N] = scale[n] * (x [M, K] @ w [N, K]^T) + bias.

A program owns BLOCK_M tokens x BLOCK_N channels and computes their product transposed, ``w @ x^T``: the weight is then
the operand that the tensor cores take from registers, where its codes are unpacked (see :mod:`.gemm_w4a16`).  Codes are
exact in the dtype of ``x``, sums are float32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cuda_slices import by_terms
from .raster import grouped_tile
from .splits import add_splits
from .tiles import Tile, shared_bytes, short_rows
from .unpack import bytes_to_float

__all__ = ["gemm_w8a16", "tile_for"]


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
    PAIRS: tl.constexpr,  # the weight as int16, two codes each
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,  # y is float32 [SPLITS, M, N] where there are several
    FEW: tl.constexpr,  # fewer tokens than a block has
):
    program = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = grouped_tile(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = tile_m * BLOCK_M
    first_n = tile_n * BLOCK_N
    there = first_m + tl.arange(0, BLOCK_M) < M
    channels = first_n + tl.arange(0, BLOCK_N)
    CODES: tl.constexpr = 2 if PAIRS else 1
    ks = tl.arange(0, BLOCK_K)
    words = tl.arange(0, BLOCK_K // CODES)
    # Rows outside are the last one there is: what they give is not stored. Where they are most of a block, they are
    # not loaded either. 64 bits for a block's first element, 32 from there on: addresses are much of the arithmetic.
    x_block = x_ptr + first_m.to(tl.int64) * x_stride
    x_places = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)[:, None] * x_stride + ks[None, :]
    weight_block = weight_ptr + first_n.to(tl.int64) * weight_stride
    weight_places = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)[:, None] * weight_stride + words[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if SPLITS > 1:
        PART: tl.constexpr = tl.cdiv(K, SPLITS * BLOCK_K) * BLOCK_K
        first_k = split * PART
        end_k = tl.minimum(first_k + PART, K)
    else:
        first_k = 0
        end_k = K
    for k in range(first_k, end_k, BLOCK_K):
        if K % BLOCK_K == 0:
            if FEW:
                x = tl.load(x_block + k + x_places, mask=there[:, None], other=0.0)
            else:
                x = tl.load(x_block + k + x_places)
            codes = tl.load(weight_block + k // CODES + weight_places)
        else:
            x = tl.load(x_block + k + x_places, mask=there[:, None] & (ks[None, :] + k < K), other=0.0)
            codes = tl.load(weight_block + k // CODES + weight_places, mask=CODES * words[None, :] + k < K, other=0)
        w = bytes_to_float(codes, PAIRS, x.dtype)
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
    channel_mask = channels < N
    total = total * tl.load(scale_ptr + channels, mask=channel_mask, other=0.0)[:, None]
    if BIAS:
        bias = tl.load(bias_ptr + channels, mask=channels < tl.where(split == 0, N, 0), other=0.0)
        total += bias[:, None]
    rows = split.to(tl.int64) * M + first_m + tl.arange(0, BLOCK_M)
    to = y_ptr + rows[:, None] * y_stride + channels[None, :]
    tl.store(to, tl.trans(total.to(y_ptr.dtype.element_ty)), mask=there[:, None] & channel_mask[None, :])


ENOUGH_PROGRAMS = 100
"""As many keep a large GPU busy; of fewer, narrower tiles are better (measured on an H200)."""


def tile_for(rows: int, channels: int, features: int) -> Tile:
    """The tile for a product (measured on an H200)."""
    if rows <= 16:
        wide = Tile(16, 64, 128, 4, 5)
        if wide.programs(rows, channels) >= 2 * ENOUGH_PROGRAMS:
            return wide
        return Tile(16, 32, 128, 2, 8).sharing(rows, channels, features, most=4, programs=512)
    if rows <= 32:
        return Tile(32, 64, 128, 4, 6).sharing(rows, channels, features, most=4, programs=264)
    if rows > 64:
        wide = Tile(128, 128, 128, 8, 3) if rows <= 128 else Tile(256, 128, 64, 8, 3)
        if wide.programs(rows, channels) >= ENOUGH_PROGRAMS:
            return wide
    if rows <= 128:
        return Tile(64, 64, 128, 4, 4).sharing(rows, channels, features, most=4, programs=264)
    return Tile(128, 64, 64, 4, 4).sharing(rows, channels, features, most=2, programs=264)


def gemm_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """:func:`qkernels.reference.linear_w8a16` of ``x [M, K]``, within the rounding of float32 sums.

    Args:
        x: float32, bfloat16 or float16, rows of contiguous values.
        weight: int8 ``[N, K]`` contiguous; weight_scale, bias: float32 ``[N]``.
        tile: None: :func:`tile_for`. Fewer stages are taken where the device has less shared memory.
    """
    rows, features = x.shape
    channels = weight.shape[0]
    out = torch.empty((rows, channels), dtype=out_dtype or x.dtype, device=x.device)
    if not rows or not channels:
        return out
    if x.dtype == torch.float32 and x.device.type != "cpu":  # in the interpreter there is no bfloat16
        product = functools.partial(
            gemm_w8a16, weight=weight, weight_scale=weight_scale, out_dtype=torch.float32, tile=tile
        )
        return by_terms(x, product, bias, out.dtype)
    x = short_rows(x)
    tile = tile_for(rows, channels, features) if tile is None else tile
    pairs = x.dtype != torch.float32 and features % 2 == 0 and weight.data_ptr() % 2 == 0
    if pairs:
        weight = weight.view(torch.int16)
    sums = torch.empty((tile.splits, rows, channels), dtype=torch.float32, device=x.device) if tile.splits > 1 else out
    _gemm_kernel[(tile.programs(rows, channels), tile.splits)](
        x,
        weight,
        weight_scale,
        weight_scale if bias is None else bias,
        sums,
        rows,
        channels,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        K=features,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP_M=tile.group,
        PAIRS=pairs,
        BIAS=bias is not None,
        SPLITS=tile.splits,
        FEW=rows < tile.m,
        num_warps=tile.warps,
        num_stages=tile.depth(tile.k * (tile.m * x.element_size() + tile.n), shared_bytes(x.device)),
        enable_fp_fusion=True,
    )
    if tile.splits > 1:
        add_splits(sums, out)
    return out
