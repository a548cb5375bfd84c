"""Operators of torch: schemas, shape functions, gradients and checks around the kernels.

Everything registered here is under ``torch.ops.qkernels``, traceable by ``torch.compile``, ``torch.export`` and
``make_fx``, and differentiable with respect to the input and the
residual.  Nothing is computed in this file: work goes to the binding,
or to the reference where no kernel exists.

    linear_w8a8       8-bit weights in the packed layout of the CPU kernels
    dequantize_w8     the float weight of that layout
    linear_packed     4-bit weights, or floating-point activations, likewise (defined in :mod:`qkernels.cpu_packed`)
    dequantize_packed  the float weight of those
    linear_quantized  any scheme, canonical tensors, by the reference
    dequantize_quantized   the float weight of those
    embedding_w8      rows of an 8-bit table on a GPU (defined in :mod:`qkernels.cuda_w8a16`)
    epilogue          what follows a Linear, by itself (defined in :mod:`qkernels.epilogues`)
    rms_norm_quantize, layer_norm_quantize, activation_quantize   rows computed and quantized in one pass (defined in
                      :mod:`qkernels.row_ops`)
    quantize, dequantize   tensors to integers and back (registered in :mod:`qkernels.tensor_ops`)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, reference
from ._library import register_rules, vmap_rows
from .backends import Prepared, prepare, register
from .checks import check_features, check_input, check_out_dtype, check_residual, check_static
from .native import ALIGNMENT, native_linear_w8a8, pack_w8, run_native, run_native_plus, unpack_w8
from .prepared import effective_weight, input_gradient, scheme_from_key
from .scheme import MAX_INTEGER_K, Scheme
from .tensor_ops import dequantize, quantize

__all__ = ["Prepared", "dequantize", "linear_w8a8", "pack_w8", "prepare", "quantize", "unpack_w8"]

_LIBRARY = torch.library.Library("qkernels", "DEF")

_W8 = Scheme()


def _operator(name: str, schema: str, kernel: Any, fake: Any, *, key: str) -> None:
    """Define ``qkernels::name`` with its kernel under dispatch key ``key`` and its shape function."""
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"qkernels::{name}", fake, lib=_LIBRARY)


# -- linear_w8a8 ----------------------------------------------------------------------------------------------------


def _require(name: str, tensor: Tensor | None, dtype: torch.dtype, numel: int, device: torch.device) -> int:
    """The address of a contiguous tensor of that dtype and size (0 for None)."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.numel() != numel or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"{name}: expected {numel} contiguous elements on {device}, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


def _linear_w8a8(
    x: Tensor,
    packed: Tensor,
    colsum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    has_minus128: bool,
    act_symmetric: bool,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    inv_smooth: Tensor | None,
    out_dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> Tensor:
    check_input(x, K, packed.device, "x")
    check_out_dtype(out_dtype)
    if not 1 <= K <= MAX_INTEGER_K or N < 1:
        raise ValueError(f"N, K: expected N >= 1 and 1 <= K <= {MAX_INTEGER_K}, got N = {N}, K = {K}")
    check_static(act_scale, act_zero_point)
    device = packed.device
    if packed.data_ptr() % ALIGNMENT:
        packed = packed.clone()
    native = native_linear_w8a8(
        _require("packed", packed, torch.int8, _C.packed_w8_bytes(N, K), device),
        _require("colsum", colsum, torch.int32, N, device),
        _require("weight_scale", weight_scale, torch.float32, N, device),
        _require("bias", bias, torch.float32, N, device),
        N,
        K,
        has_minus128,
        act_symmetric,
        0.0 if act_scale is None else float(act_scale),
        0 if act_zero_point is None else int(act_zero_point),
        _require("inv_smooth", inv_smooth, torch.float32, K, device),
    )
    if residual is None:
        return run_native(native.run, x, K, N, out_dtype or x.dtype)
    check_residual(residual, x, N, out_dtype or x.dtype)
    return run_native_plus(native, x, K, N, out_dtype or x.dtype, residual)


def _linear_w8a8_fake(
    x: Tensor,
    packed: Tensor,
    colsum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    has_minus128: bool,
    act_symmetric: bool,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    inv_smooth: Tensor | None,
    out_dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> Tensor:
    check_features(x, K, "x")
    check_out_dtype(out_dtype)
    if residual is not None:
        check_residual(residual, x, N, out_dtype or x.dtype)
    return x.new_empty((*x.shape[:-1], N), dtype=out_dtype or x.dtype)


_operator(
    "linear_w8a8",
    "(Tensor x, Tensor packed, Tensor colsum, Tensor weight_scale, Tensor? bias, int N, int K, bool has_minus128, "
    "bool act_symmetric, Tensor? act_scale, Tensor? act_zero_point, Tensor? inv_smooth, "
    "ScalarType? out_dtype, Tensor? residual=None) -> Tensor",
    _linear_w8a8,
    _linear_w8a8_fake,
    key="CPU",
)


def _dequantize_w8(
    packed: Tensor, weight_scale: Tensor, inv_smooth: Tensor | None, N: int, K: int, dtype: torch.dtype
) -> Tensor:
    _require("packed", packed, torch.int8, _C.packed_w8_bytes(N, K), packed.device)
    tensors = {"weight": unpack_w8(packed, N, K), "weight_scale": weight_scale}
    if inv_smooth is not None:
        tensors["inv_smooth"] = inv_smooth
    return effective_weight(tensors, _W8, K, dtype)


def _dequantize_w8_fake(
    packed: Tensor, weight_scale: Tensor, inv_smooth: Tensor | None, N: int, K: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty((N, K), dtype=dtype)


_operator(
    "dequantize_w8",
    "(Tensor packed, Tensor weight_scale, Tensor? inv_smooth, int N, int K, ScalarType dtype) -> Tensor",
    _dequantize_w8,
    _dequantize_w8_fake,
    key="CPU",
)


# -- linear_quantized -----------------------------------------------------------------------------------------------


def _named(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_min: Tensor | None,
    weight_multiplier: Tensor | None,
    inv_smooth: Tensor | None,
) -> dict[str, Tensor]:
    tensors = {
        "weight": weight,
        "weight_scale": weight_scale,
        "weight_zero_point": weight_zero_point,
        "weight_min": weight_min,
        "weight_multiplier": weight_multiplier,
        "inv_smooth": inv_smooth,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _linear_quantized(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_min: Tensor | None,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    inv_smooth: Tensor | None,
    scheme: str,
    K: int,
    out_dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> Tensor:
    check_input(x, K, weight.device, "x")
    tensors = _named(weight, weight_scale, weight_zero_point, weight_min, weight_multiplier, inv_smooth)
    extra = {"bias": bias, "act_scale": act_scale, "act_zero_point": act_zero_point}
    tensors.update((name, tensor) for name, tensor in extra.items() if tensor is not None)
    return reference.linear(x, tensors, scheme_from_key(scheme), K, out_dtype or x.dtype, residual).contiguous()


def _linear_quantized_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_min: Tensor | None,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    inv_smooth: Tensor | None,
    scheme: str,
    K: int,
    out_dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> Tensor:
    check_features(x, K, "x")
    check_out_dtype(out_dtype)
    if residual is not None:
        check_residual(residual, x, weight.shape[0], out_dtype or x.dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype or x.dtype)


_operator(
    "linear_quantized",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? weight_min, "
    "Tensor? weight_multiplier, Tensor? bias, Tensor? act_scale, Tensor? act_zero_point, Tensor? inv_smooth, "
    "str scheme, int K, ScalarType? out_dtype, Tensor? residual=None) -> Tensor",
    _linear_quantized,
    _linear_quantized_fake,
    key="CompositeExplicitAutograd",
)


def _dequantize_quantized(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_min: Tensor | None,
    weight_multiplier: Tensor | None,
    inv_smooth: Tensor | None,
    scheme: str,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    tensors = _named(weight, weight_scale, weight_zero_point, weight_min, weight_multiplier, inv_smooth)
    return effective_weight(tensors, scheme_from_key(scheme), K, dtype).contiguous()


def _dequantize_quantized_fake(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_min: Tensor | None,
    weight_multiplier: Tensor | None,
    inv_smooth: Tensor | None,
    scheme: str,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty((weight.shape[0], K), dtype=dtype)


_operator(
    "dequantize_quantized",
    "(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? weight_min, "
    "Tensor? weight_multiplier, Tensor? inv_smooth, str scheme, int K, ScalarType dtype) -> Tensor",
    _dequantize_quantized,
    _dequantize_quantized_fake,
    key="CompositeExplicitAutograd",
)


# -- gradients (see prepared.py) ---------------------------------------------------------------------------------------


def _setup_w8a8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, _, weight_scale, _, N, K, *_, inv_smooth, _, residual = inputs
    ctx.save_for_backward(packed, weight_scale, inv_smooth)
    ctx.sizes, ctx.dtype, ctx.has_residual = (N, K), x.dtype, residual is not None


def _backward_w8a8(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, weight_scale, inv_smooth = ctx.saved_tensors
    weight = torch.ops.qkernels.dequantize_w8(packed, weight_scale, inv_smooth, *ctx.sizes, torch.float32)
    return (input_gradient(grad, weight, ctx.dtype), *(None,) * 12, grad if ctx.has_residual else None)


def _setup_quantized(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, low, multiplier, _, _, _, inv_smooth, scheme, K, _, residual = inputs
    ctx.save_for_backward(weight, scale, zero_point, low, multiplier, inv_smooth)
    ctx.scheme, ctx.features, ctx.dtype, ctx.has_residual = scheme, K, x.dtype, residual is not None


def _backward_quantized(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.qkernels.dequantize_quantized(*ctx.saved_tensors, ctx.scheme, ctx.features, torch.float32)
    return (input_gradient(grad, weight, ctx.dtype), *(None,) * 12, grad if ctx.has_residual else None)


for _name, _backward, _setup in (
    ("linear_w8a8", _backward_w8a8, _setup_w8a8),
    ("linear_quantized", _backward_quantized, _setup_quantized),
):
    register_rules(_LIBRARY, _name, backward=_backward, setup=_setup, vmap=vmap_rows(_name))


# -- 4-bit weights, and floating-point activations ------------------------------------------------------------------

from . import cpu_packed, epilogues, row_ops  # noqa: E402  needs the library above

cpu_packed.register_operators(_LIBRARY)
epilogues.register_operators(_LIBRARY)
row_ops.register_operators(_LIBRARY)
register(cpu_packed.PreparedPacked)


# -- GPUs -----------------------------------------------------------------------------------------------------------
#
# Each is asked before the one registered earlier: the CUDA module, then Triton, then what serves the CPU.

from . import cuda_w4_layer, cuda_w8a8, cuda_w8a16  # noqa: E402  need the operators above
from .triton import layer_weight_only  # noqa: E402
from .triton.layer import PreparedTritonW4A8, PreparedTritonW8A8  # noqa: E402

_CUDA_LIBRARIES = (cuda_w8a8.register_operators(), cuda_w8a16.register_operators(_LIBRARY))
layer_weight_only.register_operators(_LIBRARY)
register(PreparedTritonW8A8)
register(PreparedTritonW4A8)
register(layer_weight_only.PreparedTritonWeightOnly)
register(cuda_w8a8.PreparedCudaW8A8)
register(cuda_w4_layer.PreparedCudaW4)
register(cuda_w8a16.PreparedCudaW8A16)


# -- functions ------------------------------------------------------------------------------------------------------


def linear_w8a8(
    x: Tensor,
    packed: Tensor,
    colsum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    has_minus128: bool = True,
    act_symmetric: bool = True,
    act_scale: Tensor | None = None,
    act_zero_point: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``y = quantize(x) @ weight.T`` scaled, plus bias, plus residual, for a weight packed by :func:`pack_w8`.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]`` with any strides.
        packed, colsum, has_minus128: what :func:`pack_w8` returned; True is always right, and slower on AVX2.
        weight_scale: float32 ``[N]``; bias: float32 ``[N]``.
        in_features: K.
        act_symmetric: int8 activations around zero, else uint8 with a zero point.
        act_scale: float32 ``[]``: static activations; None: measured per row.
        act_zero_point: int32 ``[]``: static asymmetric activations.
        inv_smooth: float32 ``[K]``, multiplied into ``x`` first.
        out_dtype: None: the dtype of ``x``.
        residual: ``[..., N]`` of the output's dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return torch.ops.qkernels.linear_w8a8(
        x,
        packed,
        colsum,
        weight_scale,
        bias,
        weight_scale.numel(),
        in_features,
        has_minus128,
        act_symmetric,
        act_scale,
        act_zero_point,
        inv_smooth,
        out_dtype,
        residual,
    )
