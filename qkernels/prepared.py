"""What a quantized Linear is to the rest of the package, whatever kernel serves it.

A :class:`Prepared` holds the tensors its kernel reads.  The eager path of a layer goes from there straight to the
binding; what needs torch's dispatcher (gradients, tracing, compilation, tensor subclasses, autocast) goes through
``torch.ops.qkernels``, and function transforms (``torch.func``, forward mode) through a function of autograd around
that.
"""

from __future__ import annotations

import copy
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .checks import DTYPE_CODES, check_input, check_residual
from .epilogues import apply_epilogue
from .scheme import Scheme

if TYPE_CHECKING:
    from .cuda_rows import RowGrid
    from .deferred import Handoff

__all__ = [
    "Prepared",
    "autocast_input",
    "effective_weight",
    "function_transform",
    "input_gradient",
    "scheme_from_key",
    "scheme_key",
    "through_transforms",
]

# Where a release of torch does not know the question, everything goes through the general path.
function_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)
"""None outside ``torch.func`` transforms."""


@functools.lru_cache(maxsize=256)
def scheme_key(scheme: Scheme) -> str:
    """A scheme as the string that operators take: its JSON, the same for equal schemes."""
    return json.dumps(scheme.to_dict(), sort_keys=True)


@functools.lru_cache(maxsize=256)
def scheme_from_key(key: str) -> Scheme:
    """The scheme :func:`scheme_key` wrote.  A preset's name is understood too.

    Raises:
        ValueError: neither.
    """
    if not key.startswith("{"):
        return Scheme.from_preset(key)
    return Scheme.from_dict(json.loads(key))


class Prepared(ABC):
    """One quantized Linear, resident in the form its kernel reads.

    Attributes:
        tensors: what is resident, by name.  A module may own this very mapping and replace entries; every call
            looks at what is in it.
        scheme, in_features, out_features: what the layer is; scheme_key: the scheme as operators take it.
        epilogue: name of the function applied to the output, or None; call :meth:`moved` after changing it.
        feeds: to the Linear that reads the output after its epilogue, and whether a product lies between; or None.
        reason: why no faster kernel serves it; "" where there is nothing to explain.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """Every name that may occur in ``tensors``."""

    fuses: ClassVar[bool] = False
    """Whether the kernel applies the epilogue itself."""

    def __init__(
        self, tensors: Mapping[str, Any], scheme: Scheme, in_features: int, out_features: int, reason: str = ""
    ) -> None:
        self.tensors = tensors
        self.scheme = scheme
        self.in_features = in_features
        self.out_features = out_features
        self.reason = reason
        self.epilogue: str | None = None
        self.feeds: tuple[Handoff, bool] | None = None
        self.scheme_key = scheme_key(scheme)

    @classmethod
    @abstractmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """Why this kernel cannot serve such a layer; "" if it can."""

    @classmethod
    @abstractmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> Prepared:
        """Make the resident form of checked canonical tensors."""

    @property
    @abstractmethod
    def kernel(self) -> str:
        """Name of the kernel, as the report shows it."""

    @abstractmethod
    def product(self, x: Tensor, tensors: Mapping[str, Tensor | None], out_dtype: torch.dtype | None) -> Tensor:
        """The layer without its epilogue, through torch's dispatcher, over ``tensors`` in place of the resident ones.

        Args:
            x: checked input.
            out_dtype: None: that of ``x``.
        """

    @abstractmethod
    def weight_of(self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """The float weight ``[N, K]`` that ``tensors`` stand for, run-time smoothing included, in ``dtype``."""

    @abstractmethod
    def canonical(self) -> dict[str, Tensor]:
        """The canonical tensors, bit for bit what was prepared.  Those that need no unpacking are not copied."""

    @abstractmethod
    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Overwrite resident values with checked canonical tensors, all or some, of unchanged shapes."""

    @property
    def device(self) -> torch.device:
        """Where the resident tensors are."""
        return self.tensors["weight_scale"].device

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self.resident().values())

    def resident(self) -> dict[str, Tensor]:
        """The resident tensors that this layer has."""
        tensors = self.tensors
        return {name: tensor for name in self.names if (tensor := tensors.get(name)) is not None}

    def run(self, x: Tensor) -> Tensor:
        """``x [..., K]`` through the layer: ``[..., N]`` in the dtype of ``x`` (under autocast, in its dtype).

        Raises:
            TypeError: not a float32, bfloat16 or float16 tensor.
            ValueError: wrong size of the last dimension, or wrong device.
        """
        return self.around(x)

    def run_plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """:meth:`run`, and ``residual [..., N]`` of the output's dtype added.

        A kernel that fuses adds it to the output in float32, after the epilogue and before the one rounding; behind
        others torch adds it to the rounded output.

        Raises:
            TypeError, ValueError: as :meth:`run`; the residual has another shape, dtype or device than the output.
        """
        return self.around(x, residual)

    def call(self, x: Tensor, tensors: Mapping[str, Tensor | None], residual: Tensor | None = None) -> Tensor:
        """:meth:`run` or :meth:`run_plus` through torch's dispatcher, over ``tensors`` instead of the resident ones."""
        x = autocast_input(x)
        check_input(x, self.in_features, self.device)
        if residual is not None:
            check_residual(residual, x, self.out_features, x.dtype)
        if self.epilogue is None and residual is None:
            return self.product(x, tensors, None)
        # A kernel that fuses rounds at the end alone, and so does this.
        y = self.product(x, tensors, torch.float32 if self.fuses else None)
        if self.epilogue is not None:
            y = torch.ops.qkernels.epilogue(y, self.epilogue, x.dtype if residual is None else y.dtype)
        return y if residual is None else (y + residual).to(x.dtype)

    def input_grid(self) -> RowGrid | None:
        """How inputs are quantized, if the kernel takes inputs that are integers already (``qkernels.deferred``)."""
        return None

    def takes_floats(self) -> bool:
        """Whether the inputs stay floats, on a device whose kernels (:mod:`qkernels.cuda_rows`) can compute them."""
        return False

    def takes(self, x: Tensor) -> tuple[RowGrid | None, bool]:
        """:meth:`input_grid` and :meth:`takes_floats` where an input may be like ``x [..., K]``; neither where not."""
        if self.in_features != x.shape[-1] or self.device != x.device or not x.numel():
            return None, False
        return self.input_grid(), self.takes_floats()

    def finished(self, y: Tensor) -> Tensor:
        """The output of a kernel that does not fuse, through the epilogue in torch's own words."""
        return y if self.epilogue is None else apply_epilogue(y, self.epilogue)

    def around(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """:meth:`run` or :meth:`run_plus` for whatever a direct call would go around: gradients, function transforms,
        modes, subclasses."""
        if function_transform() is not None or forward_ad._current_level >= 0:
            return through_transforms(x, self, residual)
        return self.call(x, self.tensors, residual)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """:meth:`weight_of` the resident tensors."""
        return self.weight_of(self.tensors, dtype)

    def moved(self) -> None:  # noqa: B027 (most kernels have nothing to do)
        """To be called when resident tensors were replaced by equal ones elsewhere."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        """Copies of the tensors; nothing that depends on addresses comes along."""
        clone = copy.copy(self)
        memo[id(self)] = clone
        clone.tensors = copy.deepcopy(self.tensors, memo)
        clone.feeds = copy.deepcopy(self.feeds, memo)
        clone.moved()
        return clone


def effective_weight(
    canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The float weight a layer stands for: the dequantized one, times ``inv_smooth`` where there is one."""
    weight = reference.dequantize_weight(canonical, scheme, in_features)
    smooth = canonical.get("inv_smooth")
    return (weight if smooth is None else weight * smooth).to(dtype)


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives the inputs of a Linear; unchanged outside autocast."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPE_CODES:
        return x
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


# -- gradients ------------------------------------------------------------------------------------------------------
#
# The rounding of activations has gradient one inside its range, so y = x @ W^T + b with the dequantized W (smoothing
# included) is what is differentiated.  Weights are constants; products in float32, cast once.


def input_gradient(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the input ``[..., K]`` in ``dtype``, of that of the output ``[..., N]`` and the float weight."""
    with torch.autocast(grad.device.type, enabled=False):
        return (grad.to(torch.float32) @ weight).to(dtype)


class _Transformable(torch.autograd.Function):
    """A layer as ``torch.func`` and forward mode take it; the input is the only tensor argument."""

    @staticmethod
    def forward(x: Tensor, prepared: Prepared) -> Tensor:
        return prepared.product(x, prepared.tensors, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Prepared], output: Tensor) -> None:
        ctx.prepared, ctx.input_dtype, ctx.output_dtype = inputs[1], inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return input_gradient(grad, ctx.prepared.weight(), ctx.input_dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return input_gradient(tangent, ctx.prepared.weight().T, ctx.output_dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, prepared: Prepared) -> tuple[Tensor, int]:
        return _Transformable.apply(x.movedim(in_dims[0] or 0, 0), prepared), 0


def through_transforms(x: Tensor, prepared: Prepared, residual: Tensor | None = None) -> Tensor:
    """``prepared.run(x)`` or ``run_plus(x, residual)`` under ``torch.func`` transforms or forward mode."""
    x = autocast_input(x)
    check_input(x, prepared.in_features, prepared.device)
    if residual is not None:
        check_residual(residual, x, prepared.out_features, x.dtype)
    y = prepared.finished(_Transformable.apply(x, prepared))
    return y if residual is None else y + residual
