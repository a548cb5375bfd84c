"""`qkernels bench`: what it computes from measurements, and one quick run of everything. No test looks at a speed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qkernels import _C, _bench, cpu_attention, cpu_norms
from qkernels.bench import ceilings, contenders, grid, norms, rivals, rivals_torch, timing
from qkernels.bench.cli import RIVALS
from qkernels.bench.rivals_zentorch import Zentorch
from qkernels.cli import main
from qkernels.scheme import Scheme

ROOT = Path(__file__).resolve().parent.parent


class Fake:
    """A sampler that takes `seconds` a call and writes down what it was asked for."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.counts: list[int] = []

    def sample(self, count: int) -> float:
        self.counts.append(count)
        return self.seconds * count


def test_interleave_repeats_short_calls_and_samples_long_ones_less() -> None:
    short, long = Fake(1e-6), Fake(1.0)
    first, second = timing.interleave([short, long], rounds=10, seconds=3.0)
    assert first.median == pytest.approx(1e-6)
    assert first.samples == 10
    assert short.counts[-1] == 300
    assert (second.median, second.samples) == (1.0, 3)


@pytest.mark.parametrize("seconds, timed, untimed", [(1e-2, 1, 1), (1e-5, 30, 500)])
def test_interleave_makes_untimed_calls_before_each_sample(seconds: float, timed: int, untimed: int) -> None:
    sampler = Fake(seconds)
    timing.interleave([sampler], rounds=4, seconds=1.0)
    assert sampler.counts[3:] == [untimed, timed] * 4


def test_rotation_takes_copies_in_turn_across_samples() -> None:
    seen: list[int] = []

    def call(index: int) -> Callable[[], None]:
        return lambda: seen.append(index)

    rotation = timing.Rotation([call(0), call(1), call(2)])
    rotation.sample(2)
    rotation.sample(2)
    assert seen == [0, 1, 2, 0]


def test_limit_is_the_larger_of_memory_and_compute() -> None:
    assert ceilings.limit_seconds(100, 10, bandwidth=10, peak=10) == 10
    assert ceilings.limit_seconds(10, 100, bandwidth=10, peak=5) == 20


@pytest.mark.parametrize(
    ("preset", "weights"), [("w8a8", 30 * 100), ("w4a8", 30 * 50 + 30 * 2), ("w4a8_intscale", 30 * 50 + 30)]
)
def test_traffic_counts_each_byte_once(preset: str, weights: int) -> None:
    scheme = Scheme.resolve(preset)
    assert grid.traffic(scheme, 100, 30, 7, 4) == weights + 8 * 30 + 7 * 100 * 4 + 7 * 30 * 4


@pytest.mark.parametrize("tier", _C.info()["usable"])
def test_ceilings_peaks_of_every_tier(tier: str) -> None:
    operations, seconds = _bench.peak(tier, "int8", 1000, 1)
    assert operations > 0
    assert seconds > 0
    assert operations % 1000 == 0


def test_ceilings_reject_nonsense() -> None:
    with pytest.raises(ValueError, match="no loops for 'sse9'"):
        _bench.peak("sse9", "int8", 1, 1)
    with pytest.raises(ValueError, match="int8 or fp32"):
        _bench.peak("scalar", "int3", 1, 1)
    with pytest.raises(ValueError, match="aligned"):
        _bench.read("scalar", 1, 512, 1, 1)
    with pytest.raises(ValueError, match="multiple of 512"):
        _bench.read("scalar", 64, 100, 1, 1)


def test_contender_that_is_wrong_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(contenders.Layer, "output", lambda self: self.calls[0]() + 1)
    assert main(["bench", "--quick", "--rows", "3", "--rivals"]) == 1
    text = capsys.readouterr().out
    assert "w8a8 layer: NOT EXACT at K=256 N=128 M=3, so not timed" in text
    assert "w8a8 gemm" in text
    assert "\nw8a8 layer  " not in text


def test_bench_quick_run_writes_json_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result, plot = tmp_path / "result.json", tmp_path / "roofline.png"
    arguments = ["bench", "--quick", "--schemes", "w8a8", "w4a16", "--json", str(result), "--plot", str(plot)]
    assert main([*arguments, "--rivals", "fp32", "bf16", "quantize_dynamic-onednn"]) == 0
    data = json.loads(result.read_text())
    names = {row["contender"] for row in data["rows"]}
    assert {"w8a8 gemm", "w8a8 quantize+gemm", "w8a8 layer", "w4a16 layer", "fp32", "bf16"} <= names
    assert data["isa"] == _C.info()["isa"]
    assert data["threads"] == torch.get_num_threads()
    assert data["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    for row in data["rows"]:
        assert row["median"] > 0
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit"] / row["median"])
        assert row["exact"] in ((True,) if row["contender"].startswith("w8a8") else (None,))
        assert row["relative_error"] < (0.2 if row["contender"].startswith("w4") else 0.05)
    for picture in (plot, tmp_path / "roofline-w8a8.png", tmp_path / "roofline-w4a16.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "% limit" in capsys.readouterr().out


def test_bench_of_attention(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "result.json"
    arguments = ["bench", "--quick", "--schemes", "attention", "--rows", "2", "--json", str(result)]
    assert main(arguments) == 0
    text, rows = capsys.readouterr().out, json.loads(result.read_text())["rows"]
    served = {"attention", "attention, padded"} if cpu_attention.available() else set()
    for size in (32, 64):
        assert f"K=256 in heads of {size}, N=128 M=2" in text
        assert {row["contender"] for row in rows if row["size"] == size} == served | {
            "torch: sdpa",
            "torch: sdpa, padded",
        }
    for row in rows:
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit"] / row["median"])
        assert row["gops"] == pytest.approx(1e-9 * 4 * 2 * 128 * 128 * 256 / row["median"])
        assert row["error"] < 2.0**-17
    if served:
        given = cpu_attention.attention
        monkeypatch.setattr(cpu_attention, "attention", lambda *args: given(*args) * 1.01)
        assert main(arguments) == 1
        assert "attention: NOT RIGHT at K=256 N=128 M=2" in capsys.readouterr().out


def test_bench_of_norms(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "result.json"
    arguments = ["bench", "--quick", "--schemes", "norm", "--rows", "2", "--json", str(result)]
    assert main(arguments) == 0
    text, rows = capsys.readouterr().out, json.loads(result.read_text())["rows"]
    assert "K=256 N=128 M=2" in text
    names = {"layer norm", "RMS norm", "torch: layer norm", "torch: RMS norm", "models: RMS norm"}
    assert {row["contender"] for row in rows} == names
    for row in rows:
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit"] / row["median"])
        assert row["error"] < 2.0**-17
    monkeypatch.setattr(norms, "normalize", lambda *args, **kwargs: cpu_norms.normalize(*args, **kwargs) * 1.01)
    assert main(arguments) == 1
    assert "RMS norm: NOT RIGHT at K=256 N=128 M=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("odd", "complaint"),
    [
        (["--schemes", "attention", "w8a8"], "by itself"),
        (["--schemes", "norm", "w8a8"], "by itself"),
        (["--schemes", "norm", "--plot", "roofline.png"], "--plot"),
        (["--schemes", "attention", "--rivals", "fp32"], "by itself"),
        (["--schemes", "attention", "--shapes", "96x16"], "multiple of 64"),
        (["--schemes", "attention", "--plot", "roofline.png"], "--plot"),
    ],
)
def test_bench_without_layers_refuses(odd: list[str], complaint: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--quick", *odd]) == 2
    assert complaint in capsys.readouterr().err


def test_bench_rejects_unknown_rivals_and_shapes(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--quick", "--rivals", "mkl"]) == 2
    assert "quantize_dynamic-x86" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--shapes", "768"])
    assert "expected KxN" in capsys.readouterr().err


EVERY_SCHEME = {"fp32", "bf16", "quantize_dynamic-x86", "quantize_dynamic-onednn"}
FOUR_BIT_INTEGERS = {"int4pack", "onnxruntime-w4a8", "openvino-w4a8"}


@pytest.mark.parametrize(
    ("schemes", "names"),
    [
        (["w8a8"], {"onnxruntime", "openvino", "zentorch"}),
        (["w8a8_static"], {"onnxruntime", "openvino", "zentorch"}),
        (["w4a8"], FOUR_BIT_INTEGERS),
        (["w4a8_intscale"], FOUR_BIT_INTEGERS),
        (["w4a16"], {"int4pack", "onnxruntime-w4a16", "openvino-w4a16"}),
        (["w8a16"], {"int8pack", "onnxruntime-w8a16", "openvino-w8a16"}),
        (["w2a16"], set()),
        (["w8a8", "w4a8"], {"onnxruntime", "openvino", "zentorch", *FOUR_BIT_INTEGERS}),
    ],
)
def test_rivals_are_those_that_go_with_the_schemes(schemes: list[str], names: set[str]) -> None:
    chosen, missing = rivals.rivals(None, schemes, None)
    assert {rival.name for rival in chosen} | set(missing) == EVERY_SCHEME | names
    for rival in chosen:
        assert rival.rival_of == tuple(schemes) if rival.name in EVERY_SCHEME else set(rival.rival_of) <= set(schemes)


def test_rivals_named_are_chosen_whatever_the_scheme() -> None:
    chosen, missing = rivals.rivals(RIVALS, ["w4a16"], None)
    assert {rival.name for rival in chosen} | set(missing) == set(RIVALS)
    assert all(rival.rival_of == ("w4a16",) for rival in chosen)


# fp32 sums; bf16 inputs, scales and outputs, 2^-9 each at most; the others: int8 inputs of normal values. A scale for a
# row or group makes steps of at most 4.5 / 127 deviations, so an error of at most 4.5 / 127 / sqrt(12) = 0.011; torch's
# quantize_dynamic has 7 bits for the values of all rows, 0.02, and rounds the weight to one scale, 0.01.
TOLERANCES = {"fp32": 1e-5, "w4a16": 1e-5, "w8a16": 1e-5, "bf16": 0.008, "int4pack": 0.008, "int8pack": 0.008}


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "zentorch"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 256, 96), (3, 320, 80), (5, 200, 90)])
def test_rivals_are_right(name: str, m: int, k: int, n: int) -> None:
    chosen, missing = rivals.rivals([name], ["w8a8"], None)
    if missing:
        pytest.skip(f"{name}: {missing[name]}")
    (rival,) = chosen
    if rival.refuses(k, n):
        assert (k, n) == (200, 90)  # tails of K and N
        assert name in ("int4pack", "int8pack", "openvino-w4a8", "openvino-w4a16")
        return
    generator = torch.Generator().manual_seed(m + k + n)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((n, k), (n,), (m, k)))
    rival.build(weight, bias, 2)
    rival.bind(x)
    assert rival.sampler(cold=True).sample(3) > 0
    truth = torch.nn.functional.linear(x, grid.held_weights([rival], weight)[rival.holds], bias)
    error = float((rival.output().float() - truth).norm() / truth.norm())
    assert error < TOLERANCES.get(name.split("-")[-1], 0.03)
    # Eight bits show, or it computes in floating point and is none of W8A8's and W4A8's rivals.
    if rival.scheme.activation_bits == 8 and name not in ("fp32", "bf16") and "avx512vnni" in _C.info()["usable"]:
        assert error > 1e-3


def test_rivals_of_four_bits_are_wrong_only_if_they_multiply_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = tmp_path / "result.json"
    arguments = ["bench", "--quick", "--rows", "3", "--schemes", "w4a8", "w8a16", "--rivals", "int4pack", "int8pack"]
    assert main([*arguments, "--json", str(result)]) == 0
    assert "WRONG" not in capsys.readouterr().out
    rows = {row["contender"]: row for row in json.loads(result.read_text())["rows"]}
    assert (rows["int4pack"]["scheme"], rows["int4pack"]["rival_of"]) == ("w4a16", ["w4a8"])
    assert (rows["int8pack"]["scheme"], rows["int8pack"]["rival_of"]) == ("w8a16", ["w8a16"])
    assert rows["int4pack"]["relative_error"] > 0.05 > rows["int4pack"]["arithmetic_error"]
    monkeypatch.setattr(rivals_torch.Int4Pack, "output", lambda self: self.calls[0]() + 1)
    assert main(arguments) == 0
    wrong = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" WRONG")]
    assert wrong == ["int4pack"]


def test_rival_that_refuses_a_shape_is_reported(capsys: pytest.CaptureFixture) -> None:
    arguments = ["--shapes", "200x90", "--rows", "2", "--schemes", "w4a16", "--rivals", "fp32", "int4pack"]
    assert main(["bench", "--quick", *arguments]) == 0
    text = capsys.readouterr().out
    assert "int4pack: not measured at K=200 N=90: N must be a multiple of 16" in text
    assert "\nfp32 " in text


def test_shape_too_small_to_be_cold_has_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = tmp_path / "result.json"
    arguments = ["--shapes", "64x64", "--rows", "1", "--state", "cold", "--rivals", "--json", str(result)]
    assert main(["bench", *arguments]) == 0
    assert "w8a8 layer: no cold rows at K=64 N=64" in capsys.readouterr().out
    assert json.loads(result.read_text())["rows"] == []


FAKE_ZENTORCH = """
import torch
library = torch.library.Library("zentorch", "DEF")
library.define("zentorch_weight_prepack_for_dynamic_qlinear(Tensor weight) -> Tensor")
arguments = "Tensor x, Tensor weight, Tensor scales, Tensor? bias, *, bool is_weight_prepacked"
library.define(f"zentorch_dynamic_qlinear({arguments}) -> Tensor")
library.impl("zentorch_weight_prepack_for_dynamic_qlinear", lambda weight: weight.clone(), "CPU")

def qlinear(x, weight, scales, bias, *, is_weight_prepacked):
    if x.shape[0] == 13:
        raise ValueError("unlucky")
    return x @ (weight.float() * scales[:, None]).T + bias

library.impl("zentorch_dynamic_qlinear", qlinear, "CPU")
print("libraries print")
"""


def test_rival_in_another_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zentorch.py").write_text(FAKE_ZENTORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rival = Zentorch(Path(sys.executable))
    try:
        weight, bias, x = torch.randn(8, 16), torch.randn(8), torch.randn(3, 16)
        rival.build(weight, bias, 2)
        rival.bind(x)
        torch.testing.assert_close(rival.output(), torch.nn.functional.linear(x, weight, bias), rtol=0, atol=0.1)
        assert rival.sampler(cold=True).sample(5) > 0
        rival.bind(torch.randn(13, 16))
        with pytest.raises(RuntimeError, match="ValueError: unlucky"):
            rival.output()
    finally:
        rival.close()


def test_microbenchmarks_run() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-q", "-k", "768-768-1 or token"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
