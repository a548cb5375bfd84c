"""Sums of activations over groups of k in Triton, which weights with a minimum are multiplied by.

sums [G, M] = sum over k of group g of x [M, K], in float32 of floating-point x, in int32 of int8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["group_sums"]

BLOCK_ROWS = 16
MOST_K = 256


@triton.jit
def _sums_kernel(x_ptr, sums_ptr, M, x_stride, K, GROUP, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1)
    end = tl.minimum((group + 1) * GROUP, K)
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    row = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    total = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=dtype)
    for k in range(group * GROUP, end, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        total += tl.load(row + ks[None, :], mask=(rows < M)[:, None] & (ks < end)[None, :], other=0).to(dtype)
    tl.store(sums_ptr + group.to(tl.int64) * M + rows, tl.sum(total, axis=1), mask=rows < M)


def group_sums(x: Tensor, group: int) -> Tensor:
    """``[ceil(K / group), M]``: the sums of ``x [M, K]``, rows of contiguous values, over groups of ``group`` k."""
    rows, features = x.shape
    groups = triton.cdiv(features, group)
    dtype = torch.float32 if x.dtype.is_floating_point else torch.int32
    sums = torch.empty((groups, rows), dtype=dtype, device=x.device)
    _sums_kernel[(triton.cdiv(rows, BLOCK_ROWS), groups)](
        x,
        sums,
        rows,
        x.stride(0),
        features,
        group,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_K=min(MOST_K, triton.next_power_of_2(group)),
        num_warps=4,
    )
    return sums
