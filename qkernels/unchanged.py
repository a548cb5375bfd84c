"""Whether a model still computes what it did: outputs before and after a change that should not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .observe import call_model, output_tensors, quiescent

__all__ = ["layer_outputs", "outputs_of"]


def outputs_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """Copies of the tensors that a model returns for a batch, without side effects."""
    with quiescent(model):
        return [tensor.detach().clone() for tensor in output_tensors(call_model(model, batch))]


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
