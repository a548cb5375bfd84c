"""What ``qkernels bench --schemes attention`` times on a CPU: attention between the Linears of an encoder.

A shape KxN is K features in heads of 32 or of 64, and N tokens, which all see all; M is the batch.  Queries, keys and
values lie in memory as Linears leave them, and the result as the next one reads it.

    attention             qkernels' kernel
    attention, padded     the same behind a bool mask that hides the last eighth of the keys
    torch: sdpa           scaled_dot_product_attention and the copy to that memory
    torch: sdpa, padded   the same behind the mask

Every row's limit is that of its two products, ``4 M N^2 K`` operations at the fp32 peak of the fastest usable tier, or
of its bytes, read and written once.  Inputs stay where the caches leave them from call to call.  A result is timed once
it is right: within 2^-17 of the reference's norm, 2^-7 and 2^-10 where bfloat16 and float16 round it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qkernels import _C, cpu_attention, reference
from qkernels.bench.ceilings import Ceilings, limit_seconds
from qkernels.bench.cpu_runs import ERRORS, columns, fields, line, run_problems, set_up
from qkernels.bench.timing import Rotation, interleave

__all__ = ["ROWS", "SHAPES", "AttentionRow", "run_attention"]

SHAPES = ("768x16", "768x128", "768x512")
ROWS = (1, 8, 32)
_SIZES = (32, 64)


@dataclass(frozen=True)
class AttentionRow:
    """One contender at one shape and batch. Times in seconds; ``error``: of the result, relative to its norm."""

    contender: str
    ours: bool
    size: int
    k: int
    n: int
    m: int
    median: float
    best: float
    samples: int
    limit: float
    percent_of_limit: float
    gops: float
    error: float


Call = Callable[[], object]


def run_attention(args: argparse.Namespace) -> int:
    """Run what the command line asks for; 1 if one of our results was wrong, else 0."""
    if any(k % size for k, _ in args.shapes for size in _SIZES):
        raise ValueError(f"--schemes attention: expected shapes KxN with K a multiple of {max(_SIZES)}")
    set_up(args)
    notes: list[str] = []
    if not cpu_attention.available():
        notes.append(f"attention: the tier in use ({_C.info()['isa']}) has no kernel")
    problems = [(k, n, m, size) for k, n in args.shapes for m in args.rows for size in _SIZES]
    return run_problems(args, ("fp32",), problems, "K={} N={} M={}, heads of {}", _run, notes)


def _run(
    args: argparse.Namespace, k: int, n: int, m: int, size: int, ceilings: Ceilings, notes: list[str]
) -> list[AttentionRow]:
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(k * 7919 + n)
    q, key, value = (
        torch.randn(m, n, k // size, size, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
    )
    padding = (torch.arange(n) < max(1, n - n // 8)).view(1, 1, 1, n).expand(m, 1, n, n)
    timed: list[tuple[str, bool, Call, float]] = []
    for name, ours, call, mask in _contenders(q, key, value, padding):
        exact = reference.attention(q[:1], key[:1], value[:1], None if mask is None else mask[:1], size**-0.5)
        result = call()
        if not isinstance(result, Tensor):
            continue  # a tier, or a number of tokens, that is left to torch
        error = float((result[:1].double() - exact.double()).norm() / exact.double().norm())
        if ours and not error <= ERRORS[dtype]:
            notes.append(f"{name}: NOT RIGHT at K={k} N={n} M={m}, heads of {size}, so not timed")
            continue
        timed.append((name, ours, call, error))
    timings = interleave([Rotation([call]) for _, _, call, _ in timed], rounds=args.rounds, seconds=args.seconds)
    ceilings.refresh()
    operations, moved = 4.0 * m * n * n * k, 4.0 * q.numel() * dtype.itemsize
    limit = limit_seconds(moved, operations, ceilings.bandwidth(int(moved)), ceilings.peak("fp32"))
    rows = [
        AttentionRow(
            contender=name,
            ours=ours,
            size=size,
            k=k,
            n=n,
            m=m,
            **fields(timing, limit, operations),
            error=error,
        )
        for (name, ours, _, error), timing in zip(timed, timings, strict=True)
    ]
    print("\n" + _table(rows), flush=True)
    return rows


def _contenders(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> list[tuple[str, bool, Call, Tensor | None]]:
    """(name, ours, call, mask) of everyone."""
    scale = q.shape[-1] ** -0.5

    def torchs(mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()

    return [
        ("attention", True, lambda: cpu_attention.attention(q, k, v, None, scale), None),
        ("attention, padded", True, lambda: cpu_attention.attention(q, k, v, padding, scale), padding),
        ("torch: sdpa", False, lambda: torchs(None), None),
        ("torch: sdpa, padded", False, lambda: torchs(padding), padding),
    ]


def _table(rows: list[AttentionRow]) -> str:
    """The rows of one shape and batch; "x torch": as fast as torch's row of the same kind, times this."""
    first = rows[0]
    lines = [
        f"K={first.k} in heads of {first.size}, N={first.n} M={first.m}: limit {first.limit * 1e6:.1f} us",
        columns("torch"),
    ]
    for row in rows:
        kind = row.contender.partition(", ")[2]
        rivals = (other.median for other in rows if not other.ours and other.contender.partition(", ")[2] == kind)
        lines.append(line(row, next(rivals, None) if row.ours else None, row.error))
    return "\n".join(lines)
