"""Calls of the CUDA kernels between the Linears of an attention block: rotary embedding, a cache's new tokens, and
attention of few queries.

Definitions in :mod:`qkernels._attention`, kernels in ``csrc/cuda/rotary.cu``, ``cache.cu`` and ``attention.cu``.  As in
:mod:`qkernels.cuda`: on torch's current stream of the tensors' device, nothing is synchronised, calls can be captured.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from . import cuda
from ._head_layout import Steps, layout_of, rotary_layout_of, rotary_shapes, steps_of
from .checks import DTYPE_CODES
from .cuda_w4 import workspace
from .eager import are_plain

__all__ = ["append", "attention", "rotary"]

MOST_QUERIES, MOST_TOKENS = 64, 16
"""Over one head of keys: four tiles of rows, which read the keys anew each.  Beyond them, and for the short inputs of
encoders, whose heads share nothing, torch's kernels are made."""

_SIZES = (64, 128)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """:func:`qkernels.reference.rotary` of queries and keys in one launch; None where the kernel does not serve.

    Args:
        q: float32, bfloat16 or float16 ``[B, H, T, D]``, features side by side, on one GPU with the others.
        k: ``[B, G, T, D]``.
        cos, sin: ``[B or 1, T, D]``, strided alike.

    Returns:
        Both in their shapes; in memory ``[B, T, H, D]`` and ``[B, T, G, D]``.
    """
    if not q.is_cuda or not k.get_device() == cos.get_device() == sin.get_device() == q.get_device():
        return None
    known, device = rotary_shapes(q, k, cos, sin), q.device
    way = None if known is None else _rotary_way(*known[1], device)
    if known is None or way is None:
        return None
    run, of_q, of_k = way
    turned = q.new_empty_strided(q.shape, of_q), q.new_empty_strided(k.shape, of_k)
    addresses = q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr()
    cuda.launch(device, run, known[0], *addresses, turned[0].data_ptr(), turned[1].data_ptr())
    return turned


@functools.lru_cache(maxsize=4096)
def _rotary_way(
    q: Steps, q_steps: Steps, k: Steps, k_steps: Steps, angles: Steps, angle_steps: Steps, device: torch.device
) -> tuple[Any, Steps, Steps] | None:
    """For tensors of these shapes and strides: what the module runs, and the strides of its outputs; None where it does
    not take them."""
    layout = rotary_layout_of(q, q_steps, k, k_steps, angles, angle_steps)
    if layout is None or cuda.unavailable(device):
        return None
    places = layout.q, layout.k, steps_of(q, layout.q_out), steps_of(k, layout.k_out), layout.angles
    return cuda._cuda.Rotary(layout.sizes, *places, cuda.overlaps(device)).run, layout.q_out, layout.k_out


def append(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> bool:
    """:func:`qkernels.reference.append` in one launch; False, and nothing done, where the kernel does not serve.

    Args:
        keys, values: ``[B, G, L, D]`` and ``[B, G, L, E]`` of any dtype, features side by side, heads of a multiple of
            16 bytes, on one GPU with the others.
        length: int64.  More tokens than the cache has room for stop the kernel with an assertion, as they stop torch's.
        key, value: of the cache's dtypes.
    """
    if not key.is_cuda or not are_plain(keys, values, length, key, value):
        return False
    device, index = key.device, key.get_device()
    if not keys.get_device() == values.get_device() == length.get_device() == value.get_device() == index:
        return False
    if length.dtype != torch.int64 or length.dim() or keys.dtype != key.dtype or values.dtype != value.dtype:
        return False
    places = (key, value, keys, values)
    if any(x.is_neg() or x.is_conj() for x in places):
        return False
    addresses = [x.data_ptr() for x in places]
    if any(at % 16 for at in addresses):
        return False
    layouts = tuple((x.shape, x.stride()) for x in places)
    run = _append_way(layouts, key.element_size(), value.element_size(), device)
    if run is None:
        return False
    counter, _ = workspace(device, cuda._stream(device), 1, 0)
    cuda.launch(device, run, *addresses, length.data_ptr(), counter)
    return True


@functools.lru_cache(maxsize=4096)
def _append_way(layouts: tuple[tuple[Steps, Steps], ...], of_key: int, of_value: int, device: torch.device) -> Any:
    """For key, value, keys and values of these shapes and strides, and bytes of an element: what the module runs; None
    where it does not take them."""
    (key, _), (value, _), (keys, _), (values, _) = layouts
    if any(len(shape) != 4 or 0 in shape or steps[3] != 1 for shape, steps in layouts) or cuda.unavailable(device):
        return None
    batch, heads, tokens, size = key
    room = batch, heads, keys[2]
    if value[:3] != key[:3] or keys != (*room, size) or values != (*room, value[3]):
        return None
    elements = of_key, of_value, of_key, of_value
    places = [
        tuple(step * element for step in steps_of(*layout)) for layout, element in zip(layouts, elements, strict=True)
    ]
    bytes_of = size * of_key, value[3] * of_value
    if any(step % 16 for step in (*bytes_of, *itertools.chain(*places))):
        return None
    sizes = (batch, heads, tokens, *bytes_of, keys[2])
    return cuda._cuda.Append(sizes, *places, cuda.overlaps(device)).run


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """:func:`qkernels.reference.attention` of few queries; None where the kernel does not serve, or is not meant to.

    Args:
        q: bfloat16 or float16 ``[B, H, T, D]``, D 64 or 128, features side by side, rows at multiples of 16 bytes; at
            most :data:`MOST_QUERIES` of a head of keys and :data:`MOST_TOKENS` tokens.
        k, v: ``[B, G, L, D]``, likewise.
        mask: bool ``[B or 1, H or 1, T or 1, L]``, keys side by side, or None.
        scale: factor of the scores.

    Returns:
        ``[B, T, H, D]``, contiguous.
    """
    dtype, code = q.dtype, DTYPE_CODES.get(q.dtype)
    if not q.is_cuda or not code or not are_plain(q, k, v, *(() if mask is None else (mask,))):
        return None
    device, index = q.device, q.get_device()
    if k.dtype != dtype or v.dtype != dtype or k.get_device() != index or v.get_device() != index:
        return None
    of_mask = None
    if mask is not None:
        if mask.dtype != torch.bool or mask.get_device() != index:
            return None
        of_mask = mask.shape, mask.stride()
    at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if (at_q | at_k | at_v) % 16 or q.is_neg() or k.is_neg() or v.is_neg():
        return None
    way = _attention_way(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), of_mask, device)
    if way is None:
        return None
    run, of_out, counters, floats = way
    out = q.new_empty(of_out)
    memory = workspace(device, cuda._stream(device), counters, floats) if counters else (0, 0)
    at_mask = 0 if mask is None else mask.data_ptr()
    cuda.launch(device, run, code, at_q, at_k, at_v, at_mask, out.data_ptr(), scale, *memory)
    return out


@functools.lru_cache(maxsize=4096)
def _attention_way(
    q: Steps,
    q_steps: Steps,
    k: Steps,
    k_steps: Steps,
    v: Steps,
    v_steps: Steps,
    of_mask: tuple[Steps, Steps] | None,
    device: torch.device,
) -> tuple[Any, Steps, int, int] | None:
    """For tensors of these shapes and strides: what the module runs, the shape of its output, and the counters and
    partial sums it needs; None where it does not take them."""
    layout = layout_of(q, q_steps, k, k_steps, v, v_steps, of_mask)
    if layout is None or cuda.unavailable(device):
        return None
    batch, heads, key_heads, tokens, length, size, *places, mask_steps = layout
    if size not in _SIZES or tokens > MOST_TOKENS or heads // key_heads * tokens > MOST_QUERIES:
        return None
    if any(step % 8 for steps in (q_steps, k_steps, v_steps) for step in steps[:3]):
        return None
    if of_mask is not None and (of_mask[0][3] != length or of_mask[1][3] != 1):
        return None
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    sizes, of_out = (batch, heads, key_heads, tokens, size), (batch, tokens, heads, size)
    plan = cuda._cuda.plan_attention(sizes, length, cuda.capability(device.index or 0), sms)
    out_steps = steps_of(q, (tokens * heads * size, size, heads * size, 1))
    way = cuda._cuda.Attention(sizes, length, *places, out_steps, mask_steps, plan, cuda.overlaps(device))
    return way.run, of_out, plan[2], plan[3]
