"""Weights that read one input, side by side in one memory: on a GPU one launch multiplies them all.

A layer that was joined to others is what it was.  Its resident tensors are views of larger ones, a kernel that runs it
alone is told the distance between its slabs, and its state dict, moves and copies are its own.  Which layers belong
together, and when they run as one, is the business of :class:`qkernels.groups.InputGroup`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import _C
from .deferred import Deferred
from .eager import is_plain
from .prepared import Prepared

__all__ = ["Joinable", "Joint", "Rows", "join", "own_memory", "separate"]


class Rows(NamedTuple):
    """A resident tensor in a shape that has a dimension for the rows of the weight, and which one that is."""

    tensor: Tensor
    dimension: int


class Joinable(Prepared):
    """A layer whose resident tensors may be views of larger ones, which hold the rows of several layers."""

    granule: ClassVar[int] = 1
    """A layer with another one behind it has a multiple of so many rows."""

    @abstractmethod
    def rows_of(self, name: str, tensor: Tensor) -> Rows | None:
        """How a resident tensor holds rows; None: it belongs to the input, which layers of a group have in common."""

    def direct(self, x: Tensor) -> Tensor | None:
        """The layer without its epilogue, past torch's dispatcher; None where the call has to go around."""
        if not isinstance(x, Deferred) and not is_plain(x):
            return None
        y = self.run(x)
        return y if is_plain(y) else None


class Joint:
    """Layers whose weights lie side by side, and the one layer that they are together.

    Args:
        whole: ``[sum of N, K]``, without an epilogue.
        parts: the resident tensors of each layer, in its mapping by now: views of those of ``whole``.
        members: the layers.
    """

    def __init__(self, whole: Joinable, parts: Sequence[Mapping[str, Tensor]], members: Sequence[Joinable]) -> None:
        self.whole = whole
        self._sizes = [member.out_features for member in members]
        self._held = [_C.Held(dict(part), member.names).holds for member, part in zip(members, parts, strict=True)]
        self._classes = [type(member) for member in members]

    def holds(self, members: Sequence[Prepared]) -> bool:
        """Whether layers, in the order of the members, still have the tensors that were joined."""
        for member, kind, held in zip(members, self._classes, self._held, strict=True):
            if type(member) is not kind or not held(member.tensors):  # type: ignore[arg-type]  # see join
                return False
        return True

    def run(self, x: Tensor) -> Sequence[Tensor] | None:
        """The output of each layer before its epilogue, slices of one ``[..., sum of N]``; None where each has to run
        alone."""
        y = self.whole.direct(x)
        if y is None:
            return None
        # Not as views: they would share one counter of changes, and autograd forbids to change some kinds of them.
        return torch.unsafe_split_with_sizes(y, self._sizes, -1)


def join(members: Sequence[Prepared]) -> Joint | None:
    """Bring the weights of layers into one memory.

    Args:
        members: of one scheme and number of features, quantizing inputs alike.

    Returns:
        None, and nothing is changed, where their kernel does not serve joined weights.
    """
    layers = [member for member in members if isinstance(member, Joinable)]
    first = layers[0] if layers else None
    if first is None or len(layers) != len(members) or len({id(layer.tensors) for layer in layers}) != len(layers):
        return None
    if any(type(layer) is not type(first) or layer.device != first.device for layer in layers):
        return None
    if any(layer.out_features % first.granule for layer in layers[:-1]):
        return None
    whole: dict[str, Any] = {}
    parts: list[dict[str, Tensor]] = [{} for _ in layers]
    with torch.no_grad():
        for name in first.names:
            given = [layer.tensors.get(name) for layer in layers]
            if not _join_one(name, given, layers, whole, parts):
                return None
    for layer, part in zip(layers, parts, strict=True):
        layer.tensors.update(part)  # type: ignore[attr-defined]  # a dictionary, which a module may own
        layer.moved()
    rows = sum(layer.out_features for layer in layers)
    return Joint(type(first)(whole, first.scheme, first.in_features, rows), parts, layers)


def _join_one(
    name: str,
    given: list[Tensor | None],
    layers: Sequence[Joinable],
    whole: dict[str, Any],
    parts: list[dict[str, Tensor]],
) -> bool:
    """The resident tensors of one name, of all layers; False where they do not fit together."""
    present = [tensor for tensor in given if tensor is not None]
    if not present:
        return True
    if len({tensor.dtype for tensor in present}) > 1:
        return False
    if layers[0].rows_of(name, present[0]) is None:
        whole[name] = given[0]
        for part, tensor in zip(parts, given, strict=True):
            if tensor is not None:
                part[name] = tensor
        return len(present) == len(layers)
    if len(present) < len(layers):
        if name != "bias":
            return False
        # -0 changes nothing that it is added to.
        filled = [present[0].new_full((layer.out_features,), -0.0) for layer in layers]
    else:
        filled = []
    pieces, dimension = [], 0
    for index, (layer, tensor) in enumerate(zip(layers, given, strict=True)):
        rows = layer.rows_of(name, filled[index] if tensor is None else tensor)
        if rows is None:
            return False
        pieces.append(rows.tensor)
        dimension = rows.dimension
    together, first = torch.cat(pieces, dimension), 0
    for piece, part, tensor in zip(pieces, parts, given, strict=True):
        count = piece.shape[dimension]
        if tensor is not None:
            part[name] = together.narrow(dimension, first, count)
        first += count
    whole[name] = together
    return True


def separate(layer: Prepared) -> None:
    """Give a layer memory of its own again."""
    layer.tensors.update(own_memory(layer.resident()))  # type: ignore[attr-defined]  # see join
    layer.moved()


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors none of which is a view of a larger one: copies of those that are."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        if tensor.untyped_storage().nbytes() > tensor.nbytes
        else tensor
        for name, tensor in tensors.items()
    }
