"""Shapes and strides of queries, keys and values, as the kernels of attention are told of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .checks import DTYPE_CODES
from .eager import are_plain

__all__ = ["HeadLayout", "RotaryLayout", "Steps", "layout_of", "rotary_layout_of", "rotary_shapes", "steps_of"]

Steps = tuple[int, ...]
Place = tuple[int, int, int]


class HeadLayout(NamedTuple):
    """Sizes, and elements from one batch, head and token to the next."""

    batch: int
    heads: int
    key_heads: int
    tokens: int
    length: int
    size: int
    q: Place
    k: Place
    v: Place
    mask: Place  # zeros where there is none


def layout_of(
    q: Steps, q_steps: Steps, k: Steps, k_steps: Steps, v: Steps, v_steps: Steps, of_mask: tuple[Steps, Steps] | None
) -> HeadLayout | None:
    """Of tensors of these shapes and strides; None where they are no attention's, or features lie apart.

    Args:
        q: ``[B, H, T, D]``, nothing empty; k, v: ``[B, G, L, D]``, H a multiple of G.
        of_mask: ``[B or 1, H or 1, T or 1, any]`` and its strides, or None.
    """
    if len(q) != 4 or len(k) != 4 or v != k or not all((*q, *k)):
        return None
    batch, heads, tokens, size = q
    key_heads, length = k[1], k[2]
    if k != (batch, key_heads, length, size) or heads % key_heads:
        return None
    if any(steps[3] != 1 for steps in (q_steps, k_steps, v_steps)):
        return None
    mask_steps: Place = (0, 0, 0)
    if of_mask is not None:
        mask, steps = of_mask
        if len(mask) != 4 or any(n not in (1, full) for n, full in zip(mask, (batch, heads, tokens), strict=False)):
            return None
        mask_steps = steps_of(mask, steps)
    places = steps_of(q, q_steps), steps_of(k, k_steps), steps_of(v, v_steps), mask_steps
    return HeadLayout(batch, heads, key_heads, tokens, length, size, *places)


class RotaryLayout(NamedTuple):
    """Sizes, and elements from one batch, head and token to the next; strides of the outputs ``[B, T, heads, D]``."""

    sizes: tuple[int, int, int, int, int]  # batch, heads of queries, heads of keys, tokens, features
    q: Place
    k: Place
    angles: Place
    q_out: Steps
    k_out: Steps


def rotary_shapes(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[int, tuple[Steps, Steps, Steps, Steps, Steps, Steps]] | None:
    """The dtype's code, and what :func:`rotary_layout_of` asks of tensors on one device; None where they are not of one
    dtype that kernels read, not ordinary ones, or the angles are not strided alike."""
    dtype, code = q.dtype, DTYPE_CODES.get(q.dtype)
    if code is None or not are_plain(q, k, cos, sin) or not k.dtype == cos.dtype == sin.dtype == dtype:
        return None
    if q.is_neg() or k.is_neg() or cos.is_neg() or sin.is_neg():
        return None
    angles, steps = cos.shape, cos.stride()
    if sin.shape != angles or sin.stride() != steps:
        return None
    return code, (q.shape, q.stride(), k.shape, k.stride(), angles, steps)


def rotary_layout_of(
    q: Steps, q_steps: Steps, k: Steps, k_steps: Steps, angles: Steps, angle_steps: Steps
) -> RotaryLayout | None:
    """Of tensors of these shapes and strides; None where they are no rotary embedding's, or features lie apart.

    Args:
        q: ``[B, H, T, D]``, nothing empty, D even; k: ``[B, G, T, D]``; angles: ``[B or 1, T, D]``.
    """
    if len(q) != 4 or len(k) != 4 or not all((*q, *k)):
        return None
    batch, heads, tokens, size = q
    if (k[0], *k[2:]) != (batch, tokens, size) or size % 2 or angles not in ((batch, tokens, size), (1, tokens, size)):
        return None
    if q_steps[3] != 1 or k_steps[3] != 1 or angle_steps[2] != 1:
        return None
    of_angles = (angle_steps[0] if angles[0] > 1 else 0, 0, angle_steps[1])
    outputs = [(tokens * n * size, size, n * size, 1) for n in (heads, k[1])]
    return RotaryLayout(
        (batch, heads, k[1], tokens, size), steps_of(q, q_steps), steps_of(k, k_steps), of_angles, *outputs
    )


def steps_of(shape: Steps, strides: Steps) -> Place:
    """Elements from one index to the next in the first three dimensions; 0 in those of one."""
    batch, head, token = (step if n > 1 else 0 for n, step in zip(shape[:3], strides[:3], strict=True))
    return batch, head, token
