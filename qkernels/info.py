"""What this installation can do on this machine, and what may be wrong with it."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import _C
from ._version import __version__

__all__ = ["info", "openmp_runtimes"]

_OPENMP = re.compile(
    r"lib(?:gomp|iomp5|omp|omp5|vcomp\d*)(?:[-.][\w.\-]*)?\.(?:so|dylib|dll)(?:\.[\d.]+)?$", re.IGNORECASE
)


def info() -> dict[str, Any]:
    """Facts for people and for bug reports; plain values throughout, `json.dumps` takes it.

    Keys: version, isa (the tier in use), isa_reason, compiled and usable (tiers), cuda (a dict: built, available,
    device), threads (what torch.set_num_threads says), openmp (paths of the runtimes loaded), warnings, torch,
    python, platform, processor.
    """
    core = _C.info()
    runtimes = openmp_runtimes()
    return {
        "version": __version__,
        "isa": core["isa"],
        "isa_reason": core["reason"],
        "compiled": list(core["compiled"]),
        "usable": list(core["usable"]),
        "cuda": _cuda(),
        "threads": torch.get_num_threads(),
        "openmp": runtimes,
        "warnings": _warnings(core, runtimes),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
    }


def openmp_runtimes(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of the OpenMP runtimes loaded into this process; empty where the system does not list them.

    Args:
        maps: the process's table of mappings.
    """
    try:
        text = maps.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found: dict[str, None] = {}
    for line in text.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _OPENMP.search(os.path.basename(fields[5].removesuffix(" (deleted)"))):
            found[fields[5]] = None
    return list(found)


def _cuda() -> dict[str, Any]:
    try:
        from . import _cuda  # type: ignore[attr-defined]  # built only where a CUDA compiler was found

        built, why = True, None
        del _cuda
    except ImportError as error:
        built, why = False, "built without CUDA" if "_cuda" in str(error) else str(error)
    available = torch.cuda.is_available()
    return {
        "built": built,
        "reason": why,
        "available": available,
        "device": torch.cuda.get_device_name() if available else None,
        "torch": torch.version.cuda,
    }


def _warnings(core: Mapping[str, Any], runtimes: list[str]) -> list[str]:
    found = []
    if len(runtimes) > 1:
        found.append(
            f"{len(runtimes)} OpenMP runtimes are loaded ({', '.join(os.path.basename(r) for r in runtimes)}): "
            "each starts threads of its "
            "own and they compete for the cores; import torch before packages that bring another one"
        )
    if core["isa"] == "scalar" and platform.machine().lower() in ("x86_64", "amd64"):
        found.append("the scalar tier is in use: right, but slow")
    return found


def _processor() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
