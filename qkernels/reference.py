"""Pure torch: the definition of every operation, and the fallback where no kernel exists.

Runs on any device, needs no compiled code, and favours being read over being fast.  Results are defined to the
bit for everything that enters the product as integers; weight-only products are float32 with unspecified order
of summation.  Rounding rules are in ``_rounding.py``, tensors of any shape in ``_tensors.py``, weights in
``_weights.py``, rows of activations in ``_activations.py``, norms and functions before those in ``_fused.py``, what is
between Linears of an attention block in ``_attention.py``.  Names and shapes:

    x [..., K]    weight [N, K]    y [..., N] = x @ weight.T + bias

The tensors of a quantized Linear, under the names a state dict gives them:

    weight             int8 [N, K], or uint8 [N, ceil(K * bits / 8)] for 4, 3 and 2 bits: the codes of a row one after
                       the other, from the lowest bit of the first byte on (4 bits: low nibble first)
    weight_scale       float32 [N] per channel; float16 or float32 [N, G] per group, G = ceil(K / group_size)
    weight_zero_point  uint8, shaped like weight_scale: asymmetric with an integer zero point
    weight_min         dtype and shape of weight_scale: asymmetric with a float minimum
    weight_multiplier  uint8 [N, G]: scales of groups in units of weight_scale, which is float32 [N] then; zero points
                       are [N, G]
    bias               float32 [N], or absent
    act_scale          float32 [], act_zero_point int32 []: static activations (zero point: asymmetric ones)
    inv_smooth         float32 [K], multiplied into x before anything else; or absent

Nothing here records gradients; whoever needs them defines them outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from qkernels import _rounding as rounding
from qkernels._activations import quantize_activations
from qkernels._attention import append, attention, rotary
from qkernels._fused import ACTIVATIONS, activated, add_residual, layer_norm, rms_norm
from qkernels._tensors import check_static, dequantize, pack_int4, quantize, unpack_int4
from qkernels._weights import (
    centred_zero,
    dequantize_weight,
    group_scale,
    integer_grid,
    integer_scales,
    multiplied_codes,
    quantize_weight,
    round_to_grid,
    weight_codes,
    weight_grid,
    widen_groups,
)
from qkernels.checks import canonical_specs, check_residual, check_vector
from qkernels.scheme import MAX_INTEGER_K, Scheme

__all__ = [
    "ACTIVATIONS",
    "activated",
    "add_residual",
    "append",
    "attention",
    "centred_zero",
    "check_static",
    "dequantize",
    "dequantize_weight",
    "group_scale",
    "integer_grid",
    "integer_scales",
    "layer_norm",
    "linear",
    "linear_w4a8",
    "linear_w4a8_prequantized",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a8_prequantized",
    "linear_w8a16",
    "multiplied_codes",
    "pack_int4",
    "quantize",
    "quantize_activations",
    "quantize_weight",
    "rms_norm",
    "rotary",
    "round_to_grid",
    "unpack_int4",
    "weight_codes",
    "weight_grid",
]

CHUNK_ELEMENTS = 1 << 23
"""Weights are widened in slices of rows of at most this many elements (64 MiB of float64)."""


# -- products -------------------------------------------------------------------------------------------------


@torch.no_grad()
def linear_w8a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int | None = None,
    act_symmetric: bool = True,
    act_scale: Tensor | float | None = None,
    act_zero_point: Tensor | int | None = None,
    inv_smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """8-bit weights times 8-bit activations, exact in int32: quantize ``x``, multiply, scale, add, cast.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, K <= 65,536.
        weight: int8 ``[N, K]`` (-128 is allowed here).
        weight_scale: ``[N]``, or ``[N, G]`` with ``group_size``.
        act_symmetric, act_scale, act_zero_point, inv_smooth: as in :func:`quantize_activations`.
        out_dtype: None: the dtype of ``x``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_weight(x, weight, weight.shape[-1], 8)
    _check_integer_k(weight.shape[-1])
    q, x_scale, x_zero_point = quantize_activations(
        x, symmetric=act_symmetric, scale=act_scale, zero_point=act_zero_point, inv_smooth=inv_smooth
    )
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if weight_scale.dim() == 2:
        return _grouped_product(
            q, x_scale, x_zero_point, weight, weight_scale, bias, group_size=group_size, zero=0, out_dtype=out_dtype
        )
    return linear_w8a8_prequantized(q, x_scale, x_zero_point, weight, weight_scale, bias, out_dtype)


@torch.no_grad()
def linear_w8a8_prequantized(
    q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The product and its epilogue, for activations that are integers already.

    ``acc = sum_k (q - x_zero_point) * weight`` in int32; ``y = float(acc); y *= x_scale; y *= weight_scale;
    y += bias``, each step one float32 rounding; then one cast to ``out_dtype``.

    Args:
        q: int8 or uint8 ``[..., K]``; x_scale: float32 ``[...]``; x_zero_point: int32 ``[...]`` or None.
        weight: int8 ``[N, K]``; weight_scale: float32 ``[N]``; bias: ``[N]``.
    """
    _check_weight(q, weight, weight.shape[-1], 8)
    _check_integer_k(weight.shape[-1])
    check_vector("weight_scale", weight_scale, weight.shape[0])
    a = q.to(torch.int32) if x_zero_point is None else q.to(torch.int32) - x_zero_point.unsqueeze(-1)
    acc = q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=torch.int32)
    for rows in _row_slices(weight):
        acc[..., rows] = _integer_product(a, weight[rows])
    y = acc.to(torch.float32) * x_scale.unsqueeze(-1)
    return _finish(y * weight_scale.to(torch.float32), bias, out_dtype)


@torch.no_grad()
def linear_w4a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    bits: int = 4,
    group_size: int | None = None,
    weight_zero_point: Tensor | None = None,
    weight_min: Tensor | None = None,
    act_symmetric: bool = True,
    act_scale: Tensor | float | None = None,
    act_zero_point: Tensor | int | None = None,
    inv_smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Weights of 4, 3 or 2 bits times 8-bit activations: exact int32 within a group, float32 over the groups, in order.

    With ``a`` the activation codes less their zero point: ``d = sum(a * q) - zero_point * sum(a)`` in int32;
    ``total += float(d) * weight_scale[g]``; with a float minimum the zero point is 0 and ``total += weight_min[g] *
    float(sum(a))`` follows; then ``y = total * x_scale; y += bias``; then one cast.

    Args:
        x: float32, bfloat16 or float16 ``[..., in_features]``, in_features <= 65,536.
        weight: uint8 ``[N, ceil(in_features * bits / 8)]``; weight_scale: ``[N]`` or ``[N, G]`` with ``group_size``.
        bits: 4, 3 or 2.
        weight_zero_point, weight_min: shaped like weight_scale; at most one of them; neither: zero point
            ``2 ** (bits - 1)``.
    """
    _check_weight(x, weight, in_features, bits)
    codes = quantize_activations(
        x, symmetric=act_symmetric, scale=act_scale, zero_point=act_zero_point, inv_smooth=inv_smooth
    )
    return linear_w4a8_prequantized(
        *codes,
        weight,
        weight_scale,
        bias,
        x.dtype if out_dtype is None else out_dtype,
        in_features=in_features,
        bits=bits,
        group_size=group_size,
        weight_zero_point=weight_zero_point,
        weight_min=weight_min,
    )


@torch.no_grad()
def linear_w4a8_prequantized(
    q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    in_features: int,
    bits: int = 4,
    group_size: int | None = None,
    weight_zero_point: Tensor | None = None,
    weight_min: Tensor | None = None,
) -> Tensor:
    """:func:`linear_w4a8` for activations that are integers already.

    Args:
        q: int8 or uint8 ``[..., in_features]``; x_scale: float32 ``[...]``; x_zero_point: int32 ``[...]`` or None.
        the others: as there.
    """
    _check_weight(q, weight, in_features, bits)
    _check_integer_k(in_features)
    if weight_zero_point is not None and weight_min is not None:
        raise ValueError("weight_min: expected None beside weight_zero_point, got both")
    return _grouped_product(
        q,
        x_scale,
        x_zero_point,
        rounding.unpack_codes(weight, bits, in_features),
        weight_scale,
        bias,
        group_size=group_size,
        zero=2 ** (bits - 1) if weight_min is None else 0,
        weight_zero_point=weight_zero_point,
        weight_min=weight_min,
        out_dtype=out_dtype,
    )


def _grouped_product(
    q: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    group_size: int | None,
    zero: int,
    weight_zero_point: Tensor | None = None,
    weight_min: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The sum over groups that :func:`linear_w4a8` describes; ``codes [N, K]`` are weights one per element."""
    a = q.to(torch.int32) if x_zero_point is None else q.to(torch.int32) - x_zero_point.unsqueeze(-1)
    a = widen_groups(a, weight_scale, group_size)
    scale, low = weight_scale.to(torch.float32), None if weight_min is None else weight_min.to(torch.float32)
    total = torch.zeros((*q.shape[:-1], codes.shape[0]), dtype=torch.float32, device=q.device)
    for rows in _row_slices(codes):
        centred = widen_groups(codes[rows].to(torch.int32), weight_scale, group_size)
        if weight_zero_point is None:
            centred = centred - zero
        else:
            centred = centred - weight_zero_point[rows].to(torch.int32).reshape(*centred.shape[:2], 1)
        for g in range(centred.shape[1]):
            d = _integer_product(a[..., g, :], centred[:, g])
            scale_g = scale[rows].reshape(centred.shape[:2])[:, g]
            part = total[..., rows] + d.to(torch.float32) * scale_g
            if low is not None:
                sums = a[..., g, :].sum(-1, dtype=torch.int32).to(torch.float32)
                part = part + low[rows].reshape(centred.shape[:2])[:, g] * sums.unsqueeze(-1)
            total[..., rows] = part
    return _finish(total * x_scale.unsqueeze(-1), bias, out_dtype)


@torch.no_grad()
def linear_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int | None = None,
    inv_smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """8-bit weights, activations in floating point: dequantized weights and ``x`` multiplied in float32."""
    _check_weight(x, weight, weight.shape[-1], 8)
    scheme = Scheme(activation_bits=None) if weight_scale.dim() == 1 else _per_group(8, group_size, weight_scale)
    tensors = {"weight": weight, "weight_scale": weight_scale}
    return _float_product(x, tensors, scheme, weight.shape[-1], bias, inv_smooth, out_dtype)


@torch.no_grad()
def linear_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    bits: int = 4,
    group_size: int | None = None,
    weight_zero_point: Tensor | None = None,
    weight_min: Tensor | None = None,
    codebook: tuple[float, ...] | None = None,
    inv_smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Weights of 4, 3 or 2 bits, activations in floating point: dequantized weights and ``x`` multiplied in float32.

    Weights as in :func:`linear_w4a8`, or 4 bits through a ``codebook`` of 16 values.
    """
    _check_weight(x, weight, in_features, bits)
    symmetric = weight_zero_point is None and weight_min is None
    zero = "int" if weight_min is None else "float"
    if weight_scale.dim() == 1:
        scheme = Scheme(bits, weight_symmetric=symmetric, weight_zero=zero, codebook=codebook, activation_bits=None)
    else:
        scheme = _per_group(bits, group_size, weight_scale).replace(
            weight_symmetric=symmetric, weight_zero=zero, codebook=codebook
        )
    tensors = {"weight": weight, "weight_scale": weight_scale}
    if weight_zero_point is not None:
        tensors["weight_zero_point"] = weight_zero_point
    if weight_min is not None:
        tensors["weight_min"] = weight_min
    return _float_product(x, tensors, scheme, in_features, bias, inv_smooth, out_dtype)


def _per_group(bits: int, group_size: int | None, weight_scale: Tensor) -> Scheme:
    if group_size is None:
        raise ValueError(f"group_size: expected an int with weight_scale {list(weight_scale.shape)}, got None")
    return Scheme(bits, weight_granularity="per_group", group_size=group_size, activation_bits=None)


def _float_product(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    scheme: Scheme,
    in_features: int,
    bias: Tensor | None,
    inv_smooth: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    wide = rounding.widen(x, "x")
    if inv_smooth is not None:
        check_vector("inv_smooth", inv_smooth, in_features)
        wide = wide * inv_smooth.to(torch.float32)
    y = wide.new_empty((*wide.shape[:-1], tensors["weight"].shape[0]))
    # A float32 product would be narrowed under autocast: switched off here.
    with torch.autocast(device_type=x.device.type, enabled=False):
        for rows in _row_slices(tensors["weight"]):
            part = dequantize_weight({name: t[rows] for name, t in tensors.items()}, scheme, in_features)
            y[..., rows] = wide @ part.T
    return _finish(y, bias, x.dtype if out_dtype is None else out_dtype)


@torch.no_grad()
def linear(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    scheme: Scheme,
    in_features: int,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``x [..., in_features]`` through the quantized Linear that ``tensors`` (see the module) and ``scheme`` describe.

    With a ``residual [..., N]`` of the output's dtype: the float32 output ``y``, bias included, is not rounded yet;
    ``y += float(residual)``, one float32 rounding; then one cast to ``out_dtype``.

    Raises:
        TypeError, ValueError: naming the argument or the tensor.
    """
    if residual is not None:
        rounded = x.dtype if out_dtype is None else out_dtype
        y = linear(x, tensors, scheme, in_features, torch.float32)
        check_residual(residual, x, y.shape[-1], rounded)
        return (y + residual.to(torch.float32)).to(rounded)
    specs = canonical_specs(scheme, in_features, out_features=0)  # rows do not matter to what is needed
    missing = [name for name, spec in specs.items() if spec.required and name not in tensors]
    if missing:
        raise ValueError(f"tensors: expected {', '.join(missing)} for scheme {scheme.name}, got {sorted(tensors)}")
    weight, scale, bias = tensors["weight"], tensors["weight_scale"], tensors.get("bias")
    group = scheme.resolve_group_size(in_features) if scheme.weight_granularity == "per_group" else None
    smooth = tensors.get("inv_smooth")
    zero_point, low = tensors.get("weight_zero_point"), tensors.get("weight_min")
    if scheme.weight_only and scheme.weight_bits == 8:
        return linear_w8a16(x, weight, scale, bias, group_size=group, inv_smooth=smooth, out_dtype=out_dtype)
    if scheme.weight_only:
        return linear_w4a16(
            x,
            weight,
            scale,
            bias,
            in_features=in_features,
            bits=scheme.weight_bits,
            group_size=group,
            weight_zero_point=zero_point,
            weight_min=low,
            codebook=scheme.codebook,
            inv_smooth=smooth,
            out_dtype=out_dtype,
        )
    static = not scheme.activation_dynamic
    act_scale = tensors["act_scale"] if static else None
    act_zero_point = tensors["act_zero_point"] if static and not scheme.activation_symmetric else None
    if scheme.group_scales == "int":  # the products of 8-bit weights, to the bit
        _check_weight(x, weight, in_features, scheme.weight_bits)
        weight, group = multiplied_codes(tensors, scheme, in_features), None
    if scheme.weight_bits == 8 or scheme.group_scales == "int":
        return linear_w8a8(
            x,
            weight,
            scale,
            bias,
            group_size=group,
            act_symmetric=scheme.activation_symmetric,
            act_scale=act_scale,
            act_zero_point=act_zero_point,
            inv_smooth=smooth,
            out_dtype=out_dtype,
        )
    return linear_w4a8(
        x,
        weight,
        scale,
        bias,
        in_features=in_features,
        bits=scheme.weight_bits,
        group_size=group,
        weight_zero_point=zero_point,
        weight_min=low,
        act_symmetric=scheme.activation_symmetric,
        act_scale=act_scale,
        act_zero_point=act_zero_point,
        inv_smooth=smooth,
        out_dtype=out_dtype,
    )


# -- pieces ---------------------------------------------------------------------------------------------------


def _integer_product(a: Tensor, w: Tensor) -> Tensor:
    """int ``[..., K]`` times int ``[N, K]`` -> int32 ``[..., N]``; float64 is exact below 2**53 on every device."""
    return (a.to(torch.float64) @ w.to(torch.float64).T).to(torch.int32)


def _row_slices(weight: Tensor) -> Iterator[slice]:
    """Slices over the rows of ``[N, K]`` that bound the memory of widening it."""
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _finish(y: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if bias is not None:
        check_vector("bias", bias, y.shape[-1])
        y = y + bias.detach().to(torch.float32)
    return y.to(rounding.check_dtype(out_dtype, "out_dtype"))


def _check_integer_k(in_features: int) -> None:
    if in_features > MAX_INTEGER_K:
        raise ValueError(f"in_features: expected <= {MAX_INTEGER_K} for exact int32 sums, got {in_features}")


def _check_weight(x: Tensor, weight: Tensor, in_features: int, bits: int) -> None:
    if bits not in (8, 4, 3, 2):
        raise ValueError(f"bits: expected 4, 3 or 2, got {bits!r}")
    dtype, width = torch.uint8 if bits < 8 else torch.int8, -(-in_features * bits // 8)
    if weight.dtype != dtype:
        raise TypeError(f"weight: expected {dtype}, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight: expected shape [N, {width}], got {list(weight.shape)}")
    if not x.dim() or x.shape[-1] != in_features:
        raise ValueError(f"x: expected a last dimension of {in_features}, got shape {list(x.shape)}")
