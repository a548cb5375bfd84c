"""Quantization-aware training: Linears that compute what the quantized layer will compute, and learn around it.

    qk.prepare_qat_(model, "w4a8")
    ...                                   # train as usual
    qk.convert_(model)                    # the outputs stay what they were

The forward pass is the reference of the kernels, to the bit.  Gradients go straight through the rounding inside the
range and are zero outside (Bengio et al., 1308.3432); with ``learnable_scale`` the scales learn too (Esser et al., LSQ,
1902.08153):

    dw_hat/ds = round(w/s) - w/s inside the range, the clipped code outside;  times 1 / sqrt(values * largest code)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from ._rounding import join_groups, split_groups, storage_dtype
from .account import account, take_snapshot
from .experts import take_apart
from .nn import QuantLinear
from .patterns import compile_patterns, unmatched_message
from .plan import DEFAULT_EXCLUDE
from .report import Report
from .scheme import Scheme
from .survey import Layer, dress, scheme_obstacle, survey

__all__ = ["QATLinear", "convert_", "prepare_qat_"]


class _Exact(torch.autograd.Function):
    """The quantized layer's output; gradients as if nothing had been rounded, except where the weight is clipped."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, scheme: Scheme
    ) -> Tensor:
        """``x [..., K]``, weight ``[N, K]``; scale ``[N]`` or ``[N, G]``, or None where it is measured."""
        tensors = _tensors(weight, scale, scheme)
        if bias is not None:
            tensors["bias"] = bias.detach().to(torch.float32)
        columns = weight.shape[1]
        ctx.save_for_backward(x, weight, scale, reference.dequantize_weight(tensors, scheme, columns))
        ctx.scheme, ctx.bias = scheme, bias is not None
        return reference.linear(x, tensors, scheme, columns, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through."""
        x, weight, scale, rounded = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        grad = grads[0].to(torch.float32)
        rows = grad.reshape(-1, grad.shape[-1])
        inputs = x.detach().to(torch.float32)
        if not scheme.weight_only:
            codes, step, zero = reference.quantize_activations(inputs, symmetric=scheme.activation_symmetric)
            whole = codes.to(torch.float32) if zero is None else codes.to(torch.float32) - zero.unsqueeze(-1)
            inputs = whole * step.unsqueeze(-1)
        grad_x = (grad @ rounded).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_w = rows.t() @ inputs.reshape(-1, inputs.shape[-1])
        grad_b = rows.sum(0) if ctx.bias and ctx.needs_input_grad[2] else None
        grad_s = None
        if scale is not None:
            grad_w, grad_s = _learned(grad_w, weight, scale, scheme)
        return grad_x, grad_w.to(weight.dtype), grad_b, grad_s, None


def _learned(grad: Tensor, weight: Tensor, scale: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """LSQ: gradients of the weight and of its scale, from that of the rounded weight."""
    low, high = (code - scheme.zero_code for code in scheme.code_range)
    columns = weight.shape[1]
    size = scheme.resolve_group_size(columns)
    grouped = scale.dim() == 2
    wide = weight.detach().to(torch.float32)
    values = split_groups(wide, size) if grouped else wide.unsqueeze(1)
    flow = split_groups(grad, size) if grouped else grad.unsqueeze(1)
    v = values / reference.group_scale(_learned_grid(scale, scheme)).reshape(*values.shape[:2], 1)
    inside = (v >= low) & (v <= high)
    slope = torch.where(inside, v.round() - v, v.clamp(low, high))
    count = min(size, columns) if grouped else columns
    step = (flow * slope).sum(-1) / math.sqrt(count * high)
    kept = flow * inside
    return (join_groups(kept, columns) if grouped else kept.squeeze(1)), step.reshape(scale.shape)


def _learned_grid(scale: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """A learned scale as the layer will store it: positive, in the dtype of its granularity or as whole multiples."""
    positive = scale.detach().abs().clamp_min(2.0**-100)
    if scheme.group_scales == "int":
        return reference.integer_scales(positive, torch.ones_like(positive, dtype=torch.bool), scheme)
    return {"weight_scale": positive.to(storage_dtype(scheme.scale_dtype or torch.float32, positive))}


def _tensors(weight: Tensor, scale: Tensor | None, scheme: Scheme) -> dict[str, Tensor]:
    if scale is None:
        return reference.quantize_weight(weight, scheme)
    grid = _learned_grid(scale, scheme)
    return {"weight": reference.weight_codes(reference.round_to_grid(weight, grid, scheme), scheme), **grid}


class QATLinear(nn.Linear):
    """An nn.Linear that computes what a `QuantLinear` with its weight would.

    Attributes:
        scheme: of that layer.
        weight_scale: the scales of channels or groups, where they are learned; else None.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme, *, learnable_scale: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.scheme = linear.weight, scheme
        if linear.bias is not None:
            self.bias = linear.bias
        self.register_parameter("weight_scale", None)
        if learnable_scale:
            grid = reference.weight_grid(linear.weight.detach(), scheme)
            self.weight_scale = nn.Parameter(reference.group_scale(grid))

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in_features]``, fp32, bf16 or fp16."""
        result: Tensor = _Exact.apply(input, self.weight, self.bias, self.weight_scale, self.scheme)
        return result

    def tensors(self) -> dict[str, Tensor | None]:
        """The canonical tensors of the quantized layer."""
        found: dict[str, Tensor | None] = dict(_tensors(self.weight.detach(), self.weight_scale, self.scheme))
        found["bias"] = None if self.bias is None else self.bias.detach()
        return found

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        return f"{super().extra_repr()}, scheme={self.scheme.name}, learnable_scale={self.weight_scale is not None}"


def prepare_qat_(
    model: nn.Module,
    scheme: str | Scheme = "w8a8",
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = DEFAULT_EXCLUDE,
    learnable_scale: bool = False,
) -> list[str]:
    """Put a `QATLinear` in the place of every chosen nn.Linear, over the same parameters.

    Args:
        model: trained further by the caller.
        scheme: dynamic or weight only.
        include, exclude: patterns of layers, as in `quantize_`.
        learnable_scale: scales become parameters (symmetric schemes without a code book); make the optimizer after
            this call.

    Experts in 3-D parameters become layers with parameters of their own: make the optimizer after this call for them
    too.

    Returns:
        The names of the layers.

    Raises:
        ValueError, TypeError: naming the argument; the model is unchanged then.
    """
    resolved = Scheme.resolve(scheme)
    if not resolved.activation_dynamic:
        raise ValueError(f"scheme: expected dynamic or no activation quantization for training, got {resolved.name}")
    if learnable_scale and (not resolved.weight_symmetric or resolved.codebook is not None):
        raise ValueError(f"learnable_scale: expected a symmetric scheme without a code book, got {resolved.name}")
    wanted, unwanted = compile_patterns(include, "include"), compile_patterns(exclude, "exclude")
    with take_apart(model) as apart:
        layers = [layer for layer in survey(model) if layer.kind == "linear" and layer.reason is None]
        names = [name for layer in layers for name in layer.names]
        for pattern in [*wanted, *(unwanted if exclude is not DEFAULT_EXCLUDE else [])]:
            if not pattern.matches(names):
                raise ValueError(unmatched_message(pattern, names, [name for name, _ in model.named_modules()]))
        chosen = [
            layer
            for layer in layers
            if (not wanted or any(p.matches(layer.names) for p in wanted))
            and not any(p.matches(layer.names) for p in unwanted)
            and scheme_obstacle(layer, resolved) is None
        ]
        if not chosen:
            raise ValueError(
                f"model: expected Linear layers to prepare, {type(model).__name__} holds none that are chosen"
            )
        names = [layer.name for layer in chosen]
        apart.keep(names.__contains__, lambda name: "not chosen")
        made = []
        for layer in chosen:
            linear = layer.module
            if isinstance(linear, nn.Linear):
                new = QATLinear(linear, resolved, learnable_scale=learnable_scale)
                new.train(linear.training)
                made.append((layer, new))
        for layer, new in made:
            for parent, key in layer.sites:
                parent._modules[key] = new
        return names


def convert_(model: nn.Module) -> Report:
    """Turn every `QATLinear` into the quantized layer that it stood for. The outputs stay the same.

    Schemes with 8-bit activations stay the same to the bit; weight-only ones up to the order of fp32 sums.

    Returns:
        The account of every layer and byte.

    Raises:
        ValueError: there is none, or one whose weight is not finite; the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    before = take_snapshot(model)
    sites: dict[int, Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, child in module._modules.items():
            if isinstance(child, QATLinear):
                full = f"{name}.{key}" if name else key
                layer = sites.setdefault(id(child), Layer(child, [], [], "linear"))
                layer.names.append(full)
                if not any(parent is module and known == key for parent, known in layer.sites):
                    layer.sites.append((module, key))
    if not sites:
        raise ValueError(f"model: expected layers that prepare_qat_ made, {type(model).__name__} holds none")
    made: list[tuple[Layer, QuantLinear]] = []
    with torch.no_grad():
        for layer in sites.values():
            old = layer.module
            if isinstance(old, QATLinear):
                new = QuantLinear(old.in_features, old.out_features, old.tensors(), old.scheme, dtype=old.weight.dtype)
                dress(new, layer)
                made.append((layer, new))
    for layer, new in made:
        for parent, key in layer.sites:
            parent._modules[key] = new
    return account(model, before, {})
