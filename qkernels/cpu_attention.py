"""Calls of the CPU kernels between the Linears of an attention block: rotary embedding, and attention.

Definitions in :mod:`qkernels._attention`, kernels in ``csrc/cpu/rotary_impl.h``, which every tier has, and
``attention_impl.h``: the tiers with vectors have it, AMX another one for bfloat16, the scalar tier none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import _C
from ._head_layout import Steps, layout_of, rotary_layout_of, rotary_shapes
from .checks import DTYPE_CODES
from .eager import are_plain

__all__ = ["attention", "available", "rotary"]

MOST_FEATURES = 256
"""Of a head: what the scratch buffers of the kernel are made for."""

FEWEST_QUERIES = 8
"""Below, packing a head of keys takes longer than the products that it makes fast, but on AVX2 for 16-bit inputs, which
torch has no fast products of there, and where queries share keys, which transformers copy for each of them first."""

FEWEST_SHARING = 3
"""Heads of float32 queries with one of keys, where there are fewer queries than that."""

_num_threads = torch.get_num_threads


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """:func:`qkernels.reference.rotary` of queries and keys, to the bit; None where the kernel does not serve.

    Args:
        q: float32, bfloat16 or float16 ``[B, H, T, D]``, features side by side, on the CPU with the others.
        k: ``[B, G, T, D]``.
        cos, sin: ``[B or 1, T, D]``, strided alike.

    Returns:
        Both in their shapes; in memory ``[B, T, H, D]`` and ``[B, T, G, D]``.
    """
    known = rotary_shapes(q, k, cos, sin) if q.is_cpu and k.is_cpu and cos.is_cpu and sin.is_cpu else None
    way = None if known is None else _rotary_way(*known[1], known[0])
    if way is None:
        return None
    run, of_q, of_k = way
    turned = q.new_empty_strided(q.shape, of_q), q.new_empty_strided(k.shape, of_k)
    addresses = q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr()
    run(*addresses, turned[0].data_ptr(), turned[1].data_ptr(), _num_threads())
    return turned


@functools.lru_cache(maxsize=4096)
def _rotary_way(
    q: Steps, q_steps: Steps, k: Steps, k_steps: Steps, angles: Steps, angle_steps: Steps, code: int
) -> tuple[Callable[..., None], Steps, Steps] | None:
    """For tensors of these shapes and strides: what the module runs, and the strides of its outputs; None where it does
    not take them."""
    layout = rotary_layout_of(q, q_steps, k, k_steps, angles, angle_steps)
    if layout is None:
        return None
    return _C.Rotary(layout.sizes, layout.q, layout.k, layout.angles, code).run, layout.q_out, layout.k_out


def available() -> bool:
    """Whether the tier in use has the kernel."""
    return _C.has_attention()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False
) -> Tensor | None:
    """:func:`qkernels.reference.attention`; None where the kernel does not serve, or is not meant to.

    Args:
        q: float32, bfloat16 or float16 ``[B, H, T, D]``, D at most :data:`MOST_FEATURES`, features side by side, T at
            least :data:`FEWEST_QUERIES`, or fewer where that says so.
        k, v: ``[B, G, L, D]``, likewise.
        mask: bool, or of the dtype of ``q``, ``[B or 1, H or 1, T or 1, L or 1]``; or None.
        scale: factor of the scores.
        causal: query t sees keys up to t.

    Returns:
        ``[B, T, H, D]``, contiguous.
    """
    if not q.is_cpu or q.dim() != 4 or k.dim() != 4 or not (_worth(q, k) and available()):
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
    addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), at_mask, out.data_ptr()
    return out if native.run(*addresses, scale, _num_threads()) else None


def _worth(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel is faster than what transformers do without it."""
    _, heads, tokens, _ = q.shape
    if tokens >= FEWEST_QUERIES:
        return True
    return _C.has_attention_of_few() and (q.dtype != torch.float32 or heads >= FEWEST_SHARING * k.shape[1])


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
    layout = layout_of(q, q_steps, k, k_steps, v, v_steps, of_mask)
    if layout is None or layout.size > MOST_FEATURES:
        return None
    return _C.Attention(layout[:6], *layout[6:], code, kind, causal)
