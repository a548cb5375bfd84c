"""Compiles the CUDA module for the given architectures without installing it: a check for machines without a GPU.

Fails on what makes a kernel slow without making it wrong: registers spilled to memory, wgmma instructions that ptxas
serialized, a setmaxnreg that it ignored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
SLOW = ("spilled to local memory", "serialized", "setmaxnreg ignored", "C7508", "C7510")
"""What ptxas says of such a kernel."""


def main() -> int:
    """Returns the compiler's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archs", nargs="+", default=["80", "90a"], help="compute capabilities, such as 80 90a")
    parser.add_argument("--build-dir", type=Path, help="kept between runs; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        build = args.build_dir or Path(temporary)
        configure = [
            "cmake",
            "-S",
            str(ROOT / "cmake" / "cuda"),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DQK_CUDA_ARCHS={';'.join(f'{arch}-real' for arch in args.archs)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
        ]
        slow = []
        for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for line in process.stdout or ():
                print(line, end="", flush=True)
                if any(words in line for words in SLOW):
                    slow.append(line.strip())
            if process.wait() != 0:
                return process.returncode
    if slow:
        print(f"{len(slow)} kernels that ptxas could not compile well; the first: {slow[0]}", file=sys.stderr)
        return 1
    print(f"the CUDA module compiles for sm_{', sm_'.join(args.archs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
