"""The CUDA module against the reference, kernel by kernel and instance by instance."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, hazard_rows, seeded

from qkernels import cuda, reference

_cuda = pytest.importorskip("qkernels._cuda", reason="this installation was built without the CUDA module")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
]
GPU = torch.device("cuda")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and _cuda.has_sm90a()

MMA: list[cuda.Config] = [(0, tokens, 1, 1, 0, 0) for tokens in (16, 64, 128)]
STREAM: list[cuda.Config] = [
    (1, tokens, split, share, deep, channels)
    for tokens, split, share, deep, channels in itertools.product(
        (8, 16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 4), (0, 1), (64, 128)
    )
    if split * share <= 8 and tokens >= 8 * share
] + [(1, 16, 3, 1, 0, 128), (1, 64, 5, 1, 1, 64), (1, 64, 1, 8, 1, 128)]
TILED: list[cuda.Config] = [
    (2, 128, 1, 1, 0, 0),
    (2, 128, 1, 2, 0, 0),
    (2, 128, 1, 2, 1, 0),
    (2, 224, 1, 2, 0, 0),
    (2, 256, 1, 1, 0, 0),
    (2, 256, 1, 2, 0, 0),
]
FAMILIES = {"mma": MMA, "stream": STREAM, "tiled": TILED}
# Tails in every dimension, one element, K and N that are multiples of nothing, more tokens than a tile.
SHAPES = [
    (1, 1, 1),
    (2, 264, 16),
    (3, 5, 33),
    (17, 130, 257),
    (64, 576, 1536),
    (100, 257, 1000),
    (129, 1000, 640),
    (300, 384, 4864),
    (1300, 4200, 300),  # several tiles for each CTA
]


def random_codes(*shape: int, low: int = -128) -> torch.Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8, device=GPU)


def layer(n: int, k: int, *, bias: bool = True) -> tuple[torch.Tensor, dict[str, Any]]:
    """A random weight with every code, -128 too, and what a layer holds of it."""
    weight = random_codes(n, k)
    packed, colsum = cuda.pack_w8(weight)
    tensors = {"packed": packed, "colsum": colsum, "weight_scale": torch.rand(n, device=GPU) + 0.01}
    tensors["bias"] = torch.randn(n, device=GPU) if bias else None
    return weight, tensors


def packed_w8(weight: torch.Tensor, layout: int) -> torch.Tensor:
    """The packed weight by the words of ``csrc/cuda/w8a8.h``."""
    n, k = weight.shape
    padded = torch.zeros(-(-n // 8) * 8, -(-k // 128) * 128, dtype=torch.int8, device=GPU)
    padded[:n, :k] = weight
    if layout == cuda.W8Layout.PAIRS:
        order = [place for t in range(4) for place in (2 * t, 8 + 2 * t, 2 * t + 1, 9 + 2 * t)]
        padded = (padded.view(padded.shape[0], -1, 16)[:, :, order] ^ -128).view(padded.shape)
    chunks = padded.view(padded.shape[0], -1, 8, 16).transpose(0, 1)
    places = torch.arange(8, device=GPU)[None] ^ (torch.arange(chunks.shape[1], device=GPU) % 8)[:, None]
    return chunks.gather(2, places[None, :, :, None].expand_as(chunks)).flatten()


@pytest.mark.parametrize("layout", [cuda.W8Layout.SLABS, cuda.W8Layout.PAIRS])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 129), (8, 128), (130, 333), (576, 1536), (49, 65536)])
def test_pack_returns_every_byte(n: int, k: int, offset: int, layout: int) -> None:
    weight = random_codes(n * k + offset)[offset:].view(n, k)
    packed, colsum = cuda.pack_w8(weight, layout=layout)
    assert_bits_equal(packed, packed_w8(weight, layout))
    assert_bits_equal(cuda.unpack_w8(packed, n, k, layout=layout), weight)
    assert_bits_equal(colsum, weight.sum(1, dtype=torch.int32))


def test_pack_refuses_what_is_no_layout_of_slabs() -> None:
    weight = random_codes(8, 128)
    for layout in (cuda.W8Layout.ROWS, 3):
        with pytest.raises(ValueError, match=r"layout|value"):
            cuda.pack_w8(weight, layout=layout)


@pytest.mark.parametrize("k", [1, 5, 8, 129, 576, 4096, 14336, 32768, 40000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rows_hazards(k: int, dtype: torch.dtype) -> None:
    x = torch.cat([hazard_rows(k), seeded(3, k) * torch.tensor([[1.0], [100.0], [1e-3]])]).to(dtype)
    smooth = seeded(k, seed=1).abs() + 0.5
    for symmetric, static, smoothed in itertools.product((True, False), repeat=3):
        scale = torch.tensor(0.031) if static else None
        zero = torch.tensor(100, dtype=torch.int32) if static and not symmetric else None
        given = {"scale": scale, "zero_point": zero, "inv_smooth": smooth if smoothed else None}
        expected = reference.quantize_activations(x, symmetric=symmetric, **given)
        moved = {name: None if tensor is None else tensor.to(GPU) for name, tensor in given.items()}
        got = cuda.quantize_rows(x.to(GPU), symmetric=symmetric, **moved)
        for name, ours, theirs in zip(("q", "scale", "zero_point"), got, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert_bits_equal(ours, theirs, f"{name}, symmetric={symmetric}, static={static}, smooth={smoothed}")


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_rows_divides_like_the_cpu(symmetric: bool) -> None:
    """Random bit patterns: the kernel's division must round as the processor's, over the whole range."""
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(1, 2**31 - 1, (60000, 8), generator=generator, dtype=torch.int32)
    x = bits.view(torch.float32) * torch.where(torch.rand(60000, 8, generator=generator) < 0.5, 1.0, -1.0)
    expected = reference.quantize_activations(x, symmetric=symmetric)
    got = cuda.quantize_rows(x.to(GPU), symmetric=symmetric)
    assert_bits_equal(got[1], expected[1], "scale")
    assert_bits_equal(got[0], expected[0], "q")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm_every_instance(family: str, shape: tuple[int, int, int]) -> None:
    if family != "mma" and not HOPPER:
        pytest.skip("wgmma needs compute capability 9.0 and a build for sm_90a")
    m, n, k = shape
    weight, tensors = layer(n, k)
    q, scale = random_codes(m, k, low=-127), torch.rand(m, device=GPU)
    scale[m // 2] = torch.nan
    zero = torch.randint(0, 256, (m,), dtype=torch.int32, device=GPU)
    unsigned = (q.view(torch.uint8) ^ 128).contiguous()
    for number, config in enumerate(FAMILIES[family]):
        cases = (q, None, None), (q, None, tensors["bias"]), (unsigned, zero, tensors["bias"])
        for turn, (codes, zeros, bias) in enumerate(cases):
            out_dtype = DTYPES[(number // 3 + number + turn) % 3]
            wanted = reference.linear_w8a8_prequantized(
                codes, scale, zeros, weight, tensors["weight_scale"], bias, out_dtype
            )
            got = cuda.gemm_w8a8(codes, scale, zeros, {**tensors, "bias": bias}, out_dtype=out_dtype, config=config)
            assert_bits_equal(got, wanted, f"{config}, {out_dtype}, zero points {zeros is not None}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "left", "right"), [(130, 1, 3), (130, 8, 6), (264, 16, 8)])
def test_gemm_writes_only_its_output(family: str, dtype: torch.dtype, n: int, left: int, right: int) -> None:
    """A slice of a larger tensor, misaligned or not: every element written, none beside them."""
    if family != "mma" and not HOPPER:
        pytest.skip("wgmma needs compute capability 9.0 and a build for sm_90a")
    m, k = 77, 257
    weight, tensors = layer(n, k)
    q, scale = random_codes(m, k, low=-127), torch.rand(m, device=GPU)
    wanted = reference.linear_w8a8_prequantized(q, scale, None, weight, tensors["weight_scale"], tensors["bias"], dtype)
    around = torch.full((m + 2, left + n + right), 7.0, dtype=dtype, device=GPU)
    inside = around[1:-1, left : left + n]
    for config in FAMILIES[family] if family == "tiled" else FAMILIES[family][-1:]:
        cuda.gemm_w8a8(q, scale, None, tensors, out_dtype=dtype, config=config, out=inside)
        assert_bits_equal(inside.contiguous(), wanted, str(config))
        inside[:] = 7.0
        assert bool((around == 7.0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_gemm_at_the_overflow_bound(family: str) -> None:
    if family != "mma" and not HOPPER:
        pytest.skip("wgmma needs compute capability 9.0 and a build for sm_90a")
    k, n, m = 65536, 9, 3
    weight = torch.full((n, k), -128, dtype=torch.int8, device=GPU)
    weight[1] = 127
    packed, colsum = cuda.pack_w8(weight)
    ones = torch.ones(n, device=GPU)
    tensors = {"packed": packed, "colsum": colsum, "weight_scale": ones, "bias": None}
    q = torch.full((m, k), 255, dtype=torch.uint8, device=GPU)
    q[1] = 0
    zero = torch.tensor([0, 255, 128], dtype=torch.int32, device=GPU)
    scale = torch.ones(m, device=GPU)
    wanted = reference.linear_w8a8_prequantized(q, scale, zero, weight, ones, None, torch.float32)
    got = cuda.gemm_w8a8(q, scale, zero, tensors, out_dtype=torch.float32, config=FAMILIES[family][0])
    assert_bits_equal(got, wanted)


def test_gemm_rejects_an_instance_that_does_not_exist() -> None:
    _, tensors = layer(8, 16)
    with pytest.raises(ValueError, match="expected"):
        cuda.gemm_w8a8(
            random_codes(1, 16),
            torch.ones(1, device=GPU),
            None,
            tensors,
            out_dtype=torch.float32,
            config=(0, 7, 1, 1, 0, 0),
        )
