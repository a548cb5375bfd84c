"""Layers on a GPU as the binding knows them: a call passes its rows, what stays was handed over before.

A plain eager call of few rows takes its host longer than the GPU, so what is here was timed line by line.  An object of
the binding (``csrc/cuda/bindings_layers.h``) borrows the addresses of a layer's tensors; each call asks first whether
the layer still holds them where they were, and makes another object if not.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _C
from .checks import DTYPE_CODES, row_stride
from .cuda import _cuda, _on, _stream, launch, settle
from .cuda_rows import GemmCodes, RowGrid
from .cuda_w4 import workspace
from .deferred import Deferred, HandsOn, TakesIntegers
from .eager import is_plain

__all__ = ["BoundLayer", "FloatLayer", "IntegerLayer"]

_code_of = DTYPE_CODES.get
_new_empty = Tensor.new_empty
_strided = torch.strided

_MOST_PLANS = 64
"""Numbers of rows whose needs a layer remembers."""


_PLAIN = RowGrid()
"""One object for all layers whose inputs are quantized by nothing but themselves: found the same at a glance."""


def _is_plain_grid(grid: RowGrid) -> bool:
    return grid.symmetric and all(tensor is None for tensor in grid[1:])


class Bound:
    """What a layer's tensors are to the binding.

    Attributes:
        layer: the object of the binding.
        holds: whether a mapping still holds the tensors that ``layer`` borrows from, where they were.
        device, index: where they are.
        fused: up to so many rows the fused kernel is the faster one.
        needs: rows -> counters and partial sums of a launch.
        grid: how inputs are quantized, if they are.
    """

    __slots__ = ("device", "fused", "grid", "holds", "index", "layer", "needs")

    def __init__(self, layer: Any, held: _C.Held, device: torch.device, fused: float, grid: RowGrid | None) -> None:
        self.layer = layer
        self.holds = held.holds
        self.device = device
        self.index = device.index
        self.fused = fused
        self.grid = grid
        self.needs: dict[int, tuple[int, int]] = {}

    def needs_of(self, rows: int) -> tuple[int, int]:
        """Of a launch over so many rows."""
        if len(self.needs) >= _MOST_PLANS:
            self.needs.clear()
        with _on(self.device):
            needs = self.needs[rows] = self.layer.needs(rows)
        return needs


class BoundLayer(HandsOn):
    """A layer whose kernels are called through an object of the binding.

    Classes that mix this in say how to make it (:meth:`bind`), and what serves the calls that it does not.
    """

    alignment: ClassVar[int] = 16
    """Bytes; the kernels read packed weights that begin at a multiple of it."""

    _bound: Bound | None = None

    @abstractmethod
    def bind(self) -> tuple[Any, float]:
        """The object for what is resident now, plain tensors of one GPU, and :attr:`Bound.fused`."""

    def grid(self) -> RowGrid | None:
        """How inputs are quantized, if they are."""
        return None

    @abstractmethod
    def general(self, x: Tensor) -> Tensor:
        """The product of an ordinary input that fits the layer, in whatever layout, dtype and number of rows."""

    @abstractmethod
    def through(self, bound: Bound, x: Tensor) -> Tensor | None:
        """:meth:`general` by one call of the binding; None where the rows are not for it."""

    def bound(self) -> Bound | None:
        """The binding's view of what is resident now; None where kernels cannot read that."""
        bound = self._bound
        if bound is None or not bound.holds(self._dictionary()):
            bound = self._bound = self._bind()
        return bound

    def _dictionary(self) -> dict[str, Any]:
        """:attr:`tensors`, or what they come to where a head borrows its table's."""
        tensors = self.tensors
        return tensors if isinstance(tensors, dict) else self.resident()

    def _bind(self) -> Bound | None:
        held = _C.Held(self._dictionary(), self.names)  # before addresses are read: another thread may replace tensors
        tensors, device = self.resident(), self.device
        if device.type != "cuda" or any(type(t) is not Tensor or t.device != device for t in tensors.values()):
            return None
        if tensors["packed"].data_ptr() % self.alignment:
            return None  # memory of somebody else's making: the operator copies it
        layer, fused = self.bind()
        grid = self.grid()
        return Bound(layer, held, device, fused, _PLAIN if grid is not None and _is_plain_grid(grid) else grid)

    def takes(self, x: Tensor) -> tuple[RowGrid | None, bool]:
        """See :meth:`Prepared.takes`."""
        bound = self.bound()
        if bound is None:
            return super().takes(x)
        if not x.is_cuda or x.get_device() != bound.index or x.shape[-1] != self.in_features or not x.numel():
            return None, False
        return bound.grid, bound.grid is None

    def direct(self, x: Tensor) -> Tensor | None:
        """See :meth:`qkernels.joint.Joinable.direct`."""
        if isinstance(x, Deferred):
            x = x.value()
        if not is_plain(x) or not x.is_cuda:
            return None
        alive = tuple(self._dictionary().values())  # until the launch, whatever another thread does
        bound = self.bound()
        if bound is None or x.get_device() != bound.index or x.layout is not _strided:
            return None
        shape = x.shape
        if x.dtype not in DTYPE_CODES or not shape or shape[-1] != self.in_features:
            return None
        y = self.through(bound, x)
        del alive
        return self.general(x) if y is None else y

    def run(self, x: Tensor) -> Tensor:
        """See :meth:`Prepared.run`.  Plain eager calls go straight to the binding."""
        y = self.direct(x)
        if y is None:
            return self.around(x.value() if isinstance(x, Deferred) else x)
        return self.finished(y)

    def moved(self) -> None:
        """Forget the object that borrows addresses, and wait for the copies."""
        self._bound = None
        settle(self.device)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: addresses mean nothing elsewhere."""
        return {**self.__dict__, "_bound": None}


class FloatLayer(BoundLayer):
    """One that multiplies floats."""

    def through(self, bound: Bound, x: Tensor) -> Tensor | None:
        """See the base class: 16-bit rows at multiples of 16 bytes."""
        code, features = _code_of(x.dtype), self.in_features
        rows = x.numel() // features
        stride = features if x.is_contiguous() else row_stride(x)
        at = x.data_ptr()
        if not code or not rows or rows > bound.fused or stride is None or stride % 8 or at % 16 or x.is_neg():
            return None
        y = _new_empty(x, (*x.shape[:-1], self.out_features))
        needs = bound.needs.get(rows) or bound.needs_of(rows)
        if not needs[0]:
            launch(bound.device, bound.layer.run, at, code, rows, stride, y.data_ptr(), 0, 0)
            return y
        with _on(bound.device):
            stream = _stream(bound.device)
            memory = workspace(bound.device, stream, *needs)
            bound.layer.run(at, code, rows, stride, y.data_ptr(), *memory, stream)
        return y


class IntegerLayer(BoundLayer, TakesIntegers):
    """One that multiplies integers, which it makes of floats, or takes as they come."""

    def direct(self, x: Tensor) -> Tensor | None:
        """See the base class."""
        if isinstance(x, Deferred):
            taken = self.codes_product(x)
            if taken is not None:
                return taken
        return super().direct(x)

    def input_grid(self) -> RowGrid | None:
        """See :meth:`Prepared.input_grid`."""
        bound = self.bound()
        return None if bound is None else bound.grid

    def product_of(self, codes: GemmCodes, out_dtype: torch.dtype) -> Tensor:
        """See the base class.

        Raises:
            ValueError: codes for a layer that no kernel can read.
        """
        alive = tuple(self._dictionary().values())  # as in direct
        bound = self.bound()
        if bound is None:
            raise ValueError(f"packed: expected a tensor that the kernels can read, got one on {self.device}")
        memory, rows = codes
        y = _new_empty(memory, rows, self.out_features, dtype=out_dtype)
        code = DTYPE_CODES[out_dtype]
        launch(bound.device, bound.layer.product, memory.data_ptr(), rows, y.data_ptr(), code)
        del alive
        return y

    def through(self, bound: Bound, x: Tensor) -> Tensor | None:
        """See the base class: rows of contiguous values."""
        features = self.in_features
        rows = x.numel() // features
        stride = features if x.is_contiguous() else row_stride(x)
        if not rows or stride is None or x.is_neg():
            return None
        y = _new_empty(x, (*x.shape[:-1], self.out_features))
        memory = _new_empty(x, _cuda.workspace_bytes(rows, features), dtype=torch.int8)
        code = DTYPE_CODES[x.dtype]
        at, to = x.data_ptr(), y.data_ptr()
        launch(bound.device, bound.layer.run, at, code, rows, stride, memory.data_ptr(), to, code)
        return y
