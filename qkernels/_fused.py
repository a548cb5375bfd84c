"""The fused half of the reference: rows that are normalized, or go through an activation, before they are rounded.

Statistics are defined without an order: sums in float64, rounded to float32 once.  Everything after them is float32,
each step rounded once:

    total      = x + residual, rounded to the dtype of x
    RMS norm     y = (total * rstd) * weight                   rstd = 1 / sqrt(mean(total^2) + eps)
    layer norm   y = ((total - mean) * rstd) * weight + bias   rstd = 1 / sqrt(mean((total - mean)^2) + eps)
    activation   y = f(x) * up                                 f in float64, rounded once

``y`` is not rounded to the dtype of ``x``: :func:`qkernels.reference.quantize_activations` takes it from there,
smoothing included; where Linears read floats, the result is ``y.to(x.dtype)``.  A row whose sum of squares leaves
float32 is one of NaN.  A kernel sums in float32 in an order of its own: ``mean`` within 2^-17 of the mean of |x|,
``rstd`` around that mean within 2^-18, activations within 2^-20 |x|; its codes follow the contract for the ``y`` it
has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkernels import _rounding as rounding

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_LARGEST = torch.finfo(torch.float32).max


def add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """``x + residual`` in the dtype of ``x``, both ``[..., K]`` of one dtype; ``x`` where there is none.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    wide = rounding.widen(x, "x")
    if residual is None:
        return x.detach()
    _check_like("residual", residual, x)
    return (wide + residual.detach().to(torch.float32)).to(x.dtype)


def rms_norm(total: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``total [..., K]`` to float32 ``[..., K]``; ``weight [K]``, or None for ones."""
    wide = rounding.widen(total, "x")
    _check_factor("weight", weight, wide)
    y = wide * _reciprocal_deviation(wide, eps)
    return y if weight is None else y * weight.detach().to(torch.float32)


def layer_norm(total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``total [..., K]`` to float32 ``[..., K]``; ``weight [K]`` or None for ones, ``bias [K]`` or None."""
    wide = rounding.widen(total, "x")
    _check_factor("weight", weight, wide)
    _check_factor("bias", bias, wide)
    centred = wide - wide.to(torch.float64).mean(-1, keepdim=True).to(torch.float32)
    y = centred * _reciprocal_deviation(centred, eps)
    y = y if weight is None else y * weight.detach().to(torch.float32)
    return y if bias is None else y + bias.detach().to(torch.float32)


def activated(x: Tensor, name: str | None, up: Tensor | None = None) -> Tensor:
    """``f(x) * up`` in float32; ``name`` of an activation, or None for ``x`` itself."""
    wide = rounding.widen(x, "x")
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or one of {', '.join(ACTIVATIONS)}, got {name!r}")
    if name == "relu":
        wide = functional.relu(wide)
    elif name is not None:
        exact = wide.to(torch.float64)
        if name == "silu":
            exact = functional.silu(exact)
        else:
            exact = functional.gelu(exact, approximate="tanh" if name == "gelu_tanh" else "none")
        wide = exact.to(torch.float32)
    if up is None:
        return wide
    _check_like("up", up, x)
    return wide * up.detach().to(torch.float32)


def _reciprocal_deviation(values: Tensor, eps: float) -> Tensor:
    squares = values.to(torch.float64).square().sum(-1, keepdim=True)
    mean = rounding.divide(squares, float(values.shape[-1])).to(torch.float32) + eps
    rstd = (1.0 / mean.to(torch.float64).sqrt()).to(torch.float32)
    return torch.where(squares <= _LARGEST, rstd, torch.full_like(rstd, torch.nan))


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected dtype {x.dtype}, as x, got {tensor.dtype}")
    if tensor.shape != x.shape or tensor.device != x.device:
        raise ValueError(
            f"{name}: expected shape {list(x.shape)} on {x.device}, as x, got {list(tensor.shape)} on {tensor.device}"
        )


def _check_factor(name: str, factor: Tensor | None, x: Tensor) -> None:
    if factor is None:
        return
    if factor.dtype not in rounding.FLOATS:
        raise TypeError(f"{name}: expected dtype float32, bfloat16 or float16, got {factor.dtype}")
    if factor.shape != x.shape[-1:]:
        raise ValueError(f"{name}: expected shape {list(x.shape[-1:])}, got {list(factor.shape)}")
