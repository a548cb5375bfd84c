"""Calls of the CUDA kernels between the Linears of an attention block: rotary embedding, and attention of few queries.

Definitions in :mod:`qkernels._attention`, kernels in ``csrc/cuda/rotary.cu`` and ``attention.cu``.  As in
:mod:`qkernels.cuda`: on torch's current stream of the tensors' device, nothing is synchronised, calls can be captured.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import cuda
from .checks import DTYPE_CODES
from .cuda_w4 import workspace
from .eager import are_plain

__all__ = ["attention", "attention_serves", "rotary", "rotary_serves"]

MOST_QUERIES, MOST_TOKENS = 64, 16
"""Over one head of keys: four tiles of rows, which read the keys anew each.  Beyond them, and for the short inputs of
encoders, whose heads share nothing, torch's kernels are made."""

_SIZES = (64, 128)
_HALVES = (torch.bfloat16, torch.float16)


def rotary_serves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether :func:`rotary` takes these tensors."""
    if not q.is_cuda or q.dtype not in DTYPE_CODES or q.dim() != 4 or k.dim() != 4 or not q.numel() or not k.numel():
        return False
    batch, _, tokens, size = q.shape
    alike = all(x.dtype == q.dtype and x.device == q.device for x in (k, cos, sin))
    if not alike or size % 2 or not are_plain(q, k, cos, sin):
        return False
    if (k.shape[0], *k.shape[2:]) != (batch, tokens, size) or cuda.unavailable(q.device):
        return False
    angles = ((batch, tokens, size), (1, tokens, size))
    if cos.shape not in angles or sin.shape != cos.shape or sin.stride() != cos.stride():
        return False
    return all(x.stride(-1) == 1 and not x.is_neg() for x in (q, k, cos, sin))


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`qkernels.reference.rotary` of queries and keys in one launch.

    Args:
        q: float32, bfloat16 or float16 ``[B, H, T, D]``, features side by side, on one GPU with the others.
        k: ``[B, G, T, D]``.
        cos, sin: ``[B or 1, T, D]``, strided alike.

    Returns:
        Both in their shapes; in memory ``[B, T, H, D]`` and ``[B, T, G, D]``.
    """
    batch, heads, tokens, size = q.shape
    turned = [
        torch.empty((batch, tokens, x.shape[1], size), dtype=q.dtype, device=q.device).transpose(1, 2) for x in (q, k)
    ]
    with cuda._on(q.device):
        cuda._cuda.rotary(
            DTYPE_CODES[q.dtype],
            (batch, heads, k.shape[1], tokens, size),
            *(_heads(x) for x in (q, k, *turned)),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            cuda.overlaps(q.device),
            cuda._stream(q.device),
        )
    return turned[0], turned[1]


def attention_serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether :func:`attention` takes these tensors, and is meant for so few queries."""
    if not q.is_cuda or q.dtype not in _HALVES or any(x.dim() != 4 for x in (q, k, v)):
        return False
    batch, heads, tokens, size = q.shape
    length, key_heads = k.shape[2], k.shape[1]
    if size not in _SIZES or not q.numel() or not k.numel() or v.shape != k.shape or cuda.unavailable(q.device):
        return False
    if k.shape != (batch, key_heads, length, size) or heads % key_heads:
        return False
    if tokens > MOST_TOKENS or heads // key_heads * tokens > MOST_QUERIES:
        return False
    for x in (q, k, v):
        fits = x.dtype == q.dtype and x.device == q.device and not x.is_neg()
        if not fits or x.stride(3) != 1 or x.data_ptr() % 16 or any(step % 8 for step in x.stride()[:3]):
            return False
    if mask is None:
        return are_plain(q, k, v)
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.device != q.device or not are_plain(q, k, v, mask):
        return False
    broadcast = zip(mask.shape[:3], (batch, heads, tokens), strict=True)
    return mask.shape[3] == length and mask.stride(3) == 1 and all(n in (1, full) for n, full in broadcast)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """:func:`qkernels.reference.attention` of at most :data:`MOST_QUERIES` queries of a head of keys.

    Args:
        q: bfloat16 or float16 ``[B, H, T, D]``, D 64 or 128, features side by side, rows at multiples of 16 bytes.
        k, v: ``[B, G, L, D]``, likewise.
        mask: bool ``[B or 1, H or 1, T or 1, L]``, keys side by side, or None.
        scale: factor of the scores.

    Returns:
        ``[B, T, H, D]``, contiguous.
    """
    batch, heads, tokens, size = q.shape
    sizes, length = (batch, heads, k.shape[1], tokens, size), k.shape[2]
    out = torch.empty((batch, tokens, heads, size), dtype=q.dtype, device=q.device)
    plan = _plan(sizes, length, q.device.index or 0)
    stream = cuda._stream(q.device)
    with cuda._on(q.device):
        cuda._cuda.attention(
            DTYPE_CODES[q.dtype],
            sizes,
            length,
            _heads(q),
            _heads(k),
            _heads(v),
            _heads(out.transpose(1, 2)),
            (0, 0, 0, 0) if mask is None else _heads(mask),
            scale,
            plan,
            *(workspace(q.device, stream, *plan[2:]) if plan[2] else (0, 0)),
            cuda.overlaps(q.device),
            stream,
        )
    return out


@functools.lru_cache(maxsize=4096)
def _plan(sizes: tuple[int, ...], length: int, index: int) -> tuple[int, int, int, int]:
    """Parts of the keys, keys of a part, counters, partial sums."""
    sms = torch.cuda.get_device_properties(index).multi_processor_count
    return cuda._cuda.plan_attention(sizes, length, sms)


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """Address, and elements from one index to the next in the first three dimensions; 0 in those of one."""
    steps = (step if n > 1 else 0 for n, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    batch, head, token = steps
    return x.data_ptr(), batch, head, token
