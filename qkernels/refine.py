"""Rounding of one weight column by column, each column making good the errors of others, and scales for given codes.

    minimise  sum over rows of e H e^T,     e = w - w_hat,  w_hat = scale_g * unit + low_g

Given all other columns, the best value of column i is ``w_i + sum over k of e_k H_ki / H_ii``.  :func:`refine_weight`
goes over the groups of columns, again and again: the best scale given everything else, then column after column the
unit nearest to the best value.  No step can make the sum larger, and rounding a scale to the type that stores it cannot
either: along one scale the sum is a parabola, and what is nearest to its lowest point is best.

GPTQ's rounding is the same walk with another factor than ``H_ki / H_ii``, one that counts columns before alone:
:func:`round_columns`, used by :mod:`qkernels.gptq`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .grids import Grid, Line, round_units
from .scheme import Scheme

__all__ = ["refine_weight", "round_block", "round_columns"]

BLOCK = 128  # columns for which the errors of all columns before are added up at once
WIDTHS = (8, 32, 128)  # columns that errors reach one by one, and those that they then reach in products of matrices
SPAN = 256  # columns of whole groups for which the errors of all columns are added up at once
NARROWEST, WIDEST = 0.5, 2.0  # of the scale there was: beyond, the data did not determine it


def round_columns(
    wanted: Tensor, factor: Tensor, lines: Sequence[Line], *, block_size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Round column after column to the unit nearest to ``w_i + sum over k < i of e_k factor_ki``.

    Args:
        wanted: the float weight, less the minimum of its grid, ``[K, N]``: one line per column.
        factor: ``[K, K]``; what is above its diagonal counts.
        lines: of the grid, one per column.
        block_size: columns for which the errors of all columns before are added up at once.

    Returns:
        The units and the errors ``e``, both ``[K, N]``.
    """
    units, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    for start in range(0, len(wanted), block_size):
        block = slice(start, min(start + block_size, len(wanted)))
        targets = torch.addmm(wanted[block], factor[:start, block].t(), errors[:start])
        errors[block] = round_block(targets, wanted[block], units[block], factor[block, block], lines[block])
    return units, errors


def round_block(targets: Tensor, before: Tensor, units: Tensor, factor: Tensor, lines: Sequence[Line]) -> Tensor:
    """Round the lines of ``targets [B, N]`` in order, each for what rounding the ones before it changed.

    Per line five steps and its share of products: few, since on a GPU a step costs as much as thousands of rows do.

    Args:
        targets: the best value of every column, were all others as they were; changed in place.
        before: the values they had. units: what they are rounded to, written.
        factor: ``[B, B]``; what is above its diagonal counts. lines: of the grid, one per column.

    Returns:
        ``before`` less the new values, ``[B, N]``.
    """
    changes = torch.empty_like(targets)
    _round_part(targets, before, units, changes, factor, lines)
    return changes


def _round_part(
    targets: Tensor, before: Tensor, units: Tensor, changes: Tensor, factor: Tensor, lines: Sequence[Line]
) -> None:
    size = len(targets)
    width = max((width for width in WIDTHS if width < size), default=0)
    for start in range(0, size, width) if width else ():
        part, rest = slice(start, start + width), slice(start + width, size)
        _round_part(targets[part], before[part], units[part], changes[part], factor[part, part], lines[part])
        if start + width < size:
            targets[rest].addmm_(factor[part, rest].t(), changes[part])
    if width:
        return
    each = zip(lines, targets.unbind(), before.unbind(), units.unbind(), changes.unbind(), strict=True)
    for i, (line, target, old, unit, change) in enumerate(each):
        round_units(torch.mul(target, line.inv, out=unit), line, unit)
        torch.addcmul(old, unit, line.scale, value=-1.0, out=change)
        if i + 1 < size:
            targets[i + 1 :].addr_(factor[i, i + 1 :], change)


@torch.no_grad()
def refine_weight(
    wanted: Tensor, units: Tensor, h: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme, *, rounds: int
) -> dict[str, Tensor]:
    """Scales and units made better, ``rounds`` times over all groups; zero points and minima stay.

    Multiples (``group_scales="int"``) lie too far apart for the best scale of a group to reach another one: multipliers
    stay, and each round begins with the best scale of every channel.

    Args:
        wanted: float32 ``[K, N]``: the weight, less the minimum of its grid. units: ``[K, N]``, changed in place.
        h: float32 ``[K, K]``, positive definite: the errors' weights. tensors: the grid's canonical tensors.

    Returns:
        The canonical tensors of the grid that the units are on now.
    """
    stored, columns = tensors["weight_scale"], len(wanted)
    grid = Grid.of(tensors, scheme, columns)
    size, diagonal = grid.group_size, h.diagonal().unsqueeze(1)
    factor = h / diagonal.t()
    factor.diagonal().zero_()
    scales, of_channel = grid.scale.clone(), stored
    multipliers = torch.round(scales / stored) if scheme.group_scales == "int" else None
    errors = wanted - units * grid.widen(scales, columns)
    span = max(1, SPAN // size) * size
    for start in [start for _ in range(rounds) for start in range(0, columns, span)]:
        if multipliers is not None and start == 0:
            of_channel = _channel_scale(wanted - errors, errors, h, of_channel, stored)
            torch.mul(multipliers, of_channel, out=scales)
            torch.sub(wanted, units * grid.widen(scales, columns), out=errors)
        stop = min(start + span, columns)
        targets = torch.addmm(wanted[start:stop], factor[:, start:stop].t(), errors)
        for first in range(start, stop, size):
            g, last = first // size, min(first + size, stop)
            near, inside = units[first:last], factor[first:last, first:last]
            before = wanted[first:last] - errors[first:last]
            best = targets[first - start : last - start]
            if multipliers is not None:
                changes = round_block(best, before, near, inside, [grid.line(g, scales[g])] * len(near))
            else:
                pull = (best - before).mul_(diagonal[first:last]).mul_(near).sum(0)
                curvature = (h[first:last, first:last] @ near).mul_(near).sum(0)
                step = _step(pull / curvature, scales[g], grid.scale[g], stored.dtype)
                scales[g] += step
                moved = near * step
                best.addmm_(inside.t(), moved, alpha=-1.0)
                line = grid.line(g, scales[g])
                changes = round_block(best, before + moved, near, inside, [line] * len(near)).sub_(moved)
            errors[first:last] += changes
            targets[last - start :].addmm_(factor[first:last, last:stop].t(), changes)
    if multipliers is not None:
        return {**tensors, "weight_scale": of_channel}
    return {**tensors, "weight_scale": scales.t().reshape(stored.shape).to(stored.dtype).contiguous()}


def _channel_scale(values: Tensor, errors: Tensor, h: Tensor, scale: Tensor, first: Tensor) -> Tensor:
    """The best scales ``[N]`` of channels, all else given; as before where that leaves the neighbourhood of ``first``.

    Args:
        values: what the units stand for; errors: what is left of the wanted weight, both ``[K, N]``.
    """
    pull = h @ values
    step = scale * ((pull * errors).sum(0) / (pull * values).sum(0))
    return scale + _step(step, scale, first, scale.dtype)


def _step(step: Tensor, scale: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """``step`` as far as ``scale + step`` can be stored; none where it would leave the neighbourhood of ``first``."""
    moved = (scale + step).to(dtype).to(torch.float32)
    sound = (moved > NARROWEST * first) & (moved < WIDEST * first)  # False for NaN
    sound &= moved >= torch.finfo(dtype).tiny
    return torch.where(sound, moved - scale, torch.zeros_like(scale))
