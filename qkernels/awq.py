"""AWQ: weights that meet large activations are scaled up before they are rounded; and ranges of least error ("mse").

    s = |x|^r / |w|^(1 - r), r = 0, 0.05, ..., 0.95        s /= sqrt(max(s) * min(s))

with the r whose outputs are nearest to the float layers'.  1 / s is folded into the module that produces the input,
by the machinery of :mod:`qkernels.smooth`; where no exact fold is known the layer is only given its best range.
(Lin et al., AWQ, 2306.00978.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .bias import corrected_bias
from .calibrate import LayerStats, Statistics, collect
from .grids import codes_and_tensors, search_range
from .hooks import Quantizer, Target, register_algorithm
from .probe import Producer
from .scheme import Scheme
from .smooth import Smoother, example_of, loss, over_channels

__all__ = ["AWQ", "MSE"]

RATIOS = 20
SMALLEST_CLIP = 0.5
SAMPLES = 128


@dataclass(frozen=True)
class MSE:
    """The algorithm ``"mse"``: rounding to nearest on the range of least error, searched group by group.

    Args:
        smallest: the smallest share of the full range that is tried. steps: how many shares.
        bias_correction: move the mean error of the outputs into the bias; needs calibration.
    """

    smallest: float = 0.2
    steps: int = 40
    bias_correction: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.smallest <= 1.0 or self.steps < 0:
            raise ValueError(
                f"smallest, steps: expected 0 < smallest <= 1 and steps >= 0, got {self.smallest}, {self.steps}"
            )

    def __call__(self, model: nn.Module, targets: Sequence[Target], calibration: Any) -> Quantizer:
        """See :class:`qkernels.hooks.Algorithm`."""
        stats = None
        if self.bias_correction:
            if calibration is None:
                raise ValueError("calibration: bias correction needs batches, got none")
            stats = collect(model, calibration, samples=0, progress=False)
            stats.require(target.name for target in targets)
        return _Searched(targets, stats, smallest=self.smallest, steps=self.steps, correct=self.bias_correction)


class _Searched:
    """Rounds on searched ranges; errors count as the statistics say, if there are any."""

    def __init__(
        self,
        targets: Sequence[Target],
        stats: Statistics | None,
        *,
        smallest: float,
        steps: int,
        correct: bool = False,
        weigh: bool = False,
        smoother: Smoother | None = None,
    ) -> None:
        self.targets = {target.name: target for target in targets} if correct else {}
        self.stats, self.weigh, self.correct = stats, weigh, correct
        self.smallest, self.steps, self.smoother = smallest, steps, smoother

    def __call__(self, name: str, weight: Tensor, scheme: Scheme) -> Mapping[str, Tensor]:
        layer = None if self.stats is None else self.stats.layers[name]
        importance = layer.rms.square() if layer is not None and self.weigh else None
        grid = search_range(weight, scheme, importance=importance, smallest=self.smallest, steps=self.steps)
        tensors = codes_and_tensors(reference.round_to_grid(weight, grid, scheme), grid, scheme)
        if self.correct and layer is not None:
            stands_for = reference.dequantize_weight(tensors, scheme, weight.shape[1])
            tensors["bias"] = corrected_bias(self.targets.pop(name), stands_for, layer.mean)
        return tensors

    def undo(self) -> None:
        """Take back what was folded."""
        if self.smoother is not None:
            self.smoother.undo()


@dataclass(frozen=True)
class AWQ:
    """The algorithm ``"awq"``, with its knobs.

    Args:
        clip: also search the range of every group, down to half of it.
        samples: input rows per layer that the search tries scales on.
    """

    clip: bool = True
    samples: int = SAMPLES

    def __call__(self, model: nn.Module, targets: Sequence[Target], calibration: Any) -> Quantizer:
        """Fold scales into the model; what is returned can take them back."""
        if calibration is None:
            raise ValueError("calibration: algorithm 'awq' needs batches, got none")
        stats = collect(model, calibration, samples=self.samples, progress=False)
        smoother = _Scaler(model, "auto", "auto")
        try:
            smoother.run(stats, example_of(calibration), {target.name: target.scheme for target in targets}, False)
        except BaseException:
            smoother.undo()
            raise
        steps = 20 if self.clip else 0
        return _Searched(targets, stats, smallest=SMALLEST_CLIP, steps=steps, weigh=True, smoother=smoother)


class _Scaler(Smoother):
    """The search for AWQ's scales."""

    nothing = "no scale is better than none"
    runtime = False

    def wants(self, scheme: Scheme) -> bool:
        """Where weights are coarse."""
        return scheme.weight_bits < 8

    def find_scale(
        self, layer: LayerStats, weights: Sequence[Tensor], producer: Producer | None, scheme: Scheme
    ) -> tuple[float, Tensor | None]:
        """The ratio and scale of least error; no scale where none is better than nothing."""
        act = layer.rms
        size = sum(len(w) for w in weights)
        weight = torch.stack([w.to(torch.float32).abs().sum(0) for w in weights]).sum(0) / size
        if producer is not None:
            act, weight = over_channels(act, producer), over_channels(weight, producer)
        live = (act > 0) & (weight > 0)
        rows = layer.sample.to(weights[0].device)
        best, best_ratio, best_scale = loss(rows, weights, scheme, None), 0.0, None
        for step in range(RATIOS):
            ratio = step / RATIOS
            scale = act.clamp_min(1e-4) ** ratio / weight.clamp_min(1e-8) ** (1.0 - ratio)
            scale = scale / (scale[live].max() * scale[live].min()).sqrt() if bool(live.any()) else scale
            if any(w.dtype != torch.float32 for w in weights):
                scale = torch.exp2(torch.log2(scale).round())
            scale = torch.where(live & torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
            found = loss(rows, weights, scheme, scale)
            if found < best:
                best, best_ratio, best_scale = found, ratio, scale
        return best_ratio, best_scale


register_algorithm("mse", MSE())
register_algorithm("awq", AWQ())
