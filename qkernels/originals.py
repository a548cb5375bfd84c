"""Copies of parameters that are about to be changed in place, to put them back to the bit when something fails."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from typing import IO

import torch
from torch import Tensor, nn

__all__ = ["Originals"]

KEEP_BYTES = 256 << 20  # copies that stay in memory; beyond that they go to an unnamed temporary file


class Originals:
    """What parameters of a model held before.  Dropping the object keeps the changes; :meth:`restore` takes them back.

    Parameters are found by name when they are restored, so that modules may have been exchanged in between, as long as
    they were exchanged back.

    Args:
        model: the model.
        keep: bytes of copies held in memory before the file is used.
    """

    def __init__(self, model: nn.Module, *, keep: int = KEEP_BYTES) -> None:
        self._model = model
        self._room = keep
        self._copies: dict[tuple[str, str], Tensor | int] = {}
        self._actions: list[Callable[[], None]] = []
        self._file: IO[bytes] | None = None

    def keep(self, module: str, parameter: str) -> None:
        """Remember what a parameter holds now, unless it is remembered already."""
        tensor = self._find(module, parameter)
        if tensor is None or (module, parameter) in self._copies:
            return
        size = tensor.numel() * tensor.element_size()
        if size <= self._room:
            self._room -= size
            self._copies[module, parameter] = tensor.clone()
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this object
            weakref.finalize(self, self._file.close)
        self._copies[module, parameter] = self._file.seek(0, 2)
        self._file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def on_restore(self, action: Callable[[], None]) -> None:
        """Also call ``action``; the latest first, after the parameters."""
        self._actions.append(action)

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for (module, parameter), copy in self._copies.items():
                tensor = self._find(module, parameter)
                if tensor is not None:
                    tensor.copy_(self._read(tensor, copy) if isinstance(copy, int) else copy)
        for action in reversed(self._actions):
            action()
        self._copies.clear()
        self._actions.clear()

    def _find(self, module: str, parameter: str) -> Tensor | None:
        found = self._model.get_submodule(module)._parameters[parameter]
        return None if found is None else found.detach()

    def _read(self, like: Tensor, position: int) -> Tensor:
        if self._file is None:
            raise OSError("the temporary file of a conversion is gone; the model cannot be restored")
        self._file.seek(position)
        raw = bytearray(self._file.read(like.numel() * like.element_size()))
        return torch.frombuffer(raw, dtype=torch.uint8).view(like.dtype).reshape(like.shape)
