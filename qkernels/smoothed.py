"""Run-time smoothing of float layers: a buffer ``inv_smooth [K]`` that the input is multiplied by.

It is an ordinary buffer under the name a quantized layer has for it, so copies and state dicts carry it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attach", "attached", "detach", "forget_hook"]

_NAME = "inv_smooth"


def _multiply(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: the input times ``inv_smooth``, in float32, back in its own dtype."""
    factor = module._buffers[_NAME]

    def scaled(x: Tensor) -> Tensor:
        return x if factor is None else (x.to(torch.float32) * factor).to(x.dtype)

    if args:
        return (scaled(args[0]), *args[1:]), kwargs
    key = next(iter(kwargs))
    return args, {**kwargs, key: scaled(kwargs[key])}


def attach(module: nn.Module, inv_smooth: Tensor) -> None:
    """Multiply the input of ``module`` by ``inv_smooth``, fp32 ``[K]``, from now on, in place of an earlier factor."""
    if attached(module) is None:
        module.register_forward_pre_hook(_multiply, with_kwargs=True, prepend=True)
    module.register_buffer(_NAME, inv_smooth.detach().to(torch.float32))


def attached(module: nn.Module) -> Tensor | None:
    """The factor of a float layer, or None."""
    if not any(hook is _multiply for hook in module._forward_pre_hooks.values()):
        return None
    return module._buffers.get(_NAME)


def detach(module: nn.Module) -> None:
    """Take the factor off again."""
    forget_hook(module)
    module._buffers.pop(_NAME, None)


def forget_hook(module: nn.Module) -> None:
    """Stop multiplying, without touching the hook tables of whoever shares them."""
    ours = [key for key, hook in module._forward_pre_hooks.items() if hook is _multiply]
    if not ours:
        return
    kept = [(k, v) for k, v in module._forward_pre_hooks.items() if k not in ours]
    # With one table shared between two modules, handles that users hold go on working for the old one.
    module.__dict__["_forward_pre_hooks"] = OrderedDict(kept)
    flags = module._forward_pre_hooks_with_kwargs
    module.__dict__["_forward_pre_hooks_with_kwargs"] = OrderedDict((k, v) for k, v in flags.items() if k not in ours)
