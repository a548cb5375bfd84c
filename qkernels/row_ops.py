"""Operators that compute a row and quantize it in one pass: norms, with a residual before them, and activations.

    torch.ops.qkernels.rms_norm_quantize    (x + residual) normalized and quantized, and the sum itself
    torch.ops.qkernels.layer_norm_quantize  the same of a layer norm
    torch.ops.qkernels.activation_quantize  activation(x) * up, quantized

One CUDA kernel each, reading the row once; the reference elsewhere (:mod:`qkernels._fused` is the definition).  The
functions here take the same arguments with names.  Operators cannot return None: what there is not comes back as an
empty tensor.  Not differentiable: whoever needs gradients runs the parts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import cuda, reference
from .checks import DTYPE_CODES
from .cuda_rows import Codes, GemmCodes, RowGrid, quantize_activation, quantize_norm

__all__ = ["activation_quantize", "layer_norm_quantize", "register_operators", "rms_norm_quantize"]

_GRID = "bool symmetric, Tensor? scale, Tensor? zero_point, Tensor? inv_smooth"
Results = tuple[Tensor, Tensor, Tensor]
NormResults = tuple[Tensor, Tensor, Tensor, Tensor]


# -- the functions ----------------------------------------------------------------------------------------------------


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    inv_smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``total = x + residual``, RMS-normalized, to 8 bits per row.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.
        weight: ``[K]``, or None for ones.
        eps: added to the mean of squares, >= 0.
        residual: shaped like ``x``, of its dtype.
        symmetric, scale, zero_point, inv_smooth: as in :func:`qkernels.reference.quantize_activations`.

    Returns:
        Codes int8 (uint8 if asymmetric) ``[..., K]``, scales float32 ``[...]``, zero points int32 ``[...]`` or None,
        and ``total [..., K]`` in the dtype of ``x`` (``x`` itself without a residual).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    q, s, zero, total = torch.ops.qkernels.rms_norm_quantize(
        x, residual, weight, eps, symmetric, scale, zero_point, inv_smooth
    )
    return q, s, None if symmetric else zero, x if residual is None else total


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    inv_smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``total = x + residual``, layer-normalized, to 8 bits per row.

    Arguments, results and errors as those of :func:`rms_norm_quantize`; ``bias`` is ``[K]`` or None.
    """
    q, s, zero, total = torch.ops.qkernels.layer_norm_quantize(
        x, residual, weight, bias, eps, symmetric, scale, zero_point, inv_smooth
    )
    return q, s, None if symmetric else zero, x if residual is None else total


def activation_quantize(
    x: Tensor,
    activation: str | None,
    up: Tensor | None = None,
    *,
    symmetric: bool = True,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    inv_smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``activation(x) * up`` to 8 bits per row.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.
        activation: "relu", "gelu", "gelu_tanh", "silu", or None.
        up: shaped like ``x``, of its dtype; None: ones.
        symmetric, scale, zero_point, inv_smooth: as in :func:`qkernels.reference.quantize_activations`.

    Returns:
        Codes, scales and zero points as in :func:`rms_norm_quantize`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    q, s, zero = torch.ops.qkernels.activation_quantize(x, up, activation, symmetric, scale, zero_point, inv_smooth)
    return q, s, None if symmetric else zero


# -- checks -----------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor, eps: float | None, grid: RowGrid, likes: dict[str, Tensor | None], of_row: dict[str, Any]
) -> None:
    """TypeError or ValueError unless everything has the dtype, shape and device it has to have."""
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"x: expected dtype float32, bfloat16 or float16, got {x.dtype}")
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"x: expected [..., K] with K > 0, got shape {list(x.shape)}")
    if eps is not None and not eps >= 0.0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    for name, tensor in likes.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected dtype {x.dtype}, as x, got {tensor.dtype}")
        if tensor.shape != x.shape or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected shape {list(x.shape)} on {x.device}, as x, got {list(tensor.shape)} on "
                f"{tensor.device}"
            )
    for name, tensor in {**of_row, "inv_smooth": grid.inv_smooth}.items():
        if tensor is None:
            continue
        if tensor.dtype not in ((torch.float32,) if name == "inv_smooth" else DTYPE_CODES):
            others = "" if name == "inv_smooth" else ", bfloat16 or float16"
            raise TypeError(f"{name}: expected dtype float32{others}, got {tensor.dtype}")
        if tensor.shape != x.shape[-1:] or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected shape {list(x.shape[-1:])} on {x.device}, got {list(tensor.shape)} on "
                f"{tensor.device}"
            )
    for name, tensor, dtype in (("scale", grid.scale, torch.float32), ("zero_point", grid.zero_point, torch.int32)):
        if tensor is not None and (tensor.numel() != 1 or tensor.dtype != dtype or tensor.device != x.device):
            raise ValueError(
                f"{name}: expected one element of {dtype} on {x.device}, got {list(tensor.shape)} of {tensor.dtype} on "
                f"{tensor.device}"
            )
    if grid.symmetric and grid.zero_point is not None:
        raise ValueError("zero_point: expected None with symmetric=True, got a value")
    if not grid.symmetric and (grid.scale is None) != (grid.zero_point is None):
        raise ValueError("zero_point: expected to be given together with scale, got only one of them")


# -- kernels ----------------------------------------------------------------------------------------------------------


def _empty_like_none(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(0, dtype=dtype)


def _results(codes: Codes | GemmCodes, x: Tensor) -> Results:
    codes, rows = cast(Codes, codes), x.shape[:-1]  # not for a product
    zero = _empty_like_none(x, torch.int32) if codes.zero_point is None else codes.zero_point.view(rows)
    return codes.q.view(x.shape), codes.scale.view(rows), zero


def _quantized(y: Tensor, grid: RowGrid) -> Results:
    q, scale, zero = reference.quantize_activations(
        y, symmetric=grid.symmetric, scale=grid.scale, zero_point=grid.zero_point, inv_smooth=grid.inv_smooth
    )
    return q.contiguous(), scale.contiguous(), _empty_like_none(y, torch.int32) if zero is None else zero.contiguous()


def _served(x: Tensor) -> bool:
    return x.is_cuda and not cuda.unavailable(x.device)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grid: RowGrid,
    layer: bool,
) -> NormResults:
    _check(x, eps, grid, {"residual": residual}, {"weight": weight, "bias": bias})
    nothing = _empty_like_none(x, x.dtype)
    if _served(x):
        contiguous = [None if t is None else t.contiguous() for t in (weight, bias, grid.inv_smooth)]
        grid = grid._replace(inv_smooth=contiguous[2])
        codes, total = quantize_norm(x, contiguous[0], contiguous[1], eps, grid, layer=layer, residual=residual)
        return (*_results(codes, x), nothing if total is None else total)
    with torch.no_grad():
        summed = reference.add_residual(x, residual)
        y = reference.layer_norm(summed, weight, bias, eps) if layer else reference.rms_norm(summed, weight, eps)
    return (*_quantized(y, grid), nothing if residual is None else summed.contiguous())


def _rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    symmetric: bool,
    scale: Tensor | None,
    zero_point: Tensor | None,
    inv_smooth: Tensor | None,
) -> NormResults:
    return _norm(x, residual, weight, None, eps, RowGrid(symmetric, scale, zero_point, inv_smooth), False)


def _layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    symmetric: bool,
    scale: Tensor | None,
    zero_point: Tensor | None,
    inv_smooth: Tensor | None,
) -> NormResults:
    return _norm(x, residual, weight, bias, eps, RowGrid(symmetric, scale, zero_point, inv_smooth), True)


def _activation(
    x: Tensor,
    up: Tensor | None,
    activation: str | None,
    symmetric: bool,
    scale: Tensor | None,
    zero_point: Tensor | None,
    inv_smooth: Tensor | None,
) -> Results:
    grid = RowGrid(symmetric, scale, zero_point, inv_smooth)
    _check(x, None, grid, {"up": up}, {})
    _check_activation(activation)
    if _served(x):
        smooth = None if inv_smooth is None else inv_smooth.contiguous()
        return _results(quantize_activation(x, activation, up, grid._replace(inv_smooth=smooth)), x)
    with torch.no_grad():
        y = reference.activated(x, activation, up)
    return _quantized(y, grid)


def _check_activation(name: str | None) -> None:
    if name is not None and name not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected None or one of {', '.join(reference.ACTIVATIONS)}, got {name!r}")


# -- shapes -----------------------------------------------------------------------------------------------------------


def _fake_results(x: Tensor, symmetric: bool) -> Results:
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.int8 if symmetric else torch.uint8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(0 if symmetric else rows, dtype=torch.int32),
    )


def _rms_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, symmetric: bool, *grid: Tensor | None
) -> NormResults:
    _check(x, eps, RowGrid(symmetric, *grid), {"residual": residual}, {"weight": weight})
    return (*_fake_results(x, symmetric), x.new_empty(0 if residual is None else x.shape))


def _layer_norm_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    symmetric: bool,
    *grid: Tensor | None,
) -> NormResults:
    _check(x, eps, RowGrid(symmetric, *grid), {"residual": residual}, {"weight": weight, "bias": bias})
    return (*_fake_results(x, symmetric), x.new_empty(0 if residual is None else x.shape))


def _activation_fake(
    x: Tensor, up: Tensor | None, activation: str | None, symmetric: bool, *grid: Tensor | None
) -> Results:
    _check(x, None, RowGrid(symmetric, *grid), {"up": up}, {})
    _check_activation(activation)
    return _fake_results(x, symmetric)


def register_operators(library: torch.library.Library) -> None:
    """Define the operators."""
    norm = "(Tensor x, Tensor? residual, Tensor? weight, "
    results = "-> (Tensor, Tensor, Tensor"
    for name, schema, kernel, fake in (
        ("rms_norm_quantize", f"{norm}float eps, {_GRID}) {results}, Tensor)", _rms_norm, _rms_norm_fake),
        (
            "layer_norm_quantize",
            f"{norm}Tensor? bias, float eps, {_GRID}) {results}, Tensor)",
            _layer_norm,
            _layer_norm_fake,
        ),
        (
            "activation_quantize",
            f"(Tensor x, Tensor? up, str? activation, {_GRID}) {results})",
            _activation,
            _activation_fake,
        ),
    ):
        library.define(f"{name}{schema}")
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qkernels::{name}", fake, lib=library)
