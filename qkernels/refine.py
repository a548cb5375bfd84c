"""Codes and scales of a rounded weight made better, by exact descent on what they do to the outputs.

    minimise  sum over rows of (w - w_hat) H (w - w_hat)^T,     w_hat = scale_g * u + offset_g

by turns over the scales (all of a row at once: a linear system with as many unknowns as groups) and over the codes
(column after column, each the best one given all others).  Neither step can make the sum larger, apart from the
rounding of scales to the type they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._rounding import split_groups
from .grids import Grid
from .scheme import Scheme

__all__ = ["distribute_errors", "refine_codes", "refine_weight", "refit_scales"]

INNER = 32  # columns within a block that errors reach one by one
BLOCK = 128  # columns whose changes reach the rest of the weight at once
CHUNK_ELEMENTS = 1 << 26  # of the linear systems that are solved at once: 256 MiB
NARROWEST, WIDEST = 0.5, 2.0  # of the scale there was: beyond, the system had no sound answer


def distribute_errors(
    rows: Tensor,
    factor: Tensor,
    start: int,
    stop: int,
    visit: Callable[[int, Tensor], Tensor],
    *,
    inner: int = INNER,
) -> None:
    """Visit ``rows[start:stop]`` in order; what ``visit(i, row)`` returns is taken out of the rows after it.

    ``rows[j] -= factor[i, j] * visit(i, rows[i])`` for ``j > i``, at once within a few columns and in products of
    matrices beyond.

    Args:
        rows: ``[K, N]``, changed in place. factor: ``[K, K]``, its upper triangle counts.
        inner: the few columns that are reached at once.
    """
    part = rows[start:stop]
    near_factor = factor[start:stop, start:stop]
    taken = torch.empty_like(part)
    for i in range(stop - start):
        taken[i] = amount = visit(start + i, part[i])
        near = min(i - i % inner + inner, stop - start)
        if i + 1 < near:
            part[i + 1 : near].addr_(near_factor[i, i + 1 : near], amount, alpha=-1.0)
        elif near < stop - start:
            first = i - i % inner
            part[near:].addmm_(near_factor[first:near, near:].t(), taken[first:near], alpha=-1.0)
    if stop < len(rows):
        rows[stop:].addmm_(factor[start:stop, stop:].t(), taken, alpha=-1.0)


def refine_codes(wanted: Tensor, codes: Tensor, rounded: Tensor, h: Tensor, grid: Grid) -> None:
    """One pass of coordinate descent over the columns; everything ``[K, N]``: one line per column of the weight.

    Args:
        wanted: the float weight. codes, rounded: what it is rounded to, changed in place.
        h: float32 ``[K, K]``, positive definite. grid: of the weight.
    """
    slope = h @ (wanted - rounded)  # of the sum over 2, against every column
    curvature = h.diagonal().tolist()

    def visit(i: int, row: Tensor) -> Tensor:
        old = rounded[i].clone()
        codes[i], rounded[i] = grid.round_column(old + row / curvature[i], i)
        return rounded[i] - old

    for start in range(0, len(wanted), BLOCK):
        distribute_errors(slope, h, start, min(start + BLOCK, len(wanted)), visit)


def refit_scales(
    wanted: Tensor, codes: Tensor, h: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme
) -> dict[str, Tensor]:
    """The scales of least error for ``codes [N, K]``; zero points and minima stay.

    Args:
        wanted: the float weight ``[N, K]``. h: float32 ``[K, K]``, positive definite.
        tensors: the grid's canonical tensors.

    Returns:
        Those tensors with other scales.
    """
    columns = wanted.shape[1]
    grid = Grid.of(tensors, scheme, columns)
    size, groups = grid.group_size, grid.scale.shape[1]
    units = grid.units(codes)
    if grid.low is not None:
        wanted = wanted - grid.widen(grid.low, columns)
    pulls = split_groups((wanted @ h).mul_(units), size).sum(-1)
    fitted = torch.empty_like(grid.scale)
    for rows in torch.arange(len(wanted), device=wanted.device).split(max(1, CHUNK_ELEMENTS // groups**2)):
        part = units[rows]
        system = part.new_empty(len(part), groups, groups)
        for g in range(groups):
            start, stop = g * size, min((g + 1) * size, columns)
            products = (part[:, start:stop] @ h[start:stop, start:]).mul_(part[:, start:])
            system[:, g, g:] = split_groups(products, size).sum(-1)
            system[:, g + 1 :, g] = system[:, g, g + 1 :]  # symmetric
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny  # a group of zeros
        fitted[rows], _ = torch.linalg.solve_ex(system, pulls[rows])
    stored = tensors["weight_scale"]
    fitted = fitted.to(stored.dtype)
    sound = (fitted > NARROWEST * grid.scale) & (fitted < WIDEST * grid.scale)  # False for NaN
    sound &= torch.isfinite(fitted) & (fitted >= torch.finfo(stored.dtype).tiny)
    return {**tensors, "weight_scale": torch.where(sound.reshape(stored.shape), fitted.reshape(stored.shape), stored)}


@torch.no_grad()
def refine_weight(
    weight: Tensor, codes: Tensor, h: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme, *, rounds: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scales and codes made better by turns, ``rounds`` times.

    Args:
        weight: float32 ``[N, K]``. codes: ``[K, N]``, float32, changed in place. h: float32 ``[K, K]``, positive
            definite: the error's weights. tensors: the grid's canonical tensors.

    Returns:
        The codes, and the canonical tensors of the grid they are on now.
    """
    wanted, grid_tensors = weight.t().contiguous(), dict(tensors)
    for _ in range(rounds):
        grid_tensors = refit_scales(weight, codes.t(), h, grid_tensors, scheme)
        grid = Grid.of(grid_tensors, scheme, weight.shape[1])
        refine_codes(wanted, codes, grid.values(codes.t()).t().contiguous(), h, grid)
    return codes, grid_tensors
