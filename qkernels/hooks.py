"""Where weight-rounding algorithms and smoothing plug into `quantize_`.

`quantize_` itself knows round-to-nearest ("rtn") only. A module that implements another algorithm registers it here
when it is imported, and `quantize_(..., algorithm=name)` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .scheme import Scheme

__all__ = [
    "Algorithm",
    "Quantizer",
    "Smoother",
    "Smoothing",
    "Target",
    "algorithm_names",
    "find_algorithm",
    "find_smoother",
    "register_algorithm",
    "register_smoother",
]


@dataclass(frozen=True)
class Target:
    """One layer that is going to be quantized.

    Args:
        name: its qualified name.
        module: the float layer, still in place.
        scheme: what it becomes.
        transposed: the module holds its weight as `[in_features, out_features]` (transformers' Conv1D).
    """

    name: str
    module: nn.Module
    scheme: Scheme
    transposed: bool

    def weight(self) -> torch.Tensor:
        """The weight as `[out_features, in_features]`, a view of the layer's own memory."""
        weight = self.module._parameters["weight"]
        if weight is None:
            raise ValueError(f"{self.name}: expected a layer with a weight")
        return weight.detach().t() if self.transposed else weight.detach()


Quantizer = Callable[[str, torch.Tensor, Scheme], Mapping[str, torch.Tensor]]
"""`quantizer(name, weight [N, K], scheme)` gives the canonical tensors of one layer (without the bias, unless it
changes it)."""

Algorithm = Callable[[nn.Module, Sequence[Target], Any], Quantizer]
"""`algorithm(model, targets, calibration)` runs once, before any layer is replaced; calibration is a list of batches,
statistics gathered before, or None. It leaves the model as it was, or returns a quantizer with a method `undo` that
puts it back."""


class Smoothing(Protocol):
    """What a smoother has done: the model in place is smoothed and computes what it did; layers that multiply their
    input at run time carry the factors (`qkernels.smoothed`)."""

    def undo(self) -> None:
        """Take back, to the bit, whatever was folded into the model."""


Smoother = Callable[[nn.Module, Sequence[Target], Any, float | str], Smoothing]
"""`smoother(model, targets, calibration, alpha)`: calibration is a list of batches, or statistics gathered before;
alpha is a number in 0..1 or "auto"."""

_algorithms: dict[str, Algorithm] = {}
_smoothers: list[Smoother] = []


def register_algorithm(name: str, algorithm: Algorithm) -> None:
    """Make `algorithm` known as `name`. Raises ValueError if the name is taken."""
    if name == "rtn" or name in _algorithms:
        raise ValueError(f"algorithm: {name!r} is registered already")
    _algorithms[name] = algorithm


def register_smoother(smoother: Smoother) -> None:
    """Make `smoother` the one that `quantize_(smooth=...)` uses."""
    _smoothers[:] = [smoother]


def algorithm_names() -> list[str]:
    """Every name that `quantize_(algorithm=...)` takes."""
    return ["rtn", *sorted(_algorithms)]


def find_algorithm(name: str | Algorithm) -> Algorithm | None:
    """The algorithm called `name`, or the one given; None for "rtn". Raises TypeError or ValueError, listing names."""
    if not isinstance(name, str):
        if not callable(name) or isinstance(name, type):
            raise TypeError(f"algorithm: expected a name, or an algorithm such as GPTQ(), got {name!r}")
        return name
    if name not in algorithm_names():
        raise ValueError(f"algorithm: expected one of {', '.join(algorithm_names())}, got {name!r}")
    return _algorithms.get(name)


def find_smoother(smooth: float | str | None) -> Smoother | None:
    """The smoother for `smooth`; None for None. Raises TypeError or ValueError for a value without meaning."""
    if smooth is None:
        return None
    if isinstance(smooth, bool) or not isinstance(smooth, (int, float, str)):
        raise TypeError(f"smooth: expected None, a number from 0 to 1 or 'auto', got {smooth!r}")
    if (isinstance(smooth, str) and smooth != "auto") or (not isinstance(smooth, str) and not 0.0 <= smooth <= 1.0):
        raise ValueError(f"smooth: expected None, a number from 0 to 1 or 'auto', got {smooth!r}")
    if not _smoothers:
        raise ValueError(f"smooth: expected None, because no smoother is registered, got {smooth!r}")
    return _smoothers[0]
