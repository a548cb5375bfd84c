"""Modules of torch that read the weights of their children instead of calling them.

`nn.TransformerEncoderLayer` hands `linear1.weight` and `linear2.weight` to one fused float kernel in eval mode, past
the children's `forward`, and `nn.TransformerEncoder` turns padded batches into nested tensors for it. Once one of
those children is quantized the fused path would bypass it (and rebuild its float weight in every call), so it is
switched off in exactly those modules, and switched on again by the way back.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["adapt_parents", "reads_weight"]

_MARK = "_qkernels_fast_path"  # what the attribute was before; kept in the module, so it travels with copies


def reads_weight(parent: nn.Module, key: str) -> str | None:
    """Why the child `key` of `parent` must stay a float module, or None."""
    if isinstance(parent, nn.MultiheadAttention) and key == "out_proj":
        return "nn.MultiheadAttention reads its weight directly"
    return None


def adapt_parents(
    model: nn.Module,
    is_quantized: Callable[[nn.Module], bool],
    *,
    on_failure: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Switch torch's fused encoder path off where a child is quantized, and on again where none is any more.

    Args:
        model: looked through as a whole.
        is_quantized: tells our layers.
        on_failure: is handed, before anything is switched, a function that undoes it.
    """
    switched = {
        nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
        nn.TransformerEncoder: ("use_nested_tensor", False),
    }
    parents = [(m, *off) for m in model.modules() for kind, off in switched.items() if isinstance(m, kind)]
    before = [(m, {k: m.__dict__[k] for k in (name, _MARK) if k in m.__dict__}, name) for m, name, _ in parents]

    def undo() -> None:
        for module, values, name in before:
            for key in (name, _MARK):
                module.__dict__.pop(key, None)
            module.__dict__.update(values)

    if on_failure is not None:
        on_failure(undo)
    for module, name, off in parents:
        quantized = any(is_quantized(m) for m in module.modules())
        if quantized and _MARK not in module.__dict__ and name in module.__dict__:
            module.__dict__[_MARK] = module.__dict__[name]
            module.__dict__[name] = off
        elif not quantized and _MARK in module.__dict__:
            module.__dict__[name] = module.__dict__.pop(_MARK)
