"""Progress of long work: a bar on a terminal, a callable of the caller's, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Progress", "Step", "tracking"]

Step = Callable[[int, int, str], None]
"""Called as `step(done, total, name)`: before the first piece with done = 0, then after each one."""

Progress = bool | Step | None
"""None: a bar when standard error is a terminal. True / False: always / never. A callable: see `Step`."""


def _ignore(done: int, total: int, name: str) -> None:
    """Show nothing."""


@contextmanager
def tracking(progress: Progress, *, total: int, what: str) -> Iterator[Step]:
    """A `Step` for work of `total` pieces; `what` labels the bar. The bar needs tqdm; without it nothing is shown.

    Raises:
        TypeError: `progress` is none of None, True, False, callable.
    """
    if callable(progress):
        progress(0, total, "")
        yield progress
        return
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress: expected None, True, False or a callable, got {type(progress).__name__}")
    show = sys.stderr.isatty() if progress is None else progress
    bar: Any = None
    if show and total:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            bar = tqdm(total=total, desc=what, unit="layer", leave=False, file=sys.stderr, dynamic_ncols=True)
    if bar is None:
        yield _ignore
        return

    def step(done: int, total: int, name: str) -> None:
        bar.set_postfix_str(name[-40:], refresh=False)
        bar.update(done - bar.n)

    try:
        yield step
    finally:
        bar.close()
