"""Calibration: what entered every Linear layer, as running statistics whose memory does not grow with the data.

    with qk.calibrate(model) as stats:
        for batch in batches:
            model(batch)
    qk.smooth_(model, stats)
    qk.quantize_(model, "w8a8_static", calibration=stats)

Per layer O(K) numbers are kept: bounds, sums and squares of every input feature, a histogram of all of them together,
and a few whole input rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _rounding as rounding
from .experts import experts_apart
from .observe import Call, run_batches, take_batches
from .patterns import compile_patterns, unmatched_message
from .progress import Progress, tracking
from .ranges import Histogram, check_method, choose_range
from .scheme import Scheme
from .survey import survey

__all__ = ["LayerStats", "Statistics", "calibrate", "collect", "first_input", "name_some", "widths_checked"]

SAMPLE_ROWS = 64


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor a layer is called with, positional or by keyword; None if there is none."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    return x if isinstance(x, Tensor) else None


@contextmanager
def widths_checked(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, Linears and Conv1Ds refuse inputs of another width than their weight's before torch does.

    Raises:
        ValueError: from the model's call, as where it is given batches of several kinds; the message names the layer.
    """

    def check(name: str, features: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            if x is not None and (not x.dim() or x.shape[-1] != features):
                shape = list(x.shape)
                raise ValueError(f"calibration: expected {features} features to enter {name!r}, got shape {shape}")

        return hook

    handles = []
    try:
        for name, module in layers.items():
            features = int(getattr(module, "in_features", getattr(module, "nx", 0)))
            handles.append(module.register_forward_pre_hook(check(name, features), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def name_some(names: Sequence[str], limit: int = 5) -> str:
    """Names for a message: the first few, and how many more."""
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


@dataclass
class LayerStats:
    """What entered one layer.

    Args:
        in_features: K.
        rows: input rows seen (tokens).
        low: smallest value of every feature, float32 ``[K]``; high: the largest.
        sums: float64 ``[K]``; squares: of the values squared.
        histogram: of all features together, or None where none is kept.
        sample: up to ``capacity`` input rows picked evenly at random, float32 ``[rows, K]``.
        finite: False once a NaN or Inf entered.
    """

    in_features: int
    rows: int = 0
    low: Tensor = field(default_factory=lambda: torch.zeros(0))
    high: Tensor = field(default_factory=lambda: torch.zeros(0))
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    histogram: Histogram | None = None
    sample: Tensor = field(default_factory=lambda: torch.zeros(0))
    capacity: int = SAMPLE_ROWS
    finite: bool = True
    _keys: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    def update(self, x: Tensor) -> None:
        """Take one more input ``[..., K]`` into account."""
        if not x.numel():
            return
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        low, high = rows.amin(0), rows.amax(0)
        if not bool(torch.isfinite(low + high).all()) and not bool(torch.isfinite(rows).all()):
            self.finite = False
            self.rows += len(rows)
            return
        if not len(self.low):
            self.low, self.high = low, high
            self.sums = torch.zeros_like(low, dtype=torch.float64)
            self.squares = torch.zeros_like(low, dtype=torch.float64)
            self.sample = rows[:0]
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.sums += rows.sum(0, dtype=torch.float64)
        self.squares += rows.to(torch.float64).square_().sum(0)
        self.rows += len(rows)
        if self.histogram is not None:
            self.histogram.update(rows)
        self._pick(rows)

    def _pick(self, rows: Tensor) -> None:
        # Every row draws a number, and the smallest stay: each row ever seen is equally likely to be kept.
        keys = torch.cat((self._keys, torch.rand(len(rows), generator=self._generator)))
        kept = torch.topk(keys, min(self.capacity, len(keys)), largest=False, sorted=False).indices
        known = len(self._keys)
        old, new = kept[kept < known], kept[kept >= known] - known
        device = rows.device
        self.sample = torch.cat((self.sample[old.to(device)], rows[new.to(device)]))
        self._keys = torch.cat((keys[old], keys[new + known]))

    @property
    def seen(self) -> bool:
        """Whether any row entered."""
        return self.rows > 0

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of every feature, float32 ``[K]``."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mean(self) -> Tensor:
        """Mean of every feature, float32 ``[K]``."""
        return (self.sums / max(self.rows, 1)).to(torch.float32)

    @property
    def rms(self) -> Tensor:
        """Root of the mean square of every feature, float32 ``[K]``."""
        return (self.squares / max(self.rows, 1)).sqrt().to(torch.float32)

    def group_absmax(self, group_size: int) -> Tensor:
        """Largest magnitude in every group of ``group_size`` features, float32 ``[ceil(K / group_size)]``."""
        return rounding.split_groups(self.absmax, group_size).amax(-1)

    def multiply(self, factor: Tensor) -> None:
        """Follow a change of the inputs: every feature times a positive ``factor [K]``.  Ends the histogram."""
        factor = factor.to(self.low)
        self.low, self.high = self.low * factor, self.high * factor
        self.sums, self.squares = self.sums * factor, self.squares * factor.to(torch.float64) ** 2
        self.sample = self.sample * factor
        self.histogram = None


@dataclass
class Statistics:
    """What entered the layers of a model: ``layers[name]`` for every Linear and Conv1D, seen or not.

    Args:
        layers: by qualified name.
        method: how :meth:`range` cuts outliers off unless told otherwise; see :data:`qkernels.ranges.METHODS`.
        percentile: for method "percentile".
        example: the first call of the model that was watched, or None.
    """

    layers: dict[str, LayerStats]
    method: str = "minmax"
    percentile: float = 99.99
    example: Call | None = None

    @property
    def seen(self) -> list[str]:
        """Names of the layers that some row entered."""
        return [name for name, layer in self.layers.items() if layer.seen]

    @property
    def unseen(self) -> list[str]:
        """Names of the layers that no row entered."""
        return [name for name, layer in self.layers.items() if not layer.seen]

    def require(self, layers: Iterable[str] | Mapping[str, int]) -> None:
        """Check that there is finite data for every one of these layers; given their input features, of that width.

        Raises:
            ValueError: a layer that is unknown, saw nothing, saw NaN or Inf, or is of another width; the message names
                it.
        """
        names = list(layers)
        unknown = [name for name in names if name not in self.layers]
        if unknown:
            raise ValueError(
                f"calibration: the statistics hold nothing of {name_some(unknown)}; calibrate this very model"
            )
        unseen = [name for name in names if not self.layers[name].seen]
        if unseen:
            raise ValueError(
                f"calibration: no batch reached {name_some(unseen)}; give data that does, or exclude the layers"
            )
        broken = [name for name in names if not self.layers[name].finite]
        if broken:
            raise ValueError(f"calibration: NaN or infinite values entered {name_some(broken)}")
        for name, features in layers.items() if isinstance(layers, Mapping) else ():
            if self.layers[name].in_features != features:
                raise ValueError(
                    f"calibration: expected statistics of {features} features for {name!r}, got them of "
                    f"{self.layers[name].in_features}; calibrate this very model"
                )

    def range(
        self,
        name: str,
        method: str | None = None,
        *,
        percentile: float | None = None,
        symmetric: bool = True,
    ) -> tuple[float, float]:
        """The range of all inputs of a layer that an 8-bit grid should cover.

        Raises:
            ValueError: see :meth:`require` and :func:`qkernels.ranges.choose_range`.
        """
        self.require([name])
        layer = self.layers[name]
        return choose_range(
            float(layer.low.min()),
            float(layer.high.max()),
            layer.histogram,
            self.method if method is None else method,
            percentile=self.percentile if percentile is None else percentile,
            symmetric=symmetric,
        )

    def activation_tensors(self, name: str, scheme: Scheme, device: torch.device) -> dict[str, Tensor]:
        """``act_scale`` and, for an asymmetric scheme, ``act_zero_point`` of a static layer."""
        method = self.method
        if self.layers[name].histogram is None and method not in ("minmax", "absmax"):
            method = "minmax"  # smoothing has ended the histogram
        low, high = self.range(name, method, symmetric=scheme.activation_symmetric)
        bounds = torch.tensor([low, high], dtype=torch.float32)
        if scheme.activation_symmetric:
            return {"act_scale": rounding.symmetric_grid(bounds, bits=8).scale.to(device)}
        grid = rounding.asymmetric_grid(bounds, bits=8)
        zero_point = torch.zeros((), dtype=torch.int32) if grid.zero_point is None else grid.zero_point
        return {"act_scale": grid.scale.to(device), "act_zero_point": zero_point.to(torch.int32).to(device)}

    def to_dict(self) -> dict[str, Any]:
        """A summary that JSON can hold: rows and range of every layer."""
        return {
            name: {
                "rows": layer.rows,
                "low": float(layer.low.min()) if len(layer.low) else None,
                "high": float(layer.high.max()) if len(layer.high) else None,
                "finite": layer.finite,
            }
            for name, layer in self.layers.items()
        }


@contextmanager
def calibrate(
    model: nn.Module,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    method: str = "minmax",
    percentile: float = 99.99,
    histogram: bool = True,
    samples: int = SAMPLE_ROWS,
    progress: Progress = False,
) -> Iterator[Statistics]:
    """Watch what enters the Linear layers of ``model`` while the block runs; nothing of the model changes.

    Experts in 3-D parameters are watched one by one; inside the block, layers stand in their place.

    Args:
        model: run by the caller inside the block, in whatever mode it is in (``model.eval()`` is usual).
        include, exclude: patterns of layers, as in ``quantize_``.
        method: how static ranges are cut later: "minmax", "absmax", "percentile", "mse" or "entropy".
        percentile: for method "percentile".
        histogram: keep what "percentile", "mse" and "entropy" need.
        samples: input rows to keep per layer, for searches that try things out.
        progress: True, or a callable ``(done, total, name)``: called after every forward pass of the model; total is 0.

    Yields:
        The statistics, complete when the block ends.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_method(method, percentile)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ValueError(f"samples: expected an integer of at least 0, got {samples!r}")
    with experts_apart(model):
        yield from _watching(model, include, exclude, method, percentile, histogram, samples, progress)


def _watching(
    model: nn.Module,
    include: Iterable[str] | None,
    exclude: Iterable[str] | None,
    method: str,
    percentile: float,
    histogram: bool,
    samples: int,
    progress: Progress,
) -> Iterator[Statistics]:
    modules = _watched(model, include, exclude)
    keep = histogram or method not in ("minmax", "absmax")
    stats = Statistics(
        {
            name: LayerStats(columns, histogram=Histogram() if keep else None, capacity=samples)
            for name, (_, columns) in modules.items()
        },
        method,
        percentile,
    )
    handles = []

    def watch(layer: LayerStats) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            if x is not None:
                with torch.no_grad():
                    layer.update(x)

        return hook

    checked = widths_checked({name: module for name, (module, _) in modules.items()})
    with checked, tracking(progress, total=0, what="calibrating") as step:
        passes = 0

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal passes
            passes += 1
            stats.example = stats.example or Call(args, kwargs)
            step(passes, 0, "")

        try:
            for name, (module, _) in modules.items():
                handles.append(module.register_forward_pre_hook(watch(stats.layers[name]), with_kwargs=True))
            handles.append(model.register_forward_hook(count, with_kwargs=True))
            yield stats
        finally:
            for handle in handles:
                handle.remove()


def _watched(
    model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str] | None
) -> dict[str, tuple[nn.Module, int]]:
    wanted, unwanted = compile_patterns(include, "include"), compile_patterns(exclude, "exclude")
    layers = [layer for layer in survey(model) if layer.kind in ("linear", "conv1d") and _has_weight(layer.module)]
    names = [name for layer in layers for name in layer.names]
    for pattern in [*wanted, *unwanted]:
        if not pattern.matches(names):
            raise ValueError(unmatched_message(pattern, names, [name for name, _ in model.named_modules()]))
    chosen = {
        layer.name: (layer.module, layer.shape[1])
        for layer in layers
        if (not wanted or any(p.matches(layer.names) for p in wanted))
        and not any(p.matches(layer.names) for p in unwanted)
    }
    if not chosen:
        raise ValueError(f"model: expected Linear layers to watch, {type(model).__name__} holds none that are chosen")
    return chosen


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None


def collect(
    model: nn.Module,
    calibration: Any,
    *,
    histogram: bool = False,
    samples: int = SAMPLE_ROWS,
    progress: Progress = None,
) -> Statistics:
    """Statistics of a ``calibration`` argument: returned as they are, or gathered by running its batches.

    Raises:
        TypeError, ValueError: as :func:`qkernels.observe.take_batches`.
    """
    if isinstance(calibration, Statistics):
        return calibration
    batches = take_batches(calibration)
    with calibrate(model, histogram=histogram, samples=samples) as stats:
        run_batches(model, batches, progress=progress)
    return stats
