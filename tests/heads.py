"""Queries, keys and values for tests of attention, and the bound of qkernels/_attention.py."""

from __future__ import annotations

import torch
from helpers import seeded
from torch import Tensor

from qkernels import _C, cpu_attention, reference

UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What rounding to a dtype adds; that of fp32 is in the bound of the sums."""


def heads(batch: int, count: int, tokens: int, size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[B, H, T, D]`` in memory as a Linear leaves it."""
    return seeded(batch, tokens, count, size, seed=seed).to(dtype).transpose(1, 2)


def three(
    batch: int, count: int, groups: int, tokens: int, length: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        heads(batch, count, tokens, size, 0, dtype),
        heads(batch, groups, length, size, 1, dtype),
        heads(batch, groups, length, size, 2, dtype),
    )


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False) -> Tensor:
    """Runs the kernel and compares it with the reference within the derived bound."""
    got = cpu_attention.attention(q, k, v, mask, scale, causal=causal)
    assert got is not None
    assert _C.last_kernel().startswith("attention.")
    wide = q.double(), k.double(), v.double()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    wanted = reference.attention(*wide, mask, scale, causal=causal)
    assert got.shape == wanted.shape
    assert got.dtype == q.dtype
    assert got.is_contiguous()
    shared = q.shape[1] // k.shape[1]
    size, length = q.shape[-1], k.shape[2]
    scores = wide[0].abs() @ wide[1].repeat_interleave(shared, 1).abs().transpose(-1, -2) * abs(scale)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.masked_fill(mask <= -(2.0**100), 0.0).abs()
    largest = scores.amax(-1).transpose(1, 2).unsqueeze(-1)
    weighed = reference.attention(wide[0], wide[1], wide[2].abs(), mask, scale, causal=causal)
    bound = (2 * (size + 8) * largest + 2 * length + 16) * 2.0**-24 * weighed
    if _C.last_kernel() == "attention.amx" and q.dtype == torch.bfloat16:
        bound = bound + 2.0**-15 * weighed
    bound = bound + UNIT[q.dtype] * (wanted.abs() + bound) + length * 2.0**-126 * wide[2].abs().nan_to_num().max()
    error = (got.double() - wanted).abs()
    numbers = ~wanted.isnan()
    assert torch.equal(got.isnan(), ~numbers)
    worst = (error - bound)[numbers]
    assert bool((worst <= 0).all()), f"off by {error[numbers].max():.3g}, beyond the bound by {worst.max():.3g}"
    return got
