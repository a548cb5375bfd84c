"""Whether a layer still holds the tensors whose addresses an object of the binding borrowed."""

from __future__ import annotations

import weakref

import pytest
import torch

from qkernels import _C
from qkernels.cuda_bound import BoundLayer
from qkernels.cuda_w8a8 import PreparedCudaW8A8
from qkernels.cuda_w8a16 import PreparedCudaW8A16
from qkernels.embedding import QuantEmbedding
from qkernels.scheme import Scheme

NAMES = ("packed", "scale", "bias")


def tensors() -> dict[str, torch.Tensor | None]:
    return {"packed": torch.zeros(8), "scale": torch.ones(2), "bias": None, "other": torch.ones(1)}


def test_held_while_nothing_moves() -> None:
    own = tensors()
    held = _C.Held(own, NAMES)
    assert held.holds(own)
    assert held.holds(dict(own))
    own["packed"].add_(1)  # type: ignore[union-attr]
    own["other"] = None
    del own["bias"]
    assert held.holds(own), "values, what it was not asked about, and a name that is missing in place of None"


@pytest.mark.parametrize("name", NAMES)
def test_held_no_longer_after_a_replacement(name: str) -> None:
    own = tensors()
    held = _C.Held(own, NAMES)
    own[name] = torch.zeros(8)
    assert not held.holds(own)


def test_held_no_longer_after_a_removal_or_a_move_in_place() -> None:
    own = tensors()
    held = _C.Held(own, NAMES)
    gone = {name: tensor for name, tensor in own.items() if name != "scale"}
    assert not held.holds(gone)
    own["packed"].data = torch.zeros(8)  # type: ignore[union-attr]
    assert not held.holds(own)


def test_held_keeps_nothing_alive() -> None:
    own = tensors()
    held = _C.Held(own, NAMES)
    reference = weakref.ref(own["packed"])
    own["packed"] = torch.zeros(8)
    assert reference() is None
    assert not held.holds(own)


def test_held_of_something_else() -> None:
    with pytest.raises(TypeError):
        _C.Held([torch.zeros(1)], NAMES)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="data_ptr"):
        _C.Held({"packed": 3}, NAMES)


class _Gpu:
    """Any device, and the first GPU."""

    type, index = "cuda", 0

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("kernel, scheme", [(PreparedCudaW8A8, "w8a8"), (PreparedCudaW8A16, "w8a16")])
def test_heads_over_a_table_are_bound(kernel: type[BoundLayer], scheme: str) -> None:
    """Their tensors are no dictionary: some are the table's, whatever it has in their place by then."""

    class Here(kernel):  # type: ignore[misc, valid-type]
        device = property(lambda self: _Gpu())
        alignment = 1

        def bind(self) -> tuple[object, float]:
            return object(), 1.0

    table = QuantEmbedding.from_embedding(torch.nn.Embedding(128, 64))
    head = table.shared_head()
    layer = Here(head._prepared.tensors, Scheme.from_preset(scheme), 64, 128)
    bound = layer.bound()
    assert bound is not None
    assert layer.bound() is bound
    replaced = next(name for name, tensor in table._buffers.items() if tensor is layer.tensors["packed"])
    table._buffers[replaced] = table._buffers[replaced].clone()
    assert layer.bound() is not bound
