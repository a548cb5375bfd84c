"""What operators of torch have in common when they are registered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_residual

__all__ = ["plus_residual", "register_rules", "vmap_rows"]


def register_rules(library: torch.library.Library, name: str, *, backward: Any, setup: Any, vmap: Any) -> None:
    """Gradient and batching of ``qkernels::name``."""
    torch.library.register_autograd(f"qkernels::{name}", backward, setup_context=setup, lib=library)
    if hasattr(torch.library, "register_vmap"):
        torch.library.register_vmap(f"qkernels::{name}", vmap, lib=library)


def plus_residual(kernel: Any, arguments: int) -> Any:
    """A kernel of ``arguments`` arguments, ``x`` first and ``out_dtype`` last, as one that takes a residual as well.

    The sum is rounded once, as in kernels that add it themselves.
    """

    def run(x: Tensor, *rest: Any) -> Tensor:
        residual = rest[arguments - 1] if len(rest) == arguments else None
        if residual is None:
            return kernel(x, *rest[: arguments - 1])  # type: ignore[no-any-return]
        *given, out_dtype, _ = rest
        y = kernel(x, *given, torch.float32)
        check_residual(residual, x, y.shape[-1], out_dtype or x.dtype)
        return (y + residual).to(out_dtype or x.dtype)  # type: ignore[no-any-return]

    return run


def vmap_rows(name: str) -> Any:
    """Batching over the input alone: any leading dimension is more rows."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[1:]):
            raise ValueError(f"{name}: expected vmap over the input alone, got in_dims {in_dims}")
        return getattr(torch.ops.qkernels, name)(x.movedim(in_dims[0] or 0, 0), *rest), 0

    return rule
