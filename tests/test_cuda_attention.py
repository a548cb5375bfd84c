"""The CUDA kernels between the Linears of an attention block, against the reference."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, assert_steady_on_gpu, seeded
from torch import Tensor
from w4_on_gpu import gpu

import qkernels as qk
from qkernels import reference
from qkernels.cuda_attention import MOST_QUERIES, append, attention, rotary

pytestmark = gpu

HALVES = (torch.bfloat16, torch.float16)


def heads(batch: int, count: int, tokens: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """As a Linear leaves them: ``[B, T, heads, D]`` in memory."""
    return seeded(batch, tokens, count, size, seed=seed).to(dtype).cuda().transpose(1, 2)


# -- rotary embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "count", "key_heads", "tokens", "size"),
    [(1, 32, 8, 1, 128), (3, 9, 3, 1, 64), (2, 4, 4, 17, 96), (1, 2, 1, 300, 256), (2, 3, 1, 5, 18), (1, 1, 1, 1, 2)],
)
def test_rotary(dtype: torch.dtype, batch: int, count: int, key_heads: int, tokens: int, size: int) -> None:
    q, k = heads(batch, count, tokens, size, 0, dtype), heads(batch, key_heads, tokens, size, 1, dtype)
    for angles in (1, batch):
        cos, sin = (seeded(angles, tokens, size, seed=seed).to(dtype).cuda() for seed in (2, 3))
        assert rotary(q, k, cos, sin) is not None
        for got, x in zip(rotary(q, k, cos, sin), (q, k), strict=True):
            assert_bits_equal(got, reference.rotary(x, cos, sin))
            assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_of_other_strides_and_odd_addresses(dtype: torch.dtype) -> None:
    wide = seeded(2, 6, 4, 70).to(dtype).cuda()
    cos, sin = (seeded(2, 4, 66, seed=seed).to(dtype).cuda()[..., 1:65] for seed in (2, 3))
    q, k = wide[:, :4, :, 3:67], wide[:, 4:, :, 3:67]
    assert rotary(q, k, cos, sin) is not None
    for got, x in zip(rotary(q, k, cos, sin), (q, k), strict=True):
        assert_bits_equal(got, reference.rotary(x, cos, sin))


def test_rotary_keeps_nan_infinity_and_signs_of_zero() -> None:
    q = heads(1, 2, 3, 16, 0, torch.float32)
    q[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])
    q[0, 1] = 0.0
    cos, sin = (seeded(1, 3, 16, seed=seed).cuda() for seed in (2, 3))
    cos[0, 1], sin[0, 1] = 0.0, -1.0
    for got in rotary(q, q, cos, sin):
        assert_bits_equal(got, reference.rotary(q, cos, sin))


def test_rotary_is_steady() -> None:
    q, k = heads(2, 8, 1, 128, 0, torch.bfloat16), heads(2, 2, 1, 128, 1, torch.bfloat16)
    cos, sin = (seeded(2, 1, 128, seed=seed).bfloat16().cuda() for seed in (2, 3))

    def refill(seed: int) -> None:
        q.copy_(heads(2, 8, 1, 128, seed, torch.bfloat16))

    assert_steady_on_gpu(lambda: rotary(q, k, cos, sin), refill, 20)


def test_rotary_declines() -> None:
    q, k = heads(1, 4, 3, 64, 0, torch.bfloat16), heads(1, 2, 3, 64, 1, torch.bfloat16)
    cos, sin = (seeded(1, 3, 64, seed=seed).bfloat16().cuda() for seed in (2, 3))
    assert rotary(q, k, cos, sin) is not None
    assert rotary(q, k, cos.float(), sin.float()) is None, "another dtype"
    assert rotary(q, k, cos[..., :32], sin[..., :32]) is None, "part of the features"
    assert rotary(q, k[:, :, :2], cos, sin) is None, "other tokens"
    assert rotary(q, k, cos.cpu(), sin.cpu()) is None, "another device"
    assert rotary(q.clone().requires_grad_(), k, cos, sin) is None, "gradients"
    assert rotary(q[:, :0], k, cos, sin) is None, "nothing"


# -- caches -----------------------------------------------------------------------------------------------------------


class Cache:
    """A cache on the GPU, and what the reference makes of its copy."""

    def __init__(self, batch: int, count: int, room: int, sizes: tuple[int, int], dtype: torch.dtype) -> None:
        self.keys, self.values = (seeded(batch, count, room, size).to(dtype).cuda() for size in sizes)
        self.length = torch.zeros((), dtype=torch.int64, device="cuda")
        self.wanted = self.keys.clone(), self.values.clone(), self.length.clone()

    def add(self, key: Tensor, value: Tensor) -> None:
        assert append(self.keys, self.values, self.length, key, value)
        reference.append(*self.wanted, key, value)
        for got, wanted in zip((self.keys, self.values, self.length), self.wanted, strict=True):
            assert_bits_equal(got, wanted)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.int8))
@pytest.mark.parametrize(("batch", "count", "sizes"), [(1, 8, (128, 128)), (3, 2, (64, 32)), (2, 1, (16, 80))])
def test_new_tokens_come_into_a_cache(dtype: torch.dtype, batch: int, count: int, sizes: tuple[int, int]) -> None:
    cache = Cache(batch, count, 700, sizes, dtype)
    for seed, tokens in enumerate((1, 1, 17, 1, 600, 80)):  # to the last place
        cache.add(*(heads(batch, count, tokens, size, seed, dtype) for size in sizes))


def test_tokens_of_other_strides_come_into_caches_of_other_strides() -> None:
    cache = Cache(2, 6, 20, (32, 32), torch.bfloat16)
    cache.keys, cache.values = cache.keys[:, 1:4], cache.values.transpose(1, 2).contiguous().transpose(1, 2)[:, :3]
    cache.wanted = cache.keys.clone(), cache.values.clone(), cache.length.clone()
    wide = seeded(2, 3, 4, 96).bfloat16().cuda()
    cache.add(wide[..., :32], wide[..., 64:])
    cache.add(wide[:, :1, :, :32].expand(2, 3, 4, 32), wide[:, :, :1, 64:].expand(2, 3, 4, 32))


def test_caches_are_steady() -> None:
    key = heads(2, 4, 300, 64, 0, torch.float16)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (torch.zeros(2, 4, 900, 64, dtype=torch.float16, device="cuda") for _ in range(2))
        length = torch.full((), 4, dtype=torch.int64, device="cuda")
        assert append(keys, values, length, key, key)
        return keys, values, length

    assert_steady_on_gpu(step, lambda seed: key.copy_(heads(2, 4, 300, 64, seed, torch.float16)), 20)


def test_append_declines_and_does_nothing() -> None:
    keys, values = (torch.zeros(2, 4, 9, 64, dtype=torch.float16, device="cuda") for _ in range(2))
    length, key = torch.zeros((), dtype=torch.int64, device="cuda"), heads(2, 4, 3, 64, 0, torch.float16)
    assert not append(keys, values, length, key.float(), key.float()), "another dtype"
    assert not append(keys, values, length.int(), key, key), "another length"
    assert not append(keys, values, length.cpu(), key, key), "another device"
    assert not append(keys, values, length, key[:, :3], key[:, :3]), "fewer heads"
    assert not append(keys, values, length, key[..., :60], key), "part of the features"
    assert not append(keys[..., :60], values, length, key[..., :60], key), "heads of 120 bytes"
    assert not append(keys, values, length, key[:, :, :2], key), "other tokens"
    assert not append(keys, values, length, key, key.clone().requires_grad_()), "a gradient"
    assert not int(length)
    assert not bool(keys.any()), "nothing written"


# -- attention --------------------------------------------------------------------------------------------------------


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, what: str = "") -> None:
    """Within what rounding weights to 16 bits may cost, and one rounding of the result."""
    assert attention(q, k, v, mask, 1.0) is not None, what
    got, exact = attention(q, k, v, mask, scale), reference.attention(q.double(), k.double(), v.double(), mask, scale)
    assert got.dtype == q.dtype
    assert got.is_contiguous()
    around = reference.attention(q.double(), k.double(), v.double().abs(), mask, scale)
    slack = (2.0**-7 if q.dtype == torch.bfloat16 else 2.0**-10) * around + 1e-6
    off = (got.double() - exact).abs() / slack
    assert bool((off <= 1.0).all()), f"{what}: {float(off.max()):.2f} of what is allowed"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("count", "key_heads"), [(8, 8), (32, 8), (9, 3), (12, 1), (64, 2)])
def test_attention_of_one_token(dtype: torch.dtype, size: int, count: int, key_heads: int) -> None:
    for length in (1, 15, 16, 17, 63, 64, 65, 200, 512, 513, 1000, 4097):
        q = heads(2, count, 1, size, 0, dtype)
        k, v = (seeded(2, key_heads, length, size, seed=seed).to(dtype).cuda() for seed in (1, 2))
        check(q, k, v, None, size**-0.5, f"{length} keys")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_attention_behind_a_mask(dtype: torch.dtype, tokens: int) -> None:
    for batch, length, seen in ((1, 192, 130), (3, 300, 299), (2, 2048, 40), (2, 70, 16)):
        q = heads(batch, 8, tokens, 128, 0, dtype)
        k, v = (seeded(batch, 2, length, 128, seed=seed).to(dtype).cuda() for seed in (1, 2))
        position = torch.arange(seen - tokens, seen).cuda()
        causal = (torch.arange(length).cuda() <= position[:, None]).view(1, 1, tokens, length)
        check(q, k, v, causal, 0.1, f"{length} keys, {seen} seen")
        check(q, k, v, causal.expand(batch, 8, tokens, length), 0.1, "expanded")
        random = (seeded(batch, 8, tokens, length, seed=3) > 1.0).cuda()
        check(q, k, v, random, 0.1, "random")
        check(q, k, v, (seeded(batch, 1, 1, length, seed=4) > 0.0).cuda(), 0.1, "of batches")


def test_what_a_mask_hides_is_not_read() -> None:
    q = heads(1, 8, 1, 128, 0, torch.bfloat16)
    k, v = (seeded(1, 2, 512, 128, seed=seed).bfloat16().cuda() for seed in (1, 2))
    mask = (torch.arange(512) < 96).view(1, 1, 1, 512).cuda()
    wanted = attention(q, k, v, mask, 0.1)
    k[:, :, 96:], v[:, :, 96:] = torch.nan, torch.nan
    assert_bits_equal(attention(q, k, v, mask, 0.1), wanted)


def test_queries_that_see_nothing_get_zeros() -> None:
    q = heads(2, 8, 2, 64, 0, torch.float16)
    k, v = (seeded(2, 2, 300, 64, seed=seed).half().cuda() for seed in (1, 2))
    mask = torch.ones(2, 1, 2, 300, dtype=torch.bool)
    mask[1, :, 0] = False
    y = attention(q, k, v, mask.cuda(), 0.1)
    assert not y[1, 0].any()
    check(q, k, v, mask.cuda(), 0.1)


def test_large_scores_and_nan() -> None:
    q, k = heads(1, 4, 1, 64, 0, torch.bfloat16) * 30.0, seeded(1, 1, 200, 64, seed=1).bfloat16().cuda() * 30.0
    v = seeded(1, 1, 200, 64, seed=2).bfloat16().cuda()
    weights = attention(q, k, v, None, 0.125)
    best = (q.double() @ k.double().transpose(-1, -2)).argmax(-1)[0, :, 0]
    assert torch.allclose(weights[0, 0].float(), v[0, 0, best].float(), atol=0.05)
    k[0, 0, 150, 3] = torch.nan
    assert bool(attention(q, k, v, None, 0.125).isnan().all())


def test_strides_of_caches() -> None:
    q = heads(2, 8, 1, 64, 0, torch.bfloat16)
    wide = seeded(2, 400, 4, 128, seed=1).bfloat16().cuda().transpose(1, 2)
    k, v = wide[:, :2, 50:350, :64], wide[:, 2:, 50:350, 64:]
    check(q, k, v, None, 0.1)
    check(q, k[:1].expand(2, -1, -1, -1), v, None, 0.1, "one cache for two")


def test_attention_is_steady() -> None:
    q = heads(2, 32, 1, 128, 0, torch.bfloat16)
    k, v = (seeded(2, 8, 3000, 128, seed=seed).bfloat16().cuda() for seed in (1, 2))
    mask = (torch.arange(3000) < 2500).view(1, 1, 1, 3000).cuda()

    def refill(seed: int) -> None:
        q.copy_(heads(2, 32, 1, 128, seed, torch.bfloat16))

    assert_steady_on_gpu(lambda: [attention(q, k, v, mask, 0.1)], refill, 20)


def test_attention_declines() -> None:
    q = heads(1, 8, 1, 128, 0, torch.bfloat16)
    k, v = (seeded(1, 2, 100, 128, seed=seed).bfloat16().cuda() for seed in (1, 2))
    assert attention(q, k, v, None, 1.0) is not None
    assert attention(q.float(), k.float(), v.float(), None, 1.0) is None, "fp32"
    assert attention(heads(1, 32, 5, 128, 0, torch.bfloat16), k, v, None, 1.0) is None, f"over {MOST_QUERIES} queries"
    assert attention(heads(1, 2, 17, 128, 0, torch.bfloat16), k, v, None, 1.0) is None, "over 16 tokens"
    assert attention(q[..., :96], k[..., :96], v[..., :96], None, 1.0) is None, "96 features"
    assert attention(q, k, v, torch.zeros(1, 1, 1, 100, device="cuda"), 1.0) is None, "a mask of floats"
    assert attention(q, k, v, torch.ones(1, 1, 1, 99, device="cuda", dtype=torch.bool), 1.0) is None, "another length"
    assert attention(q, k.cpu(), v.cpu(), None, 1.0) is None, "another device"
    assert attention(q.clone().requires_grad_(), k, v, None, 1.0) is None, "gradients"
    assert attention(q, k[..., :64, :], v, None, 1.0) is None, "keys and values of other lengths"


# -- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(cache: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    report = qk.quantize_(model, "w8a8")
    assert "attention of few tokens" in str(report)
    ids = torch.randint(0, 128, (2, 9), device="cuda")
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    fused = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
    names = kernels(lambda: model.generate(ids, max_new_tokens=3, do_sample=False, **options))
    assert any("attention_kernel" in name for name in names)
    assert any("rotary_kernel" in name for name in names)
    assert any("append_kernel" in name for name in names) == (cache == "static")
    for block in model.model.layers:
        del block.self_attn.__dict__["forward"]
    alone = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
    assert float((fused == alone).double().mean()) > 0.8, "random weights: near ties may fall either way"


def kernels(call: object) -> set[str]:
    """Names of those that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()  # type: ignore[operator]
        torch.cuda.synchronize()
    return {event.key for event in profile.key_averages()}
