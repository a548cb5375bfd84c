"""Grids of weights that are searched for, not only measured: rounding column by column, and the range of least error.

Everything ends in the canonical tensors that :func:`qkernels.reference.weight_grid` would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._rounding import quotient, split_groups
from .scheme import Scheme

__all__ = ["Grid", "Line", "Table", "codes_and_tensors", "joined", "round_units", "search_multiples", "search_range"]

SMALLEST = 0.2  # of the full range
NORM = 2.4  # exponent of the error that range searches add up: outliers count a little more than squared
CPU_ELEMENTS = (
    15 << 11
)  # fp32 that stays in the cache, and too few for torch to share out: cores would wait more than work
DEVICE_ELEMENTS = 1 << 24  # elsewhere few large steps cost less than many small ones
EDGES = 8  # columns of a weight that consists of bounds: the smallest group there is
LINE = 64  # rows of the weight, at least, that are tried out together: they lie side by side


@dataclass(frozen=True)
class Table:
    """A code book in ascending order.

    Args:
        entries: float32 ``[16]``. middles: between neighbours, float32 ``[15]``.
        codes: int64 ``[16]``, where in the code book each entry is; places: where each code is here.
    """

    entries: Tensor
    middles: Tensor
    codes: Tensor
    places: Tensor

    @classmethod
    def of(cls, codebook: Sequence[float], device: torch.device) -> Table:
        """The table of 16 values in any order."""
        entries, codes = torch.tensor(codebook, dtype=torch.float32, device=device).sort(stable=True)
        return cls(entries, (entries[1:] + entries[:-1]) / 2, codes, codes.argsort())


class Line(NamedTuple):
    """What one group of columns is rounded with: tensors of a shape that fits theirs."""

    scale: Tensor
    inv: Tensor
    bottom: Tensor
    top: Tensor
    table: Table | None


@dataclass(frozen=True)
class Grid:
    """The grid of a weight ``[N, K]``, ready to round single columns: ``w ~ scale * unit + low``.

    A unit is a code less the code of zero, or an entry of the code book.  Everything here is float32 with one line per
    column of the weight, ``[K, N]``, or per group of columns, ``[G, N]``.

    Args:
        scale: ``[G, N]``; inv: its reciprocals; low: minimum, or None.
        zero, bottom, top: the code of zero, the smallest and the largest unit, ``[G, N]``.
        group_size: columns per group.
        table: the code book, or None.
    """

    scale: Tensor
    inv: Tensor
    low: Tensor | None
    zero: Tensor
    bottom: Tensor
    top: Tensor
    group_size: int
    table: Table | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Grid:
        """The grid that canonical tensors describe."""

        def lines(tensor: Tensor) -> Tensor:
            wide = tensor.to(torch.float32)
            return (wide.unsqueeze(0) if wide.dim() == 1 else wide.t()).contiguous()

        scale, low = lines(reference.group_scale(tensors)), tensors.get("weight_min")
        if "weight_zero_point" in tensors:
            zero = lines(tensors["weight_zero_point"])
        else:
            zero = torch.full_like(scale, float(scheme.zero_code) if low is None else 0.0)
        first, last = scheme.code_range
        size = scheme.resolve_group_size(in_features)
        table = None if scheme.codebook is None else Table.of(scheme.codebook, scale.device)
        low = None if low is None else lines(low)
        return cls(scale, quotient(1.0, scale), low, zero, first - zero, last - zero, size, table)

    def line(self, group: int, scale: Tensor | None = None) -> Line:
        """What the columns of one group are rounded with: the grid's own scales, or others ``[N]``."""
        inv = self.inv[group] if scale is None else quotient(1.0, scale)
        scale = self.scale[group] if scale is None else scale
        return Line(scale, inv, self.bottom[group], self.top[group], self.table)

    def codes(self, units: Tensor) -> Tensor:
        """The codes of ``units [K, N]``."""
        if self.table is not None:
            return self.table.codes[torch.bucketize(units, self.table.middles)].to(torch.float32)
        return units + self.widen(self.zero, len(units))

    def units(self, codes: Tensor) -> Tensor:
        """The units of ``codes [K, N]``."""
        if self.table is not None:
            return self.table.entries[self.table.places[codes.to(torch.int64)]]
        return codes.to(torch.float32) - self.widen(self.zero, len(codes))

    def values(self, units: Tensor) -> Tensor:
        """What ``units [K, N]`` stand for."""
        values = units * self.widen(self.scale, len(units))
        return values if self.low is None else values.add_(self.widen(self.low, len(units)))

    def widen(self, per_group: Tensor, columns: int) -> Tensor:
        """``per_group [G, N]`` once per column, ``[columns, N]``."""
        return per_group.repeat_interleave(self.group_size, 0)[:columns]


def round_units(steps: Tensor, line: Line, out: Tensor) -> Tensor:
    """``steps`` (values, less the minimum, over the scale) rounded to units, into ``out``, which may be ``steps``."""
    if line.table is not None:
        return out.copy_(line.table.entries[torch.bucketize(steps, line.table.middles)])
    return torch.round(steps, out=out).clamp_(line.bottom, line.top)


def codes_and_tensors(codes: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """Canonical tensors of codes ``[N, K]`` on a grid."""
    return {"weight": reference.weight_codes(codes.to(torch.int32), scheme), **tensors}


def joined(parts: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Tensor]:
    """Grids of parts of a weight as one; float32 where one part needs it."""
    result = {}
    for name in parts[0]:
        dtypes = {part[name].dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        result[name] = torch.cat([part[name].to(dtype) for part in parts], dim)
    return result


@torch.no_grad()
def search_range(
    w: Tensor, scheme: Scheme, *, importance: Tensor | None = None, smallest: float = SMALLEST, steps: int = 40
) -> dict[str, Tensor]:
    """The grid whose ranges, shrunk group by group, round ``w [N, K]`` with the least error.

    Shrinking clips the largest weights of a group and rounds all others finer.  The error is ``sum |w - w_hat|^2.4``,
    or the weighted sum of squares where ``importance`` is given.  With ``group_scales="int"`` the scale of a channel
    comes of the largest float scale that is found, and those of groups from :func:`search_multiples`.

    Args:
        importance: weight of each column's error, ``[K]``; None counts all alike.
        smallest: the smallest share of the full range that is tried.
        steps: how many shares are tried below the full one.

    Returns:
        What :func:`qkernels.reference.weight_grid` returns.
    """
    if not w.numel():
        return reference.weight_grid(w, scheme)
    if scheme.group_scales == "int":
        found = search_range(w, scheme.searched, importance=importance, smallest=smallest, steps=steps)
        channel_scale = reference.integer_grid(w, found, scheme)["weight_scale"]
        return search_multiples(w, scheme, channel_scale, importance=importance)
    small = scheme.replace(group_size=EDGES) if scheme.weight_granularity == "per_group" else scheme
    shares = torch.tensor([1.0 - (1.0 - smallest) * step / max(steps, 1) for step in range(steps + 1)], device=w.device)

    def shrunk(values: Tensor, rows: slice) -> dict[str, Tensor]:
        # A grid depends on the bounds of a group alone, so those for all shares are those of weights that consist of
        # bounds: ``small`` has groups of that many columns.
        bounds = torch.stack((values.amin(1), values.amax(1)), -1).repeat(1, 1, EDGES // 2)
        some = max(1, _elements(w) // bounds.numel())
        edges = [(part.reshape(-1, 1, 1, 1) * bounds).reshape(-1, EDGES) for part in shares.split(some)]
        return joined([reference.weight_grid(part, small) for part in edges], 0)

    return _least_error(w, scheme, shrunk, importance, NORM if importance is None else 2.0)


@torch.no_grad()
def search_multiples(
    w: Tensor, scheme: Scheme, channel_scale: Tensor, *, importance: Tensor | None = None, norm: float = NORM
) -> dict[str, Tensor]:
    """The grid of ``group_scales="int"`` whose multipliers round ``w [N, K]`` with the least error; all are tried.

    Args:
        channel_scale: ``weight_scale`` of the grid, float32 ``[N]``. importance: as for :func:`search_range`.
        norm: the exponent of the errors where ``importance`` is None; else they are squared.
    """
    multipliers = torch.arange(1, scheme.largest_multiplier + 1, device=w.device, dtype=torch.float32)

    def multiples(values: Tensor, rows: slice) -> dict[str, Tensor]:
        tried = multipliers.reshape(-1, 1, 1).expand(-1, len(values), values.shape[2])
        scale = channel_scale[rows].expand_as(tried)
        tensors = {"weight_scale": scale.reshape(-1), "weight_multiplier": tried.to(torch.uint8).reshape(-1, 1)}
        if not scheme.weight_symmetric:
            hi, lo = values.amax(1).clamp(min=0.0), values.amin(1).clamp(max=0.0)
            zero = reference.centred_zero(hi, lo, scale * tried, scheme)
            tensors["weight_zero_point"] = zero.reshape(-1, 1)
        return tensors

    found = _least_error(w, scheme, multiples, importance, norm if importance is None else 2.0)
    return {"weight_scale": channel_scale, **found}


def _elements(w: Tensor) -> int:
    """How many elements are worked on at once."""
    return CPU_ELEMENTS if w.device.type == "cpu" else DEVICE_ELEMENTS


def _least_error(
    w: Tensor,
    scheme: Scheme,
    candidates: Callable[[Tensor, slice], dict[str, Tensor]],
    importance: Tensor | None,
    norm: float,
) -> dict[str, Tensor]:
    """The grid of ``w [N, K]`` that consists, group by group, of the candidate of least error.

    Args:
        candidates: of groups ``values [G, size, N]`` and the rows they are of: canonical tensors ``[C * G * N, ...]``.

    Returns:
        The tensors that groups have of their own; all where the weight has one group.
    """
    per_group = scheme.weight_granularity == "per_group"
    size = scheme.resolve_group_size(w.shape[1]) if per_group else w.shape[1]
    weights = torch.ones(w.shape[1], device=w.device) if importance is None else importance.to(w.device, torch.float32)
    counts = split_groups(weights, size)  # what fills a short last group counts nothing
    small = scheme.replace(group_size=EDGES) if per_group else scheme
    step = min(len(w), max(LINE, _elements(w) // size))
    at_once = max(1, _elements(w) // (size * step))
    found = []
    for start in range(0, len(w), step):
        rows = slice(start, min(start + step, len(w)))
        groups = split_groups(w.detach()[rows].to(torch.float32), size, replicate=scheme.weight_zero == "float")
        pieces = []
        for first in range(0, len(counts), at_once):
            # [G, size, N]: what has one scale lies across the lines
            values = groups[:, first : first + at_once].permute(1, 2, 0).contiguous()
            tensors = candidates(values, rows)
            best = _best(values, Grid.of(tensors, small, EDGES), counts[first : first + at_once], norm)
            own = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2 or not per_group}
            pieces.append({name: _chosen(tensor, best) for name, tensor in own.items()})
        found.append(joined(pieces, 1) if per_group else pieces[0])
    return joined(found, 0)


def _best(values: Tensor, grid: Grid, counts: Tensor, norm: float) -> Tensor:
    """Which candidate rounds ``values [G, size, N]``, counting ``counts [G, size]``, best: int64 ``[1, G, 1, N]``."""

    def each(lines: Tensor) -> Tensor:
        return lines.reshape(-1, len(values), 1, values.shape[2])

    scale = each(grid.scale)
    limits = (each(lines).unbind() for lines in (grid.scale, grid.inv, grid.bottom, grid.top))
    lows = [None] * len(scale) if grid.low is None else each(grid.low).unbind()
    losses = torch.empty_like(scale)
    exact, units, weights = torch.empty_like(values), torch.empty_like(values), counts.unsqueeze(1)
    for low, loss, (step, inv, bottom, top) in zip(lows, losses.unbind(), zip(*limits, strict=True), strict=True):
        line = Line(step, inv, bottom, top, grid.table)
        torch.mul(values if low is None else values - low, line.inv, out=exact)
        error = round_units(exact, line, units).sub_(exact)
        torch.bmm(weights, error.square_() if norm == 2.0 else error.abs_().pow_(norm), out=loss)
    return losses.mul_((scale / scale[0]).pow_(norm)).argmin(0, keepdim=True)


def _chosen(tensor: Tensor, best: Tensor) -> Tensor:
    """What is stored for the best candidate of each group: ``[N, G]``, or ``[N]`` of a weight with one group."""
    chosen = tensor.reshape(-1, *best.shape[1:]).gather(0, best)[0, :, 0]
    return (chosen.t() if tensor.dim() == 2 else chosen[0]).contiguous()
