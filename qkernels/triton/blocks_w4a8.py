"""What the kernels of W4A8 share: a program's rows, its blocks of operands, its store of a product computed transposed.

A program owns BLOCK_M tokens x BLOCK_N channels and computes ``w @ q^T``, block of k by block of k.  Rows outside of
either operand are the last one there is: what they give is not stored.  Where they are most of a block of tokens (FEW),
they are not loaded either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .raster import grouped_tile

__all__ = ["load_block", "operand_blocks", "rows_of_program", "store_transposed", "words_of"]


@triton.jit
def rows_of_program(  # noqa: ANN201 (what Triton makes of it)
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The tokens and the channels of a program: the first, all of them, and the rows to load for them.

    ``token_rows`` are rows of ``q``, ``channel_rows`` those of the weight from ``first_n`` on; ``there [BLOCK_M, 1]``
    says which tokens exist.
    """
    program = tl.program_id(0)
    tile_m, tile_n = grouped_tile(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = tile_m * BLOCK_M
    first_n = tile_n * BLOCK_N
    tokens = first_m + tl.arange(0, BLOCK_M)
    channels = first_n + tl.arange(0, BLOCK_N)
    there = (tokens < M)[:, None]
    token_rows = tl.minimum(tokens, M - 1)
    channel_rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    return first_m, tokens, token_rows, there, first_n, channels, channel_rows


@triton.jit
def operand_blocks(  # noqa: ANN201
    q_ptr,
    weight_ptr,
    first_m,
    first_n,
    token_rows,
    channel_rows,
    q_stride,
    weight_stride,
    BLOCK_K: tl.constexpr,
    CODES: tl.constexpr,
):
    """Where the rows of a program begin, and the places of a block of k from there.

    64 bits for a block's first element, 32 from there on: addresses are much of the arithmetic.
    """
    q_block = q_ptr + first_m.to(tl.int64) * q_stride
    q_places = (token_rows - first_m)[:, None] * q_stride + tl.arange(0, BLOCK_K)[None, :]
    weight_block = weight_ptr + first_n.to(tl.int64) * weight_stride
    weight_places = channel_rows[:, None] * weight_stride + tl.arange(0, BLOCK_K // CODES)[None, :]
    return q_block, q_places, weight_block, weight_places


@triton.jit
def load_block(  # noqa: ANN201
    q_block,
    q_places,
    weight_block,
    weight_places,
    there,
    k,
    end,
    BLOCK_K: tl.constexpr,
    CODES: tl.constexpr,
    MASKED: tl.constexpr,
    FEW: tl.constexpr,
):
    """``q`` and the words of the weight from ``k`` on; MASKED: zeros from ``end`` on."""
    if MASKED:
        ks = tl.arange(0, BLOCK_K)[None, :]
        words = tl.arange(0, BLOCK_K // CODES)[None, :]
        q = tl.load(q_block + k + q_places, mask=there & (ks + k < end), other=0)
        codes = tl.load(weight_block + k // CODES + weight_places, mask=CODES * words + k < end, other=0)
    else:
        if FEW:
            q = tl.load(q_block + k + q_places, mask=there, other=0)
        else:
            q = tl.load(q_block + k + q_places)
        codes = tl.load(weight_block + k // CODES + weight_places)
    return q, codes


@triton.jit
def store_transposed(y, bias_ptr, y_ptr, tokens, channels, there, N, y_stride, BIAS: tl.constexpr):  # noqa: ANN201
    """``y [BLOCK_N, BLOCK_M]`` plus the bias, rounded once to the dtype of the output, to where it belongs."""
    channel_mask = channels < N
    if BIAS:
        y = y + tl.load(bias_ptr + channels, mask=channel_mask, other=0.0)[:, None]
    to = y_ptr + tokens.to(tl.int64)[:, None] * y_stride + channels[None, :]
    tl.store(to, tl.trans(y.to(y_ptr.dtype.element_ty)), mask=there & channel_mask[None, :])


def words_of(weight: Tensor, features: int) -> tuple[Tensor, int]:
    """The weight uint8 ``[N, ceil(K / 2)]`` in the widest words that rows are whole numbers of, and the codes of one:
    four in int16 or two in uint8."""
    weight = weight.contiguous()
    if features % 4 == 0 and weight.data_ptr() % 2 == 0:
        return weight.view(torch.int16), 4
    return weight, 2
