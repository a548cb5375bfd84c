"""Grids of weights that are searched for, not only measured: rounding column by column, and the range of least error.

Everything ends in the canonical tensors that :func:`qkernels.reference.weight_grid` would have made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from ._rounding import quotient, split_groups
from .scheme import Scheme

__all__ = ["Grid", "codes_and_tensors", "joined", "search_range"]

SMALLEST = 0.2  # of the full range
NORM = 2.4  # exponent of the error that range searches add up: outliers count a little more than squared
CHUNK_ELEMENTS = 1 << 16  # 256 KiB of fp32: what is tried out again and again stays in the cache


@dataclass(frozen=True)
class Grid:
    """The grid of a weight ``[N, K]``, ready to round single columns.

    Args:
        scale: float32 ``[N, G]``; zero: the code of zero, float32 ``[N, G]``; low: minimum, or None.
        group_size: columns per group.
        bounds: smallest and largest code.
        table: the code book, float32 ``[16]``, or None.
    """

    scale: Tensor
    zero: Tensor
    low: Tensor | None
    group_size: int
    bounds: tuple[int, int]
    table: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Grid:
        """The grid that canonical tensors describe."""
        scale = tensors["weight_scale"].to(torch.float32)
        scale = scale.unsqueeze(1) if scale.dim() == 1 else scale
        low = zero = None
        if "weight_min" in tensors:
            low = tensors["weight_min"].to(torch.float32).reshape(scale.shape)
        if "weight_zero_point" in tensors:
            zero = tensors["weight_zero_point"].to(torch.float32).reshape(scale.shape)
        if zero is None:
            around_zero = low is None and scheme.codebook is None
            zero = torch.full_like(scale, float(scheme.zero_code) if around_zero else 0.0)
        table = None
        if scheme.codebook is not None:
            table = torch.tensor(scheme.codebook, dtype=torch.float32, device=scale.device)
        return cls(scale, zero, low, scheme.resolve_group_size(in_features), scheme.code_range, table)

    def units(self, codes: Tensor) -> Tensor:
        """What the scales of ``codes [N, K]`` are multiplied with, float32."""
        if self.table is not None:
            return self.table[codes.to(torch.int64)]
        return codes.to(torch.float32) - self.widen(self.zero, codes.shape[1])

    def values(self, codes: Tensor) -> Tensor:
        """What ``codes [N, K]`` stand for, float32."""
        values = self.units(codes).mul_(self.widen(self.scale, codes.shape[1]))
        return values if self.low is None else values.add_(self.widen(self.low, codes.shape[1]))

    def widen(self, per_group: Tensor, columns: int) -> Tensor:
        """``per_group [N, G]`` once per column, ``[N, columns]``."""
        return per_group.repeat_interleave(self.group_size, 1)[:, :columns]

    def round_column(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Codes (float32) and what they stand for, of ``values [N]`` in a column of the weight."""
        group = column // self.group_size
        scale, zero = self.scale[:, group], self.zero[:, group]
        inv = quotient(1.0, scale)
        if self.table is not None:
            codes = (values * inv).unsqueeze(1).sub(self.table).abs().argmin(1)
            return codes.to(torch.float32), self.table[codes] * scale
        if self.low is not None:
            low = self.low[:, group]
            codes = ((values - low) * inv).round_().clamp_(*self.bounds)
            return codes, codes * scale + low
        codes = (values * inv).round_().add_(zero).clamp_(*self.bounds)
        return codes, (codes - zero) * scale


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
    or the weighted sum of squares where ``importance`` is given.

    Args:
        importance: weight of each column's error, ``[K]``; None counts all alike.
        smallest: the smallest share of the full range that is tried.
        steps: how many shares are tried below the full one.

    Returns:
        What :func:`qkernels.reference.weight_grid` returns.
    """
    if not w.numel():
        return reference.weight_grid(w, scheme)
    size = scheme.resolve_group_size(w.shape[1]) if scheme.weight_granularity == "per_group" else w.shape[1]
    weights = torch.ones(w.shape[1], device=w.device) if importance is None else importance.to(w.device, torch.float32)
    counts = split_groups(weights, size)  # what fills a short last group counts nothing
    rows = max(1, CHUNK_ELEMENTS // w.shape[1])
    shares = [1.0 - (1.0 - smallest) * step / max(steps, 1) for step in range(steps + 1)]
    norm = NORM if importance is None else 2.0
    return joined([_search_rows(part, scheme, size, counts, norm, shares) for part in w.detach().split(rows)], 0)


def _search_rows(
    w: Tensor, scheme: Scheme, size: int, counts: Tensor, norm: float, shares: Sequence[float]
) -> dict[str, Tensor]:
    values = split_groups(w.to(torch.float32), size)
    edges = _bounds(w.to(torch.float32), scheme, size)
    small = scheme.replace(group_size=8) if scheme.weight_granularity == "per_group" else scheme
    best: dict[str, Tensor] = {}
    least = values.new_zeros(0)
    for share in shares:
        tensors = reference.weight_grid(edges * share, small)
        residual = _round(values, tensors, scheme).sub_(values)
        error = residual.square_() if norm == 2.0 else residual.abs_().pow_(norm)
        sums = error.mul_(counts).sum(-1)
        if not best:
            best, least = tensors, sums
            continue
        better = sums < least
        least = torch.where(better, sums, least)
        for name, tensor in tensors.items():
            old = best[name]
            dtype = old.dtype if old.dtype == tensor.dtype else torch.float32
            best[name] = torch.where(better.reshape(old.shape), tensor.to(dtype), old.to(dtype))
    return best


def _bounds(w: Tensor, scheme: Scheme, size: int) -> Tensor:
    """The smallest weights that have the grids of ``w``: eight columns per group, its bounds among them."""
    replicate = scheme.weight_zero == "float"
    groups = split_groups(w, size, replicate=replicate)
    low, high = groups.amin(-1), groups.amax(-1)
    return torch.stack((low, high, low, high, low, high, low, high), -1).flatten(1)


def _round(values: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """``values [N, G, group]`` on a grid, as numbers: a new tensor."""
    shape = (*values.shape[:2], 1)
    scale = tensors["weight_scale"].to(torch.float32).reshape(shape)
    inv = quotient(1.0, scale)
    if scheme.codebook is not None:
        table = torch.tensor(sorted(scheme.codebook), dtype=torch.float32, device=values.device)
        return table[torch.bucketize((values * inv).contiguous(), (table[1:] + table[:-1]) / 2)].mul_(scale)
    bottom, top = scheme.code_range
    if "weight_min" in tensors:
        low = tensors["weight_min"].to(torch.float32).reshape(shape)
        return (values - low).mul_(inv).round_().clamp_(bottom, top).mul_(scale).add_(low)
    if "weight_zero_point" in tensors:
        zero = tensors["weight_zero_point"].to(torch.float32).reshape(shape)
        return (values * inv).round_().add_(zero).clamp_(bottom, top).sub_(zero).mul_(scale)
    middle = scheme.zero_code
    return (values * inv).round_().clamp_(bottom - middle, top - middle).mul_(scale)
