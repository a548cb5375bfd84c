"""A directory that is written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(directory: Path, *, drop: Callable[[Path], Collection[str]]) -> Iterator[Path]:
    """A fresh directory to write into, which takes the place of `directory` when the block ends well.

    It lies beside `directory`, so that the exchange is a rename. Files that were there already are kept (as hard links,
    or copies where links are not possible), except for those that `drop(old directory)` names. If anything fails, the
    new directory is removed and the old one is what it was.

    Raises:
        OSError: the parent cannot be written to, the disk is full, and so on; the message names `directory`.
    """
    target = Path(os.path.abspath(directory))
    stage: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"expected a directory, {target} is a file")
        for place in (target.parent, target):
            _refuse_read_only(place)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        fresh = stage / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            _keep_others(target, fresh, drop(target))
        _sync_directory(fresh)
        _exchange(fresh, target, stage / "old")
        _sync_directory(target.parent)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _refuse_read_only(directory: Path) -> None:
    """A directory whose mode lets nobody write is meant to stay as it is, also by those whom modes do not stop."""
    if directory.exists() and not directory.stat().st_mode & 0o222:
        raise PermissionError(errno.EACCES, f"{directory} is read-only")


def _exchange(fresh: Path, target: Path, aside: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    shutil.copymode(target, fresh)
    target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        aside.rename(target)
        raise


def _keep_others(old: Path, fresh: Path, dropped: Collection[str]) -> None:
    for entry in old.iterdir():
        if entry.name in dropped or (fresh / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, fresh / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(fresh / entry.name))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync_directory(directory: Path) -> None:
    """Make the names in `directory` last; systems that cannot open directories do without."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
