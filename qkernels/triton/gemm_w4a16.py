"""W4A16 GEMM in Triton over the canonical weight:

    y [M, N] = x [M, K] @ w [N, K]^T + bias,   w = scale * (q - zero_point),  scale * q + min,  or  scale * codebook[q]

A program owns BLOCK_M tokens x BLOCK_N channels, computes their product transposed, ``w @ x^T``, and walks K in blocks
that lie in one group.  Transposed, the weight is the operand that the tensor cores take from registers (wgmma on
compute capability 9.0), where its codes are unpacked, while ``x`` goes from memory to shared memory and into the
product as it is.  Codes less their zero point are exact in the dtype of ``x``; a block's sum is multiplied by its scale
in float32.  Only a codebook's entries are rounded, to that dtype, where inputs are of 16 bits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cuda_slices import by_slices, by_terms, split_float32
from .dequantize import dequantize_w4
from .group_sums import group_sums
from .raster import grouped_tile
from .splits import add_splits
from .tiles import Tile, shared_bytes, short_rows
from .unpack import halves, nibbles_to_float

__all__ = ["SLICED_ROWS", "block_for", "fitting_block", "gemm_w4a16", "tile_for"]


@triton.jit
def _gemm_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    min_ptr,
    sums_ptr,  # of x over blocks of k, or over all of a row where that is the group
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
    GROUP_M: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    MINIMUM: tl.constexpr,
    CODEBOOK: tl.constexpr,
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
    # Rows outside are the last one there is: what they give is not stored. Where they are most of a block, they are
    # not loaded either. 64 bits for a block's first element, 32 from there on: addresses are much of the arithmetic.
    token_rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
    channel_rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    ks = tl.arange(0, BLOCK_K)
    pairs = tl.arange(0, BLOCK_K // 2)
    x_block = x_ptr + first_m.to(tl.int64) * x_stride
    x_places = token_rows[:, None] * x_stride + ks[None, :]
    weight_block = weight_ptr + first_n.to(tl.int64) * weight_stride
    weight_places = channel_rows[:, None] * weight_stride + pairs[None, :]
    group_block = first_n.to(tl.int64) * scale_stride
    group_places = channel_rows * scale_stride
    dtype: tl.constexpr = x_ptr.dtype.element_ty
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
            codes = tl.load(weight_block + k // 2 + weight_places)
        else:
            x = tl.load(x_block + k + x_places, mask=there[:, None] & (ks[None, :] + k < K), other=0.0)
            codes = tl.load(weight_block + k // 2 + weight_places, mask=2 * pairs[None, :] + k < K, other=0)
        group = group_block + k // GROUP
        if CODEBOOK:
            if dtype == tl.float32:
                wide = codes.to(tl.int32)
                w = tl.load(book_ptr + tl.interleave(wide & 15, wide >> 4))
            else:
                w = halves(tl.load(book_ptr + codes.to(tl.int32))).to(dtype, bitcast=True)
        elif ZERO_POINT:
            zero = tl.load(zero_ptr + group + group_places).to(tl.float32).to(dtype)
            w = nibbles_to_float(codes, zero[:, None], None, dtype)
        elif MINIMUM:
            w = nibbles_to_float(codes, 0, 0, dtype)
        else:
            w = nibbles_to_float(codes, 0, 8, dtype)
        if GROUP >= K:
            total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
        else:
            part = tl.dot(w, tl.trans(x), input_precision="ieee")
            total += part * tl.load(scale_ptr + group + group_places).to(tl.float32)[:, None]
            if MINIMUM:
                sums = tl.load(sums_ptr + k // BLOCK_K * M + first_m + token_rows)
                total += tl.load(min_ptr + group + group_places).to(tl.float32)[:, None] * sums[None, :]
    if GROUP >= K:
        total = total * tl.load(scale_ptr + group_block + group_places).to(tl.float32)[:, None]
        if MINIMUM:
            sums = tl.load(sums_ptr + first_m + token_rows, mask=token_rows < tl.where(split == 0, M, 0), other=0.0)
            total += tl.load(min_ptr + group_block + group_places).to(tl.float32)[:, None] * sums[None, :]
    channel_mask = channels < N
    if BIAS:
        bias = tl.load(bias_ptr + channels, mask=channels < tl.where(split == 0, N, 0), other=0.0)
        total += bias[:, None]
    rows = split.to(tl.int64) * M + first_m + tl.arange(0, BLOCK_M)
    to = y_ptr + rows[:, None] * y_stride + channels[None, :]
    tl.store(to, tl.trans(total.to(y_ptr.dtype.element_ty)), mask=there[:, None] & channel_mask[None, :])


def block_for(features: int, group: int, most: int = 128) -> int:
    """The largest block of k, up to ``most``, that lies in one group; 0 where there is none of a size a dot takes."""
    return next((size for size in (128, 64, 32) if size <= most and (group >= features or group % size == 0)), 0)


def fitting_block(features: int, group: int, most: int = 128) -> int:
    """:func:`block_for`.

    Raises:
        ValueError: there is none.
    """
    size = block_for(features, group, most)
    if not size:
        raise ValueError(f"group_size: expected a multiple of 32, or at least {features}, got {group}")
    return size


SLICED_ROWS = 512
"""As many rows of 16-bit values or more: the weight is dequantized in slices (measured on an H200)."""

ENOUGH_PROGRAMS = 100
"""More of them than this keep a large GPU busy; else narrower tiles are better (measured on an H200)."""


def tile_for(rows: int, channels: int, features: int) -> Tile:
    """The tile for a product (measured on an H200)."""
    if rows <= 16:
        return Tile(16, 64, 128, 4, 5).sharing(rows, channels, features, most=8, programs=900)
    if rows <= 64:
        narrow = Tile(32, 64, 128, 4, 6) if rows <= 32 else Tile(64, 64, 128, 4, 4)
        return narrow.sharing(rows, channels, features, most=4, programs=264)
    wide = Tile(128, 128, 128, 8, 3)
    if wide.programs(rows, channels) > ENOUGH_PROGRAMS:
        return wide
    return Tile(128, 64, 128, 4, 3).sharing(rows, channels, features, most=2, programs=4 * ENOUGH_PROGRAMS)


def _pairs(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Both entries of every byte of codes, rounded to the 16-bit ``dtype``, in a word: int32 ``[256]``."""
    entries = codebook.to(dtype)
    return torch.stack((entries.repeat(16), entries.repeat_interleave(16)), 1).view(torch.int32)


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
    tile: Tile | None = None,
) -> Tensor:
    """:func:`qkernels.reference.linear_w4a16` of ``x [M, K]``, within the rounding of float32 sums.

    From :data:`SLICED_ROWS` rows of 16-bit ``x`` on, where outputs have its dtype and no tile is given, the weight is
    dequantized slice by slice, rounded once to the dtype of ``x``, and multiplied by the vendor's library, which is
    faster there; the bias is rounded to that dtype as well.

    Args:
        x: float32, bfloat16 or float16, rows of contiguous values.
        weight: uint8 ``[N, ceil(K / 2)]`` contiguous; weight_scale: ``[N]`` or ``[N, G]``; bias: float32 ``[N]``.
        group_size: a multiple of 32, or None (one group).
        weight_zero_point, weight_min: shaped like weight_scale, at most one; neither: zero point 8.
        codebook: float32 ``[16]``.
        tile: None: :func:`tile_for`. A smaller block of k is taken where one group needs it, fewer stages where the
            device has less shared memory.

    Raises:
        ValueError: no block of k fits the group size.
    """
    rows, features = x.shape
    channels = weight.shape[0]
    group = features if group_size is None else min(group_size, features)
    fitting_block(features, group)
    out_dtype = out_dtype or x.dtype
    if not rows or not channels:
        return torch.empty((rows, channels), dtype=out_dtype, device=x.device)
    scales = weight_scale.view(channels, -1)
    if x.dtype == torch.float32 and x.device.type != "cpu":  # in the interpreter there is no bfloat16
        product = functools.partial(
            gemm_w4a16,
            weight=weight,
            weight_scale=weight_scale,
            group_size=group_size,
            weight_zero_point=weight_zero_point,
            weight_min=weight_min,
            out_dtype=torch.float32,
            tile=tile,
        )
        if codebook is None:
            return by_terms(x, product, bias, out_dtype)
        books = split_float32(codebook[None]).to(torch.float32)  # else its entries would be rounded to bfloat16

        def over_books(terms: Tensor) -> Tensor:
            high, middle, low = (product(terms, codebook=book) for book in books)
            return (low + middle) + high

        return by_terms(x, over_books, bias, out_dtype)
    x = short_rows(x)
    # Outputs of another dtype, the sums of terms of float32 inputs among them, must not be rounded to that of x.
    if tile is None and rows >= SLICED_ROWS and features and x.dtype == out_dtype != torch.float32:

        def dequantize(first: int, count: int, to: Tensor) -> None:
            there = slice(first, first + count)
            dequantize_w4(
                weight[there],
                scales[there],
                None if weight_zero_point is None else weight_zero_point.view(channels, -1)[there],
                None if weight_min is None else weight_min.view(channels, -1)[there],
                codebook,
                to,
                group=group,
                block=block_for(features, group),
            )

        return by_slices(x, channels, dequantize, bias, out_dtype)
    out = torch.empty((rows, channels), dtype=out_dtype, device=x.device)
    tile = tile_for(rows, channels, features) if tile is None else tile
    size = block_for(features, group, tile.k)
    book = scales
    if codebook is not None:
        book = codebook if x.dtype == torch.float32 else _pairs(codebook, x.dtype)
    sums = torch.empty((tile.splits, rows, channels), dtype=torch.float32, device=x.device) if tile.splits > 1 else out
    _gemm_kernel[(tile.programs(rows, channels), tile.splits)](
        x,
        weight,
        scales,
        weight if weight_zero_point is None else weight_zero_point,
        scales if weight_min is None else weight_min,
        scales if weight_min is None else group_sums(x, size if group < features else features),
        book,
        scales if bias is None else bias,
        sums,
        rows,
        channels,
        x.stride(0),
        weight.stride(0),
        scales.stride(0),
        out.stride(0),
        K=features,
        GROUP=max(1, group),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=size,
        GROUP_M=tile.group,
        ZERO_POINT=weight_zero_point is not None,
        MINIMUM=weight_min is not None,
        CODEBOOK=codebook is not None,
        BIAS=bias is not None,
        SPLITS=tile.splits,
        FEW=rows < tile.m,
        num_warps=tile.warps,
        num_stages=tile.depth(size * (tile.m * x.element_size() + tile.n // 2), shared_bytes(x.device)),
        enable_fp_fusion=True,
    )
    if tile.splits > 1:
        add_splits(sums, out)
    return out
