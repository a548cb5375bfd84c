"""Inputs that reach a Linear as integers: tensors whose floating-point values exist once somebody reads them.

On a GPU a norm, or an activation, can quantize its output in the pass that computes it (:mod:`qkernels.cuda_rows`).
What it returns then is a :class:`QuantizedInput`: the Linears it is meant for take the integers; to everybody else it
is an ordinary tensor, computed at the first operation on it by the module's own code.  Where the Linears multiply
floats it is an ordinary tensor for all.  A sum that such a norm reads may wait for it too, as a :class:`PendingSum`.
:mod:`qkernels.fuse` decides where, from the code of the parents; a :class:`Handoff` ties the two ends together.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .cuda_rows import Codes, GemmCodes, RowGrid, activate, quantize_activation
from .eager import is_plain
from .epilogues import apply_epilogue
from .prepared import Prepared
from .views import METADATA, writes

if TYPE_CHECKING:
    from .linear import QuantLinear

__all__ = [
    "Deferred",
    "Handoff",
    "HandsOn",
    "PendingSum",
    "QuantizedInput",
    "TakesIntegers",
    "hand_activation",
    "hand_term",
]


class Handoff:
    """From what computes an input to the Linears that read it.

    It refers to the first of them weakly, and a copy (or pickle) of it starts without one: that layer's copy joins.
    """

    def __init__(self) -> None:
        self._reader: weakref.ref[QuantLinear] | None = None
        self._compared: dict[tuple[int, int], tuple[Tensor, int, Tensor, int, bool]] = {}

    def __reduce__(self) -> tuple[type[Handoff], tuple[()]]:
        """For copies and pickles: nothing."""
        return Handoff, ()

    def join(self, layer: QuantLinear) -> None:
        """Make ``layer`` the one that says what inputs are rounded to."""
        self._reader = weakref.ref(layer)

    def leave(self) -> None:
        """From now on nobody reads."""
        self._reader = None

    def left(self) -> bool:
        """Whether nobody reads any more."""
        return self._reader is None

    def takes(self, x: Tensor) -> tuple[RowGrid | None, bool]:
        """What the reader makes of an input like ``x [..., K]``: how it is quantized (None: it is not, or not there),
        and whether floats are multiplied there by kernels whose input others compute."""
        reader = None if self._reader is None else self._reader()
        if reader is None:
            return None, False
        return reader._prepared.takes(x)

    def serves(self, x: Tensor) -> bool:
        """Whether a kernel computes the reader's input from one like ``x [..., K]``, whatever it rounds to."""
        grid, floats = self.takes(x)
        return floats or grid is not None

    def same(self, a: Tensor | None, b: Tensor | None) -> bool:
        """Whether two of the readers' tensors are equal.  Compared once; while a graph is captured, not at all."""
        if a is None or b is None or a is b:
            return a is b
        known = self._compared.get((id(a), id(b)))
        if known is None or known[0] is not a or known[2] is not b or known[1::2][:2] != (version(a), version(b)):
            if a.device != b.device or (a.is_cuda and torch.cuda.is_current_stream_capturing()):
                return False
            if len(self._compared) >= 16:  # of layers that moved: forget
                self._compared.clear()
            known = self._compared[id(a), id(b)] = (a, version(a), b, version(b), torch.equal(a, b))
        return known[4]


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


_Kind = TypeVar("_Kind", bound="Deferred")
_wrap = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
"""Where a release of torch does not know the question, operators take torch's way."""


class Deferred(Tensor):
    """Shape, dtype and device now, values when somebody asks for them."""

    _build: Callable[[], Tensor]
    _value: Tensor | None
    _seen: int
    _like: tuple[
        torch.Size, torch.dtype, torch.device
    ]  # ours to ask: torch's own answers come through a subclass's hook

    @staticmethod
    def __new__(cls: type[_Kind], like: Tensor, build: Callable[[], Tensor]) -> _Kind:
        """A tensor shaped like ``like``, whose values come from ``build()``."""
        shape, dtype, device = own = like.shape, like.dtype, like.device
        tensor = _wrap(cls, shape, dtype=dtype, device=device)
        tensor._build, tensor._value, tensor._seen, tensor._like = build, None, 0, own
        return tensor  # type: ignore[no-any-return]

    # What blocks ask and do between their modules, without the way through torch and back.

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of the tensor."""
        return self._like[0]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the tensor."""
        return self._like[1]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of the tensor."""
        return self._like[2]

    def __add__(self, other: Any) -> Tensor:
        """The sum, which may wait."""
        waiting = None if _function_modes() else _sum(self, other)
        return super().__add__(other) if waiting is None else waiting

    def __radd__(self, other: Any) -> Tensor:
        """The sum, which may wait."""
        waiting = None if _function_modes() else _sum(other, self)
        return super().__radd__(other) if waiting is None else waiting

    def __mul__(self, other: Any) -> Tensor:
        """The product, which a held activation waits for."""
        waiting = None if _function_modes() else _product(self, other)
        return super().__mul__(other) if waiting is None else waiting

    def __rmul__(self, other: Any) -> Tensor:
        """The product, which a held activation waits for."""
        waiting = None if _function_modes() else _product(other, self)
        return super().__rmul__(other) if waiting is None else waiting

    def untouched(self) -> bool:
        """Whether the values are what :meth:`value` gave or will give: nobody wrote to them, nor may have."""
        value = self._value
        return value is None or (self._seen >= 0 and version(value) == self._seen)

    def value(self) -> Tensor:
        """The ordinary tensor; from then on there is one, and whoever writes to this one writes to it."""
        if self._value is None:
            self._value = self._build().contiguous()
            self._seen = version(self._value)
        return self._value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Metadata at once; the product that a held activation waits for; anything else over the values."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if len(args) == 2 and not kwargs:
            waiting = _product(*args) if func in _PRODUCTS else _sum(*args) if func in _SUMS else None
            if waiting is not None:
                return waiting
        result = func(*_values(args), **_values(kwargs))
        if args and isinstance(args[0], Deferred) and isinstance(result, Tensor) and result is args[0]._value:
            if result.shape != args[0].shape:
                raise RuntimeError(
                    f"expected shape {list(args[0].shape)} to stay, got {list(result.shape)}: see unfuse_"
                )
            return args[0] if writes(func) else result
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What comes past ``__torch_function__``: over the values as well."""
        return func(*_values(args), **_values(kwargs or {}))


def _values(tree: Any) -> Any:
    return tree_map_only(Deferred, lambda tensor: tensor.value(), tree)


class QuantizedInput(Deferred):
    """The input of Linears, quantized where it was computed."""

    _codes: Codes | GemmCodes
    _grid: RowGrid
    _handoff: Handoff

    @classmethod
    def of(
        cls, like: Tensor, build: Callable[[], Tensor], codes: Codes | GemmCodes, grid: RowGrid, handoff: Handoff
    ) -> QuantizedInput:
        """An input shaped like ``like`` whose rows are ``codes`` on ``grid``, and whose values are ``build()``."""
        tensor = cls.__new__(cls, like, build)
        tensor._codes, tensor._grid, tensor._handoff = codes, grid, handoff
        return tensor

    def codes_for(self, prepared: Prepared) -> Codes | GemmCodes | None:
        """The integers, if a layer would have made these from the values; None where the values count."""
        if not self.untouched():
            return None
        grid, own = self._grid, prepared.input_grid()
        shape, _, device = self._like
        if own is None or prepared.in_features != shape[-1] or prepared.device != device:
            return None
        if own.symmetric != grid.symmetric or not is_plain(self._codes[0]):
            return None
        if own is grid:
            return self._codes
        same = self._handoff.same
        if same(grid.scale, own.scale) and same(grid.zero_point, own.zero_point):
            return self._codes if same(grid.inv_smooth, own.inv_smooth) else None
        return None


class HandsOn(Prepared):
    """A layer whose activation makes the input of the next one."""

    def finished(self, y: Tensor) -> Tensor:
        """See :meth:`Prepared.finished`; the next Linear may get it as integers, or with the product before it."""
        if self.epilogue is None:
            return y
        if self.feeds is not None:
            handed = hand_activation(y, self.epilogue, *self.feeds)
            if handed is not None:
                return handed
        return super().finished(y)


class TakesIntegers(HandsOn):
    """A layer whose kernel multiplies 8-bit integers, and takes them where they come ready."""

    @abstractmethod
    def product_of(self, codes: Any, out_dtype: torch.dtype) -> Tensor:
        """``[M, N]`` of rows that are integers already, bias included, without the epilogue.

        Args:
            codes: as the kernels in front of the layer make them.
            out_dtype: of the output.
        """

    def over_codes(self, x: Deferred) -> Tensor | None:
        """The layer's output for an input that came as integers it would have made; None where the values count."""
        y = self.codes_product(x)
        return None if y is None else self.finished(y)

    def codes_product(self, x: Deferred) -> Tensor | None:
        """:meth:`over_codes` without the epilogue."""
        codes = x.codes_for(self) if isinstance(x, QuantizedInput) else None
        if codes is None:
            return None
        shape, dtype, _ = x._like
        return self.product_of(codes, dtype).view(*shape[:-1], self.out_features)


class _HeldActivation(Deferred):
    """``activation(y)`` that waits for the product with another tensor."""

    _inner: Tensor
    _name: str
    _handoff: Handoff


def hand_activation(y: Tensor, name: str, handoff: Handoff, gated: bool) -> Tensor | None:
    """``activation(y)`` on its way to a Linear that reads it as integers, or times something else; None where it cannot
    go that way.

    Args:
        y: ``[..., K]``, nobody else's.
        name: of the epilogue.
        gated: what the Linear reads is its product with another tensor.
    """
    if not is_plain(y):
        return None
    grid, floats = handoff.takes(y)
    if grid is None and not (gated and floats):
        return None
    if grid is not None and not gated:
        codes = quantize_activation(y, name, None, grid, for_gemm=True)
        return QuantizedInput.of(y, lambda: apply_epilogue(y, name), codes, grid, handoff)
    held = _HeldActivation.__new__(_HeldActivation, y, lambda: apply_epilogue(y, name))
    held._inner, held._name, held._handoff = y, name, handoff
    return held


def _product(a: Any, b: Any) -> Tensor | None:
    held, up = (a, b) if isinstance(a, _HeldActivation) else (b, a)
    if not isinstance(held, _HeldActivation) or held._value is not None or not isinstance(up, Tensor):
        return None
    inner, name = held._inner, held._name
    if not is_plain(up) or up.shape != inner.shape or up.dtype != inner.dtype or up.device != inner.device:
        return None
    grid, floats = held._handoff.takes(inner)
    if grid is None:
        return activate(inner, name, up, for_gemm=True) if floats else None
    codes = quantize_activation(inner, name, up, grid, for_gemm=True)
    build = unchanged(up, lambda: held.value() * up)
    return QuantizedInput.of(inner, build, codes, grid, held._handoff)


class _Term(Deferred):
    """A Linear's output, whose values are there, on its way to a sum."""

    _handoff: Handoff


class PendingSum(Deferred):
    """The sum of two tensors that waits for the norm behind it."""

    _terms: tuple[Tensor, Tensor] | None
    _versions: tuple[int, int]

    @classmethod
    def of(cls, y: Tensor, residual: Tensor) -> PendingSum:
        """``residual + y``, alike in shape, dtype and device."""
        before = version(y), version(residual)

        def build() -> Tensor:
            if (version(y), version(residual)) != before:
                raise RuntimeError(_CHANGED)
            return residual + y

        pending = cls.__new__(cls, y, build)
        pending._terms, pending._versions = (y, residual), before
        return pending

    def terms(self) -> tuple[Tensor, Tensor] | None:
        """``y`` and the residual, if they are what they were and their sum has not been formed; None otherwise."""
        terms = self._terms
        if self._value is not None or terms is None or (version(terms[0]), version(terms[1])) != self._versions:
            return None
        return terms

    def formed(self, total: Tensor) -> None:
        """Take the sum that somebody else computed, and let go of its terms."""
        self._value, self._seen, self._terms, self._build = total, version(total), None, lambda: total


def hand_term(y: Tensor, handoff: Handoff) -> Tensor:
    """A Linear's output ``y [..., N]``, nobody else's, ready to be a term of what a norm reads next; ``y`` itself where
    the norm would not take it."""
    if not is_plain(y) or not handoff.serves(y):
        return y
    term = _Term.__new__(_Term, y, lambda: y)
    term._value, term._seen, term._handoff = y, version(y), handoff
    return term


def _sum(a: Any, b: Any) -> Tensor | None:
    term, other = (b, a) if isinstance(b, _Term) else (a, b)
    if not isinstance(term, _Term) or isinstance(other, _Term):
        return None
    y = term.value()
    if isinstance(other, Deferred):
        other = other.value()
    if not isinstance(other, Tensor) or not is_plain(other):
        return None
    if other.shape != y.shape or other.dtype != y.dtype or other.device != y.device:
        return None
    return PendingSum.of(y, other)


def unchanged(x: Tensor, build: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``build``, which reads ``x`` later, and refuses if it was written to meanwhile."""
    before = version(x)

    def checked() -> Tensor:
        if version(x) != before:
            raise RuntimeError(_CHANGED)
        return build()

    return checked


_CHANGED = (
    "a tensor was changed in place between the module that reads it and the first operation on what that module "
    "returned; qkernels.unfuse_ makes the module compute at once"
)

_SUMS = {Tensor.add, torch.add, Tensor.__add__, Tensor.__radd__}
_PRODUCTS = {Tensor.mul, torch.mul, Tensor.multiply, torch.multiply, Tensor.__mul__, Tensor.__rmul__}
