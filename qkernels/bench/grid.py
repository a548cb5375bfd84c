"""The benchmark itself: shapes x rows, every contender checked first and then timed in turns with the others."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels import _C, reference
from qkernels.bench import rivals as others
from qkernels.bench.ceilings import Ceilings, limit_seconds
from qkernels.bench.contenders import Contender, ours
from qkernels.bench.cpu_runs import columns, end, fields, limits, line, set_up
from qkernels.bench.timing import interleave
from qkernels.progress import tracking
from qkernels.scheme import Scheme

_CHECKED_ROWS = 64
_SUSPICIOUS_ERROR = 0.05  # more than int8 inputs and bf16 sums lose


@dataclass(frozen=True)
class Row:
    """One contender at one shape, number of rows and state of the cache. Times in seconds.

    ``limit`` and ``percent_of_limit`` are those of ``scheme``: what it computes, rivals as well as ours; W8A8 where a
    rival computes no scheme (``fp32``, ``bf16``). ``rival_of``: the schemes that a rival is compared with.
    ``relative_error``: against the fp32 product of the weight as it was. ``arithmetic_error``: against that of the
    weight that its codes stand for, which tells whether it multiplies right; the same where it makes codes of its own.
    ``exact``: equal to the reference to the last bit; None where no exact result is defined (every rival).
    """

    contender: str
    ours: bool
    scheme: str
    rival_of: tuple[str, ...]
    k: int
    n: int
    m: int
    state: str
    median: float
    best: float
    samples: int
    limit: float
    percent_of_limit: float
    gops: float
    relative_error: float
    arithmetic_error: float
    exact: bool | None
    rotated_bytes: int


def traffic(scheme: Scheme, k: int, n: int, m: int, itemsize: int, input_itemsize: int | None = None) -> float:
    """Bytes that must move once: weights with their scales, the rows in, the result out.

    Args:
        itemsize: bytes of one value of the result, and of the rows where ``input_itemsize`` is None.
    """
    weights = n * math.ceil(k * scheme.weight_bits / 8)
    if scheme.weight_granularity == "per_group":
        of_group = 1 if scheme.group_scales == "int" else (scheme.scale_dtype or torch.float16).itemsize
        weights += n * math.ceil(k / scheme.resolve_group_size(k)) * of_group
    return weights + 8 * n + m * k * (input_itemsize or itemsize) + m * n * itemsize


def run_grid(args: argparse.Namespace) -> int:
    """Run what the command line asks for; 1 if one of our results was not exact, else 0."""
    set_up(args)
    chosen, missing = others.rivals(args.rivals, args.schemes, args.zentorch_python)
    contenders = [*ours(args.schemes), *chosen]
    ceilings = limits(args, ("int8", "fp32"))
    if missing:
        print("not measured: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items()))
    rows: list[Row] = []
    notes: list[str] = []
    total = len(args.shapes) * len(args.rows)
    try:
        with torch.inference_mode(), tracking(None, total=total, what="bench") as step:
            for shape in args.shapes:
                done = len({(row.k, row.n, row.m) for row in rows})
                step(done, total, f"K={shape[0]} N={shape[1]}")
                rows += _run_shape(
                    args, shape, contenders, ceilings, notes, lambda count, name: step(count, total, name), done
                )
    finally:
        for contender in contenders:
            contender.close()
    result = end(args, notes, rows, ceilings, not_measured=missing)
    if args.plot:
        from qkernels.bench.plots import draw

        for path in draw(result, args.plot, args.schemes):
            print(f"wrote {path}")
    return 1 if any("NOT EXACT" in note for note in notes) else 0


def _run_shape(
    args: argparse.Namespace,
    shape: tuple[int, int],
    contenders: Sequence[Contender],
    ceilings: Ceilings,
    notes: list[str],
    step: Any,
    done: int,
) -> list[Row]:
    k, n = shape
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(k * 7919 + n)
    weight = torch.randn(n, k, generator=generator) / math.sqrt(k)
    bias = torch.randn(n, generator=generator) / 10
    refusals = {contender.name: contender.refuses(k, n) for contender in contenders}
    notes += [f"{name}: not measured at K={k} N={n}: {reason}" for name, reason in refusals.items() if reason]
    contenders = [contender for contender in contenders if not refusals[contender.name]]
    held = held_weights(contenders, weight)
    copies: dict[str, int] = {}
    for contender in contenders:
        wanted = contender.copies_for(n * k, args.cold_mb << 20) if args.state != "warm" else 1
        if wanted > contender.most_copies:
            notes.append(f"{contender.name}: no cold rows at K={k} N={n}: {wanted} copies would be needed")
            wanted = 1
        copies[contender.name] = wanted
        step(done, f"K={k} N={n} {contender.name}")
        contender.build(weight, bias, wanted)
    rows: list[Row] = []
    for index, m in enumerate(args.rows):
        x = torch.randn(m, k, generator=generator).to(dtype)
        checks = {}
        for contender in contenders:
            contender.bind(x)
            checks[contender.name] = _check(contender, x, weight, held, bias)
            if checks[contender.name].exact is False:
                notes.append(f"{contender.name}: NOT EXACT at K={k} N={n} M={m}, so not timed")
        for state in ("cold", "warm") if args.state == "both" else (args.state,):
            # Nothing wrong of ours is timed, and nothing is called cold that stays in the cache.
            timed = [
                c
                for c in contenders
                if checks[c.name].exact is not False
                and (state == "warm" or copies[c.name] > 1 or n * k * c.bytes_per_weight >= args.cold_mb << 20)
            ]
            samplers = [contender.sampler(cold=state == "cold") for contender in timed]
            if state == "cold" and index == 0:  # what a copy does once, at its first call, is not what is asked
                for contender, sampler in zip(timed, samplers, strict=True):
                    sampler.sample(copies[contender.name])
            timings = interleave(samplers, rounds=args.rounds, seconds=args.seconds)
            ceilings.refresh()
            for contender, timing in zip(timed, timings, strict=True):
                scheme = contender.scheme
                moved = traffic(scheme, k, n, m, dtype.itemsize, contender.input_itemsize)
                bandwidth = ceilings.bandwidth(None if state == "cold" else int(moved))
                limit = limit_seconds(moved, 2.0 * m * n * k, bandwidth, _peak(ceilings, scheme))
                rows.append(
                    Row(
                        contender=contender.name,
                        ours=contender.ours,
                        scheme=scheme.name,
                        rival_of=contender.rival_of,
                        k=k,
                        n=n,
                        m=m,
                        state=state,
                        **fields(timing, limit, 2.0 * m * n * k),
                        **asdict(checks[contender.name]),
                        rotated_bytes=int(copies[contender.name] * n * k * contender.bytes_per_weight),
                    )
                )
            if timed:
                print("\n" + table([row for row in rows if (row.m, row.state) == (m, state)]), flush=True)
        step(done + index + 1, f"K={k} N={n} M={m}")
    return rows


def _peak(ceilings: Ceilings, scheme: Scheme) -> float:
    """Operations a second of the instruction that the scheme's kernels are made of, in the tier in use."""
    return ceilings.peak("int8", _C.info()["isa"]) if scheme.activation_bits == 8 else ceilings.peak("fp32")


@dataclass(frozen=True)
class _Check:
    """What a contender's output is like; the fields are those of a row."""

    relative_error: float
    arithmetic_error: float
    exact: bool | None


def held_weights(contenders: Sequence[Contender], weight: Tensor) -> dict[Scheme | None, Tensor]:
    """The weights that contenders multiply by, by the scheme that they hold; None: ``weight`` itself."""
    held: dict[Scheme | None, Tensor] = {None: weight}
    for scheme in {contender.holds for contender in contenders if contender.holds is not None}:
        held[scheme] = reference.dequantize_weight(reference.quantize_weight(weight, scheme), scheme, weight.shape[1])
    return held


def _check(
    contender: Contender, x: Tensor, weight: Tensor, held: Mapping[Scheme | None, Tensor], bias: Tensor
) -> _Check:
    """Compares some rows of the output with fp32 products, and with the exact result where one is defined."""
    y = contender.output()
    rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], _CHECKED_ROWS)).long()
    x, y = x[rows], y[rows]

    def error(of: Tensor) -> float:
        truth = torch.nn.functional.linear(x.float(), of, bias)
        return float((y.float() - truth).norm() / truth.norm())

    expected = contender.expected(x, weight, bias)
    exact = None if expected is None else bool(torch.equal(y, expected))
    return _Check(error(weight), error(held[contender.holds]), exact)


def table(rows: Sequence[Row]) -> str:
    """The rows of one shape, M and state; "x rival": as fast as the fastest right rival of the scheme, times this."""
    first = rows[0]
    lines = [f"K={first.k} N={first.n} M={first.m} {first.state}: limit {first.limit * 1e6:.1f} us (first row's)"]
    lines.append(columns("rival"))
    right = [row for row in rows if not row.ours and row.arithmetic_error < _SUSPICIOUS_ERROR]
    for row in rows:
        schemes = {row.scheme} if row.ours else set(row.rival_of)
        rival = min((other.median for other in right if schemes.intersection(other.rival_of)), default=None)
        verdict = "" if row.arithmetic_error < _SUSPICIOUS_ERROR else " WRONG"  # NaN too
        lines.append(line(row, rival, row.relative_error) + verdict)
    return "\n".join(lines)
