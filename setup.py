"""Builds the extension modules with CMake and Ninja; everything else about the package is in pyproject.toml.

``QKERNELS_CUDA`` (``auto``, ``0``, ``1``) says whether the CUDA module is built. ``auto``: if nvcc is found, and a
failure leaves a CPU-only installation and says so; ``0``: never; ``1``: always, a failure fails the installation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_PROJECT = ROOT / "cmake" / "cuda"


def cuda_mode() -> str:
    """The validated value of ``QKERNELS_CUDA``; ``auto`` where it is unset or empty."""
    mode = os.environ.get("QKERNELS_CUDA", "") or "auto"
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"QKERNELS_CUDA: expected one of auto, 0, 1; got {mode!r}")
    return mode


def find_nvcc() -> str | None:
    """Path of nvcc, from PATH or from the toolkit's usual place, or None."""
    found = shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.is_file() else None)


class CMakeBuild(build_ext):
    """Builds all extensions: one CMake project for the CPU modules, another for the CUDA one."""

    def run(self) -> None:
        cuda_mode()  # a typo is better found before the build than after it
        super().run()

    def build_extensions(self) -> None:
        for extension in self.extensions:  # what an earlier build left must not slip into this one's wheel
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self._cmake(ROOT, "cpu", [])
        self._cuda()

    def _cuda(self) -> None:
        mode = cuda_mode()
        nvcc = find_nvcc()
        if mode == "0" or not (CUDA_PROJECT / "CMakeLists.txt").is_file():
            return
        if nvcc is None:
            if mode == "1":
                raise SystemExit("QKERNELS_CUDA=1, but nvcc is neither on PATH nor in /usr/local/cuda/bin")
            print("qkernels: nvcc not found: built for the CPU alone", file=sys.stderr)
            return
        try:
            self._cmake(CUDA_PROJECT, "cuda", [f"-DCMAKE_CUDA_COMPILER={nvcc}"])
        except (subprocess.CalledProcessError, OSError) as error:
            if mode == "1":
                raise
            bar = "*" * 88
            print(
                f"{bar}\nqkernels: THE CUDA MODULE FAILED TO BUILD ({error}).\n"
                "The package is installed for the CPU alone; the compiler's messages are above. Set QKERNELS_CUDA=1 "
                f"to make\nthis an error, QKERNELS_CUDA=0 to skip the attempt.\n{bar}",
                file=sys.stderr,
            )

    def _cmake(self, source: Path, name: str, options: list[str]) -> None:
        """Configures and builds one CMake project, its modules going where setuptools expects them."""
        import pybind11

        output = Path(self.get_ext_fullpath("qkernels._C")).resolve().parent
        # Not build_temp: that is a new temporary directory for each editable install, and nothing would be reused.
        version = f"{sys.version_info.major}{sys.version_info.minor}"
        build = ROOT / "build" / f"cmake-{name}-{sysconfig.get_platform()}-cp{version}"
        build.mkdir(parents=True, exist_ok=True)
        # Under build isolation every path of the tools is new each time. Not --fresh: it deletes the objects as well.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in (build / "CMakeFiles").glob("[0-9]*"):  # what CMake knows of a compiler, by its own version
            shutil.rmtree(found)
        output.mkdir(parents=True, exist_ok=True)
        build_type = "Debug" if self.debug else "Release"
        configure = [
            "cmake",
            "-S",
            str(source),
            "-B",
            str(build),
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_{build_type.upper()}={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            *options,
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--config", build_type, "--parallel", jobs], check=True)


def extensions() -> list[Extension]:
    """Names only: CMake knows the sources. The CUDA module may be missing after a successful build."""
    modules = [Extension("qkernels._C", sources=[]), Extension("qkernels._bench", sources=[], optional=True)]
    modules.append(Extension("qkernels._cuda", sources=[], optional=True))
    return modules


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
