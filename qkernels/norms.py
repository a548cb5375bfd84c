"""Norms whose output only quantized Linears read: on a GPU one kernel computes it, as integers where they take those.

Nothing is replaced in the model: a norm keeps its class, its parameters and its name, and gets a ``forward`` of its own
(:class:`NormHandoff`), which computes what the class does wherever that kernel would not serve.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import reference
from .checks import DTYPE_CODES
from .cuda_rows import normalize, quantize_norm
from .deferred import Deferred, Handoff, PendingSum, QuantizedInput, unchanged
from .eager import is_plain

__all__ = ["Norm", "NormHandoff", "norm_of"]

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


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
    if "forward" in module.__dict__ or module._modules or module._buffers:
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
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, weight.shape[0], generator=generator) * 3.0).to(weight.device)
    try:
        with torch.no_grad():
            y = type(module).forward(module, x)
    except Exception:  # whatever a forward raises over such an input: it is another kind of module
        return False
    return isinstance(y, Tensor) and torch.allclose(y.float(), reference.rms_norm(x, weight, eps), rtol=1e-4, atol=1e-6)


class NormHandoff:
    """The ``forward`` of a norm whose output quantized Linears alone read.

    Args:
        module: the norm; it keeps this object in its ``__dict__``.
        norm: what it computes.
        handoff: to the Linears.
    """

    def __init__(self, module: nn.Module, norm: Norm, handoff: Handoff) -> None:
        self._module = module
        self._norm = norm
        self._handoff = handoff

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the class of the norm computes, as integers or by one kernel where it can be."""
        module = self._module
        if len(args) == 1 and not kwargs and not _is_dynamo_compiling():
            handed = self._handed(args[0])
            if handed is not None:
                return handed
        return type(module).forward(module, *args, **kwargs)

    def _handed(self, x: Any) -> Tensor | None:
        waiting, residual = x, None
        if isinstance(x, Deferred):
            terms = x.terms() if isinstance(x, PendingSum) else None
            x, residual = (x.value(), None) if terms is None else terms
        if not is_plain(x) or x.dtype not in DTYPE_CODES or not x.dim():
            return None
        module = self._module
        if module._forward_hooks or torch_module._global_forward_hooks:
            return None  # they would see something new
        parameters = module._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if not (weight is None or _reads(weight, x)) or not (bias is None or _reads(bias, x)):
            return None
        (layer, eps), (grid, floats) = self._norm, self._handoff.takes(x)
        if grid is not None:
            codes, total = quantize_norm(x, weight, bias, eps, grid, layer=layer, residual=residual, for_gemm=True)
        elif floats:
            y, total = normalize(x, weight, bias, eps, layer=layer, residual=residual, for_gemm=True)
        else:
            return None
        if total is not None and isinstance(waiting, PendingSum):
            waiting.formed(total)
            x = total
        if grid is None:
            return y
        build = unchanged(x, lambda: type(module).forward(module, x))
        return QuantizedInput.of(x, build, codes, grid, self._handoff)


def _reads(factor: Tensor, x: Tensor) -> bool:
    """Whether the kernels multiply ``x`` by a factor, or add it, and nobody asks for its gradient."""
    if factor.dtype != x.dtype or factor.device != x.device or not factor.is_contiguous():
        return False
    return not (factor.requires_grad and torch.is_grad_enabled())
