"""Quantized layers that hold one weight between them: output heads tied to embeddings, Linears that shared a
parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from .scheme import Scheme
from .survey import storage_key

__all__ = ["OWN", "linear_over", "owners", "weight_memory"]

OWN = ("bias", "act_scale", "act_zero_point", "inv_smooth")
"""Tensors of a layer that are never shared along with its weight."""


def weight_memory(module: QuantLinear | QuantEmbedding) -> tuple[object, ...] | None:
    """Equal for layers whose integers are the same memory; None for a layer that holds none."""
    holder: Any = module._table if isinstance(module, TiedQuantLinear) else module
    tensors = [
        t for name in holder._resident_names() if name not in OWN and (t := holder._buffers.get(name)) is not None
    ]
    if not tensors:
        return None
    largest = max(tensors, key=lambda t: t.nbytes)
    return storage_key(largest) if largest.numel() else None


def owners(model: nn.Module) -> dict[str, str]:
    """Layer -> the layer whose weight it uses. The embedding counts as the owner of a table, else the first layer."""
    groups: dict[tuple[object, ...], list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            key = weight_memory(module)
            if key is not None:
                groups.setdefault(key, []).append((name, module))
    found = {}
    for members in groups.values():
        owner = next((name for name, module in members if isinstance(module, QuantEmbedding)), members[0][0])
        found.update({name: owner for name, _ in members if name != owner})
    return found


def linear_over(
    owner: nn.Module, own: Mapping[str, torch.Tensor | None], scheme: Scheme, dtype: torch.dtype
) -> QuantLinear:
    """A Linear over the weight of `owner`, with tensors of its own (some of `OWN`).

    Raises:
        ValueError: the owner cannot share (the table of an embedding serves 8-bit schemes per channel alone).
    """
    given = {name: tensor for name, tensor in own.items() if tensor is not None}
    if isinstance(owner, QuantEmbedding):
        head = owner.shared_head(
            given.get("bias"),
            scheme=scheme,
            act_scale=given.get("act_scale"),
            act_zero_point=given.get("act_zero_point"),
        )
        head.dtype = dtype
        return head
    if not isinstance(owner, QuantLinear):
        raise ValueError(f"owner: expected a quantized layer, got {type(owner).__name__}")
    canonical = {name: tensor for name, tensor in owner.canonical().items() if name not in OWN}
    layer = QuantLinear(owner.in_features, owner.out_features, {**canonical, **given}, scheme, dtype=dtype)
    for name in layer._resident_names():
        if name not in OWN and owner._buffers.get(name) is not None and layer._buffers.get(name) is not None:
            layer._buffers[name] = owner._buffers[name]
    layer._moved()
    return layer
