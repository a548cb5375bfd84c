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


def adapt_parents(model: nn.Module, is_quantized: Callable[[nn.Module], bool]) -> Callable[[], None]:
    """Switch torch's fused encoder path off where a child is quantized, and on again where none is any more.

    Returns:
        A function that undoes it.
    """
    changed: list[tuple[nn.Module, str, object, bool]] = []

    def switch(module: nn.Module, attribute: str, off: object, quantized: bool) -> None:
        marked = _MARK in module.__dict__
        if quantized == marked:
            return
        changed.append((module, attribute, module.__dict__.get(attribute), marked))
        if quantized:
            module.__dict__[_MARK] = module.__dict__.get(attribute)
            module.__dict__[attribute] = off
        else:
            module.__dict__[attribute] = module.__dict__.pop(_MARK)

    def undo() -> None:
        for module, attribute, value, marked in reversed(changed):
            if marked:
                module.__dict__[_MARK] = value_before[id(module)]
            else:
                module.__dict__.pop(_MARK, None)
            module.__dict__[attribute] = value

    value_before = {id(m): m.__dict__[_MARK] for m in model.modules() if _MARK in m.__dict__}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            switch(module, "activation_relu_or_gelu", 0, any(is_quantized(m) for m in module.modules()))
        elif isinstance(module, nn.TransformerEncoder):
            switch(module, "use_nested_tensor", False, any(is_quantized(m) for m in module.modules()))
    return undo
