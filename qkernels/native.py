"""Calls of the binding: from tensors that were checked to addresses.

Nothing is checked here that a layer has checked before; the operators check for callers who bring their own tensors.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _C
from .checks import DTYPE_CODES, row_stride

__all__ = [
    "ALIGNMENT",
    "copy_packed",
    "empty_packed",
    "native_linear_w8a8",
    "pack_w8",
    "run_native",
    "run_native_plus",
    "unpack_w8",
]

ALIGNMENT = 64
"""Bytes; packed weights begin at a multiple of it."""

_OWN_PAGES = 4 << 20  # bytes

_CPU = torch.device("cpu")
_num_threads = torch.get_num_threads
_new_empty = Tensor.new_empty


def empty_packed(count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized ``[count]`` on the CPU for packed weights.

    From 4 MiB on it has pages of its own, and huge ones where the system has them (Linux, ``madvise``): a layer of one
    row reads its weights once from beginning to end, and prefetches end where a page does.
    """
    size = count * dtype.itemsize
    if size < _OWN_PAGES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device=_CPU)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def copy_packed(packed: Tensor) -> Tensor | None:
    """A copy of packed weights in pages as :func:`empty_packed` has them; None where they need none of their own."""
    if type(packed) is not Tensor or packed.device != _CPU or packed.nbytes < _OWN_PAGES:
        return None
    if not packed.is_contiguous() or packed.is_shared() or packed.untyped_storage().nbytes() != packed.nbytes:
        return None
    return empty_packed(packed.numel(), packed.dtype).view(packed.shape).copy_(packed)


def pack_w8(weight: Tensor, packed: Tensor | None = None, colsum: Tensor | None = None) -> tuple[Tensor, Tensor, bool]:
    """Canonical weight to the layout of the CPU kernels.

    Args:
        weight: int8 ``[N, K]`` on the CPU, contiguous.
        packed, colsum: written in place where given.

    Returns:
        packed int8 ``[ceil(N / 64) * ceil(K / 64) * 4096]``, colsum int32 ``[N]`` (the sum of each row), and whether a
        -128 occurs.
    """
    rows, features = weight.shape
    if packed is None:
        packed = empty_packed(_C.packed_w8_bytes(rows, features), torch.int8)
    if colsum is None:
        colsum = torch.empty(rows, dtype=torch.int32, device=_CPU)
    minus = _C.pack_w8(weight.data_ptr(), rows, features, packed.data_ptr(), colsum.data_ptr(), _num_threads())
    return packed, colsum, minus


def unpack_w8(packed: Tensor, rows: int, features: int) -> Tensor:
    """The canonical int8 ``[rows, features]`` that :func:`pack_w8` packed, without loss."""
    weight = torch.empty((rows, features), dtype=torch.int8, device=packed.device)
    if weight.device.type == "cpu":
        _C.unpack_w8(packed.data_ptr(), rows, features, weight.data_ptr(), _num_threads())
    return weight


@functools.lru_cache(maxsize=4096)
def native_linear_w8a8(
    packed: int,
    colsum: int,
    weight_scale: int,
    bias: int,
    rows: int,
    features: int,
    has_minus128: bool,
    act_symmetric: bool,
    act_scale: float,
    act_zero_point: int,
    inv_smooth: int,
    function: int = 0,
) -> _C.LinearW8A8:
    """The binding's object for these addresses (0: absent).  It holds only its arguments, so it can be shared."""
    return _C.LinearW8A8(
        packed,
        colsum,
        weight_scale,
        bias,
        rows,
        features,
        has_minus128,
        act_symmetric,
        act_scale,
        act_zero_point,
        inv_smooth,
        function,
    )


def run_native(native: Callable[..., None], x: Tensor, features: int, rows: int, out_dtype: torch.dtype) -> Tensor:
    """Checked input ``x [..., features]`` on the CPU through a ``LinearW8A8.run``: ``[..., rows]`` in ``out_dtype``."""
    return _run(native, x, features, rows, out_dtype)


def run_native_plus(
    native: Any, x: Tensor, features: int, rows: int, out_dtype: torch.dtype, residual: Tensor
) -> Tensor:
    """:func:`run_native` of an object of the binding, plus a checked residual ``[..., rows]`` of ``out_dtype``."""
    residual, stride = _strided_rows(residual, rows)
    return _run(native.run_plus, x, features, rows, out_dtype, residual.data_ptr(), stride)


def _strided_rows(x: Tensor, features: int) -> tuple[Tensor, int]:
    """``x [..., features]``, or a copy, and the elements between its rows."""
    if x.is_contiguous():
        return x, features
    stride = row_stride(x)
    if stride is None or x.is_neg():
        return x.resolve_neg().contiguous(), features
    return x, stride


def _run(
    native: Callable[..., None], x: Tensor, features: int, rows: int, out_dtype: torch.dtype, *residual: int
) -> Tensor:
    x, stride = _strided_rows(x, features)
    shape = x.shape
    out = _new_empty(x, *shape[:-1], rows, dtype=out_dtype)
    count = x.numel() // features
    if count:
        native(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            count,
            stride,
            out.data_ptr(),
            DTYPE_CODES[out_dtype],
            rows,
            _num_threads(),
            *residual,
        )
    return out
