"""Undo of a conversion, at the memory of one layer.

A failed conversion must leave the very modules and parameters that were there, and yet a conversion may not hold two
models.
So every replaced module is entered here before it is replaced: a few of them stay in memory; the weights of the
others are written to an unnamed temporary file, which the system removes by itself even when the process dies. On
success the journal is dropped; on failure everything is put back, bit by bit.

Objects that somebody else still refers to are never copied back: their owner keeps them alive, so they are put back
themselves. Where there is no room on the disk, the originals stay in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import IO, Any

import torch
from torch import nn

__all__ = ["Journal", "Site"]

Site = tuple[nn.Module, str]
"""A parent and the name under which it holds the module."""

KEEP_BYTES = 16 << 20  # originals that stay in memory; beyond that they go to the file


class _Spilled:
    """A parameter whose bytes are in the file, and which may or may not still be alive elsewhere."""

    def __init__(self, parameter: nn.Parameter, file: IO[bytes]) -> None:
        self._file = file
        self._offset = file.seek(0, os.SEEK_END)
        data = parameter.detach()
        view = memoryview(data.cpu().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):  # one call may write less than asked
            done += file.write(view[done : done + (64 << 20)])
        self._bytes = len(view)
        self._like = torch.empty_like(data, device="meta")
        self._device = data.device
        self._class = type(parameter)
        self._requires_grad = parameter.requires_grad
        self._attributes = dict(parameter.__dict__)
        self.reference = weakref.ref(parameter)
        self._restored: nn.Parameter | None = None

    def get(self) -> nn.Parameter:
        """The parameter itself, or one with the same bits and attributes if nobody kept it."""
        alive = self.reference()
        if alive is not None:
            return alive
        if self._restored is None:
            raw = torch.empty(self._bytes, dtype=torch.uint8)
            view = memoryview(raw.numpy())  # type: ignore[arg-type]
            self._file.seek(self._offset)
            done = 0
            while done < self._bytes:
                count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise OSError("the temporary file of a conversion was cut short; the model cannot be restored")
                done += count
            data = raw.view(self._like.dtype).view(self._like.shape).to(self._device)
            self._restored = self._class(data, requires_grad=self._requires_grad)
            self._restored.__dict__.update(self._attributes)
        return self._restored


class _Record:
    """One replaced module: where it was, and how to get it back."""

    def __init__(self, sites: Sequence[Site], module: nn.Module, spilled: _Spilled | None) -> None:
        self.sites = list(sites)
        self._spilled = spilled
        self._module: nn.Module | None = module if spilled is None else None
        self._reference = weakref.ref(module)
        self._class = type(module)
        self._state: dict[str, Any] = {}
        if spilled is not None:
            self._state = dict(module.__dict__)
            self._state["_parameters"] = {k: None if k == "weight" else p for k, p in module._parameters.items()}

    def restore(self) -> None:
        """Put the module back in all its places."""
        module = self._module or self._reference()
        if module is None and self._spilled is not None:
            module = self._class.__new__(self._class)
            module.__dict__.update(self._state)
            module._parameters["weight"] = self._spilled.get()
        for parent, key in self.sites:
            parent._modules[key] = module


class Journal:
    """Context manager around a conversion: leaving it by any exception puts everything back.

    Args:
        expected: bytes of all originals, to see beforehand whether the file would fit on the disk.
        keep: bytes of originals that stay in memory before the file is used.
    """

    def __init__(self, *, expected: int, keep: int = KEEP_BYTES) -> None:
        self._records: list[_Record] = []
        self._actions: list[Callable[[], None]] = []
        self._parameters: dict[int, _Spilled] = {}
        self._room = keep
        self._file: IO[bytes] | None = None
        self._spill = expected > keep
        self._expected = expected

    def replace(self, sites: Sequence[Site], original: nn.Module, replacement: nn.Module) -> None:
        """Put `replacement` where `original` is, at every site."""
        record = _Record(sites, original, self._store(original))
        self._records.append(record)
        for parent, key in sites:
            parent._modules[key] = replacement

    def on_failure(self, action: Callable[[], None]) -> None:
        """Also call `action` when things go wrong; the latest first."""
        self._actions.append(action)

    def _store(self, module: nn.Module) -> _Spilled | None:
        """None when the module itself is to be kept."""
        weight = module._parameters.get("weight")
        if weight is None or type(weight) is not nn.Parameter or not weight.is_contiguous():
            return None
        known = self._parameters.get(id(weight))
        if known is not None and known.reference() is weight:
            return known
        size = weight.numel() * weight.element_size()
        if size <= self._room:
            self._room -= size
            return None
        if not self._spill:
            return None
        try:
            if self._file is None:
                self._file = _open_spill_file(self._expected)
            spilled = _Spilled(weight, self._file)
        except OSError:
            self._spill = False  # no room on the disk: memory has to do
            return None
        self._parameters[id(weight)] = spilled
        return spilled

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                with _uninterrupted():
                    steps = [record.restore for record in reversed(self._records)]
                    _do_all([*steps, *reversed(self._actions)])
        finally:
            self._records.clear()
            self._actions.clear()
            self._parameters.clear()
            if self._file is not None:
                self._file.close()


def _do_all(steps: Sequence[Callable[[], None]]) -> None:
    """Take every step, even after one has failed; the first failure is raised at the end."""
    failed: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed


def _open_spill_file(size: int) -> IO[bytes]:
    """An unnamed file with room for `size` bytes, on a real disk where there is one. Raises OSError when there is no
    room."""
    candidates = [tempfile.gettempdir(), "/var/tmp"]
    candidates.sort(key=_in_memory)  # stable: the default directory first, unless it is a file system in memory
    for directory in candidates:
        with contextlib.suppress(OSError):
            if shutil.disk_usage(directory).free > size + (size >> 4):
                return tempfile.TemporaryFile(dir=directory, buffering=0)
    raise OSError("no directory for temporary files has room for the weights")


def _in_memory(directory: str) -> bool:
    """Whether `directory` lies on a tmpfs, as far as the system tells."""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
            entries = [line.split()[1:3] for line in mounts]
    except OSError:
        return False
    path = os.path.realpath(directory)
    best, kind = "", ""
    for point, filesystem in entries:
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, filesystem
    return kind in ("tmpfs", "ramfs")


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C while the model is put together again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.SIG_DFL)
