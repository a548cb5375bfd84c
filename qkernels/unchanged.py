"""Whether a model still computes what it did: outputs before and after a change that should not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .observe import call_model
from .probe import output_tensors, quiescent

__all__ = ["difference_of", "layer_outputs", "limit_of", "outputs_of"]


def outputs_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """Copies of the tensors that a model returns for a batch, without side effects."""
    with quiescent(model):
        return [tensor.detach().clone() for tensor in output_tensors(call_model(model, batch))]


def difference_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Norm of the change over the norm, the worst of all tensors; infinite where something stopped being finite."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        a64, b64 = a.double(), b.double()
        kept = torch.isfinite(a64)
        if not torch.equal(kept, torch.isfinite(b64)):
            return math.inf
        size = float(a64[kept].norm())
        change = float((a64[kept] - b64[kept]).norm())
        worst = max(worst, change / size if size else change)
    return worst


def limit_of(model: nn.Module) -> float:
    """What rounding may move the outputs by: folding in fp32 stays near 1e-6, folding by powers of two is exact."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return 1e-4 if dtypes <= {torch.float32, torch.float64} else 2e-2


def layer_outputs(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:
    """What each of `modules` returned first during that batch, by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, output.detach().clone())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        outputs_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
