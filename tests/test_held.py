"""Whether a layer still holds the tensors whose addresses an object of the binding borrowed."""

from __future__ import annotations

import weakref

import pytest
import torch

from qkernels import _C

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
