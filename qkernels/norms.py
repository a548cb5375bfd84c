"""Norms of a model with quantized Linears: on a CPU one kernel computes each; on a GPU those whose output only such
Linears read, as integers where they take those.

Nothing is replaced in the model: a norm keeps its class, its parameters and its name, and gets a ``forward`` of its own
(:class:`NormForward`, :class:`NormHandoff`), which computes what the class does wherever no kernel would serve.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import reference
from .checks import DTYPE_CODES
from .cpu_norms import normalize as normalize_rows
from .cuda_rows import normalize, quantize_norm
from .deferred import Deferred, Handoff, PendingSum, QuantizedInput, unchanged
from .eager import is_plain

__all__ = ["Norm", "NormForward", "NormHandoff", "norm_of"]

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

_ORDINARY = (nn.Parameter, Tensor)
"""Kinds of tensors with memory of their own; a parameter that wraps another kind is of that kind."""


class Norm(NamedTuple):
    """What a module computes: a layer norm or an RMS norm over the last dimension, with its own weight and bias."""

    layer: bool
    eps: float


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module is, or None.

    torch's own are known by their type; classes that call themselves ``...RMSNorm`` (or ``T5LayerNorm``) are tried on
    random rows, because some multiply by ``1 + weight``.
    """
    kind = type(module)
    known = module.__dict__.get("forward")
    if type(known) is NormForward:
        return known.norm
    if known is not None or module._modules or module._buffers:
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if kind in (nn.LayerNorm, getattr(nn, "RMSNorm", None)):
        if len(module.normalized_shape) != 1 or module.eps is None:  # type: ignore[arg-type]
            return None
        return Norm(kind is nn.LayerNorm, float(module.eps))  # type: ignore[arg-type]
    if not kind.__name__.endswith(("RMSNorm", "T5LayerNorm")) or weight is None or bias is not None:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if len(module._parameters) != 1 or weight.dim() != 1 or not isinstance(eps, float) or weight.is_meta:
        return None
    return Norm(False, eps) if _computes_rms(module, weight, eps) else None


def _computes_rms(module: nn.Module, weight: Tensor, eps: float) -> bool:
    """Whether it normalizes the last dimension and keeps shape and dtype."""
    if weight.dtype not in DTYPE_CODES:
        return False
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, weight.shape[0], generator=generator) * 3.0).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            y = type(module).forward(module, x)
    except Exception:  # whatever a forward raises over such an input: it is another kind of module
        return False
    if not isinstance(y, Tensor) or y.dtype != x.dtype or y.shape != x.shape:
        return False
    error = 1e-4 if x.dtype == torch.float32 else 2e-2  # of several roundings
    return torch.allclose(y.float(), reference.rms_norm(x, weight, eps), rtol=error, atol=1e-2 * error)


class NormForward:
    """The ``forward`` of a norm: on a CPU by a kernel.

    Args:
        module: the norm; it keeps this object in its ``__dict__``.
        norm: what it computes.
    """

    def __init__(self, module: nn.Module, norm: Norm) -> None:
        self._module = module
        self.norm = norm
        self._eps = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the class of the norm computes."""
        module = self._module
        if len(args) == 1 and not kwargs and not _is_dynamo_compiling():
            y = self._computed(args[0])
            if y is not None:
                return y
        return type(module).forward(module, *args, **kwargs)

    def _computed(self, x: Any) -> Tensor | None:
        """What a kernel makes of the input; None where none serves."""
        if type(x) is not Tensor or not x.is_cpu or not is_plain(x) or x.is_nested or x.layout is not torch.strided:
            return None
        factors = self._factors(x)
        return None if factors is None else normalize_rows(x, *factors, self.norm.eps, layer=self.norm.layer)

    def _factors(self, x: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
        """Weight and bias, where kernels multiply rows like those of ``x`` by them, and nobody asks for their
        gradient.  None where they are no longer the module's own parameters, or its eps is another one."""
        module, (layer, eps) = self._module, self.norm
        parameters = module._parameters
        if (
            x.dtype not in DTYPE_CODES
            or not x.dim()
            or "weight" not in parameters
            or getattr(module, self._eps, None) != eps
        ):
            return None
        weight, bias = parameters["weight"], None
        if layer:
            if "bias" not in parameters:
                return None
            bias = parameters["bias"]
        if weight is None:
            if x.shape[-1:] != getattr(module, "normalized_shape", None):
                return None
        elif not _reads(weight, x):
            return None
        return (weight, bias) if bias is None or _reads(bias, x) else None


class NormHandoff(NormForward):
    """The ``forward`` of a norm whose output quantized Linears alone read: on a GPU as what they take.

    Args:
        module, norm: as for :class:`NormForward`.
        handoff: to the Linears.
    """

    def __init__(self, module: nn.Module, norm: Norm, handoff: Handoff) -> None:
        super().__init__(module, norm)
        self._handoff = handoff

    def _computed(self, x: Any) -> Tensor | None:
        waiting, residual = x, None
        if isinstance(x, Deferred):
            terms = x.terms() if isinstance(x, PendingSum) else None
            x, residual = (x.value(), None) if terms is None else terms
        if not is_plain(x) or x.is_nested or not x.dim():
            return None
        grid, floats = self._handoff.takes(x)
        if grid is None and not floats:
            return None if residual is not None or self._handoff.left() else super()._computed(x)
        module, (layer, eps) = self._module, self.norm
        if module._forward_hooks or torch_module._global_forward_hooks:
            return None  # they would see something new
        factors = self._factors(x)
        if factors is None:
            return None
        if grid is not None:
            codes, total = quantize_norm(x, *factors, eps, grid, layer=layer, residual=residual, for_gemm=True)
        else:
            y, total = normalize(x, *factors, eps, layer=layer, residual=residual, for_gemm=True)
        if total is not None and isinstance(waiting, PendingSum):
            waiting.formed(total)
            x = total
        if grid is None:
            return y
        build = unchanged(x, lambda: type(module).forward(module, x))
        return QuantizedInput.of(x, build, codes, grid, self._handoff)


def _reads(factor: Tensor, x: Tensor) -> bool:
    """Whether the kernels multiply the rows of ``x`` by a factor, or add it, and nobody asks for its gradient."""
    # Sizes and numbers rather than shapes and devices, which cost a call as much as all else here.
    return (
        type(factor) in _ORDINARY
        and factor.dtype is x.dtype
        and factor.dim() == 1
        and factor.numel() == x.shape[-1]
        and factor.is_cpu is x.is_cpu
        and factor.get_device() == x.get_device()
        and factor.is_contiguous()
        and not factor.is_neg()
        and not (factor.requires_grad and torch.is_grad_enabled())
    )
