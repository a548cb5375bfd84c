"""TiedQuantLinear: the output head over the table of a QuantEmbedding, and the kernels that multiply by that table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backends import Prepared, PreparedReference, PreparedW8A8
from .checks import check_canonical
from .cuda_w8a8 import PreparedCudaW8A8
from .cuda_w8a16 import PreparedCudaW8A16
from .linear import QuantLinear
from .scheme import Scheme

if TYPE_CHECKING:
    from .embedding import QuantEmbedding

__all__ = ["TiedQuantLinear", "head_kernel"]

_TABLE_NAMES = ("weight", "weight_scale")
_SHARED_NAMES = {"q_weight": "table", "packed_scale": "weight_scale"}
"""What a head's kernel calls a tensor, and what the table does, where that is not the same."""


def head_kernel(scheme: Scheme, features: int, rows: int, device: torch.device) -> tuple[type[Prepared] | None, str]:
    """What multiplies by a packed table there; None and the reason where only the reference does."""
    kernel: type[Prepared] = PreparedW8A8
    if device.type == "cuda":
        kernel = PreparedCudaW8A16 if scheme.weight_only else PreparedCudaW8A8
    reason = kernel.objection(scheme, features, rows, device)
    return (None, reason) if reason else (kernel, "")


class _SharedTensors(Mapping[str, Any]):
    """The tensors of a head: its own, and those of the table."""

    def __init__(self, own: dict[str, Any], table: QuantEmbedding) -> None:
        self.own = own
        self.table = table

    def __getitem__(self, name: str) -> Any:
        if name in self.own:
            return self.own[name]
        return self.table._buffers[_SHARED_NAMES.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from self.table._resident_names()

    def __len__(self) -> int:
        return len(self.own) + len(self.table._resident_names())


class TiedQuantLinear(QuantLinear):
    """A QuantLinear over the table of a :class:`QuantEmbedding`, made by its ``shared_head``.

    It holds the bias and static scales; weight and row scales are the embedding's, wherever that moves.  The state dict
    names them under the head too, as the same tensors.
    """

    _OWN = ("bias", "act_scale", "act_zero_point")
    _table: QuantEmbedding
    _table_epoch: int

    def __init__(self, table: QuantEmbedding, extra: Mapping[str, Tensor | None], scheme: Scheme) -> None:
        nn.Module.__init__(self)
        self.in_features = table.embedding_dim
        self.out_features = table.num_embeddings
        self.scheme = scheme
        self.dtype = table.dtype
        given = {name: tensor for name, tensor in extra.items() if tensor is not None}
        checked = check_canonical({**table.canonical(), **given}, scheme, self.in_features, self.out_features)
        table._head_scheme = scheme
        table._pack_for_head()
        self.__dict__["_table"] = table  # not a child of this module
        self._hold({name: checked.get(name) for name in self._OWN})
        self._prepare()

    def _hold(self, own: Mapping[str, Tensor | None]) -> None:
        self._buffers.update(own)
        self._non_persistent_buffers_set.update(own)

    def _prepare(self) -> None:
        table = self._table
        tensors = _SharedTensors(self._buffers, table)
        sizes = (self.in_features, self.out_features)
        kernel, reason = head_kernel(self.scheme, *sizes, table._device())
        prepared: Prepared
        if not table._packed or kernel is None:
            prepared = PreparedReference(tensors, self.scheme, *sizes, reason)
        elif kernel is PreparedW8A8:
            prepared = PreparedW8A8(tensors, self.scheme, *sizes, has_minus128=table._has_minus128)
        else:
            prepared = kernel(tensors, self.scheme, *sizes)
        self.__dict__["_prepared"] = prepared
        self.__dict__["_table_epoch"] = table._epoch

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """See :meth:`QuantLinear.forward`."""
        if self._table_epoch != self._table._epoch:
            self._prepare()
        return super().forward(input, residual=residual)

    def canonical(self) -> dict[str, Tensor]:
        """The canonical tensors; ``weight`` and ``weight_scale`` are those of the embedding's state dict."""
        own = {name: tensor for name in self._OWN if (tensor := self._buffers.get(name)) is not None}
        return {**self._table.canonical(), **own}

    def _tensors(self) -> dict[str, Tensor | None]:
        if self._table_epoch != self._table._epoch:
            self._prepare()
        tensors: dict[str, Tensor | None] = {}
        shared = self._table._buffers
        for name in self._prepared.names:
            own = self._buffers.get(name)
            tensors[name] = own if own is not None else shared.get(_SHARED_NAMES.get(name, name))
        return tensors

    def _resident_names(self) -> tuple[str, ...]:
        return self._OWN

    def _device(self) -> torch.device:
        return self._table._device()

    def _apply(self, fn: Any, recurse: bool = True) -> TiedQuantLinear:
        """The table moves along, as a parameter does that two modules hold."""
        before = self._device()
        self._table._apply(fn)
        self.dtype = self._table.dtype
        own = {name: self._buffers.pop(name) for name in self._OWN}
        try:
            nn.Module._apply(self, fn, recurse)
        finally:
            self._buffers.update(own)
        for name, tensor in own.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        if before != self._device() or self._table_epoch != self._table._epoch:
            self._prepare()
        return self

    def _install(self, canonical: Mapping[str, Tensor]) -> None:
        checked = check_canonical(canonical, self.scheme, self.in_features, self.out_features)
        self._table._install({name: checked[name] for name in _TABLE_NAMES})
        self._hold({name: checked.get(name) for name in self._OWN})
        self._prepare()

    def _overwrite(self, canonical: Mapping[str, Tensor]) -> None:
        self._table._overwrite({name: tensor for name, tensor in canonical.items() if name in _TABLE_NAMES})
        with torch.no_grad():
            for name, tensor in canonical.items():
                if name in self._OWN:
                    self._buffers[name].copy_(tensor)
        self._prepare()

    def _build_weight(self, dtype: torch.dtype) -> Tensor:
        return self._table._build_weight(dtype)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: its own tensors and the embedding."""
        state = self.__dict__.copy()
        del state["_prepared"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The other way round."""
        nn.Module.__setstate__(self, state)
        self._prepare()
