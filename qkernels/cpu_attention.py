"""Calls of the CPU kernel of attention.

Definition in :mod:`qkernels._attention`, kernel in ``csrc/cpu/attention_impl.h``: the tiers with vectors have it, the
scalar tier does not.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _C
from .checks import DTYPE_CODES
from .eager import are_plain

__all__ = ["attention", "available"]

MOST_FEATURES = 256
"""Of a head: what the scratch buffers of the kernel are made for."""

FEWEST_QUERIES = 8
"""Below, packing a head of keys takes longer than the products that it makes fast."""

Steps = tuple[int, ...]

_num_threads = torch.get_num_threads


def available() -> bool:
    """Whether the tier in use has the kernel."""
    return _C.has_attention()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False
) -> Tensor | None:
    """:func:`qkernels.reference.attention`; None where the kernel does not serve, or is not meant to.

    Args:
        q: float32, bfloat16 or float16 ``[B, H, T, D]``, D at most :data:`MOST_FEATURES`, features side by side, T at
            least :data:`FEWEST_QUERIES`.
        k, v: ``[B, G, L, D]``, likewise.
        mask: bool, or of the dtype of ``q``, ``[B or 1, H or 1, T or 1, L or 1]``; or None.
        scale: factor of the scores.
        causal: query t sees keys up to t.

    Returns:
        ``[B, T, H, D]``, contiguous.
    """
    if q.device.type != "cpu" or not available():
        return None
    if not are_plain(q, k, v, *(() if mask is None else (mask,))):
        return None
    dtype, code = q.dtype, DTYPE_CODES.get(q.dtype)
    if code is None or k.dtype != dtype or v.dtype != dtype or q.is_neg() or k.is_neg() or v.is_neg():
        return None
    if k.device != q.device or v.device != q.device:
        return None
    of_mask, kind = None, 0
    if mask is not None:
        if mask.dtype not in (torch.bool, dtype) or mask.device != q.device or mask.dim() != 4 or mask.is_neg():
            return None
        length = k.shape[2]
        if mask.shape[3] not in (1, length):
            return None
        if mask.stride(3) != 1 or mask.shape[3] != length:
            mask = mask.expand(*mask.shape[:3], length).contiguous()
        of_mask, kind = (mask.shape, mask.stride()), 1 if mask.dtype == torch.bool else 2
    native = _native(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), of_mask, code, kind, causal)
    if native is None:
        return None
    batch, heads, tokens, size = q.shape
    out = q.new_empty(batch, tokens, heads, size)
    at_mask = 0 if mask is None else mask.data_ptr()
    native.run(q.data_ptr(), k.data_ptr(), v.data_ptr(), at_mask, out.data_ptr(), scale, _num_threads())
    return out


@functools.lru_cache(maxsize=4096)
def _native(
    q: Steps,
    q_steps: Steps,
    k: Steps,
    k_steps: Steps,
    v: Steps,
    v_steps: Steps,
    of_mask: tuple[Steps, Steps] | None,
    code: int,
    kind: int,
    causal: bool,
) -> _C.Attention | None:
    """The binding's object for tensors of these shapes and strides; None where the kernel does not take them."""
    if len(q) != 4 or len(k) != 4 or v != k or not all((*q, *k)):
        return None
    batch, heads, tokens, size = q
    key_heads, length = k[1], k[2]
    if k != (batch, key_heads, length, size) or heads % key_heads:
        return None
    if size > MOST_FEATURES or tokens < FEWEST_QUERIES:
        return None
    if any(steps[3] != 1 for steps in (q_steps, k_steps, v_steps)):
        return None
    mask_steps = (0, 0, 0)
    if of_mask is not None:
        mask, steps = of_mask
        if any(n not in (1, full) for n, full in zip(mask[:3], (batch, heads, tokens), strict=True)):
            return None
        mask_steps = _steps(mask, steps)
    sizes = (batch, heads, key_heads, tokens, length, size)
    of_q, of_k, of_v = _steps(q, q_steps), _steps(k, k_steps), _steps(v, v_steps)
    return _C.Attention(sizes, of_q, of_k, of_v, mask_steps, code, kind, causal)


def _steps(shape: Steps, strides: Steps) -> tuple[int, int, int]:
    """Elements from one index to the next in the first three dimensions; 0 in those of one."""
    batch, head, token = (step if n > 1 else 0 for n, step in zip(shape[:3], strides[:3], strict=True))
    return batch, head, token
