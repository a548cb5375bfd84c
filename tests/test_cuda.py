"""Quantized layers on a GPU: bits, streams, graphs, compilation, devices.  What needs no GPU runs without one."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import (
    DTYPES,
    assert_bits_equal,
    assert_compiled_and_differentiated,
    hazard_rows,
    seeded,
    static_grid,
    strided,
)

from qkernels import cuda, ops, reference
from qkernels.cuda_w8a8 import PreparedCudaW8A8
from qkernels.prepared import Prepared
from qkernels.scheme import Scheme
from qkernels.triton.layer import PreparedTritonW8A8

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA")
needs_module = pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module")
SCHEMES = {
    "symmetric": Scheme(),
    "asymmetric": Scheme(activation_symmetric=False),
    "static": Scheme(activation_dynamic=False, activation_granularity="per_tensor"),
    "static asymmetric": Scheme(
        activation_dynamic=False, activation_granularity="per_tensor", activation_symmetric=False
    ),
}


def canonical(scheme: Scheme, n: int, k: int, *, smooth: bool = False) -> dict[str, torch.Tensor]:
    tensors = reference.quantize_weight(seeded(n, k, seed=n + k), scheme)
    tensors["bias"] = seeded(n, seed=1)
    tensors |= static_grid(scheme, 0.021, 117)
    if smooth:
        tensors["inv_smooth"] = seeded(k, seed=2).abs() + 0.5
    return tensors


def on_gpu(scheme: Scheme, n: int, k: int, *, smooth: bool = False, device: str = "cuda") -> Prepared:
    prepared = ops.prepare(canonical(scheme, n, k, smooth=smooth), scheme, k, device=device)
    assert isinstance(prepared, PreparedCudaW8A8), prepared.reason
    return prepared


# -- without a GPU ----------------------------------------------------------------------------------------------------


def test_kernels_leave_other_devices_alone() -> None:
    cpu = torch.device("cpu")
    for candidate in (PreparedCudaW8A8, PreparedTritonW8A8):
        assert candidate.objection(Scheme(), 64, 64, cpu)
    prepared = ops.prepare(canonical(Scheme(), 8, 16), Scheme(), 16)
    assert prepared.kernel.startswith("w8a8.")
    assert "cuda" not in prepared.kernel
    w4 = ops.prepare(reference.quantize_weight(seeded(8, 64), Scheme.from_preset("w4a16")), "w4a16", 64)
    assert "CUDA" not in w4.reason


@needs_module
def test_selection_covers_every_shape() -> None:
    """On every architecture each shape gets a kernel that exists there, within its limits."""
    for capability in (80, 86, 89, 90, 100, 120):
        for m in (1, 7, 16, 17, 64, 65, 128, 200, 256, 257, 1000, 4096, 8192):
            for n, k in ((1, 1), (576, 1536), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (49152, 576)):
                kernel, tile, split, share, deep, channels = cuda._cuda.select_w8a8(m, n, k, capability, 132)
                if capability != 90 or not cuda._cuda.has_sm90a():
                    assert (kernel, split, share, deep, channels) == (0, 1, 1, 0, 0)
                    assert tile in (16, 64, 128)
                elif kernel == 1:
                    assert tile in (8, 16, 32, 64, 128)
                    assert split * share <= 8
                    assert channels in (64, 128)
                    assert tile >= 8 * share
                else:
                    assert kernel == 2
                    assert (tile, share) in ((128, 1), (128, 2), (224, 2), (256, 1), (256, 2))


@needs_module
def test_packed_size_is_whole_atoms() -> None:
    assert cuda.packed_w8_bytes(1, 1) == 1024
    assert cuda.packed_w8_bytes(8, 128) == 1024
    assert cuda.packed_w8_bytes(9, 129) == 4096


def test_bench_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from qkernels.bench.cuda_grid import run_cuda_grid

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        run_cuda_grid(argparse.Namespace())


def test_bench_tables_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from qkernels.bench.cuda_grid import CudaCeilings, CudaRow, table
    from qkernels.bench.cuda_plots import draw

    limit = CudaCeilings(copy=4e12, bf16=8e14, int8=16e14).limit(8e6, 1e6)
    assert limit == pytest.approx(2.0)
    rows = [
        CudaRow(name, True, "w8a8.cuda.mma.16", 64, 64, m, 4.0, 3.5, 5.0, limit, 50.0, 1.0)
        for name in ("gemm", "layer")
        for m in (1, 16)
    ]
    assert "w8a8.cuda.mma.16" in table(rows)
    result = {"device": "a GPU", "dtype": "bfloat16", "rows": [asdict(row) for row in rows]}
    assert draw(result, tmp_path / "picture.png").stat().st_size > 1000


def test_bench_times_what_operations_limit_in_a_steady_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender alone before its samples there, in turns where bytes limit; results that are not exact never."""
    from qkernels.bench import cuda_grid

    played: list[str] = []

    class Graph:
        def __init__(self, call: Callable[[int], str], count: int) -> None:
            self.name = call(count)

        def replay(self) -> float:
            played.append(self.name)
            return 8.0

        def settle(self, seconds: float) -> None:
            assert seconds == cuda_grid.STEADY_SECONDS
            played.append(f"{self.name} alone")

    class Problem:
        name, kernel, dtype, scheme = "w8a8", "w8a8.cuda.mma.16", torch.bfloat16, Scheme()
        k, n, m = 4096, 4096, 1

        def contenders(self) -> list[tuple[str, bool, Callable[[int], str]]]:
            return [("gemm", True, lambda _: "gemm"), ("wrong", True, lambda _: "wrong"), ("x", False, lambda _: "x")]

        def exact(self, call: Callable[[int], str]) -> bool:
            return call(0) != "wrong"

    monkeypatch.setattr(cuda_grid, "Graph", Graph)
    ceilings, notes, problem = cuda_grid.CudaCeilings(copy=4e12, bf16=8e14, int8=16e14), [], Problem()
    rows = cuda_grid._run_problem(problem, ceilings, 5, notes)  # type: ignore[arg-type]
    assert sorted(played) == ["gemm"] * 5 + ["x"] * 5
    assert [row.steady for row in rows] == [False, False]
    assert notes == ["wrong: NOT EXACT at K=4096 N=4096 M=1, so not timed"]
    played.clear()
    problem.m = 4096
    rows = cuda_grid._run_problem(problem, ceilings, 5, notes)  # type: ignore[arg-type]
    turn = 1 + cuda_grid.STEADY_REPLAYS
    turns = [played[i : i + turn] for i in range(0, len(played), turn)]
    assert sorted(turns) == sorted(
        [f"{name} alone", *[name] * cuda_grid.STEADY_REPLAYS] for name in ("gemm", "x") * cuda_grid.STEADY_ROUNDS
    )
    assert [row.steady for row in rows] == [True, True]
    assert ", steady" in cuda_grid.table(rows)


class _FakeGemlite:
    """GemLite's constructors, by what they document: codes, scales and zero points of groups along K."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        assert (device, dtype) == ("cpu", torch.bfloat16)

    def from_weights(self, codes: torch.Tensor, *rest: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        n, k = codes.shape
        if codes.dtype == torch.int8:
            bias, scales = rest
            zeros = torch.zeros(n, 1)
        else:
            scales, zeros, bias = rest
            assert codes.max() <= 15
        assert bias is None
        assert scales is not None
        assert zeros is not None
        groups = codes.reshape(len(scales), -1).float()
        weight = ((groups - zeros.float()) * scales.float()).view(n, k)
        return lambda x: x.float() @ weight.t()


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a16"])
def test_bench_gives_gemlite_our_codes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from qkernels.bench.cuda_gemlite import gemlite_contender

    scheme, x = Scheme.from_preset(name), seeded(3, 512).to(torch.bfloat16)
    kept = [canonical(scheme, 24, 512), canonical(scheme, 24, 512)]
    assert importlib.util.find_spec("gemlite") or not list(gemlite_contender(scheme, kept, x))
    package, helper = types.ModuleType("gemlite"), types.ModuleType("gemlite.helper")
    package.__spec__ = importlib.machinery.ModuleSpec("gemlite", None)
    package.helper = helper  # type: ignore[attr-defined]
    used = {"w8a8": "A8W8_int8_dynamic", "w8a16": "A16W8_INT8", "w4a16": "A16W4_HQQ_INT"}[name]
    setattr(helper, used, _FakeGemlite)
    monkeypatch.setitem(sys.modules, "gemlite", package)
    monkeypatch.setitem(sys.modules, "gemlite.helper", helper)
    ((contender, ours, call),) = gemlite_contender(scheme, kept, x)
    assert (contender, ours) == ("gemlite", False)
    wanted = x.float() @ reference.dequantize_weight(kept[1], scheme, 512).t()
    torch.testing.assert_close(call(3), wanted, rtol=0.01, atol=0.01 * float(wanted.abs().max()))
    assert not list(gemlite_contender(scheme, kept, x.float()))
    assert not list(gemlite_contender(Scheme.from_preset("w4a8"), kept, x))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def test_streams_and_devices_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: 100 + index)
    monkeypatch.setattr(cuda, "_current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"to {device}")
    assert cuda._stream(torch.device("cuda", 3)) == 103
    assert cuda._on(torch.device("cuda", 0)) == "to cuda:0"
    with cuda._on(torch.device("cuda", 1)), cuda._on(torch.device("cuda", 1)), cuda._on(torch.device("cuda")):
        pass


def test_streams_without_torchs_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(cuda, "_raw_stream", None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    assert cuda._stream(torch.device("cuda", 0)) == 7


@needs_gpu
@needs_module
@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smooth", [False, True])
def test_layer_equals_the_reference(name: str, dtype: torch.dtype, smooth: bool) -> None:
    scheme, n, k = SCHEMES[name], 203, 333
    prepared, tensors = on_gpu(scheme, n, k, smooth=smooth), canonical(scheme, n, k, smooth=smooth)
    for rows in (1, 2, 15, 33, 129, 300):
        x = seeded(rows, k, seed=rows).to(dtype)
        assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, tensors, scheme, k), f"{rows} rows")
    x = hazard_rows(k).to(dtype)
    assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, tensors, scheme, k), "hazards")


@needs_gpu
@needs_module
@pytest.mark.gpu
def test_layer_takes_any_strides_and_no_rows() -> None:
    scheme, n, k = Scheme(), 64, 96
    prepared, tensors = on_gpu(scheme, n, k), canonical(scheme, n, k)
    x = seeded(6, 5, k).to(torch.bfloat16)
    wanted = reference.linear(x, tensors, scheme, k)
    gpu = x.to("cuda")
    assert_bits_equal(prepared.run(gpu), wanted)
    assert_bits_equal(prepared.run(strided(gpu)), wanted)
    assert_bits_equal(prepared.run(gpu.transpose(0, 1)), wanted.transpose(0, 1).contiguous())
    flat = torch.empty(6 * 5 * k + 1, dtype=torch.bfloat16, device="cuda")[1:].view(6, 5, k)  # misaligned by 2 bytes
    assert_bits_equal(prepared.run(flat.copy_(gpu)), wanted)
    assert prepared.run(gpu[:0]).shape == (0, 5, n)


@needs_gpu
@needs_module
@pytest.mark.gpu
def test_layer_returns_its_canonical_tensors_and_takes_new_ones() -> None:
    scheme, n, k = Scheme(), 75, 200
    prepared, tensors = on_gpu(scheme, n, k), canonical(scheme, n, k)
    for name, tensor in prepared.canonical().items():
        assert_bits_equal(tensor, tensors[name], name)
    other = dict(canonical(scheme, n, k), weight=torch.flip(tensors["weight"], (0,)))
    prepared.load(other)
    x = seeded(9, k)
    assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, other, scheme, k))


@needs_gpu
@needs_module
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_layer_in_a_cuda_graph(rows: int) -> None:
    scheme, n, k = Scheme(activation_symmetric=False), 512, 1024
    prepared, tensors = on_gpu(scheme, n, k), canonical(scheme, n, k)
    x = torch.zeros(rows, k, dtype=torch.bfloat16, device="cuda")
    prepared.run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = prepared.run(x)
        second = prepared.run(first[:, :1].expand(rows, k).contiguous())
    for seed in range(3):
        fresh = seeded(rows, k, seed=seed).to(torch.bfloat16)
        x.copy_(fresh)
        graph.replay()
        wanted = reference.linear(fresh, tensors, scheme, k)
        assert_bits_equal(first, wanted)
        assert_bits_equal(second, reference.linear(wanted[:, :1].expand(rows, k), tensors, scheme, k))


@needs_gpu
@needs_module
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33, 64, 65])
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_layers_read_what_the_one_before_them_writes_late(preset: str, rows: int) -> None:
    """Launches of a chain begin before those in front of them end, whose results they must wait for all the same."""
    scheme, k, depth = Scheme.from_preset(preset), 1024, 6
    tensors = [reference.quantize_weight(seeded(k, k, seed=i), scheme) for i in range(depth)]
    layers = [ops.prepare(one, scheme, k, device="cuda") for one in tensors]
    y = torch.zeros(rows, k, dtype=torch.bfloat16, device="cuda")
    for seed in range(3):
        fresh = seeded(rows, k, seed=seed).to(torch.bfloat16)
        ready = fresh.to("cuda")
        torch.cuda._sleep(1_000_000)  # what is launched meanwhile is there before its input
        y.copy_(ready)
        out, wanted = y, fresh
        for layer in layers:
            out = layer.run(out)
        for one in tensors:
            wanted = reference.linear(wanted, one, scheme, k)
        assert_bits_equal(out, wanted)


@needs_gpu
@needs_module
@pytest.mark.gpu
def test_layer_on_two_streams_at_once() -> None:
    scheme, n, k = Scheme(), 2048, 2048
    prepared = on_gpu(scheme, n, k)
    inputs = [seeded(rows, k, seed=rows).to("cuda", torch.bfloat16) for rows in (1, 3, 64, 500)]
    wanted = [prepared.run(x) for x in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(prepared.run(inputs[turn % 4]))
    torch.cuda.synchronize()
    for turn, result in enumerate(results):
        assert_bits_equal(result, wanted[turn % 4])


@needs_gpu
@needs_module
@pytest.mark.gpu
def test_layer_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    scheme, n, k = Scheme(), 64, 128
    prepared, tensors = on_gpu(scheme, n, k, device="cuda:1"), canonical(scheme, n, k)
    x = seeded(5, k)
    assert_bits_equal(prepared.run(x.to("cuda:1")), reference.linear(x, tensors, scheme, k))
    with pytest.raises(ValueError, match="device"):
        prepared.run(x.to("cuda:0"))


@needs_gpu
@needs_module
@pytest.mark.gpu
def test_layer_compiled_and_differentiated() -> None:
    scheme, n, k = Scheme(), 96, 64
    prepared, tensors = on_gpu(scheme, n, k), canonical(scheme, n, k)
    x = seeded(7, k)
    wanted, weight = reference.linear(x, tensors, scheme, k), reference.dequantize_weight(tensors, scheme, k)
    assert_compiled_and_differentiated(prepared, x.to("cuda"), wanted, weight)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_triton_layer_equals_the_reference(name: str) -> None:
    pytest.importorskip("triton")
    scheme, n, k = SCHEMES[name], 203, 333
    tensors = canonical(scheme, n, k, smooth=True)
    moved = {key: tensor.to("cuda") for key, tensor in tensors.items()}
    prepared = PreparedTritonW8A8.from_canonical(moved, scheme, k)
    for rows in (1, 33, 300):
        x = seeded(rows, k, seed=rows).to(torch.bfloat16)
        assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, tensors, scheme, k), f"{rows} rows")


@needs_gpu
@needs_module
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_at_every_granularity(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    cases = [
        ((5, 40), "token", -1, None),
        ((300, 64), "token", -1, None),
        ((64, 1000), "tensor", None, None),
        ((4, 6, 10), "channel", 1, None),
        ((9, 256), "group", -1, 64),
        ((400, 200), "group", -1, 64),
        ((3, 72), "group", -1, 32),
    ]
    for shape, granularity, axis, group in cases:
        x = seeded(*shape, seed=bits)
        x.view(-1)[3] = torch.inf
        x = x.to(dtype)
        options = {"bits": bits, "signed": symmetric and bits == 8, "granularity": granularity, "axis": axis}
        options |= {"group_size": group, "symmetric": symmetric}
        for static in (False, True):
            given: dict[str, float | int | None] = {"scale": None, "zero_point": None}
            if static:
                given = {"scale": 0.17, "zero_point": None if symmetric else 3}
            wanted = reference.quantize(x, **options, **given)  # type: ignore[arg-type]
            tensors = [None if v is None else torch.tensor(v, device="cuda") for v in given.values()]
            if tensors[1] is not None:
                tensors[1] = tensors[1].to(torch.int32)
            got = torch.ops.qkernels.quantize(x.to("cuda"), *options.values(), *tensors)
            what = f"{shape} {granularity} static={static}"
            for name, ours, theirs in zip(("codes", "scale", "zero_point"), got, wanted, strict=True):
                if theirs is not None:
                    assert_bits_equal(ours, theirs, f"{what}: {name}")
            for out_dtype in DTYPES:
                zero = None if symmetric else got[2]
                back = torch.ops.qkernels.dequantize(got[0], got[1], zero, shape, *options.values(), out_dtype)
                again = reference.dequantize(
                    *wanted,
                    shape=shape,
                    dtype=out_dtype,
                    **options,  # type: ignore[arg-type]
                )
                assert_bits_equal(back, again, f"{what}: dequantized")
