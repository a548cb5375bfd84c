"""CMake builds of the core for the tests that make some: run a command, find a tool, build a directory."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The tools of the environment that runs the tests come first, as with `make test`.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


x86_linux = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="the emulators and tools of x86-64 Linux"
)


def run(*command: object, ok: bool = True, **options: Any) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": PATH, **options.pop("env", {})}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment, timeout=600, **options
    )
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def need(tool: str) -> str:
    found = shutil.which(tool, path=PATH)
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found


def build(directory: Path, *options: str, target: str = "all") -> Path:
    """The project with qk_smoke, built in ``directory``: what was built there is kept, where its tools were is not."""
    need("g++")
    (directory / "CMakeCache.txt").unlink(missing_ok=True)
    run(
        need("cmake"),
        "-S",
        ROOT,
        "-B",
        directory,
        "-G",
        "Ninja",
        "-DQK_SMOKE=ON",
        f"-DCMAKE_MAKE_PROGRAM={need('ninja')}",
        *options,
    )
    run("cmake", "--build", directory, "--parallel", "2", "--target", target)
    return directory
