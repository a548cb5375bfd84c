"""How much each layer suffers from being quantized, and which scheme to give each under a budget.

    ranking = qk.sensitivity(model, batches, "w8a8")
    plan = qk.plan(model, batches, max_bytes=60_000_000)
    qk.quantize_(model, "w8a8", overrides=plan.overrides)

A layer's *harm* is what quantizing it alone does to the model's outputs.  A plan adds harms up, which holds while they
are small; what the whole plan does is measured before it is handed out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Statistics, calibrate
from .convert import quantize_rows
from .experts import with_experts_apart
from .nn import QuantLinear
from .observe import call_model, output_tensors, quiescent, take_batches
from .patterns import compile_patterns
from .plan import DEFAULT_EXCLUDE
from .progress import Progress, tracking
from .report import measure
from .scheme import Scheme
from .smoothed import attached
from .survey import Layer, scheme_obstacle, survey

__all__ = ["LayerHarm", "MixedPlan", "Sensitivity", "plan", "sensitivity"]

Loss = Callable[[Any, Any], float]
"""`loss(output, batch)`: what the caller wants small, for one batch."""

SCHEMES: tuple[str, ...] = ("w4a16", "w8a8", "w8a16")


@dataclass(frozen=True)
class LayerHarm:
    """One layer in one scheme, everything else in floating point.

    Args:
        name: the layer. scheme: its name. harm: see `sensitivity`.
        bytes_before, bytes_after: of the layer's parameters.
    """

    name: str
    scheme: str
    harm: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Sensitivity:
    """Layers by the harm that quantizing each of them alone does, the worst first."""

    layers: tuple[LayerHarm, ...]

    def overrides(self, scheme: str | Scheme | None, *, share: float) -> dict[str, Scheme | None]:
        """Overrides for `quantize_` that give another scheme to the layers that suffer most for their size.

        Args:
            scheme: what they become instead, for example "w8a16"; None leaves them.
            share: of the bytes of all ranked layers; no more than this is taken.

        Raises:
            ValueError: a share that is not between 0 and 1.
        """
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 <= share <= 1.0:
            raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
        chosen = None if scheme is None else Scheme.resolve(scheme)
        left = share * sum(layer.bytes_before for layer in self.layers)
        overrides: dict[str, Scheme | None] = {}
        for layer in sorted(self.layers, key=lambda layer: layer.harm / layer.bytes_before, reverse=True):
            if layer.bytes_before <= left:
                overrides[layer.name] = chosen
                left -= layer.bytes_before
        return overrides

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain values that JSON can hold."""
        return [dict(vars(layer)) for layer in self.layers]

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'scheme':<14}  {'harm':>10}  {'MB before':>10}  {'MB after':>10}"]
        for x in self.layers:
            sizes = f"{x.bytes_before / 1e6:>10.3f}  {x.bytes_after / 1e6:>10.3f}"
            lines.append(f"{x.name:<{width}}  {x.scheme:<14}  {x.harm:>10.3e}  {sizes}")
        return "\n".join(lines)


@dataclass(frozen=True)
class MixedPlan:
    """A scheme for every layer.

    Args:
        overrides: for `quantize_`: layer -> scheme, or None to leave it.
        bytes: size of the whole model under the plan. predicted: sum of harms. measured: harm of the whole plan.
        front: every plan met on the way, `(bytes, predicted harm)`, the largest first: the Pareto front.
    """

    overrides: dict[str, Scheme | None]
    bytes: int
    predicted: float
    measured: float
    front: tuple[tuple[int, float], ...]

    def share(self, scheme: str | Scheme) -> float:
        """Which part of the planned layers, by number, has this scheme."""
        wanted = Scheme.resolve(scheme)
        return sum(s == wanted for s in self.overrides.values()) / max(len(self.overrides), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "bytes": self.bytes,
            "predicted": self.predicted,
            "measured": self.measured,
            "layers": {name: None if s is None else s.name for name, s in self.overrides.items()},
            "front": [list(point) for point in self.front],
        }

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for scheme in self.overrides.values():
            key = "float" if scheme is None else scheme.name
            counts[key] = counts.get(key, 0) + 1
        layers = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
        return (
            f"{layers}: {self.bytes / 1e6:.2f} MB, harm {self.measured:.3e} (sum of single harms {self.predicted:.3e})"
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw harm over size, with this plan marked; the format follows the suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('the plot needs matplotlib: pip install "qkernels[demo]"') from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot([size / 1e6 for size, _ in self.front], [harm for _, harm in self.front], label="predicted")
        axes.plot([self.bytes / 1e6], [self.measured], "o", label="this plan, measured")
        axes.set_xlabel("model, MB")
        axes.set_ylabel("harm")
        axes.legend()
        figure.savefig(path, dpi=110)


@with_experts_apart
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    scheme: str | Scheme = "w8a8",
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = DEFAULT_EXCLUDE,
    loss: Loss | None = None,
    progress: Progress = None,
) -> Sensitivity:
    """Quantize every layer alone, run the model, and rank the layers by what changed. The model is left as it was.

    Args:
        model: a float model.
        batches: what it is run on; see `quantize_(calibration=...)`.
        scheme: what each layer is turned into.
        include, exclude: patterns of layers, as in `quantize_`.
        loss: `loss(output, batch)`; a layer's harm is by how much the mean over the batches rises. None: harm is the
            squared change of the outputs over their square.
        progress: see `quantize_`.

    Raises:
        ValueError, TypeError: naming the argument; also for outputs that are not finite.
    """
    trial = _Trial(model, take_batches(batches), loss, include, exclude)
    found = trial.harms([Scheme.resolve(scheme)], progress)
    rows = [row for rows in found.values() for row, _ in rows]
    return Sensitivity(tuple(sorted(rows, key=lambda row: -row.harm)))


@with_experts_apart
def plan(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_bytes: int | None = None,
    max_loss: float | None = None,
    schemes: Sequence[str | Scheme] = SCHEMES,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = DEFAULT_EXCLUDE,
    loss: Loss | None = None,
    progress: Progress = None,
) -> MixedPlan:
    """A scheme for every layer: least harm within `max_bytes`, or least bytes within `max_loss`.

    Starting from the float model, layer after layer takes the step that saves most bytes per harm.

    Args:
        model, batches, include, exclude, loss, progress: see `sensitivity`.
        max_bytes: of the whole model, everything that stays float included.
        max_loss: harm of the whole plan, as measured. Exactly one of the two is given.
        schemes: what layers may become, besides staying float.

    Raises:
        ValueError: a budget that cannot be met (the message says what can), none, or two.
    """
    if (max_bytes is None) == (max_loss is None):
        raise ValueError("max_bytes, max_loss: expected exactly one of them")
    limit = max_bytes if max_bytes is not None else max_loss
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit <= 0:
        raise ValueError(f"max_bytes, max_loss: expected a number above 0, got {limit!r}")
    trial = _Trial(model, take_batches(batches), loss, include, exclude)
    resolved = [Scheme.resolve(scheme) for scheme in schemes]
    if not resolved:
        raise ValueError("schemes: expected at least one, got none")
    options = trial.harms(resolved, progress)
    steps = _steps(options)
    size, harm = sum(measure(model).values()), 0.0
    front, states = [(size, harm)], [dict.fromkeys(options)]
    current: dict[str, Scheme | None] = dict.fromkeys(options)
    for name, scheme, saved, added in steps:
        current = {**current, name: scheme}
        size, harm = size - saved, harm + added
        front.append((size, harm))
        states.append(current)
    if max_bytes is not None:
        chosen = next((i for i, (bytes_, _) in enumerate(front) if bytes_ <= max_bytes), None)
        if chosen is None:
            raise ValueError(
                f"max_bytes: expected at least {front[-1][0]}, the least these schemes reach, got {max_bytes}"
            )
    else:
        chosen = trial.last_within(states, float(limit))
    measured = trial.measure(states[chosen])
    return MixedPlan(states[chosen], front[chosen][0], front[chosen][1], measured, tuple(front))


def _steps(options: Mapping[str, list[tuple[LayerHarm, Scheme]]]) -> list[tuple[str, Scheme, int, float]]:
    """`(layer, scheme, bytes saved, harm added)`, the best bargains first; along each layer's own convex front."""
    steps = []
    for name, rows in options.items():
        size, harm = rows[0][0].bytes_before, 0.0
        left = list(rows)
        while True:
            left = [(row, scheme) for row, scheme in left if row.bytes_after < size]
            if not left:
                break
            row, scheme = min(
                left, key=lambda x: (max(x[0].harm - harm, 0.0) / (size - x[0].bytes_after), x[0].bytes_after)
            )
            rate = max(row.harm - harm, 0.0) / (size - row.bytes_after)
            steps.append((rate, name, scheme, size - row.bytes_after, row.harm - harm))
            size, harm = row.bytes_after, row.harm
    # Rates rise along a convex front, so sorting keeps each layer's own order.
    return [(name, scheme, saved, added) for _, name, scheme, saved, added in sorted(steps, key=lambda x: x[0])]


class _Trial:
    """Layers of a model tried out in other schemes, one or many at a time, and put back."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        loss: Loss | None,
        include: Iterable[str] | None,
        exclude: Iterable[str] | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.batches, self.loss = model, batches, loss
        wanted, unwanted = compile_patterns(include, "include"), compile_patterns(exclude, "exclude")
        self.layers = {
            layer.name: layer
            for layer in survey(model)
            if layer.kind in ("linear", "conv1d")
            and layer.reason is None
            and (not wanted or any(p.matches(layer.names) for p in wanted))
            and not any(p.matches(layer.names) for p in unwanted)
        }
        if not self.layers:
            raise ValueError(f"model: expected Linear layers, {type(model).__name__} holds none that are chosen")
        self.stats: Statistics | None = None
        self.expected = self._run()
        self.base = 0.0 if loss is None else self._loss()

    def harms(self, schemes: Sequence[Scheme], progress: Progress) -> dict[str, list[tuple[LayerHarm, Scheme]]]:
        """Every layer alone in every scheme that it can have."""
        if any(not scheme.activation_dynamic for scheme in schemes):
            with calibrate(self.model, histogram=False, samples=0) as self.stats:
                self._run()
        found: dict[str, list[tuple[LayerHarm, Scheme]]] = {}
        with tracking(progress, total=len(self.layers), what="sensitivity") as step:
            for count, (name, layer) in enumerate(self.layers.items()):
                for scheme in schemes:
                    if scheme_obstacle(layer, scheme) is None:
                        found.setdefault(name, []).append((self._single(name, layer, scheme), scheme))
                step(count + 1, len(self.layers), name)
        if not found:
            raise ValueError("schemes: expected one that some layer can have")
        return found

    def _single(self, name: str, layer: Layer, scheme: Scheme) -> LayerHarm:
        quantized = self._make(name, layer, scheme)
        before = sum(p.numel() * p.element_size() for p in layer.module.parameters(recurse=False))
        after = sum(b.numel() * b.element_size() for b in quantized.buffers())
        return LayerHarm(name, scheme.name, self._with({name: quantized}), before, after)

    def measure(self, schemes: Mapping[str, Scheme | None]) -> float:
        """The harm of several layers at once."""
        return self._with({n: self._make(n, self.layers[n], s) for n, s in schemes.items() if s is not None})

    def last_within(self, states: Sequence[Mapping[str, Scheme | None]], limit: float) -> int:
        """The furthest state, by bisection, whose measured harm is within the limit; the float model always is."""
        low, high = 0, len(states) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.measure(states[middle]) <= limit:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            raise ValueError(
                f"max_loss: no layer can be quantized within {limit:.3e}; the mildest step costs "
                f"{self.measure(states[1]):.3e}"
            )
        return low

    @torch.no_grad()
    def _make(self, name: str, layer: Layer, scheme: Scheme) -> QuantLinear:
        weight, bias = layer.weight, layer.module._parameters.get("bias")
        tensors: dict[str, Tensor | None] = dict(quantize_rows(weight, scheme))
        tensors["bias"] = None if bias is None else bias.detach()
        tensors["inv_smooth"] = attached(layer.module)
        if not scheme.activation_dynamic and self.stats is not None:
            self.stats.require([name])
            tensors.update(self.stats.activation_tensors(name, scheme, weight.device))
        return QuantLinear(weight.shape[1], weight.shape[0], tensors, scheme, dtype=weight.dtype)

    def _with(self, replaced: Mapping[str, nn.Module]) -> float:
        originals = {name: self.layers[name].module for name in replaced}
        try:
            for name, module in replaced.items():
                for parent, key in self.layers[name].sites:
                    parent._modules[key] = module
            return self._loss() - self.base if self.loss is not None else self._change()
        finally:
            for name, module in originals.items():
                for parent, key in self.layers[name].sites:
                    parent._modules[key] = module

    def _run(self) -> list[list[Tensor]]:
        with quiescent(self.model):
            outputs = [output_tensors(call_model(self.model, batch)) for batch in self.batches]
        if not all(bool(torch.isfinite(t).all()) for tensors in outputs for t in tensors):
            raise ValueError("batches: the model's outputs hold NaN or infinite values")
        return outputs

    def _loss(self) -> float:
        if self.loss is None:
            return 0.0
        with quiescent(self.model):
            return sum(float(self.loss(call_model(self.model, b), b)) for b in self.batches) / len(self.batches)

    def _change(self) -> float:
        change = size = 0.0
        for before, after in zip(self.expected, self._run(), strict=True):
            for a, b in zip(before, after, strict=True):
                change += float((a.double() - b.double()).square().sum())
                size += float(a.double().square().sum())
        return change / size if size else change
