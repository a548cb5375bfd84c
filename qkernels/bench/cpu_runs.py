"""What the benchmarks of a CPU share: how they begin and end, and how a timed contender is told."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qkernels import _C
from qkernels.bench.ceilings import Ceilings, describe
from qkernels.bench.outcome import outcome
from qkernels.bench.timing import Timing
from qkernels.info import info

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["columns", "end", "fields", "limits", "line", "set_up"]


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
