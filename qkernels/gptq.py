"""GPTQ: columns rounded one after the other, each error made good by the columns that are still to come.

    H = 2 X^T X / rows + damping        U = upper Cholesky factor of H^-1
    err = (w_i - q_i) / U_ii            w_j -= err * U_ij  for j > i

(Frantar et al., GPTQ, 2210.17323.)  With ``act_order`` the columns of largest ``H_ii`` come first; the grids of the
groups are fixed before, so that the order leaves no trace in the stored layer.  Afterwards scales and codes descend
further on ``sum (w - w_hat) H (w - w_hat)^T``: :mod:`qkernels.refine`.
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
from .refine import INNER, distribute_errors, refine_weight
from .scheme import Scheme

__all__ = ["GPTQ", "gptq_weight"]

MATCH_DAMPING = 0.01  # of the change that makes good what earlier layers lost
RETRIES = 8  # each with ten times the damping
SMALLEST, STEPS = 0.5, 20  # of the search for ranges


@dataclass(frozen=True)
class GPTQ:
    """The algorithm ``"gptq"``, with its knobs; hand an instance to ``quantize_(algorithm=...)``.

    Args:
        act_order: columns that matter most first, grids of groups fixed beforehand.
        damping: share of the mean of H's diagonal that is added to it; ten times more where H is not positive.
        block_size: columns whose errors reach the rest of the weight at once.
        search: grids by least weighted error instead of the full range.
        bias_correction: move the mean error of the outputs into the bias.
        by_sequence: all tokens of a sequence together count as much as those of any other, as where their mean is
            what a model gives; False: tokens count alike. What an ``attention_mask`` hides never counts.
        match: fit weights to the outputs of the float model for what quantized layers before them give, instead of
            to their own outputs; twice the runs per layer. (Li et al., GPTAQ, 2504.02692.)
        refine: how often scales and codes are made better afterwards, by turns, on the same objective.
        progress: as in ``quantize_``.
    """

    act_order: bool = True
    damping: float = 0.01
    block_size: int = 128
    search: bool = True
    bias_correction: bool = False
    by_sequence: bool = True
    match: bool = True
    refine: int = 2
    progress: Progress = None

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise ValueError(f"damping: expected a number between 0 and 1, got {self.damping!r}")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size: expected a positive integer, got {self.block_size!r}")
        if isinstance(self.refine, bool) or not isinstance(self.refine, int) or self.refine < 0:
            raise ValueError(f"refine: expected an integer from 0 on, got {self.refine!r}")

    def __call__(self, model: nn.Module, targets: Sequence[Target], calibration: Any) -> Quantizer:
        """Round every target, block by block; see :class:`qkernels.hooks.Algorithm`."""
        if calibration is None or isinstance(calibration, Statistics):
            got = "none" if calibration is None else "statistics"
            raise ValueError(f"calibration: algorithm 'gptq' needs batches, got {got}")
        done: dict[str, dict[str, Tensor]] = {}

        def visit(target: Target, inputs: Inputs) -> Tensor:
            weight = target.weight()
            hessian = inputs.moments * (2.0 / inputs.rows)
            wanted = weight
            if inputs.cross is not None:
                wanted = matched_weight(weight, hessian, inputs.cross * (2.0 / inputs.rows), MATCH_DAMPING)
            tensors = gptq_weight(
                wanted,
                hessian,
                target.scheme,
                act_order=self.act_order,
                damping=self.damping,
                block_size=self.block_size,
                search=self.search,
                refine=self.refine,
            )
            stands_for = reference.dequantize_weight(tensors, target.scheme, weight.shape[1])
            if self.bias_correction:
                tensors["bias"] = corrected_bias(target, stands_for, *inputs.means())
            done[target.name] = tensors
            return stands_for

        run_by_blocks(
            model,
            _unshared(targets),
            calibration,
            visit,
            by_sequence=self.by_sequence,
            compare=self.match,
            progress=self.progress,
        )

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
    refine: int = 0,
) -> dict[str, Tensor]:
    """Quantize one weight so that ``x @ weight.T`` changes least for inputs with second moments ``hessian``.

    Args:
        weight: float ``[N, K]``; hessian: float ``[K, K]``, any positive multiple of the sum of ``x x^T``.
        scheme: the weight part of it counts.
        act_order, damping, block_size, search, refine: see :class:`GPTQ`.

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
    damped, upper = _inverse_factor(h, order, damping)
    rows = w.t()[order].contiguous()  # [K, N]: one column of the weight is one line of memory
    codes = torch.empty_like(rows)
    columns_of, pivots = order.tolist(), upper.diagonal().tolist()
    if not static:
        block_size = max(1, block_size // group_size) * group_size
    collected: list[dict[str, Tensor]] = []

    def visit(i: int, row: Tensor) -> Tensor:
        nonlocal grid
        column = columns_of[i]
        if not static and column % group_size == 0:
            last = min(column + group_size, columns)
            piece = scheme.replace(group_size=group_size) if scheme.group_size == "auto" else scheme
            collected.append(_measure(rows[column:last].t(), piece, importance[column:last], search))
            grid = Grid.of(collected[-1], piece, group_size)
        if grid is None:
            raise ValueError("scheme: expected a grid")
        codes[column], rounded = grid.round_column(row, column if static else column % group_size)
        return (row - rounded) / pivots[i]

    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        distribute_errors(rows, upper, start, stop, visit, inner=INNER if static else columns)
    if not static:
        tensors = joined(collected, 1)
    if refine:
        codes, tensors = refine_weight(w, codes, damped, tensors, scheme, rounds=refine)
    return codes_and_tensors(codes.t(), tensors, scheme)


@torch.no_grad()
def matched_weight(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """The float weight whose outputs for changed inputs ``x`` are nearest to those of ``weight`` for the float ``x'``.

        weight @ E[x' x^T] @ (E[x x^T] + damping)^-1,    damping drawing it to ``weight``

    Args:
        weight: ``[N, K]``. hessian: ``[K, K]``, a multiple of ``E[x x^T]``; cross: that multiple of ``E[x' x^T]``.
        damping: share of the mean of the hessian's diagonal.
    """
    w, h = weight.detach().to(hessian), hessian.clone()
    h.diagonal().add_(max(damping * float(h.diagonal().mean()), torch.finfo(torch.float32).tiny))
    change, failed = torch.linalg.solve_ex(h, (w @ (cross - hessian)).t())
    if int(failed) or not bool(torch.isfinite(change).all()):
        return w
    return w + change.t()


def _measure(w: Tensor, scheme: Scheme, importance: Tensor, search: bool) -> dict[str, Tensor]:
    if search:
        return search_range(w, scheme, importance=importance, smallest=SMALLEST, steps=STEPS)
    return reference.weight_grid(w, scheme)


def _inverse_factor(h: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``h`` damped until it has an inverse, and the upper Cholesky factor of that inverse, its columns in order."""
    mean = float(h.diagonal().mean())
    added = damping * mean
    for _ in range(RETRIES):
        damped = h.clone()
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return damped, upper
        added *= 10.0
    raise ValueError(f"hessian: not positive definite even with {added / 10.0:.3g} added to its diagonal")


register_algorithm("gptq", GPTQ())
