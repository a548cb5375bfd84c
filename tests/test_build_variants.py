"""The core under sanitizers, and cross-compiled: builds that share no object with the wheel's."""

from __future__ import annotations

from pathlib import Path

from builds import build, need, run, x86_linux

from qkernels import _C

pytestmark = x86_linux

FLAGS = {
    "avx2": ("AVX2", "FMA"),
    "avxvnni": ("AVXVNNI",),
    "avx512vnni": ("AVX512VNNI", "AVX512", "AVX512BF16"),
    "amx": ("AMX", "AMXFMA"),
}
"""The tiers of CMakeLists.txt that a tier of the dispatcher is made of."""


def test_core_cross_compiled_for_aarch64(tmp_path: Path) -> None:
    compiler, emulator = need("aarch64-linux-gnu-g++"), need("qemu-aarch64")
    options = ("-DQK_PYTHON=OFF", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    build(tmp_path, *options, f"-DCMAKE_CXX_COMPILER={compiler}")
    done = run(emulator, "-L", "/usr/aarch64-linux-gnu", tmp_path / "qk_smoke", "scalar", "scalar")
    assert "compiled scalar\n" in done.stdout
    assert "all equal" in done.stdout


def test_core_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Of the tiers that run here: instrumented, the others take most of the time to compile and check nothing."""
    usable = _C.info()["usable"]
    idle = [name for tier, names in FLAGS.items() if tier not in usable for name in names]
    build(tmp_path, "-DQK_PYTHON=OFF", "-DQK_SANITIZE=ON", *(f"-DQK_COMPILER_HAS_{name}=OFF" for name in idle))
    done = run(tmp_path / "qk_smoke", env={"UBSAN_OPTIONS": "print_stacktrace=1"})
    assert f"\nusable {','.join(usable)}\n" in done.stdout
    assert "all equal" in done.stdout
