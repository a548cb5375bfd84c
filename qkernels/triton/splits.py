"""Sums over the parts of K that several programs of a GEMM share, in their order: runs repeat to the bit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_splits"]

BLOCK = 512


@triton.jit
def _add_kernel(sums_ptr, y_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.load(sums_ptr + places, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums_ptr + split * size.to(tl.int64) + places, mask=inside, other=0.0)
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=inside)


def add_splits(sums: Tensor, out: Tensor) -> None:
    """``out [M, N]`` from float32 ``sums [S, M, N]``, both contiguous."""
    size = out.numel()
    _add_kernel[(triton.cdiv(size, BLOCK),)](sums, out, size, SPLITS=sums.shape[0], BLOCK=BLOCK, num_warps=4)
