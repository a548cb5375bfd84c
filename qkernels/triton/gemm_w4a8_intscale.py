"""W4A8 GEMM in Triton with integer scales of groups: one integer sum over all of K, and the epilogue of W8A8:

    w[n, k]   = multiplier[n, g] * (code[n, k] - zero[n, g])           group g of k; from -127 to 127
    acc[m, n] = sum over all k of (q[m, k] - x_zero[m]) * w[n, k]      int32
    y [M, N]  = round(((float(acc) * x_scale[m]) * scale[n]) + bias[n])

A program owns BLOCK_M tokens x BLOCK_N channels, computes their product transposed, ``w @ q^T``, and walks K in blocks
that lie in one group, whose codes are multiplied four to a word (:func:`.unpack.multiplied_nibbles`).  Transposed, the
weight is the operand that the tensor cores take from registers (see :mod:`.gemm_w4a16`).  Sums of groups need no
registers of their own, which leaves room for wider tiles than those of :mod:`.gemm_w4a8`.  ``enable_fp_fusion=False``:
no step of the epilogue is contracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks_w4a8 import load_block, operand_blocks, rows_of_program, store_transposed, words_of
from .gemm_w4a16 import fitting_block
from .tiles import ENOUGH_INT8_PROGRAMS, Tile, shared_bytes, short_rows
from .unpack import multiplied_nibbles

__all__ = ["gemm_w4a8_intscale", "tile_for"]


@triton.jit
def _gemm_kernel(
    q_ptr,
    weight_ptr,
    x_scale_ptr,
    x_zero_point_ptr,
    colsum_ptr,
    weight_scale_ptr,
    multiplier_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    q_stride,
    weight_stride,
    y_stride,
    K: tl.constexpr,  # a layer's own: one compilation per layer shape, and a loop whose length is known
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CODES: tl.constexpr,  # of a word of the weight: four in int16, two in uint8
    SHIFTED: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    BIAS: tl.constexpr,
    FEW: tl.constexpr,  # fewer tokens than a block has
):
    first_m, tokens, token_rows, there, first_n, channels, channel_rows = rows_of_program(
        M, N, BLOCK_M, BLOCK_N, GROUP_M
    )
    q_block, q_places, weight_block, weight_places = operand_blocks(
        q_ptr, weight_ptr, first_m, first_n, token_rows, channel_rows, q_stride, weight_stride, BLOCK_K, CODES
    )
    GROUPS: tl.constexpr = tl.cdiv(K, GROUP)
    group_block = first_n.to(tl.int64) * GROUPS
    group_places = channel_rows * GROUPS
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        group = group_block + k // GROUP
        multiplier = tl.load(multiplier_ptr + group + group_places).to(tl.int32)
        if ZERO_POINT:
            zero = tl.load(zero_ptr + group + group_places).to(tl.int32)
        else:
            zero = 8
        q, codes = load_block(
            q_block, q_places, weight_block, weight_places, there, k, K, BLOCK_K, CODES, K % BLOCK_K != 0, FEW
        )
        offsets = (128 - multiplier * zero) * 0x01010101
        w = multiplied_nibbles(codes, multiplier[:, None], offsets[:, None], CODES == 4)
        acc = tl.dot(w, tl.trans(q), acc, out_dtype=tl.int32)
    channel_mask = channels < N
    if SHIFTED:  # q - x_zero = stored - shift
        shift = tl.load(x_zero_point_ptr + token_rows) - 128
        acc = acc - tl.load(colsum_ptr + channels, mask=channel_mask, other=0)[:, None] * shift[None, :]
    y = acc.to(tl.float32) * tl.load(x_scale_ptr + token_rows)[None, :]
    y = y * tl.load(weight_scale_ptr + channels, mask=channel_mask, other=0.0)[:, None]
    store_transposed(y, bias_ptr, y_ptr, tokens, channels, there, N, y_stride, BIAS)


def tile_for(rows: int, channels: int) -> Tile:
    """The tile for a product (measured on an H100)."""
    wide, narrow, least = Tile(128, 128, 128, 8, 3), Tile(64, 64, 128, 4, 3), Tile(16, 32, 128, 2, 8)
    if rows <= 16 or (rows <= 64 and narrow.programs(rows, channels) < ENOUGH_INT8_PROGRAMS):
        return least
    return wide if rows > 64 and wide.programs(rows, channels) > ENOUGH_INT8_PROGRAMS else narrow


def gemm_w4a8_intscale(
    q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
    weight_zero_point: Tensor | None = None,
    colsum: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    tile: Tile | None = None,
) -> Tensor:
    """:func:`qkernels.reference.linear` with ``group_scales="int"`` of quantized rows, asymmetric codes as ``q - 128``.

    Args:
        q: int8 ``[M, K]``, rows of contiguous bytes; x_scale: float32 ``[M]``; x_zero_point: int32 ``[M]`` or None.
        weight: uint8 ``[N, ceil(K / 2)]``; weight_scale: float32 ``[N]``; bias: float32 ``[N]`` or None.
        weight_multiplier: uint8 ``[N, G]``, of which every weight is a signed byte.
        group_size: a multiple of 32, or at least K (one group).
        weight_zero_point: uint8 ``[N, G]``; None: 8.
        colsum: int32 ``[N]``, the sum of each row of ``multiplier * (code - zero)``; needed with zero points of ``q``.
        tile: None: :func:`tile_for`. A smaller block of k is taken where one group needs it, fewer stages where the
            device has less shared memory.

    Raises:
        ValueError: no block of k fits the group size; ``colsum`` is missing.
    """
    rows, features = q.shape
    channels = weight.shape[0]
    if x_zero_point is not None and colsum is None:
        raise ValueError("colsum: expected a tensor beside x_zero_point, got None")
    tile = tile_for(rows, channels) if tile is None else tile
    size = fitting_block(features, group_size, tile.k)
    out = torch.empty((rows, channels), dtype=out_dtype, device=q.device)
    if not rows or not channels:
        return out
    weight, codes = words_of(weight, features)
    multiplier = weight_multiplier.contiguous()
    q = short_rows(q)
    _gemm_kernel[(tile.programs(rows, channels),)](
        q,
        weight,
        x_scale,
        x_scale if x_zero_point is None else x_zero_point,
        x_scale if colsum is None else colsum,
        weight_scale,
        multiplier,
        multiplier if weight_zero_point is None else weight_zero_point.contiguous(),
        weight_scale if bias is None else bias,
        out,
        rows,
        channels,
        q.stride(0),
        weight.stride(0),
        out.stride(0),
        K=features,
        GROUP=min(group_size, features),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=size,
        GROUP_M=tile.group,
        CODES=codes,
        SHIFTED=x_zero_point is not None,
        ZERO_POINT=weight_zero_point is not None,
        BIAS=bias is not None,
        FEW=rows < tile.m,
        num_warps=tile.warps,
        # A second program of as many threads on the multiprocessor, which the vectors of the epilogue would cost.
        maxnreg=128 if tile.warps == 8 and tile.m * tile.n <= 128 * 128 else None,
        num_stages=tile.depth(size * (tile.m + tile.n // 2), shared_bytes(q.device)),
        enable_fp_fusion=False,
    )
    return out
