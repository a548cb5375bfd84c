"""W4A8 GEMM in Triton over the canonical weight, groups added in order, every step rounded once:

    d_g[m, n] = sum over k of group g of (q[m, k] - x_zero[m]) * (w[n, k] - zero[n, g])          int32
    total     = total + float(d_g) * scale[n, g]   (+ min[n, g] * float(sum of q[m, k] - x_zero[m])),   g = 0, 1, ...
    y [M, N]  = round(total * x_scale[m] + bias[n])

A program owns BLOCK_M tokens x BLOCK_N channels, computes their product transposed, ``w @ q^T``, and walks K in blocks
that lie in one group.  Transposed, the weight is the operand that the tensor cores take from registers, where its codes
are unpacked (see :mod:`.gemm_w4a16`).  ``enable_fp_fusion=False``: no multiplication and addition are contracted.
Integer scales of groups have a kernel of their own, :mod:`.gemm_w4a8_intscale`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks_w4a8 import load_block, operand_blocks, rows_of_program, store_transposed, words_of
from .gemm_w4a8_intscale import gemm_w4a8_intscale
from .gemm_w4a16 import fitting_block
from .group_sums import group_sums
from .tiles import ENOUGH_INT8_PROGRAMS, Tile, shared_bytes, short_rows
from .unpack import nibbles_to_int8

__all__ = ["gemm_w4a8", "tile_for"]


@triton.jit
def _step(
    acc,
    weight_sums,
    q_block,
    q_places,
    weight_block,
    weight_places,
    zeros,
    there,
    k,
    end,
    BLOCK_K: tl.constexpr,
    CODES: tl.constexpr,
    MASKED: tl.constexpr,
    SHIFTED: tl.constexpr,
    FEW: tl.constexpr,
):
    """One block of k, up to ``end``, into the sums of its group."""
    q, codes = load_block(q_block, q_places, weight_block, weight_places, there, k, end, BLOCK_K, CODES, MASKED, FEW)
    w = nibbles_to_int8(codes, zeros, CODES == 4)
    acc = tl.dot(w, tl.trans(q), acc, out_dtype=tl.int32)
    if SHIFTED:  # q - x_zero = stored - shift: what the shift adds
        if MASKED:
            w = tl.where((k + tl.arange(0, BLOCK_K))[None, :] < end, w, 0)
        weight_sums += tl.sum(w.to(tl.int32), axis=1)
    return acc, weight_sums


@triton.jit
def _gemm_kernel(
    q_ptr,
    weight_ptr,
    x_scale_ptr,
    x_zero_point_ptr,
    sums_ptr,  # of q over groups of k
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
    CODES: tl.constexpr,  # of a word of the weight: four in int16, two in uint8
    SHIFTED: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    MINIMUM: tl.constexpr,
    BIAS: tl.constexpr,
    FEW: tl.constexpr,  # fewer tokens than a block has
):
    first_m, tokens, token_rows, there, first_n, channels, channel_rows = rows_of_program(
        M, N, BLOCK_M, BLOCK_N, GROUP_M
    )
    q_block, q_places, weight_block, weight_places = operand_blocks(
        q_ptr, weight_ptr, first_m, first_n, token_rows, channel_rows, q_stride, weight_stride, BLOCK_K, CODES
    )
    group_block = first_n.to(tl.int64) * scale_stride
    group_places = channel_rows * scale_stride
    if SHIFTED:
        shift = tl.load(x_zero_point_ptr + token_rows) - 128
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for g in range(tl.cdiv(K, GROUP)):
        first = g * GROUP
        # A zero point in each byte of a word.
        if ZERO_POINT:
            zeros = tl.load(zero_ptr + group_block + g + group_places).to(tl.int32)[:, None] * 0x01010101
        elif MINIMUM:
            zeros = 0
        else:
            zeros = 0x08080808
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        weight_sums = tl.zeros((BLOCK_N,), dtype=tl.int32)
        if GROUP == BLOCK_K:
            acc, weight_sums = _step(
                acc,
                weight_sums,
                q_block,
                q_places,
                weight_block,
                weight_places,
                zeros,
                there,
                first,
                K,
                BLOCK_K,
                CODES,
                K % BLOCK_K != 0,
                SHIFTED,
                FEW,
            )
        else:
            end = tl.minimum(first + GROUP, K)
            for k in range(first, end, BLOCK_K):
                acc, weight_sums = _step(
                    acc,
                    weight_sums,
                    q_block,
                    q_places,
                    weight_block,
                    weight_places,
                    zeros,
                    there,
                    k,
                    end,
                    BLOCK_K,
                    CODES,
                    K % BLOCK_K != 0 or GROUP % BLOCK_K != 0,
                    SHIFTED,
                    FEW,
                )
        if SHIFTED:
            acc = acc - weight_sums[:, None] * shift[None, :]
        scale = tl.load(scale_ptr + group_block + g + group_places).to(tl.float32)
        total = total + acc.to(tl.float32) * scale[:, None]
        if MINIMUM:
            sums = tl.load(sums_ptr + g * M + token_rows)
            if SHIFTED:
                sums = sums - shift * (tl.minimum(first + GROUP, K) - first)
            low = tl.load(min_ptr + group_block + g + group_places).to(tl.float32)
            total = total + low[:, None] * sums.to(tl.float32)[None, :]
    y = total * tl.load(x_scale_ptr + token_rows)[None, :]
    store_transposed(y, bias_ptr, y_ptr, tokens, channels, there, N, y_stride, BIAS)


def tile_for(rows: int, channels: int) -> Tile:
    """The tile for a product (measured on an H200)."""
    if rows <= 16:
        return Tile(16, 32, 128, 2, 8)
    if rows <= 32:
        return Tile(32, 64, 128, 4, 6)
    wide, narrow = Tile(128, 64, 128, 4, 3), Tile(64, 64, 128, 4, 4)
    if rows > 64:
        return wide if wide.programs(rows, channels) > ENOUGH_INT8_PROGRAMS else narrow
    # Two programs to a multiprocessor: fewer stages leave room for both.
    return replace(narrow, stages=3) if narrow.programs(rows, channels) >= 200 else narrow


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
    weight_multiplier: Tensor | None = None,
    colsum: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
) -> Tensor:
    """:func:`qkernels.reference.linear` with 4-bit weights of quantized rows, asymmetric codes as ``q - 128``.

    Args:
        q: int8 ``[M, K]``, rows of contiguous bytes; x_scale: float32 ``[M]``; x_zero_point: int32 ``[M]`` or None.
        weight: uint8 ``[N, ceil(K / 2)]``; weight_scale: ``[N]`` or ``[N, G]``; bias: float32 ``[N]``.
        group_size: a multiple of 32, or None (one group).
        weight_zero_point (at most 128), weight_min: shaped like weight_scale, at most one; neither: zero point 8.
        weight_multiplier: uint8 ``[N, G]``: integer scales of groups, in units of weight_scale, float32 ``[N]``.
        colsum: int32 ``[N]``, the sum of each row of ``multiplier * (code - zero)``; needed with multipliers and
            x_zero_point, else not looked at.
        tile: None: :func:`tile_for`. A smaller block of k is taken where one group needs it, fewer stages where the
            device has less shared memory.

    Raises:
        ValueError: no block of k fits the group size; multipliers come with weight_min, or without a needed colsum.
    """
    if weight_multiplier is not None:
        if weight_min is not None:
            raise ValueError("weight_min: expected None beside weight_multiplier, got a tensor")
        return gemm_w4a8_intscale(
            q,
            x_scale,
            x_zero_point,
            weight,
            weight_scale,
            weight_multiplier,
            bias,
            group_size=q.shape[1] if group_size is None else group_size,
            weight_zero_point=weight_zero_point,
            colsum=colsum,
            out_dtype=out_dtype,
            tile=tile,
        )
    rows, features = q.shape
    channels = weight.shape[0]
    group = features if group_size is None else min(group_size, features)
    tile = tile_for(rows, channels) if tile is None else tile
    size = fitting_block(features, group, tile.k)
    out = torch.empty((rows, channels), dtype=out_dtype, device=q.device)
    if not rows or not channels:
        return out
    weight, codes = words_of(weight, features)
    scales = weight_scale.contiguous().view(channels, -1)
    q = short_rows(q)
    _gemm_kernel[(tile.programs(rows, channels),)](
        q,
        weight,
        x_scale,
        x_scale if x_zero_point is None else x_zero_point,
        x_scale if weight_min is None else group_sums(q, group),
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
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=size,
        GROUP_M=tile.group,
        CODES=codes,
        SHIFTED=x_zero_point is not None,
        ZERO_POINT=weight_zero_point is not None,
        MINIMUM=weight_min is not None,
        BIAS=bias is not None,
        FEW=rows < tile.m,
        num_warps=tile.warps,
        num_stages=tile.depth(size * (tile.m + tile.n // 2), shared_bytes(q.device)),
        enable_fp_fusion=False,
    )
    return out
