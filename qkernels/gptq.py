"""GPTQ: columns rounded one after the other, each error made good by the columns that are still to come.

    H = 2 X^T X / rows + damping = R R^T, R upper triangular
    w_hat_i = nearest to  w_i + sum over k < i of (w_k - w_hat_k) R_ki / R_ii

(Frantar et al., GPTQ, 2210.17323, who take the Cholesky factor of the inverse; the results are the same without one:
Chee et al., QuIP, 2307.13304.)  With ``act_order`` the columns of largest ``H_ii`` come first; the grids of the
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
from ._rounding import all_finite
from .bias import corrected_bias
from .blocks import Inputs, run_by_blocks
from .calibrate import Statistics
from .grids import Grid, codes_and_tensors, joined, search_multiples, search_range
from .hooks import Quantizer, Target, register_algorithm
from .progress import Progress
from .refine import refine_weight, round_block, round_columns
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
        refine: how often scales and codes are made better afterwards, on the same objective.
        progress: as in ``quantize_``.
    """

    act_order: bool = True
    damping: float = 0.01
    block_size: int = 128
    search: bool = True
    bias_correction: bool = False
    by_sequence: bool = True
    match: bool = True
    refine: int = 3
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
    if not all_finite(weight):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    if not all_finite(hessian):
        raise ValueError("hessian: expected finite values, got NaN or Inf")
    # [K, N]: one column of the weight is one line of memory.
    wanted = weight.detach().to(torch.float32).t().clone(memory_format=torch.contiguous_format)
    h = hessian.detach().to(wanted.device, torch.float32, copy=True)
    dead = h.diagonal() <= 0
    h.diagonal().masked_fill_(dead, 1.0)
    wanted.masked_fill_(dead.unsqueeze(1), 0.0)
    importance = h.diagonal().clone()
    order = torch.argsort(importance, descending=True) if act_order else torch.arange(columns, device=wanted.device)

    if act_order or scheme.weight_granularity == "per_channel":
        tensors = _measure(wanted.t(), scheme, importance, search)
        grid = Grid.of(tensors, scheme, columns)
        wanted = wanted if grid.low is None else wanted.sub_(grid.widen(grid.low, columns))
        factor = _feedback(h, order, damping)
        units = _on_fixed_grids(wanted, factor, grid, order, block_size)
    else:
        factor = _feedback(h, order, damping)
        units, tensors = _on_measured_grids(wanted, factor, importance, scheme, search)
        grid = Grid.of(tensors, scheme, columns)
        wanted = wanted if grid.low is None else wanted.sub_(grid.widen(grid.low, columns))
    del factor
    if refine:
        tensors = refine_weight(wanted, units, h, tensors, scheme, rounds=refine)
    return codes_and_tensors(grid.codes(units).t(), tensors, scheme)


def _on_fixed_grids(wanted: Tensor, factor: Tensor, grid: Grid, order: Tensor, block_size: int) -> Tensor:
    """The units ``[K, N]`` of ``wanted``, its lines rounded in order."""
    each = [grid.line(group) for group in range(len(grid.scale))]
    lines = [each[group] for group in (order // grid.group_size).tolist()]
    rounded, units = round_columns(wanted[order], factor, lines, block_size=block_size)
    units[order] = rounded
    return units


def _on_measured_grids(
    wanted: Tensor, factor: Tensor, importance: Tensor, scheme: Scheme, search: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The units ``[K, N]`` of ``wanted`` and their grids, of which each is measured when its group's turn comes.

    It is measured on the weights that would be best after what has been rounded, were the rest not rounded at all.
    """
    columns = len(wanted)
    size = scheme.resolve_group_size(columns)
    scheme = scheme.replace(group_size=size)
    errors, units = torch.empty_like(wanted), torch.empty_like(wanted)
    of_channel = {}
    if scheme.group_scales == "int":  # the groups' are multiples of it, so it is fixed before the first of them
        of_channel["weight_scale"] = _measure(wanted.t(), scheme, importance, search)["weight_scale"]
    collected = []
    for start in range(0, columns, size):
        group = slice(start, min(start + size, columns))
        inside = factor[group, group]
        made_good = factor[:start, group].t() @ errors[:start]
        best = wanted[group] + torch.linalg.solve_triangular(inside.t(), made_good, upper=False, unitriangular=True)
        tensors = _measure(best.t(), scheme, importance[group], search, of_channel.get("weight_scale"))
        grid = Grid.of(tensors, scheme, size)
        collected.append({name: tensor for name, tensor in tensors.items() if name not in of_channel})
        before = wanted[group] if grid.low is None else wanted[group] - grid.low
        errors[group] = round_block(before + made_good, before, units[group], inside, [grid.line(0)] * len(before))
    return units, {**of_channel, **joined(collected, 1)}


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


def _measure(
    w: Tensor, scheme: Scheme, importance: Tensor, search: bool, channel_scale: Tensor | None = None
) -> dict[str, Tensor]:
    if channel_scale is not None:
        if search:
            return search_multiples(w, scheme, channel_scale, importance=importance)
        return reference.integer_grid(w, reference.weight_grid(w, scheme.searched), scheme, channel_scale)
    if search:
        return search_range(w, scheme, importance=importance, smallest=SMALLEST, steps=STEPS)
    return reference.weight_grid(w, scheme)


def _feedback(h: Tensor, order: Tensor, damping: float) -> Tensor:
    """How much of each column's error the columns after it make good; ``h`` is damped, in place, until it tells.

    With ``R`` upper triangular and ``R R^T = H``, the columns in order, it is ``R_ki / R_ii`` above the diagonal.
    """
    undamped, backwards = h.diagonal().clone(), order.flip(0)
    added = damping * float(undamped.mean())
    for _ in range(RETRIES):
        torch.add(undamped, added, out=h.diagonal())
        lower, failed = torch.linalg.cholesky_ex(h.index_select(0, backwards).index_select(1, backwards))
        if not int(failed) and all_finite(lower):
            upper = lower.flip(0, 1)
            upper /= upper.diagonal().clone()
            upper.diagonal().zero_()
            return upper
        added *= 10.0
    raise ValueError(f"hessian: not positive definite even with {added / 10.0:.3g} added to its diagonal")


register_algorithm("gptq", GPTQ())
