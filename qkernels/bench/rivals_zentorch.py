"""zentorch as a rival, in a process of its own."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels.bench.contenders import Contender
from qkernels.bench.timing import Sampler


class Zentorch(Contender):
    """zentorch's dynamic int8 Linear, in a process of another interpreter: it changes the torch it is loaded into.

    Args:
        python: the interpreter of an environment that has it.
    """

    name = "zentorch"

    def __init__(self, python: Path) -> None:
        self.folder = tempfile.TemporaryDirectory()
        worker = Path(__file__).with_name("zentorch_worker.py")
        self.process = subprocess.Popen(
            [str(python), str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask(command="start", threads=torch.get_num_threads())

    def _ask(self, **request: Any) -> Any:
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("zentorch: the worker has no pipes")
        _signal(self.process, "SIGCONT")
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError("zentorch: the worker ended; its message is above")
        result = json.loads(answer)
        if "error" in result:
            raise RuntimeError(f"zentorch: {result['error']}")
        return result.get("result")

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See the base class."""
        path = Path(self.folder.name) / "weight.pt"
        torch.save({"weight": weight, "bias": bias}, path)
        self._ask(command="build", path=str(path), copies=copies)

    def bind(self, x: Tensor) -> None:
        """See the base class."""
        path = Path(self.folder.name) / "x.pt"
        torch.save(x.float(), path)
        self._ask(command="bind", path=str(path))

    def output(self) -> Tensor:
        """See the base class."""
        path = Path(self.folder.name) / "y.pt"
        self._ask(command="output", path=str(path))
        return torch.load(path, weights_only=True)

    def sampler(self, *, cold: bool) -> Sampler:
        """See the base class."""
        return _Remote(self.process, functools.partial(self._ask, command="sample", cold=cold))

    def close(self) -> None:
        """End the worker."""
        _signal(self.process, "SIGCONT")
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.folder.cleanup()


class _Remote:
    """A sampler whose clock is in the worker, which is held still between its turns: its threads spin for 200 ms."""

    def __init__(self, process: subprocess.Popen[str], ask: Callable[..., Any]) -> None:
        self.process = process
        self.ask = ask

    def sample(self, count: int) -> float:
        """Seconds of ``count`` calls."""
        try:
            return float(self.ask(count=count))
        finally:
            _signal(self.process, "SIGSTOP")


def _signal(process: subprocess.Popen[str], name: str) -> None:
    number = getattr(signal, name, None)  # not on every system
    if number is not None and process.poll() is None:
        process.send_signal(number)
