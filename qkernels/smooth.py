"""SmoothQuant for any model: outlying input features divided out of activations and multiplied into weights.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)        y = (x / s) @ (w * s).T

One ``s`` serves all layers that read one tensor.  Where a producer of that tensor is known (:mod:`qkernels.probe`),
``1 / s`` goes into its weights and costs nothing; elsewhere the layer keeps ``inv_smooth = 1 / s``, which quantized
layers
multiply in where they round their input.  The model computes the same function as before, and that is checked.
(Xiao et al., SmoothQuant, 2211.10438.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .calibrate import LayerStats, Statistics, calibrate
from .differences import difference_of, limit_of
from .experts import holds_experts
from .hooks import Smoothing, Target, register_smoother
from .observe import run_batches, take_batches
from .originals import Originals
from .patterns import compile_patterns
from .probe import Group, Producer, find_groups
from .progress import Progress, tracking
from .scheme import Scheme
from .smoothed import attach, attached, detach
from .survey import Layer, is_conv1d, survey
from .unchanged import layer_outputs, outputs_of

__all__ = [
    "SmoothReport",
    "SmoothedGroup",
    "Smoother",
    "apply_scales",
    "example_of",
    "loss",
    "over_channels",
    "smooth_",
]

FLOOR = 1e-5  # below this, a feature's largest magnitude counts as this much
STEPS = 10  # alpha="auto" tries 0, 1 / STEPS, ..., 1


@dataclass(frozen=True)
class SmoothedGroup:
    """What was done to the layers that read one tensor.

    Args:
        layers: their names.
        how: "folded", "runtime" or "left".
        producer: the module that took up 1 / s; None unless folded.
        alpha: None where the group was left.
        reason: why it was not folded, or was left.
    """

    layers: tuple[str, ...]
    how: str
    producer: str | None
    alpha: float | None
    reason: str


@dataclass(frozen=True)
class SmoothReport:
    """What `smooth_` did: every group of layers, and how far the outputs moved.

    Args:
        groups: in the order in which the model calls them.
        difference: norm of the change of the model's outputs over their norm: rounding.
    """

    groups: tuple[SmoothedGroup, ...]
    difference: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "difference": self.difference,
            "groups": [{**vars(group), "layers": list(group.layers)} for group in self.groups],
        }

    def __str__(self) -> str:
        lines = []
        for group in self.groups:
            alpha = "" if group.alpha is None else f" alpha {group.alpha:g}"
            into = f" into {group.producer}" if group.producer else ""
            reason = f" ({group.reason})" if group.reason else ""
            lines.append(f"{group.how + alpha:<18}{', '.join(group.layers)}{into}{reason}")
        counts = {how: sum(g.how == how for g in self.groups) for how in ("folded", "runtime", "left")}
        summary = ", ".join(f"{count} {how}" for how, count in counts.items())
        return "\n".join([*lines, f"{summary}; outputs moved by {self.difference:.1e}"])


def smooth_(
    model: nn.Module,
    stats: Statistics | Iterable[Any],
    *,
    alpha: float | str = 0.5,
    fold: str = "auto",
    verify: Any = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = ("*lm_head",),
    scheme: str | Scheme = "w8a8",
    progress: Progress = None,
) -> SmoothReport:
    """Move the outliers of activations into the weights of the Linear layers that read them, in place.

    The float model goes on computing what it computed; `quantize_` afterwards loses less. What `stats` hold is
    adjusted to the smoothed model, so that static schemes can use them.

    Args:
        model: a float model.
        stats: from `qk.calibrate`, or batches.
        alpha: how much of the range moves into the weights, 0..1; "auto" tries 0, 0.1, ..., 1 on every group of layers.
        fold: "auto" changes the module that produces a tensor where that is exact; "runtime" never does.
        verify: a batch that the outputs before and after are compared on; None takes one that was calibrated with.
        include, exclude: patterns of layers, as in `quantize_`.
        scheme: what the layers are going to be; alpha="auto" measures with it.
        progress: see `quantize_`.

    Returns:
        Every group of layers, with what was done.

    Raises:
        ValueError, TypeError: naming the argument or layer; also when outputs move by more than rounding. The
            model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    resolved = Scheme.resolve(scheme)
    layers = _choose(model, include, exclude)
    work = Smoother(model, alpha, fold)
    schemes = {layer.name: resolved for layer in layers}
    if isinstance(stats, Statistics):
        example = stats.example if verify is None else verify
        found = stats
    else:
        batches = take_batches(stats)
        found = _gather(model, batches, progress)
        example = batches[0] if verify is None else verify
    if example is None:
        raise ValueError("verify: expected a batch, because the statistics hold no call of the model, got None")
    try:
        return work.run(found, example, schemes, progress)
    except BaseException:
        work.undo()
        raise


def _gather(model: nn.Module, batches: Sequence[Any], progress: Progress) -> Statistics:
    with calibrate(model, histogram=False) as stats:
        run_batches(model, batches, progress=progress)
    return stats


def _choose(model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str] | None) -> list[Layer]:
    wanted, unwanted = compile_patterns(include, "include"), compile_patterns(exclude, "exclude")
    chosen = [
        layer
        for layer in _scalable(model)
        if (not wanted or any(p.matches(layer.names) for p in wanted))
        and not any(p.matches(layer.names) for p in unwanted)
    ]
    if not chosen:
        raise ValueError(f"model: expected Linear layers to smooth, {type(model).__name__} holds none that are chosen")
    return chosen


def _scalable(model: nn.Module) -> list[Layer]:
    return [x for x in survey(model) if x.kind in ("linear", "conv1d") and x.reason is None]


def _check(alpha: float | str, fold: str) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, str)):
        raise TypeError(f"alpha: expected a number from 0 to 1 or 'auto', got {alpha!r}")
    if (isinstance(alpha, str) and alpha != "auto") or (not isinstance(alpha, str) and not 0.0 <= alpha <= 1.0):
        raise ValueError(f"alpha: expected a number from 0 to 1 or 'auto', got {alpha!r}")
    if fold not in ("auto", "runtime"):
        raise ValueError(f"fold: expected 'auto' or 'runtime', got {fold!r}")


class Smoother:
    """One smoothing of one model; `undo` takes everything back to the bit. Other searches for scales derive from it."""

    nothing = "alpha='auto' found no better one than none"
    runtime = True  # whether layers without a producer get a factor at run time

    def __init__(self, model: nn.Module, alpha: float | str, fold: str) -> None:
        _check(alpha, fold)
        self.model, self.alpha, self.fold = model, alpha, fold
        self.originals = Originals(model)

    def wants(self, scheme: Scheme) -> bool:
        """Whether layers of this scheme are to be scaled."""
        return not scheme.weight_only

    def undo(self) -> None:
        """Take back what was done to the model."""
        self.originals.restore()

    def run(self, stats: Statistics, example: Any, schemes: Mapping[str, Scheme], progress: Progress) -> SmoothReport:
        """Smooth every group that holds a layer of `schemes` whose activations are quantized."""
        scalable = _scalable(self.model)
        modules = {layer.name: layer.module for layer in scalable}
        wanted = {name for name, scheme in schemes.items() if self.wants(scheme)}
        stats.require({layer.name: layer.shape[1] for layer in scalable if layer.name in wanted})
        groups = find_groups(self.model, modules, example, producers=self.fold == "auto")
        before = outputs_of(self.model, example)
        entries: list[SmoothedGroup] = []
        changed: list[tuple[Group, Producer | None, Tensor]] = []
        with torch.no_grad(), tracking(progress, total=len(groups), what="smoothing") as step:
            # From the end: folding changes the rows of a producer's weight, whose columns are looked at after that.
            for count, group in enumerate(reversed(groups)):
                entry, scale, producer = self._smooth(group, stats, schemes, wanted)
                entries.insert(0, entry)
                if scale is not None:
                    changed.append((group, producer, scale))
                step(count + 1, len(groups), next(iter(group.layers)))
        difference = difference_of(before, outputs_of(self.model, example))
        if not difference <= limit_of(self.model):
            raise ValueError(self._accuse(example, changed, difference))
        for group, _, scale in changed:
            for name in group.layers:
                if name in stats.layers and stats.layers[name].seen:
                    self._follow(stats, name, 1.0 / scale)
        why = "experts in 3-D parameters; split_experts_ makes layers of them"
        entries += [
            SmoothedGroup((name,), "left", None, None, why)
            for name, module in self.model.named_modules()
            if holds_experts(module)
        ]
        return SmoothReport(tuple(entries), difference)

    def _follow(self, stats: Statistics, name: str, factor: Tensor) -> None:
        layer, state = stats.layers[name], dict(vars(stats.layers[name]))
        self.originals.on_restore(lambda: vars(layer).update(state))
        layer.multiply(factor)

    def _smooth(
        self, group: Group, stats: Statistics, schemes: Mapping[str, Scheme], wanted: set[str]
    ) -> tuple[SmoothedGroup, Tensor | None, Producer | None]:
        names = tuple(group.layers)

        def left(reason: str) -> tuple[SmoothedGroup, None, None]:
            return SmoothedGroup(names, "left", None, None, reason), None, None

        mine = [name for name in names if name in wanted]
        if not mine:
            return left("no layer of it gains by scaling")
        if "shares its weight" in group.reason:
            return left(group.reason)
        producer = group.producer
        reason = "fold='runtime'" if self.fold == "runtime" else group.reason
        if producer is not None and not _exact(producer):
            reason = f"{producer.name} holds 1 + weight in half precision, where scaling it would round"
            producer = None
        if producer is None and not self.runtime:
            return left(reason)
        readers = group.layers if producer is not None else {name: group.layers[name] for name in mine}
        weights = [_weight(module) for module in readers.values()]
        layer = stats.layers[mine[0]]
        alpha, scale = self.find_scale(layer, weights, producer, schemes[mine[0]])
        if scale is None:
            return left(self.nothing)
        apply_scales(self.model, readers, producer, scale, self.originals)
        part = SmoothedGroup(tuple(readers), "runtime" if producer is None else "folded", None, alpha, reason)
        if producer is not None:
            part = SmoothedGroup(tuple(readers), "folded", producer.name, alpha, "")
        return part, scale, producer

    def find_scale(
        self, layer: LayerStats, weights: Sequence[Tensor], producer: Producer | None, scheme: Scheme
    ) -> tuple[float, Tensor | None]:
        """alpha, and s for every feature; no s where none is better."""
        act = layer.absmax
        weight = torch.stack([w.abs().amax(0).to(torch.float32) for w in weights]).amax(0)
        if producer is not None:
            act, weight = over_channels(act, producer), over_channels(weight, producer)
        exact = all(w.dtype == torch.float32 for w in weights)
        if not isinstance(self.alpha, str):
            return float(self.alpha), _factors(act, weight, float(self.alpha), exact=exact)
        rows = layer.sample.to(weights[0].device)
        best, best_alpha, best_scale = loss(rows, weights, scheme, None), 0.0, None
        for step in range(STEPS + 1):
            alpha = step / STEPS
            scale = _factors(act, weight, alpha, exact=exact)
            found = loss(rows, weights, scheme, scale)
            if found < best:
                best, best_alpha, best_scale = found, alpha, scale
        return best_alpha, best_scale

    def _accuse(self, example: Any, changed: Sequence[tuple[Group, Producer | None, Tensor]], difference: float) -> str:
        """The message that names the layer where smoothed and original model part."""
        names = [name for group, _, _ in changed for name in group.layers]
        modules = {name: module for group, _, _ in changed for name, module in group.layers.items()}
        after = layer_outputs(self.model, modules, example)
        self.undo()
        before = layer_outputs(self.model, modules, example)
        factors = {p.name: _row_factor(p, scale) for _, p, scale in changed if p is not None and p.kind == "linear"}
        worst = ""
        for name in before:
            expected = before[name] if name not in factors else before[name] / factors[name].to(before[name])
            if name in after and not difference_of([expected], [after[name]]) <= limit_of(self.model):
                worst = name
                break
        where = f"first at {worst!r}" if worst else f"among {len(names)} layers"
        return (
            f"verify: smoothing would change the model's outputs by {difference:.2e} of their norm, {where}; "
            "the model is unchanged"
        )


# -- arithmetic -------------------------------------------------------------------------------------------------------


def _factors(act: Tensor, weight: Tensor, alpha: float, *, exact: bool) -> Tensor:
    """s for every feature, fp32; a feature without activations or weights keeps 1.

    Half-precision weights get powers of two, so that folding rounds nothing.
    """
    scale = act.clamp_min(FLOOR) ** alpha / weight.clamp_min(FLOOR) ** (1.0 - alpha)
    if not exact:
        scale = torch.exp2(torch.log2(scale).round())
    live = (act > 0) & (weight > 0) & torch.isfinite(scale) & (scale > 0)
    return torch.where(live, scale, torch.ones_like(scale))


def over_channels(values: Tensor, producer: Producer) -> Tensor:
    """The largest value over all features that one channel of the producer is behind, for each of those features."""
    channel = producer.channel.to(values.device)
    largest = torch.zeros(int(channel.max()) + 1, device=values.device, dtype=values.dtype)
    return largest.scatter_reduce(0, channel, values, "amax", include_self=False)[channel]


def loss(rows: Tensor, weights: Sequence[Tensor], scheme: Scheme, scale: Tensor | None) -> float:
    """Squared error of the outputs of layers that share ``rows [M, K]``, quantized after smoothing by ``scale``."""
    inv = None if scale is None else 1.0 / scale
    if scheme.weight_only:
        return sum(_product_loss(rows if inv is None else rows * inv, rows, w, scheme, scale) for w in weights)
    given: dict[str, Any] = {}
    if not scheme.activation_dynamic:
        smoothed = rows if inv is None else rows * inv
        if scheme.activation_symmetric:
            given = {"scale": float(smoothed.abs().max().clamp_min(FLOOR)) / 127.0}
    codes, step, zero = reference.quantize_activations(
        rows, symmetric=scheme.activation_symmetric or not scheme.activation_dynamic, inv_smooth=inv, **given
    )
    x = codes.to(torch.float32) if zero is None else codes.to(torch.float32) - zero.unsqueeze(-1)
    x = x * step.unsqueeze(-1)
    return sum(_product_loss(x, rows, weight, scheme, scale) for weight in weights)


def _product_loss(x: Tensor, rows: Tensor, weight: Tensor, scheme: Scheme, scale: Tensor | None) -> float:
    w = weight.to(torch.float32)
    scaled = w if scale is None else w * scale
    rounded = reference.dequantize_weight(reference.quantize_weight(scaled, scheme), scheme, w.shape[1])
    return float((x @ rounded.t() - rows @ w.t()).square().sum())


def _exact(producer: Producer) -> bool:
    weight = producer.module._parameters["weight"]
    return producer.kind != "gain_plus_one" or (weight is not None and weight.dtype == torch.float32)


def _row_factor(producer: Producer, scale: Tensor) -> Tensor:
    """s for every output channel of a producer; 1 where no feature hangs on it."""
    bias = producer.module._parameters.get("bias")
    weight = producer.module._parameters["weight"]
    if weight is None:
        raise ValueError(f"{producer.name}: expected a weight")
    rows = weight.shape[0] if producer.kind != "linear" or not is_conv1d(producer.module) else weight.shape[1]
    factor = torch.ones(rows, dtype=torch.float32, device=weight.device if bias is None else bias.device)
    factor[producer.channel.to(factor.device)] = scale.to(factor.device)
    return factor


def apply_scales(
    model: nn.Module, readers: Mapping[str, nn.Module], producer: Producer | None, scale: Tensor, originals: Originals
) -> None:
    """Multiply the columns of every reader's weight by ``scale [K]``, and divide their input by it.

    The division goes into the producer, or into a factor that each reader applies at run time.
    """
    for name, module in readers.items():
        weight = _weight(module)
        originals.keep(name, "weight")
        weight.copy_((weight.to(torch.float32) * scale.to(weight.device)).to(weight.dtype))
        if producer is None:
            previous = attached(module)
            originals.on_restore(partial(_reattach, model, name, previous))
            inv = (1.0 / scale).to(weight.device)
            attach(module, inv if previous is None else previous * inv)
    if producer is None:
        return
    factor = _row_factor(producer, scale)
    for name, parameter in producer.module._parameters.items():
        if parameter is None:
            continue
        originals.keep(producer.name, name)
        value = parameter.detach().to(torch.float32)
        if producer.kind == "linear" and name == "weight":
            value = value / (factor if is_conv1d(producer.module) else factor.unsqueeze(1))
        elif producer.kind == "gain_plus_one" and name == "weight":
            value = (1.0 + value) / factor - 1.0
        else:
            value = value / factor
        parameter.detach().copy_(value.to(parameter.dtype))


def _reattach(model: nn.Module, name: str, factor: Tensor | None) -> None:
    module = model.get_submodule(name)
    if factor is None:
        detach(module)
    else:
        attach(module, factor)


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    if weight is None:
        raise ValueError(f"weight: expected a {type(module).__name__} with a weight")
    return weight.detach().t() if is_conv1d(module) else weight.detach()


# -- quantize_(smooth=...) --------------------------------------------------------------------------------------------


@dataclass
class _Done:
    """What `quantize_` needs of a smoothing that is in the model already."""

    work: Smoother
    report: SmoothReport = field(repr=False)

    def undo(self) -> None:
        """Take it back."""
        self.work.undo()


def example_of(calibration: Any) -> Any:
    """A batch to try things out on: the first one, or the first call that statistics saw.

    Raises:
        ValueError: the statistics saw none.
    """
    example = calibration.example if isinstance(calibration, Statistics) else calibration[0]
    if example is None:
        raise ValueError("calibration: expected statistics that saw a call of the model")
    return example


def _smoother(model: nn.Module, targets: Sequence[Target], calibration: Any, alpha: float | str) -> Smoothing:
    work = Smoother(model, alpha, "auto")
    stats = calibration if isinstance(calibration, Statistics) else _gather(model, calibration, False)
    try:
        return _Done(
            work, work.run(stats, example_of(calibration), {target.name: target.scheme for target in targets}, False)
        )
    except BaseException:
        work.undo()
        raise


register_smoother(_smoother)
