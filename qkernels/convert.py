"""`quantize_` and `dequantize_`: layers of a model exchanged in place, all of them or none.

First everything is decided and checked (`plan`), then calibration runs where a scheme needs it, then the layers are
replaced one by one under a `Journal` that can put back the very objects that were there. So an error, or Ctrl-C,
leaves the model as it was, and the float weight of a layer is released as soon as the layer is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .account import account, fusion_notes, take_snapshot
from .calibrate import Statistics, collect
from .experts import join_experts_, take_apart
from .fuse import fuse_, unfuse_
from .hooks import Algorithm, Quantizer, Target, find_algorithm, find_smoother
from .journal import Journal
from .nn import QuantEmbedding, QuantLinear
from .observe import take_batches
from .parents import adapt_parents
from .plan import DEFAULT_EXCLUDE, make_plan
from .progress import Progress, tracking
from .report import Report
from .rows import quantize_rows
from .scheme import Scheme
from .sharing import linear_over, owners
from .smoothed import attached
from .survey import (
    Layer,
    conv1d_class,
    dress,
    interchangeable,
    is_quantized,
    origin,
    storage_key,
    survey,
    undress,
)

__all__ = ["DEFAULT_EXCLUDE", "dequantize_", "quantize_"]


def quantize_(
    model: nn.Module,
    scheme: str | Scheme = "w8a8",
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = DEFAULT_EXCLUDE,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    embeddings: bool = False,
    calibration: Iterable[Any] | None = None,
    smooth: float | str | None = None,
    algorithm: str | Algorithm = "rtn",
    strict: bool = True,
    fuse: bool = True,
    progress: Progress = None,
) -> Report:
    """Quantize the Linear layers of `model` in place.

    Replaced are nn.Linear itself (not classes derived from it), transformers' Conv1D and, on request, nn.Embedding. A
    layer that sits in several places stays one layer; layers that share a weight go on sharing it. Everything else is
    left, and the report says why.

    Args:
        model: the module that holds the layers. A layer of it, not the model itself, can be replaced in place.
        scheme: "w8a8", "w8a8_static", "w8a16", "w4a8", "w4a8_intscale", "w4a16", "w3a16", "w2a16", or a
            `Scheme`.
        include: patterns of the layers to convert; None for all. A pattern is a glob over the whole qualified name
            ("*" crosses dots) or "re:" and a regular expression for the whole name.
        exclude: patterns of layers to leave. By default output heads named lm_head; that default gives way to an
            override, and to `embeddings=True` for a head that is tied to an embedding.
        overrides: pattern -> scheme of its own, or None to leave the layer. The first pattern that matches counts.
        embeddings: also convert every nn.Embedding to int8 rows; an output head tied to one shares its table.
        calibration: batches for static schemes, smoothing and calibrated algorithms: tensors (`model(t)`), tuples
            (`model(*t)`) or mappings (`model(**m)`); or, for static schemes and smoothing, the statistics that
            `qk.calibrate` gathered.
        smooth: None, or SmoothQuant's alpha (0..1), or "auto".
        algorithm: how weights are rounded: "rtn" (to nearest), "mse" (range of least error), "hqq", or with calibration
            "gptq" or "awq"; or one of them with its knobs: `qk.GPTQ(act_order=False)`.
        strict: raise where False would leave a layer and say so in the report: patterns that match nothing, weights
            that are not finite or hold no data, nothing to quantize.
        fuse: also apply GELU, SiLU and ReLU modules and add residuals inside quantized Linears, and quantize an input
            once for all the Linears that read it, where the code of their parent shows that nobody sees a difference;
            let kernels compute norms, rotary embeddings and attention (see `qkernels.fuse`); `dequantize_` takes all of
            it apart.
        progress: None (a bar on a terminal), True, False, or a callable `(done, total, name)`.

    Returns:
        The account of every layer and byte; see `Report`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. The model is unchanged then, as
            it is after any other exception.
    """
    rounder, smoother = find_algorithm(algorithm), find_smoother(smooth)
    _check_flags(embeddings=embeddings, strict=strict, fuse=fuse)
    # Experts in 3-D parameters are layers from here on, and as they were again after a failure.
    with take_apart(model) as apart:
        plan = make_plan(
            model, scheme, include=include, exclude=exclude, overrides=overrides, embeddings=embeddings, strict=strict
        )
        reasons = {layer.name: layer.reason or "" for layer in plan.layers if not layer.selected}
        apart.keep(lambda name: name not in reasons, reasons.__getitem__)
        apart.release()
        chosen = plan.selected
        static = [layer for layer in chosen if layer.scheme is not None and not layer.scheme.activation_dynamic]
        stats = calibration if isinstance(calibration, Statistics) else None
        batches = None if calibration is None or stats is not None else take_batches(calibration)
        if batches is None and stats is None and static:
            kind = "" if static[0].scheme is None else static[0].scheme.name
            raise ValueError(f"calibration: scheme {kind} needs batches to measure activations, got None")
        if batches is None and stats is None and smoother is not None:
            raise ValueError("calibration: smooth needs batches to measure activations, got None")

        before = take_snapshot(model)
        expected = sum(layer.weight.numel() * layer.weight.element_size() for layer in chosen)
        with Journal(expected=expected) as journal, torch.no_grad():
            targets = [
                Target(x.name, x.module, x.scheme, x.kind == "conv1d")
                for x in chosen
                if x.scheme is not None and x.table is None and x.same_as is None  # those share what another one rounds
            ]
            if smoother is not None and smooth is not None:
                smoothing = smoother(model, targets, batches if stats is None else stats, smooth)
                journal.on_failure(smoothing.undo)
            data = batches if stats is None else stats
            quantizer = None if rounder is None else rounder(model, targets, data)
            if quantizer is not None and hasattr(quantizer, "undo"):
                journal.on_failure(quantizer.undo)
            activations = _static_activations(model, static, data, progress)
            builder = _Builder(quantizer, activations)
            targets.clear()  # they hold the float layers
            with tracking(progress, total=len(chosen), what="quantizing") as step:
                for index, layer in enumerate(chosen):
                    replacement = builder.build(layer)
                    journal.replace(layer.sites, layer.module, replacement)
                    layer.module = replacement  # the float layer is free now
                    step(index + 1, len(chosen), layer.name)
            adapt_parents(model, is_quantized, on_failure=journal.on_failure)
            notes = {layer.name: layer.reason or layer.note for layer in plan.layers} | apart.reasons
            if fuse:
                notes.update(fusion_notes(fuse_(model, on_failure=journal.on_failure), notes))
            return account(model, before, notes)


class _Builder:
    """Makes the quantized layers, one at a time."""

    def __init__(
        self,
        quantizer: Quantizer | None,
        activations: Mapping[str, dict[str, torch.Tensor]],
    ) -> None:
        self._quantizer = quantizer or (lambda _, weight, scheme: quantize_rows(weight, scheme))
        self._activations = activations

    def build(self, layer: Layer) -> nn.Module:
        """The replacement of one layer; the layers it shares with have been replaced already."""
        twin = layer.same_as.module if layer.kind == "embedding" and layer.same_as is not None else None
        if twin is not None and interchangeable(layer.module, twin):
            return twin
        replacement = self._make(layer)
        dress(replacement, layer)
        return replacement

    def _make(self, layer: Layer) -> nn.Module:
        weight = layer.weight
        if layer.kind == "embedding":
            rows, columns = layer.shape
            tensors = quantize_rows(weight, Scheme(activation_bits=None))
            padding = layer.module.padding_idx
            return QuantEmbedding(rows, columns, tensors, padding_idx=padding, dtype=weight.dtype)  # type: ignore[arg-type]
        scheme = layer.scheme
        if scheme is None:
            raise ValueError(f"{layer.name}: expected a scheme")
        bias = layer.module._parameters.get("bias")
        own: dict[str, torch.Tensor | None] = {"bias": None if bias is None else _alone(bias.detach())}
        own.update(self._activations.get(layer.name, {}))
        own["inv_smooth"] = attached(layer.module)
        if own["inv_smooth"] is None:
            owner = layer.table or layer.same_as
            if owner is not None:
                return linear_over(owner.module, own, scheme, weight.dtype)
        rows, columns = layer.shape
        return QuantLinear(
            columns, rows, {**own, **self._quantizer(layer.name, weight, scheme)}, scheme, dtype=weight.dtype
        )


def _alone(bias: torch.Tensor) -> torch.Tensor:
    """The bias, or a copy where keeping it would keep a larger piece of memory that it is a view of."""
    return bias.clone() if bias.untyped_storage().nbytes() > bias.nbytes else bias


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")


def _static_activations(
    model: nn.Module, layers: Sequence[Layer], calibration: Any, progress: Progress
) -> dict[str, dict[str, torch.Tensor]]:
    """`act_scale` (and `act_zero_point`) of every static layer, from the range of what entered it."""
    if not layers:
        return {}
    stats = collect(model, calibration, samples=0, progress=progress)
    stats.require({layer.name: layer.shape[1] for layer in layers})
    return {
        layer.name: stats.activation_tensors(layer.name, layer.scheme, layer.weight.device)
        for layer in layers
        if layer.scheme is not None
    }


def dequantize_(model: nn.Module, *, dtype: torch.dtype | None = None) -> Report:
    """Turn quantized layers back into nn.Linear, Conv1D and nn.Embedding, in place; ties are tied again.

    The weights are what the quantized layers stood for (run-time smoothing included), not what they were before.

    Args:
        model: the module that holds the layers.
        dtype: of the float weights; None for that of each layer before it was quantized.

    Returns:
        The account of every layer and byte.

    Raises:
        ValueError, TypeError: `model` is itself a quantized layer, or holds none; the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or None, got {dtype}")
    layers = [layer for layer in survey(model) if is_quantized(layer.module)]
    if any(not layer.sites for layer in layers):
        raise ValueError(
            "model: expected a module that holds layers, got a single one; see its to_linear or to_embedding"
        )
    if not layers:
        raise ValueError(f"model: expected quantized layers, {type(model).__name__} holds none")
    before, tied = take_snapshot(model), owners(model)
    parameters = {storage_key(p): p for p in model.parameters() if p.numel()}
    weights: dict[str, nn.Parameter | None] = {}
    originals = [(layer, layer.module) for layer in layers]
    with Journal(expected=0) as journal, torch.no_grad():
        unfuse_(model, on_failure=journal.on_failure)
        for layer, module in sorted(originals, key=lambda item: item[0].name in tied):
            parameter = None if module._buffers.get("inv_smooth") is not None else weights.get(tied.get(layer.name, ""))
            new = _float_layer(module, dtype, parameter)
            undress(module, new)
            _tie_bias(module, new, parameters)
            if module._buffers.get("inv_smooth") is None:
                weights[layer.name] = new._parameters["weight"] if origin(module)["kind"] != "conv1d" else None
            journal.replace(layer.sites, module, new)
        join_experts_(model, on_failure=journal.on_failure)
        adapt_parents(model, is_quantized, on_failure=journal.on_failure)
        return account(model, before, {layer.name: "dequantized" for layer in layers})


def _float_layer(module: nn.Module, dtype: torch.dtype | None, weight: nn.Parameter | None) -> nn.Module:
    """The float layer a quantized one stands for; `weight` is the parameter it is tied to, if any."""
    if isinstance(module, QuantEmbedding):
        return module.to_embedding(dtype)
    if not isinstance(module, QuantLinear):
        raise ValueError(f"model: expected a quantized layer, got {type(module).__name__}")
    linear = module.to_linear(dtype) if weight is None else _tied_linear(module, dtype, weight)
    conv1d = conv1d_class() if origin(module)["kind"] == "conv1d" else None
    if conv1d is None:
        return linear
    conv: Any = conv1d(0, 0)
    conv.nf, conv.nx = module.out_features, module.in_features
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    bias = linear.bias if linear.bias is not None else torch.zeros(module.out_features, dtype=linear.weight.dtype)
    conv.bias = nn.Parameter(bias.detach())
    return conv  # type: ignore[no-any-return]


def _tied_linear(module: QuantLinear, dtype: torch.dtype | None, weight: nn.Parameter) -> nn.Linear:
    bias = module._buffers.get("bias")
    linear = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype or module.dtype, copy=True))
    return linear


def _tie_bias(module: nn.Module, new: nn.Module, parameters: Mapping[tuple[object, ...], nn.Parameter]) -> None:
    """Use the parameter that the layer's bias still shares its memory with (BERT's prediction head has such a one)."""
    bias = module._buffers.get("bias")
    if bias is not None and bias.numel():
        parameter = parameters.get(storage_key(bias))
        fresh = new._parameters.get("bias")
        if parameter is not None and fresh is not None and parameter.dtype == fresh.dtype:
            new._parameters["bias"] = parameter
