"""What the benchmarks of a CPU share: how they begin and end, and how a timed contender is told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qkernels import _C
from qkernels.bench.ceilings import Ceilings, describe
from qkernels.bench.outcome import outcome
from qkernels.bench.timing import Timing
from qkernels.info import info
from qkernels.progress import tracking

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["ERRORS", "columns", "end", "fields", "limits", "line", "run_problems", "set_up"]

ERRORS = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Of a result in floating point that is right, by input dtype, relative to its norm."""


def set_up(args: argparse.Namespace) -> None:
    """Threads and tier as ``args`` has them."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.isa:
        _C.set_isa(args.isa)


def limits(args: argparse.Namespace, kinds: Sequence[str]) -> Ceilings:
    """The machine's, measured, and printed with the peaks of ``kinds``."""
    ceilings = Ceilings(torch.get_num_threads())
    ceilings.refresh(samples=3 if args.quick else 20)
    print("\n".join(describe(ceilings, kinds)))
    return ceilings


def end(
    args: argparse.Namespace,
    notes: Sequence[str],
    rows: Sequence[DataclassInstance],
    ceilings: Ceilings,
    **facts: Any,
) -> dict[str, Any]:
    """:func:`qkernels.bench.outcome.outcome` of a run on a CPU."""
    return outcome(
        args,
        notes,
        rows,
        machine=info(),
        isa=_C.info()["isa"],
        threads=torch.get_num_threads(),
        input_dtype=args.dtype,
        ceilings=ceilings.to_dict(),
        **facts,
    )


def run_problems(
    args: argparse.Namespace,
    kinds: Sequence[str],
    problems: Sequence[tuple[int, ...]],
    words: str,
    run: Callable[..., Sequence[DataclassInstance]],
    notes: list[str],
) -> int:
    """A benchmark by itself, from its limits to its end; 1 if one of our results was wrong, else 0.

    Args:
        kinds: of peaks, as for :func:`limits`.
        problems: what ``run(args, *problem, ceilings, notes)`` takes; it returns rows.
        words: with the numbers of a problem, what is said of it meanwhile.
        notes: of the run so far.
    """
    ceilings = limits(args, kinds)
    rows: list[DataclassInstance] = []
    with torch.inference_mode(), tracking(None, total=len(problems), what="bench") as step:
        for done, problem in enumerate(problems):
            step(done, len(problems), words.format(*problem))
            rows += run(args, *problem, ceilings, notes)
    end(args, notes, rows, ceilings)
    return 1 if any("NOT RIGHT" in note for note in notes) else 0


def fields(timing: Timing, limit: float, operations: float) -> dict[str, Any]:
    """Of a row: its times and its limit in seconds, and what they come to."""
    return {
        "median": timing.median,
        "best": timing.best,
        "samples": timing.samples,
        "limit": limit,
        "percent_of_limit": 100 * limit / timing.median,
        "gops": 1e-9 * operations / timing.median,
    }


def columns(rival: str) -> str:
    """The heads of a table's columns; ``rival``: whose time stands over ours."""
    return f"{'':24}{'us':>11}{'GOPS':>9}{'% limit':>9}{'x ' + rival:>9}{'error':>10}"


def line(row: Any, over: float | None, error: float) -> str:
    """A row under them; ``over``: the rival's seconds, if there is one."""
    speedup = "" if over is None else f"{over / row.median:.2f}"
    figures = f"{row.median * 1e6:11.1f}{row.gops:9.0f}{row.percent_of_limit:9.1f}{speedup:>9}{error:10.1e}"
    return f"{row.contender:24}{figures}"
