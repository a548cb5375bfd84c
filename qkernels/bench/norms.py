"""What ``qkernels bench --schemes norm`` times on a CPU: norms between the Linears of a model.

A shape KxN is K features and N tokens; M is the batch, so that M N rows are normalized.

    layer norm            qkernels' kernel, with weight and bias
    RMS norm              the same with a weight alone
    torch: layer norm     functional.layer_norm
    torch: RMS norm       functional.rms_norm
    models: RMS norm      the operators that decoders of transformers call in its place

Every row's limit is that of its bytes, read and written once: rows stay where the caches leave them from call to call.
A result is timed once it is right: within 2^-17 of the reference's norm, 2^-7 and 2^-10 where bfloat16 and float16
round it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qkernels import reference
from qkernels.bench.ceilings import Ceilings, limit_seconds
from qkernels.bench.cpu_runs import ERRORS, columns, fields, line, run_problems, set_up
from qkernels.bench.timing import Rotation, interleave
from qkernels.cpu_norms import normalize

__all__ = ["ROWS", "SHAPES", "NormRow", "run_norms"]

SHAPES = ("576x1", "4096x1", "384x128", "768x128")
ROWS = (1, 8)
_EPS = 1e-5


@dataclass(frozen=True)
class NormRow:
    """One contender at one shape and batch. Times in seconds; ``error``: of the result, relative to its norm."""

    contender: str
    ours: bool
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


def run_norms(args: argparse.Namespace) -> int:
    """Run what the command line asks for; 1 if one of our results was wrong, else 0."""
    set_up(args)
    problems = [(k, n, m) for k, n in args.shapes for m in args.rows]
    return run_problems(args, (), problems, "K={} N={} M={}", _run, [])


def _run(args: argparse.Namespace, k: int, n: int, m: int, ceilings: Ceilings, notes: list[str]) -> list[NormRow]:
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(k * 7919 + n)
    x = (torch.randn(m * n, k, generator=generator) + 0.5).to(dtype)
    weight, bias = (torch.randn(k, generator=generator).to(dtype) for _ in range(2))
    exact = {True: reference.layer_norm(x, weight, bias, _EPS), False: reference.rms_norm(x, weight, _EPS)}
    timed: list[tuple[str, bool, Callable[[], Tensor], float]] = []
    for name, ours, layer, call in _contenders(x, weight, bias):
        error = float((call().double() - exact[layer].double()).norm() / exact[layer].double().norm())
        if ours and not error <= ERRORS[dtype]:
            notes.append(f"{name}: NOT RIGHT at K={k} N={n} M={m}, so not timed")
            continue
        timed.append((name, ours, call, error))
    timings = interleave([Rotation([call]) for _, _, call, _ in timed], rounds=args.rounds, seconds=args.seconds)
    ceilings.refresh()
    moved = 2.0 * x.nbytes
    limit = limit_seconds(moved, 0.0, ceilings.bandwidth(int(moved)), 1.0)
    rows = [
        NormRow(contender=name, ours=ours, k=k, n=n, m=m, **fields(timing, limit, 4.0 * x.numel()), error=error)
        for (name, ours, _, error), timing in zip(timed, timings, strict=True)
    ]
    print(f"\nK={k} N={n} M={m}: limit {limit * 1e6:.1f} us\n{columns('torch')}", flush=True)
    for row in rows:
        rivals = (other.median for other in rows if other.contender == f"torch: {row.contender}")
        print(line(row, next(rivals, None), row.error), flush=True)
    return rows


def _contenders(x: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[str, bool, bool, Callable[[], Tensor]]]:
    """(name, ours, whether it is a layer norm, call) of everyone."""
    shape = weight.shape

    def written_out() -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)
        return weight * wide.to(x.dtype)

    return [
        ("layer norm", True, True, lambda: normalize(x, weight, bias, _EPS, layer=True)),
        ("RMS norm", True, False, lambda: normalize(x, weight, None, _EPS, layer=False)),
        ("torch: layer norm", False, True, lambda: functional.layer_norm(x, shape, weight, bias, _EPS)),
        ("torch: RMS norm", False, False, lambda: functional.rms_norm(x, shape, weight, _EPS)),
        ("models: RMS norm", False, False, written_out),
    ]
