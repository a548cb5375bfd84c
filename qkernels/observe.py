"""Running a model over calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .progress import Progress, tracking

__all__ = ["Call", "call_model", "evaluating", "output_tensors", "quiescent", "run_batches", "take_batches"]


@dataclass(frozen=True)
class Call:
    """A batch that is a whole call: positional arguments and keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_model(model: nn.Module, batch: Any) -> Any:
    """`model(t)`, `model(*t)` or `model(**m)` for a tensor, a tuple or a mapping; a `Call` is repeated as it was."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Call):
        return model(*batch.args, **batch.kwargs)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch)


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values: Sequence[Any] = ()
    if isinstance(output, Mapping):
        values = list(output.values())
    elif isinstance(output, (tuple, list)):
        values = output
    return [tensor for value in values for tensor in output_tensors(value)]


def take_batches(calibration: Any) -> list[Any]:
    """The batches of a `calibration` argument, as a list that can be run more than once.

    Raises:
        TypeError: not an iterable of batches (a single tensor, string or mapping is a batch, not an iterable of them).
        ValueError: no batch in it.
    """
    if isinstance(calibration, (Tensor, str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration: expected an iterable of batches (a tensor, a tuple or a mapping each), got "
            f"{type(calibration).__name__}; "
            "put a single batch into a list"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration: expected at least one batch, got none")
    for batch in batches:
        if not isinstance(batch, (Tensor, tuple, list, Mapping)):
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


@contextmanager
def quiescent(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no key-value cache among the outputs (it holds what folding rescales)."""
    changed: list[Any] = []
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and getattr(config, "use_cache", None) is True and all(config is not c for c in changed):
            changed.append(config)
    try:
        for config in changed:
            config.use_cache = False
        with evaluating(model):
            yield
    finally:
        for config in changed:
            config.use_cache = True


def run_batches(model: nn.Module, batches: Sequence[Any], *, progress: Progress = None) -> None:
    """`model(t)`, `model(*t)` or `model(**m)` for every tensor, tuple or mapping; in eval mode, without gradients."""
    with evaluating(model), tracking(progress, total=len(batches), what="calibrating") as step:
        for index, batch in enumerate(batches):
            call_model(model, batch)
            step(index + 1, len(batches), "")
