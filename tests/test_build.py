"""The build: which instructions are where, and the core on processors and architectures that this machine is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools
from builds import ROOT, build, need, run, x86_linux

ENVIRONMENT = {"QKERNELS_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

pytestmark = x86_linux


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The wheel, built in isolation; None where it cannot be, for want of its requirements or of leave to write.

    In the checkout itself, as ``pip install -e .`` was: what that compiled is not compiled again.
    """
    need("g++")
    if not os.access(ROOT, os.W_OK):
        return None
    # What modules and sources that are gone left there is no part of the wheel.
    for stale in (ROOT / "build").glob("lib*"):
        shutil.rmtree(stale)
    for compiled in (ROOT / "build").glob("cmake-cpu-*/CMakeFiles/*.dir"):
        for stale in compiled.rglob("*.o"):
            if not (ROOT / stale.relative_to(compiled)).with_suffix("").exists():
                stale.unlink()
    directory = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", directory, ROOT, ok=False, env=ENVIRONMENT)
    said = done.stdout + done.stderr
    if done.returncode != 0 and "installing build dependencies did not run successfully" in said.lower():
        return None
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (path,) = directory.glob("qkernels-*.whl")
    return path


@pytest.fixture(scope="module")
def tree(wheel: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with qk_smoke: what the wheel was linked from, where there is one, so that its objects are the tested."""
    import pybind11

    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    options.append("-DPYBIND11_FINDPYTHON=ON")
    if wheel is not None:
        (directory,) = (ROOT / "build").glob(f"cmake-cpu-*-cp{sys.version_info.major}{sys.version_info.minor}")
        return build(directory, *options, target="qk_smoke")
    directory = tmp_path_factory.mktemp("build")
    return build(directory, *options, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={directory}/modules")


def check_isa(directory: Path) -> subprocess.CompletedProcess:
    need("objdump")
    return run(sys.executable, ROOT / "scripts" / "check_isa.py", directory, ok=False)


def test_isa_instructions_stay_in_their_files(tree: Path) -> None:
    done = check_isa(tree)
    assert done.returncode == 0, done.stdout + done.stderr


WIDE = (
    "#include <immintrin.h>\nvoid f(void* p) { _mm512_storeu_si512(p, _mm512_slli_epi32(_mm512_loadu_si512(p), 1)); }"
)
SUM = "float f(const float* x) { float s = 0; for (int i = 0; i < 64; ++i) s += x[i]; return s; }"
TEMPLATE = "template <class T> __attribute__((noinline)) T g(T x) { return x + x; } float f(float x) { return g(x); }"
VIOLATIONS = [
    ("pack", "-mavx2", SUM, "VEX instruction outside"),
    ("kernels_avx2", "-mavx2 -mavx512f", WIDE, "EVEX instruction in"),
    ("kernels_avx512vnni", "-mavx512f", TEMPLATE, "weak symbol"),
    ("kernels_avx512vnni", "-mavx512f", "float h(); float x = h();", "static initializer"),
    ("kernels_avx2", "-mavx2", "int f() { return 1; }", "exports f()"),
    ("kernels_avx2", "-mavx2 -mfma", "float f(float a, float b, float c) { return a * b + c; }", "fused multiply-add"),
]


@pytest.mark.parametrize(("name", "flags", "code", "complaint"), VIOLATIONS)
def test_isa_check_sees_a_violation(tmp_path: Path, name: str, flags: str, code: str, complaint: str) -> None:
    for file, options, text in ((name, flags, code), ("neutral", "", "int neutral;"), ("kernels_amx", "", "int amx;")):
        source = tmp_path / f"{file}.cpp"
        source.write_text(text + "\n")
        run(need("g++"), "-O3", *options.split(), "-c", source, "-o", tmp_path / f"{file}.cpp.o")
    done = check_isa(tmp_path)
    assert done.returncode == 1
    assert complaint in done.stdout


def test_core_equals_the_contract_on_this_processor(tree: Path) -> None:
    assert "all equal" in run(tree / "qk_smoke").stdout


@pytest.mark.parametrize(
    ("cpu", "isa", "usable"), [("Nehalem", "scalar", "scalar"), ("Haswell", "avx2", "scalar,avx2")]
)
def test_core_on_an_emulated_processor(tree: Path, cpu: str, isa: str, usable: str) -> None:
    done = run(need("qemu-x86_64"), "-cpu", cpu, tree / "qk_smoke", "--slack", isa, usable)
    assert f"chosen {isa} " in done.stdout
    assert "all equal" in done.stdout


def test_package_on_a_processor_without_avx(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, qkernels as qk\n"
        "from qkernels import _C\n"
        "torch.manual_seed(0)\n"
        "linear, x = torch.nn.Linear(70, 9), torch.randn(3, 70)\n"
        "layer = qk.nn.QuantLinear.from_linear(linear, 'w8a8')\n"
        "state = layer.state_dict()\n"
        "expected = qk.reference.linear_w8a8(x, state['weight'], state['weight_scale'], state['bias'])\n"
        "print(qk.info()['isa'], torch.equal(layer(x), expected), _C.last_kernel())\n"
    )
    done = run(need("qemu-x86_64"), "-cpu", "Nehalem", sys.executable, script, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["scalar", "True", "w8a8.scalar"], done.stdout + done.stderr


def test_wheel_builds_in_isolation_and_runs_in_a_fresh_environment(wheel: Path | None, tmp_path: Path) -> None:
    if wheel is None:
        pytest.skip("no wheel can be built here")
    names = zipfile.ZipFile(wheel).namelist()
    for stem in ("qkernels/_C.", "qkernels/_bench.", "qkernels/py.typed", "qkernels/_C.pyi", "qkernels/data/prose.txt"):
        assert any(name.startswith(stem) for name in names), f"{stem} is not in {sorted(names)}"
    assert not [name for name in names if "csrc" in name or "gomp" in name or name.startswith("tests")]

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", wheel, env={**ENVIRONMENT, "PYTHONPATH": ""})
    # torch comes from the environment of the tests: a path line gives its packages without its editable installs.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    import torch

    (site / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    code = "import torch, qkernels as qk; print(qk.__file__, qk.__version__, qk.info()['isa'])"
    where, version, isa = run(python, "-c", code, cwd=tmp_path, env={"PYTHONPATH": ""}).stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert version in wheel.name
    assert isa in ("scalar", "avx2", "avxvnni", "avx512vnni", "amx")


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    module = types.ModuleType("setup_under_test")
    module.__file__ = str(ROOT / "setup.py")
    exec(compile((ROOT / "setup.py").read_text(), module.__file__, "exec"), module.__dict__)
    return module


def test_build_rejects_an_unknown_cuda_mode(setup_module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"auto, 0, 1; got 'yes'"):
        setup_module.cuda_mode()


@pytest.mark.parametrize(("mode", "attempts"), [("auto", 1), ("0", 0), ("1", 1)])
def test_build_survives_a_failing_cuda_compiler_only_under_auto(
    setup_module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    mode: str,
    attempts: int,
) -> None:
    (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setattr(setup_module, "CUDA_PROJECT", tmp_path)
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: "nvcc")
    monkeypatch.setenv("QKERNELS_CUDA", mode)
    tried = []

    def failing(self: object, source: Path, name: str, options: list[str]) -> None:
        tried.append(name)
        raise subprocess.CalledProcessError(1, "cmake")

    monkeypatch.setattr(setup_module.CMakeBuild, "_cmake", failing)
    command = setup_module.CMakeBuild(setuptools.Distribution())
    if mode == "1":
        with pytest.raises(subprocess.CalledProcessError):
            command._cuda()
    else:
        command._cuda()
    assert tried == ["cuda"] * attempts
    assert ("FAILED TO BUILD" in capsys.readouterr().err) == (mode == "auto")


def test_build_needs_nvcc_when_cuda_is_demanded(
    setup_module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setattr(setup_module, "CUDA_PROJECT", tmp_path)
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: None)
    monkeypatch.setenv("QKERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc"):
        setup_module.CMakeBuild(setuptools.Distribution())._cuda()
