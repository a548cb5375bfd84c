"""What is asked of single modules and tensors when producers are looked for (:mod:`qkernels.probe`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .survey import is_conv1d, storage_key

__all__ = ["gain_kind", "is_gain", "out_features", "same", "shared_weights", "tolerance"]


def is_gain(module: nn.Module) -> bool:
    """A module without children whose only parameters are a weight and perhaps a bias, one value per feature."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return (
        not module._modules
        and not module._buffers
        and "weight" in own
        and set(own) <= {"weight", "bias"}
        and all(type(p) is nn.Parameter and p.dim() == 1 for p in own.values())
        and not hasattr(module, "parametrizations")
    )


def gain_kind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> str | None:
    """How the gain enters, tried out on the module itself; None if its output does not follow."""
    own = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    generator = torch.Generator().manual_seed(7)
    factor = torch.exp2(torch.randint(-2, 3, own["weight"].shape, generator=generator)).to(own["weight"])
    if own["weight"].shape[0] != output.shape[-1]:
        return None
    for kind, weight in (("gain", own["weight"] * factor), ("gain_plus_one", (1 + own["weight"]) * factor - 1)):
        changed = {"weight": weight}
        if "bias" in own:
            changed["bias"] = own["bias"] * factor
        # With a norm's gain at zero, or all at one value, both ways may agree: then the first of them is right too.
        result = torch.func.functional_call(module, changed, args, dict(kwargs))
        if same([output * factor], [result]):
            return kind
    return None


def out_features(module: nn.Module) -> int:
    """Of a Linear or a Conv1D."""
    weight = module._parameters["weight"]
    return 0 if weight is None else int(weight.shape[1 if is_conv1d(module) else 0])


def shared_weights(model: nn.Module) -> set[int]:
    """Modules that hold a parameter which another module holds as well."""
    holders: dict[tuple[object, ...], list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.device.type != "meta":
                holders.setdefault(storage_key(parameter), []).append(module)
    return {id(module) for modules in holders.values() if len(modules) > 1 for module in modules}


def tolerance(dtype: torch.dtype) -> float:
    """What rounding may change in values of that dtype, relative to the largest."""
    return 1e-3 if dtype == torch.float32 else 3e-2


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors agree to within rounding."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return False
        a64, b64 = a.double(), b.double()
        kept = torch.isfinite(a64)
        if not torch.equal(kept, torch.isfinite(b64)):
            return False
        size = float(a64[kept].norm())
        if float((a64[kept] - b64[kept]).norm()) > tolerance(a.dtype) * 0.1 * max(size, 1e-30):
            return False
    return True
