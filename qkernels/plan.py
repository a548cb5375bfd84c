"""What a conversion is going to do, decided and checked in full before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .patterns import Pattern, compile_patterns, unmatched_message
from .scheme import Scheme
from .survey import Layer, finite, scheme_obstacle, storage_key, survey

__all__ = ["DEFAULT_EXCLUDE", "Plan", "make_plan"]

DEFAULT_EXCLUDE: tuple[str, ...] = ("*lm_head",)
"""Output heads of language models stay as they are unless the caller says otherwise. Recognised by identity: a caller
who writes the same pattern out means it, also for a head tied to an embedding."""


@dataclass(frozen=True)
class Plan:
    """Every layer of the model, each with its scheme or the reason why it stays."""

    layers: list[Layer]

    @property
    def selected(self) -> list[Layer]:
        """The layers to replace: embeddings first, because output heads may share their tables."""
        chosen = [layer for layer in self.layers if layer.selected]
        return sorted(chosen, key=lambda layer: layer.kind != "embedding")


def make_plan(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    include: Iterable[str] | None,
    exclude: Iterable[str] | None,
    overrides: Mapping[str, str | Scheme | None] | None,
    embeddings: bool,
    strict: bool,
) -> Plan:
    """Decide for every layer. The arguments are those of `quantize_`, and so are the errors."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    base = Scheme.resolve(scheme)
    wanted = compile_patterns(include, "include")
    unwanted = compile_patterns(exclude, "exclude")
    special = _overrides(overrides)
    own_exclude = exclude is not DEFAULT_EXCLUDE

    layers = survey(model)
    for layer in layers:
        if not layer.sites and layer.kind != "other":
            raise ValueError(
                f"model: expected a module that holds layers, got a single {type(layer.module).__name__}, which "
                "cannot be replaced in place; "
                "wrap it: torch.nn.Sequential(layer)"
            )
    named = [*wanted, *(unwanted if own_exclude else []), *(pattern for pattern, _ in special)]
    if strict:
        _check_matched(model, layers, named)

    def override(layer: Layer) -> tuple[Pattern, Scheme | None] | None:
        return next(((p, s) for p, s in special if p.matches(layer.names)), None)

    tables: dict[tuple[object, ...], Layer] = {}
    for layer in layers:
        if layer.kind == "embedding" and layer.reason is None:
            _decide_embedding(layer, wanted, unwanted, override(layer), embeddings)
            if layer.selected:
                tables.setdefault(storage_key(layer.weight), layer)
    for layer in layers:
        if layer.kind in ("linear", "conv1d") and layer.reason is None:
            tied = tables.get(storage_key(layer.weight)) if layer.kind == "linear" else None
            _decide_linear(layer, base, wanted, unwanted, override(layer), own_exclude, tied)
    _check_data(layers, strict)
    _find_shared(layers)
    plan = Plan(layers)
    if strict and not plan.selected:
        raise ValueError(f"model: nothing to quantize in {type(model).__name__}: {_why_nothing(layers)}")
    return plan


def _overrides(overrides: Mapping[str, str | Scheme | None] | None) -> list[tuple[Pattern, Scheme | None]]:
    if overrides is None:
        return []
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides: expected a mapping of patterns to schemes or None, got {type(overrides).__name__}")
    patterns = compile_patterns(overrides, "overrides")
    return [(p, None if s is None else Scheme.resolve(s)) for p, s in zip(patterns, overrides.values(), strict=True)]


def _check_matched(model: nn.Module, layers: list[Layer], patterns: list[Pattern]) -> None:
    layer_names = [name for layer in layers for name in layer.names]
    for pattern in patterns:
        if not pattern.matches(layer_names):
            modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
            raise ValueError(unmatched_message(pattern, layer_names, modules))


def _refused(layer: Layer, wanted: list[Pattern], unwanted: list[Pattern]) -> str | None:
    for pattern in unwanted:
        if pattern.matches(layer.names):
            return f"excluded by {pattern.text!r}"
    if wanted and not any(pattern.matches(layer.names) for pattern in wanted):
        return "matched by no pattern of include"
    return None


def _decide_embedding(
    layer: Layer,
    wanted: list[Pattern],
    unwanted: list[Pattern],
    override: tuple[Pattern, Scheme | None] | None,
    embeddings: bool,
) -> None:
    if not embeddings:
        layer.leave("an embedding (embeddings=True quantizes it)")
        return
    refused = _refused(layer, wanted, unwanted)
    if refused is not None:
        layer.leave(refused)
    elif override is not None:
        pattern, scheme = override
        if scheme is None:
            layer.leave(f"excluded by the override {pattern.text!r}")
        elif not _is_int8_rows(scheme):
            raise ValueError(
                f"overrides: expected an 8-bit scheme per channel, or None, for the embedding {layer.name!r}, "
                f"got {scheme.name}"
            )


def _decide_linear(
    layer: Layer,
    base: Scheme,
    wanted: list[Pattern],
    unwanted: list[Pattern],
    override: tuple[Pattern, Scheme | None] | None,
    own_exclude: bool,
    tied: Layer | None,
) -> None:
    refused = _refused(layer, wanted, unwanted)
    # The default exclude gives way to an override that names the layer, and to the table it would share.
    if refused is not None and not own_exclude and (override is not None or tied is not None):
        refused = _refused(layer, wanted if tied is None else [], [])
    if refused is not None and tied is not None and not any(p.matches(layer.names) for p in unwanted):
        refused = None  # include need not name a head whose embedding is quantized
    if refused is not None:
        layer.leave(refused if tied is None else f"{refused}; keeps the float table that {tied.name} had")
        return
    scheme = base
    if override is not None:
        pattern, chosen = override
        if chosen is None:
            layer.leave(f"excluded by the override {pattern.text!r}")
            return
        scheme = chosen
    if tied is not None:
        if _is_int8_rows(scheme):
            layer.table = tied
        elif override is None:
            scheme = Scheme(
                activation_bits=scheme.activation_bits,
                activation_granularity=scheme.activation_granularity,
                activation_dynamic=scheme.activation_dynamic,
                activation_symmetric=scheme.activation_symmetric,
            )
            layer.table = tied
        else:
            layer.note = f"its own {scheme.name} weight, by override, beside the int8 table of {tied.name}"
    obstacle = scheme_obstacle(layer, scheme)
    if obstacle is not None:
        layer.table = None
        layer.leave(obstacle)
        return
    layer.scheme = scheme


def _is_int8_rows(scheme: Scheme) -> bool:
    return scheme.weight_bits == 8 and scheme.weight_granularity == "per_channel" and scheme.weight_symmetric


def _check_data(layers: list[Layer], strict: bool) -> None:
    """No meta tensors, no NaN, no infinity in what is going to be replaced."""
    seen: dict[tuple[object, ...], bool] = {}
    for layer in layers:
        if not layer.selected:
            continue
        weight = layer.weight
        if weight.device.type == "meta":
            if strict:
                raise ValueError(
                    f"model: the weight of {layer.name!r} is on the meta device and holds no data; load the "
                    "weights first"
                )
            layer.leave("on the meta device")
            continue
        key = storage_key(weight)
        if key not in seen:
            seen[key] = finite(weight)
        if not seen[key]:
            if strict:
                raise ValueError(
                    f"model: the weight of {layer.name!r} holds NaN or infinite values (strict=False leaves the "
                    "layer as it is)"
                )
            layer.leave("its weight holds NaN or infinite values")


def _find_shared(layers: list[Layer]) -> None:
    """Note which layers hold one weight between them."""
    first: dict[tuple[object, ...], Layer] = {}
    for layer in layers:
        if (
            layer.kind == "other"
            or layer.module._parameters.get("weight") is None
            or layer.weight.device.type == "meta"
        ):
            continue
        if layer.table is not None and not layer.table.selected:
            layer.table = None
        other = first.setdefault(storage_key(layer.weight), layer)
        if other is layer:
            continue
        if layer.selected and other.selected:
            if layer.table is None and layer.kind == other.kind and layer.scheme == other.scheme:
                layer.same_as = other
        elif layer.selected != other.selected:
            left, replaced = (other, layer) if layer.selected else (layer, other)
            replaced.note = replaced.note or f"its float weight stays too, because {left.name} uses it"


def _why_nothing(layers: list[Layer]) -> str:
    if not layers:
        return "it holds no nn.Linear, Conv1D or nn.Embedding"
    reasons: dict[str, int] = {}
    for layer in layers:
        reason = layer.reason or "nothing speaks against it"
        reasons[reason] = reasons.get(reason, 0) + 1
    return "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
