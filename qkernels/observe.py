"""Running a model over calibration batches, and the ranges of activations that static schemes need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .progress import Progress, tracking

__all__ = ["Range", "evaluating", "observe_ranges", "run_batches", "take_batches"]


class Range:
    """Smallest and largest value that entered one layer, over all batches (fp32)."""

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")

    def update(self, x: torch.Tensor) -> None:
        """Take one more input into account. NaN makes the range NaN."""
        if x.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        # A NaN, once in, stays: comparisons with it are false.
        self.low = low if not (self.low <= low or self.low != self.low) else self.low
        self.high = high if not (self.high >= high or self.high != self.high) else self.high

    @property
    def finite(self) -> bool:
        """Whether all values were finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def seen(self) -> bool:
        """Whether any value entered the layer."""
        return not (self.low == float("inf") and self.high == float("-inf"))


def take_batches(calibration: Any) -> list[Any]:
    """The batches of a `calibration` argument, as a list that can be run more than once.

    Raises:
        TypeError: not an iterable of batches (a single tensor, string or mapping is a batch, not an iterable of them).
        ValueError: no batch in it.
    """
    if isinstance(calibration, (torch.Tensor, str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration: expected an iterable of batches (a tensor, a tuple or a mapping each), got "
            f"{type(calibration).__name__}; "
            "put a single batch into a list"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration: expected at least one batch, got none")
    for batch in batches:
        if not isinstance(batch, (torch.Tensor, tuple, list, Mapping)):
            raise TypeError(
                f"calibration: expected batches to be tensors, tuples or mappings, got {type(batch).__name__}"
            )
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode is put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run_batches(model: nn.Module, batches: Sequence[Any], *, progress: Progress = None) -> None:
    """`model(t)`, `model(*t)` or `model(**m)` for every tensor, tuple or mapping; in eval mode, without gradients."""
    with evaluating(model), tracking(progress, total=len(batches), what="calibrating") as step:
        for index, batch in enumerate(batches):
            if isinstance(batch, torch.Tensor):
                model(batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch)
            step(index + 1, len(batches), "")


def observe_ranges(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Any],
    *,
    factors: Mapping[str, torch.Tensor | None],
    progress: Progress = None,
) -> dict[str, Range]:
    """The range of the first input of every module in `modules`, by name. The model is left as it was.

    Args:
        model: what is run.
        modules: name -> module in it.
        batches: see `run_batches`.
        factors: name -> fp32 `[K]` that inputs are multiplied by first (run-time smoothing).
        progress: see `tracking`.
    """
    ranges = {name: Range() for name in modules}
    handles = []

    def watch(found: Range, factor: torch.Tensor | None) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, torch.Tensor):
                found.update(x if factor is None else x.float() * factor.to(x.device))

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(watch(ranges[name], factors.get(name)), with_kwargs=True))
        run_batches(model, batches, progress=progress)
    finally:
        for handle in handles:
            handle.remove()
    return ranges
