"""Running a model over calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .progress import Progress, tracking

__all__ = ["evaluating", "run_batches", "take_batches"]


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
