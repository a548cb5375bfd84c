"""W4A16 and W8A16 layers on the Triton kernels, where the CUDA module cannot serve a GPU."""

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
from . import available, unfit

__all__ = ["PreparedTritonWeightOnly", "register_operators"]


class PreparedTritonWeightOnly(PreparedReference):
    """4-bit and 8-bit weights under floating-point activations by the Triton kernels, over the canonical tensors.

    Every call goes through ``torch.ops.qkernels.linear_weight_only_triton``, so that compiled and eager ones agree.
    """

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the Triton kernels from a layer."""
        if device.type != "cuda":  # nothing to add to what the CPU's kernels say
            return PreparedPacked.objection(scheme, in_features, out_features, device) or cuda.unavailable(device)
        if not scheme.weight_only:
            return f"no Triton kernel for scheme {scheme.name}"
        if scheme.weight_bits == 8 and scheme.weight_granularity != "per_channel":
            return f"no Triton kernel for group-wise 8-bit weights (scheme {scheme.name})"
        return unfit(scheme, in_features, out_features) or available()

    @property
    def kernel(self) -> str:
        """``"w4a16.triton"`` or ``"w8a16.triton"``."""
        return f"w{self.scheme.weight_bits}a16.triton"

    def product(self, x: Tensor, tensors: Mapping[str, Tensor | None], out_dtype: torch.dtype | None) -> Tensor:
        """Through ``torch.ops.qkernels.linear_weight_only_triton``."""
        get = tensors.get
        return torch.ops.qkernels.linear_weight_only_triton(
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
    from .gemm_w8a16 import gemm_w8a16

    check_input(x, features, weight.device, "x")
    check_out_dtype(out_dtype)
    scheme = scheme_from_key(key)
    flat = x.reshape(-1, features)
    if smooth is not None:
        flat = flat.to(torch.float32) * smooth
    dtype = out_dtype or x.dtype
    with cuda._on(x.device):
        if scheme.weight_bits == 8:
            y = gemm_w8a16(flat, weight.contiguous(), scale.contiguous(), bias, out_dtype=dtype)
            return y.view(*x.shape[:-1], weight.shape[0])
        y = gemm_w4a16(
            flat,
            weight.contiguous(),
            scale.contiguous(),
            bias,
            group_size=scheme.resolve_group_size(features),
            weight_zero_point=None if zero_point is None else zero_point.contiguous(),
            weight_min=None if low is None else low.contiguous(),
            codebook=None if scheme.codebook is None else codebook_tensor(scheme.codebook, x.device)[0],
            out_dtype=dtype,
        )
    return y.view(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    check_features(x, rest[-2], "x")
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=rest[-1] or x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, low, _, smooth, key, features, _ = inputs
    ctx.save_for_backward(weight, scale, zero_point, low, None, smooth)  # no multipliers
    ctx.layer, ctx.dtype = (key, features), x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.qkernels.dequantize_quantized(*ctx.saved_tensors, *ctx.layer, torch.float32)
    return (input_gradient(grad, weight, ctx.dtype), *(None,) * 9)


def register_operators(library: torch.library.Library) -> None:
    """Define ``torch.ops.qkernels.linear_weight_only_triton``."""
    library.define(
        "linear_weight_only_triton(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, "
        "Tensor? weight_min, Tensor? bias, Tensor? inv_smooth, str scheme, int K, ScalarType? out_dtype) -> Tensor"
    )
    library.impl("linear_weight_only_triton", _linear, "CUDA")
    torch.library.register_fake("qkernels::linear_weight_only_triton", _fake, lib=library)
    rule = vmap_rows("linear_weight_only_triton")
    register_rules(library, "linear_weight_only_triton", backward=_backward, setup=_setup, vmap=rule)
