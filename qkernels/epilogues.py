"""Functions applied to the output of a Linear inside its kernel, before the output is rounded.

    relu        max(y, 0)
    gelu        y Phi(y), by the error function
    gelu_tanh   0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3)))
    silu        y / (1 + exp(-y))

In float32, equal to the bit on every tier of the CPU, alone or fused; ReLU is exact, the others lie within
2^-22 |y| of the true value, GELU by the error function within 2^-23 |y| (torch's own within 2^-21 |y|).
``torch.ops.qkernels.epilogue`` applies one by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import _C
from ._library import register_rules
from .checks import DTYPE_CODES, check_out_dtype

__all__ = ["EPILOGUES", "apply_epilogue", "check_epilogue", "epilogue_code", "epilogue_of", "register_operators"]

EPILOGUES: dict[str, int] = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""Names, and the codes by which the binding knows them (0: none)."""

_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}


def check_epilogue(name: object) -> str | None:
    """``name`` itself where it is None or the name of an epilogue.

    Raises:
        ValueError: it is neither.
    """
    if name is not None and name not in EPILOGUES:
        raise ValueError(f"epilogue: expected None or one of {', '.join(EPILOGUES)}, got {name!r}")
    return name  # type: ignore[return-value]


def epilogue_code(name: str | None) -> int:
    """The code of an epilogue; 0 for None."""
    return 0 if name is None else EPILOGUES[name]


def apply_epilogue(y: Tensor, name: str, out_dtype: torch.dtype | None = None) -> Tensor:
    """The function in torch's own words: what is differentiated, and what runs where there is no kernel.

    Args:
        y: float32, bfloat16 or float16 of any shape.
        name: of the epilogue.
        out_dtype: None: that of ``y``.
    """
    return _TORCH[name](y).to(out_dtype or y.dtype)


# -- modules that are epilogues ---------------------------------------------------------------------------------------

_BY_NAME = {
    # Classes of transformers.activations, whose several releases name them differently.
    "GELUActivation": "gelu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}


def epilogue_of(module: nn.Module) -> str | None:
    """The epilogue that computes what an activation module does; None where there is none.  Subclasses count as
    unknown."""
    kind = type(module)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _BY_NAME.get(kind.__name__) if kind.__module__ == "transformers.activations" else None


# -- the operator -----------------------------------------------------------------------------------------------------


def _epilogue(y: Tensor, name: str, out_dtype: torch.dtype | None) -> Tensor:
    """The native kernel, on the CPU."""
    _check(y, name, out_dtype)
    source = y.resolve_neg().contiguous()
    out = torch.empty(y.shape, dtype=out_dtype or y.dtype, device=y.device)
    if out.numel():
        _C.activation(
            source.data_ptr(),
            DTYPE_CODES[source.dtype],
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            out.numel(),
            EPILOGUES[name],
            torch.get_num_threads(),
        )
    return out


def _epilogue_elsewhere(y: Tensor, name: str, out_dtype: torch.dtype | None) -> Tensor:
    _check(y, name, out_dtype)
    return apply_epilogue(y, name, out_dtype).clone(memory_format=torch.contiguous_format)


def _check(y: Tensor, name: str, out_dtype: torch.dtype | None) -> None:
    if y.dtype not in DTYPE_CODES:
        raise TypeError(f"y: expected dtype float32, bfloat16 or float16, got {y.dtype}")
    if name not in EPILOGUES:
        raise ValueError(f"name: expected one of {', '.join(EPILOGUES)}, got {name!r}")
    check_out_dtype(out_dtype)


def _fake(y: Tensor, name: str, out_dtype: torch.dtype | None) -> Tensor:
    _check(y, name, out_dtype)
    return y.new_empty(y.shape, dtype=out_dtype or y.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.name = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (y,) = ctx.saved_tensors
    wide, upstream = y.detach().to(torch.float32), grad.to(torch.float32)
    if ctx.name == "relu":
        slope = torch.ops.aten.threshold_backward(upstream, wide, 0)
    elif ctx.name == "silu":
        slope = torch.ops.aten.silu_backward(upstream, wide)
    else:
        slope = torch.ops.aten.gelu_backward(upstream, wide, approximate="tanh" if ctx.name == "gelu_tanh" else "none")
    return slope.to(y.dtype), None, None


def _vmap(info: Any, in_dims: tuple[int | None, ...], y: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """Element by element, so a batch dimension is one like the others."""
    return torch.ops.qkernels.epilogue(y.movedim(in_dims[0] or 0, 0), *rest), 0


def register_operators(library: torch.library.Library) -> None:
    """Define ``torch.ops.qkernels.epilogue``."""
    library.define("epilogue(Tensor y, str name, ScalarType? out_dtype) -> Tensor")
    library.impl("epilogue", _epilogue, "CPU")
    library.impl("epilogue", _epilogue_elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake("qkernels::epilogue", _fake, lib=library)
    register_rules(library, "epilogue", backward=_backward, setup=_setup, vmap=_vmap)
