"""What operators of torch have in common when they are registered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["register_rules", "vmap_rows"]


def register_rules(library: torch.library.Library, name: str, *, backward: Any, setup: Any, vmap: Any) -> None:
    """Gradient and batching of ``qkernels::name``."""
    torch.library.register_autograd(f"qkernels::{name}", backward, setup_context=setup, lib=library)
    if hasattr(torch.library, "register_vmap"):
        torch.library.register_vmap(f"qkernels::{name}", vmap, lib=library)


def vmap_rows(name: str) -> Any:
    """Batching over the input alone: any leading dimension is more rows."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[1:]):
            raise ValueError(f"{name}: expected vmap over the input alone, got in_dims {in_dims}")
        return getattr(torch.ops.qkernels, name)(x.movedim(in_dims[0] or 0, 0), *rest), 0

    return rule
