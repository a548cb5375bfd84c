"""Float views of quantized weights that cost nothing until somebody reads the values.

Code around a Linear often asks for ``layer.weight.dtype`` or ``.device`` in every forward.  :class:`DequantizedWeight`
answers such questions at once, and builds the float values anew for everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["METADATA", "DequantizedWeight", "writes"]

_ATTRIBUTES = (
    "device",
    "dtype",
    "grad",
    "grad_fn",
    "is_cpu",
    "is_cuda",
    "is_leaf",
    "is_meta",
    "is_mkldnn",
    "is_nested",
    "is_quantized",
    "is_sparse",
    "is_sparse_csr",
    "itemsize",
    "layout",
    "names",
    "nbytes",
    "ndim",
    "requires_grad",
    "shape",
)
_METHODS = (
    "__hash__",
    "__len__",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "is_inference",
    "nelement",
    "ndimension",
    "numel",
    "size",
    "stride",
)
METADATA = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)}
METADATA |= {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel}
"""Functions of torch that do not look at values."""


class DequantizedWeight(Tensor):
    """The weight a quantized layer stands for: shape, dtype and device now, values on demand, never written to.

    Any operation sees an ordinary tensor with the values of that moment.  Writing to the view raises
    ``RuntimeError``: it would be lost.
    """

    _build: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[DequantizedWeight],
        build: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> DequantizedWeight:
        """A view whose values come from ``build()``, a tensor of that shape, dtype and device."""
        view = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
        view._build = build
        return view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Metadata at once; anything else over the values."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.requires_grad_ and not any((*args[1:], *kwargs.values())) and len(args) + len(kwargs) > 1:
            return args[0]
        if writes(func) and isinstance((*args, *kwargs.values(), None)[0], cls):
            raise RuntimeError(
                "weight: read-only, built from integers on demand; load a state dict, or dequantize the layer first"
            )
        return func(*_values(args), **_values(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What comes past ``__torch_function__``: over the values as well."""
        return func(*_values(args), **_values(kwargs or {}))


def writes(func: Callable[..., Any]) -> bool:
    """Whether a function of torch changes its first argument, by its name."""
    name = getattr(func, "__name__", "")
    if name in ("__set__", "__delete__", "__setitem__", "__idiv__"):
        return True
    if name.startswith("__i") and name.endswith("__"):
        return name not in ("__index__", "__int__", "__invert__", "__iter__")
    return name.endswith("_") and not name.endswith("__")


def _values(tree: Any) -> Any:
    return tree_map_only(DequantizedWeight, lambda view: view._build(), tree)
