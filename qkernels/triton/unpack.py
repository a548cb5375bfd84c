"""Codes in the registers of a block, as operands of ``tl.dot``.

Everything is arithmetic on words of 32 bits that hold the codes of neighbouring k, so that a word comes out as the
register of an operand that the tensor cores take: neither shared memory nor a permutation lies between.  A 16-bit
float with the bits ``0x4300 + c`` (bfloat16) or ``0x6400 + c`` (float16) is ``128 + c`` or ``1024 + c`` exactly, for c
below 128 or 1024; subtracting what is too much is exact as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["bytes_to_float", "halves", "multiplied_nibbles", "nibbles_to_float", "nibbles_to_int8", "quarters"]


@triton.jit
def halves(word):  # noqa: ANN201 (what Triton makes of it)
    """int32 ``[R, C]`` as int16 ``[R, 2 * C]``, low half first."""
    return tl.interleave(word.to(tl.int16), (word >> 16).to(tl.int16))


@triton.jit
def quarters(word):  # noqa: ANN201
    """int32 ``[R, C]`` as int8 ``[R, 4 * C]``, lowest byte first."""
    even = tl.interleave(word.to(tl.int8), (word >> 16).to(tl.int8))
    odd = tl.interleave((word >> 8).to(tl.int8), (word >> 24).to(tl.int8))
    return tl.interleave(even, odd)


@triton.jit
def nibbles_to_float(codes, zero, ZERO: tl.constexpr, dtype: tl.constexpr):  # noqa: ANN201
    """uint8 ``[R, C]`` of two codes each as ``code - zero`` in ``dtype [R, 2 * C]``.

    Args:
        zero: ``[R, 1]`` in ``dtype``, integers up to 255; not looked at where ZERO is not None.
        ZERO: the zero point of all rows.
    """
    if dtype == tl.float32:
        wide = codes.to(tl.int32)
        values = tl.interleave(wide & 15, wide >> 4).to(tl.float32)
        if ZERO is None:
            values = values - zero
        else:
            values = values - ZERO
    else:
        # Codes of a pair 12 bits further apart: one in each half.
        base: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        exponents: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        pair = ((codes.to(tl.int32) * 0x1001) & 0x000F000F) | exponents
        values = halves(pair).to(dtype, bitcast=True)
        if ZERO is None:
            values = (values - base).to(dtype) - zero
        else:
            values = (values - (base + ZERO)).to(dtype)
    return values


@triton.jit
def bytes_to_float(codes, PAIRS: tl.constexpr, dtype: tl.constexpr):  # noqa: ANN201
    """int8 codes ``[R, C]`` in ``dtype``; PAIRS: int16 ``[R, C]`` of two codes each, as ``[R, 2 * C]``."""
    if PAIRS:
        spread = codes.to(tl.int32) & 0xFFFF
        spread = spread | (spread << 8)
        if dtype == tl.bfloat16:
            # (128 + low seven bits) - (128 + sign bit)
            low = halves((spread & 0x007F007F) | 0x43004300).to(tl.bfloat16, bitcast=True)
            sign = halves((spread & 0x00800080) | 0x43004300).to(tl.bfloat16, bitcast=True)
            values = low - sign
        else:
            biased = halves((spread & 0x00FF00FF) ^ 0x64806480).to(tl.float16, bitcast=True)  # 1024 + 128 + code
            values = (biased - 1152.0).to(tl.float16)
    else:
        values = codes.to(tl.float32).to(dtype)
    return values


@triton.jit
def _quads(codes):
    """int16 of four codes as int32 with one in each byte, lowest first."""
    spread = codes.to(tl.int32) & 0xFFFF
    spread = spread | (spread << 8)
    return (spread & 0x000F000F) | ((spread << 4) & 0x0F000F00)


@triton.jit
def nibbles_to_int8(codes, zeros, QUADS: tl.constexpr):  # noqa: ANN201
    """uint8 codes ``[R, C]``, two a byte, as int8 ``code - zero [R, 2 * C]``; QUADS: int16 of four, ``[R, 4 * C]``.

    Args:
        zeros: int32 ``[R, 1]``, the zero point in each of its bytes, 0 to 128.
    """
    if QUADS:
        # No byte borrows from the next one: 128 + code >= zero.
        values = quarters(((_quads(codes) | -2139062144) - zeros) ^ -2139062144)  # 0x80808080
    else:
        zero = (zeros & 0xFF).to(tl.int8)
        values = tl.interleave((codes & 15).to(tl.int8), (codes >> 4).to(tl.int8)) - zero
    return values


@triton.jit
def multiplied_nibbles(codes, multiplier, offsets, QUADS: tl.constexpr):  # noqa: ANN201
    """uint8 codes ``[R, C]``, two a byte, as int8 ``multiplier * code + offset - 128 [R, 2 * C]``; QUADS as above.

    Args:
        multiplier: int32 ``[R, 1]``.
        offsets: int32 ``[R, 1]``, the offset in each of its bytes, with ``multiplier * code + offset`` from 0 to 255.
    """
    if QUADS:
        # No byte carries into the next one: a multiplication, an addition and a flip of signs for four weights.
        values = quarters((_quads(codes) * multiplier + offsets) ^ -2139062144)  # 0x80808080
    else:
        wide = codes.to(tl.int32)
        values = (tl.interleave(wide & 15, wide >> 4) * multiplier + (offsets & 0xFF) - 128).to(tl.int8)
    return values
