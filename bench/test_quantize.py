"""Quantize and dequantize alone, by tier and granularity."""

import pytest
import torch

import qkernels as qk
from qkernels import _C
from qkernels.bench.ceilings import Ceilings

GRANULARITIES = {
    "tensor": {"granularity": "tensor"},
    "token": {"granularity": "token"},
    "channel": {"granularity": "channel", "axis": -1},
    "group": {"granularity": "group", "group_size": 64},
}


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return Ceilings(torch.get_num_threads())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantize(benchmark, ceilings: Ceilings, isa: str, granularity: str, bits: int) -> None:
    if bits == 4 and granularity != "group":
        pytest.skip("4 bits are stored by group")
    x = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    options = {"bits": bits, "signed": bits == 8, **GRANULARITIES[granularity]}
    qtensor = qk.quantize(x, **options)
    assert (qtensor.dequantize() - x).abs().max() < x.abs().max() / (2 ** (bits - 1) - 1)
    benchmark.group = f"quantize {bits} bits"
    benchmark(qk.quantize, x, **options)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        moved = x.nbytes + x.numel() * bits / 8
        benchmark.extra_info["percent_of_bandwidth"] = round(100 * moved / ceilings.bandwidth(int(moved)) / seconds, 1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dequantize(benchmark, isa: str, granularity: str) -> None:
    x = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    qtensor = qk.quantize(x, **GRANULARITIES[granularity])
    benchmark.group = "dequantize"
    benchmark(qk.dequantize, qtensor)
    assert _C.info()["isa"] == isa
