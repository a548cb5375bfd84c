"""GPTQ: columns rounded one after the other, each error made good by the columns that are still to come.

    H = 2 X^T X / rows + damping        U = upper Cholesky factor of H^-1
    err = (w_i - q_i) / U_ii            w_j -= err * U_ij  for j > i

(Frantar et al., GPTQ, 2210.17323.)  With ``act_order`` the columns of largest ``H_ii`` come first; the grids of the
groups are fixed before, so that the order leaves no trace in the stored layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .bias import corrected_bias
from .blocks import Inputs, run_by_blocks
from .calibrate import Statistics
from .grids import Grid, codes_and_tensors, joined, search_range
from .hooks import Quantizer, Target, register_algorithm
from .progress import Progress
from .scheme import Scheme

__all__ = ["GPTQ", "gptq_weight"]

RETRIES = 8  # each with ten times the damping
SMALLEST, STEPS = 0.5, 20  # of the search for ranges
INNER = 32  # columns within a block that errors reach one by one


@dataclass(frozen=True)
class GPTQ:
    """The algorithm ``"gptq"``, with its knobs; hand an instance to ``quantize_(algorithm=...)``.

    Args:
        act_order: columns that matter most first, grids of groups fixed beforehand.
        damping: share of the mean of H's diagonal that is added to it; ten times more where H is not positive.
        block_size: columns whose errors reach the rest of the weight at once.
        search: grids by least weighted error instead of the full range.
        bias_correction: move the mean error of the outputs into the bias.
        progress: as in ``quantize_``.
    """

    act_order: bool = True
    damping: float = 0.01
    block_size: int = 128
    search: bool = True
    bias_correction: bool = False
    progress: Progress = None

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise ValueError(f"damping: expected a number between 0 and 1, got {self.damping!r}")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size: expected a positive integer, got {self.block_size!r}")

    def __call__(self, model: nn.Module, targets: Sequence[Target], calibration: Any) -> Quantizer:
        """Round every target, block by block; see :class:`qkernels.hooks.Algorithm`."""
        if calibration is None or isinstance(calibration, Statistics):
            got = "none" if calibration is None else "statistics"
            raise ValueError(f"calibration: algorithm 'gptq' needs batches, got {got}")
        done: dict[str, dict[str, Tensor]] = {}

        def visit(target: Target, inputs: Inputs) -> Tensor:
            weight = target.weight()
            hessian = inputs.moments * (2.0 / inputs.rows)
            tensors = gptq_weight(
                weight,
                hessian,
                target.scheme,
                act_order=self.act_order,
                damping=self.damping,
                block_size=self.block_size,
                search=self.search,
            )
            stands_for = reference.dequantize_weight(tensors, target.scheme, weight.shape[1])
            if self.bias_correction:
                mean = (inputs.sums / inputs.rows).to(torch.float32)
                tensors["bias"] = corrected_bias(target, stands_for, mean)
            done[target.name] = tensors
            return stands_for

        unique = _unshared(targets)
        run_by_blocks(model, unique, calibration, visit, progress=self.progress)

        def quantizer(name: str, weight: Tensor, scheme: Scheme) -> Mapping[str, Tensor]:
            return done.pop(name)

        return quantizer


def _unshared(targets: Sequence[Target]) -> list[Target]:
    return list({id(target.module): target for target in targets}.values())


@torch.no_grad()
def gptq_weight(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    search: bool = True,
) -> dict[str, Tensor]:
    """Quantize one weight so that ``x @ weight.T`` changes least for inputs with second moments ``hessian``.

    Args:
        weight: float ``[N, K]``; hessian: float ``[K, K]``, any positive multiple of the sum of ``x x^T``.
        scheme: the weight part of it counts.
        act_order, damping, block_size, search: see :class:`GPTQ`.

    Returns:
        The canonical tensors, as :func:`qkernels.reference.quantize_weight`.

    Raises:
        ValueError: shapes that do not fit, or NaN or Inf in either.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian: expected shape [{columns}, {columns}], got {list(hessian.shape)}")
    w = weight.detach().to(torch.float32, copy=True)
    if not bool(torch.isfinite(w).all()):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    h = hessian.detach().to(w.device, torch.float32, copy=True)
    if not bool(torch.isfinite(h).all()):
        raise ValueError("hessian: expected finite values, got NaN or Inf")
    diagonal = h.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    w[:, dead] = 0.0
    importance = diagonal.clone()
    group_size = scheme.resolve_group_size(columns)

    static = act_order or scheme.weight_granularity == "per_channel"
    tensors = _measure(w, scheme, importance, search) if static else {}
    grid = Grid.of(tensors, scheme, columns) if static else None
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(columns, device=w.device)
    upper = _inverse_factor(h[order][:, order], damping)
    rows = w.t()[order].contiguous()  # [K, N]: one column of the weight is one line of memory
    codes = torch.empty_like(rows)
    columns_of = order.tolist()
    inner = INNER if static else columns
    if not static:
        block_size = max(1, block_size // group_size) * group_size
    collected: list[dict[str, Tensor]] = []

    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        part, errors = rows[start:stop], torch.empty_like(rows[start:stop])
        factor = upper[start:stop, start:stop]
        pivots = factor.diagonal().tolist()
        for i, column in enumerate(columns_of[start:stop]):
            if not static and column % group_size == 0:
                last = min(column + group_size, columns)
                piece = scheme.replace(group_size=group_size) if scheme.group_size == "auto" else scheme
                collected.append(_measure(rows[column:last].t(), piece, importance[column:last], search))
                grid = Grid.of(collected[-1], piece, group_size)
            if grid is None:
                raise ValueError("scheme: expected a grid")
            at = column if static else column % group_size
            codes[start + i], rounded = grid.round_column(part[i], at)
            error = (part[i] - rounded) / pivots[i]
            errors[i] = error
            # Errors reach the next few columns at once, the rest of the block in products of matrices.
            near = min(i - i % inner + inner, len(part))
            if i + 1 < near:
                part[i + 1 : near].addr_(factor[i, i + 1 : near], error, alpha=-1.0)
            elif near < len(part):
                first = i - i % inner
                part[near:].addmm_(factor[first:near, near:].t(), errors[first:near], alpha=-1.0)
        if stop < columns:
            rows[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
    if not static:
        tensors = joined(collected, 1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return codes_and_tensors(restored.t(), tensors, scheme)


def _measure(w: Tensor, scheme: Scheme, importance: Tensor, search: bool) -> dict[str, Tensor]:
    if search:
        return search_range(w, scheme, importance=importance, smallest=SMALLEST, steps=STEPS)
    return reference.weight_grid(w, scheme)


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of ``h``, damped until there is one."""
    mean = float(h.diagonal().mean())
    added = damping * mean
    for _ in range(RETRIES):
        damped = h.clone()
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper
        added *= 10.0
    raise ValueError(f"hessian: not positive definite even with {added / 10.0:.3g} added to its diagonal")


register_algorithm("gptq", GPTQ())
