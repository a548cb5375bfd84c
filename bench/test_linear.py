"""One Linear: quantize + GEMM + epilogue, by tier, shape and number of rows."""

import pytest
import torch

from qkernels import _C, nn, reference
from qkernels.bench.ceilings import Ceilings, limit_seconds
from qkernels.bench.grid import traffic
from qkernels.scheme import Scheme

SHAPES = [(768, 768), (768, 3072), (4096, 4096)]
ROWS = [1, 32, 128]


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    measured = Ceilings(torch.get_num_threads())
    measured.refresh(samples=10)
    return measured


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("scheme", ["w8a8"])
def test_linear(benchmark, ceilings: Ceilings, isa: str, scheme: str, k: int, n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(n, k, generator=generator) / k**0.5, torch.randn(n, generator=generator)
    layer, x = nn.QuantLinear.from_float(weight, bias, scheme), torch.randn(m, k, generator=generator)
    resolved = Scheme.resolve(scheme)
    assert torch.equal(layer(x), reference.linear(x, layer.canonical(), resolved, k))
    assert _C.last_kernel() == f"{scheme}.{isa}"
    benchmark.group = f"{scheme} K={k} N={n} M={m}"
    benchmark(layer, x)
    if benchmark.stats is not None:
        moved = traffic(resolved, k, n, m, x.element_size())
        limit = limit_seconds(moved, 2.0 * m * n * k, ceilings.bandwidth(int(moved)), ceilings.peak("int8", isa))
        benchmark.extra_info["percent_of_limit"] = round(100 * limit / benchmark.stats.stats.median, 1)


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_linear_fp32(benchmark, k: int, n: int) -> None:
    linear, x = torch.nn.Linear(k, n), torch.randn(32, k)
    benchmark.group = f"w8a8 K={k} N={n} M=32"
    benchmark(linear, x)
