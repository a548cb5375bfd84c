"""W4A16 layers on the Triton kernel, where the CUDA module cannot serve a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import cuda
from .._library import register_rules, vmap_rows
from ..backends import PreparedReference
from ..checks import check_features, check_input, check_out_dtype
from ..cpu_packed import PreparedPacked
from ..packed import codebook_tensor
from ..prepared import input_gradient, scheme_from_key
from ..scheme import Scheme
from . import available

__all__ = ["PreparedTritonW4", "register_operators"]

GROUP_STEP = 32
"""Groups are a multiple of it, or the whole row: what a block of the kernel covers."""


class PreparedTritonW4(PreparedReference):
    """4-bit weights under floating-point activations by the Triton kernel, over the canonical tensors.

    Every call goes through ``torch.ops.qkernels.linear_w4a16_triton``, so that compiled and eager ones agree.
    """

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the Triton kernel from a layer."""
        if device.type != "cuda":  # nothing to add to what the CPU's kernels say
            return PreparedPacked.objection(scheme, in_features, out_features, device) or cuda.unavailable(device)
        if (scheme.weight_bits, scheme.activation_bits) != (4, None):
            return f"no Triton kernel for scheme {scheme.name}"
        if in_features == 0 or out_features == 0:
            return f"no Triton kernel for an empty weight [{out_features}, {in_features}]"
        group = scheme.resolve_group_size(in_features)
        if group % GROUP_STEP and group < in_features:
            return f"no Triton kernel for groups of {group} (multiples of {GROUP_STEP})"
        return available()

    @property
    def kernel(self) -> str:
        """``"w4a16.triton"``."""
        return "w4a16.triton"

    def product(self, x: Tensor, tensors: Mapping[str, Tensor | None], out_dtype: torch.dtype | None) -> Tensor:
        """Through ``torch.ops.qkernels.linear_w4a16_triton``."""
        get = tensors.get
        return torch.ops.qkernels.linear_w4a16_triton(
            x,
            get("q_weight"),
            get("weight_scale"),
            get("weight_zero_point"),
            get("weight_min"),
            get("bias"),
            get("inv_smooth"),
            self.scheme_key,
            self.in_features,
            out_dtype,
        )


def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    low: Tensor | None,
    bias: Tensor | None,
    smooth: Tensor | None,
    key: str,
    features: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    from .gemm_w4a16 import gemm_w4a16

    check_input(x, features, weight.device, "x")
    check_out_dtype(out_dtype)
    scheme = scheme_from_key(key)
    flat = x.reshape(-1, features)
    if smooth is not None:
        flat = flat.to(torch.float32) * smooth
    with cuda._on(x.device):
        y = gemm_w4a16(
            flat,
            weight.contiguous(),
            scale.contiguous(),
            bias,
            group_size=scheme.resolve_group_size(features),
            weight_zero_point=None if zero_point is None else zero_point.contiguous(),
            weight_min=None if low is None else low.contiguous(),
            codebook=None if scheme.codebook is None else codebook_tensor(scheme.codebook, x.device),
            out_dtype=out_dtype or x.dtype,
        )
    return y.view(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    check_features(x, rest[-2], "x")
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[-1] or x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, low, _, smooth, key, features, _ = inputs
    ctx.save_for_backward(weight, scale, zero_point, low, smooth)
    ctx.layer, ctx.dtype = (key, features), x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.qkernels.dequantize_quantized(*ctx.saved_tensors, *ctx.layer, torch.float32)
    return (input_gradient(grad, weight, ctx.dtype), *(None,) * 9)


def register_operators(library: torch.library.Library) -> None:
    """Define ``torch.ops.qkernels.linear_w4a16_triton``."""
    library.define(
        "linear_w4a16_triton(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, "
        "Tensor? weight_min, Tensor? bias, Tensor? inv_smooth, str scheme, int K, ScalarType? out_dtype) -> Tensor"
    )
    library.impl("linear_w4a16_triton", _linear, "CUDA")
    torch.library.register_fake("qkernels::linear_w4a16_triton", _fake, lib=library)
    rule = vmap_rows("linear_w4a16_triton")
    register_rules(library, "linear_w4a16_triton", backward=_backward, setup=_setup, vmap=rule)
