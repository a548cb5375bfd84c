"""Attention on the CPU: every tier against the reference, within the bound of qkernels/_attention.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from families import VOCABULARY, build
from helpers import assert_bits_equal, seeded
from torch import Tensor, nn

import qkernels as qk
from qkernels import _C, attention, cpu_attention, reference
from qkernels.attention import AttentionForward

UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What rounding to a dtype adds; that of fp32 is in the bound of the sums."""


@pytest.fixture
def kernel(isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tier that has the kernel, which serves any number of queries."""
    if isa == "scalar":
        pytest.skip("the scalar tier leaves attention to torch")
    monkeypatch.setattr(cpu_attention, "FEWEST_QUERIES", 1)
    cpu_attention._native.cache_clear()
    return isa


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    cpu_attention._native.cache_clear()


def heads(batch: int, count: int, tokens: int, size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[B, H, T, D]`` in memory as a Linear leaves it."""
    return seeded(batch, tokens, count, size, seed=seed).to(dtype).transpose(1, 2)


def three(
    batch: int, count: int, groups: int, tokens: int, length: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        heads(batch, count, tokens, size, 0, dtype),
        heads(batch, groups, length, size, 1, dtype),
        heads(batch, groups, length, size, 2, dtype),
    )


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False) -> Tensor:
    """Runs the kernel and compares it with the reference within the derived bound."""
    got = cpu_attention.attention(q, k, v, mask, scale, causal=causal)
    assert got is not None
    assert _C.last_kernel().startswith("attention.")
    wide = q.double(), k.double(), v.double()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    wanted = reference.attention(*wide, mask, scale, causal=causal)
    assert got.shape == wanted.shape
    assert got.dtype == q.dtype
    assert got.is_contiguous()
    shared = q.shape[1] // k.shape[1]
    size, length = q.shape[-1], k.shape[2]
    scores = wide[0].abs() @ wide[1].repeat_interleave(shared, 1).abs().transpose(-1, -2) * abs(scale)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.masked_fill(mask <= -(2.0**100), 0.0).abs()
    largest = scores.amax(-1).transpose(1, 2).unsqueeze(-1)
    weighed = reference.attention(wide[0], wide[1], wide[2].abs(), mask, scale, causal=causal)
    bound = (2 * (size + 8) * largest + 2 * length + 16) * 2.0**-24 * weighed
    if _C.last_kernel() == "attention.amx" and q.dtype == torch.bfloat16:
        bound = bound + 2.0**-15 * weighed
    bound = bound + UNIT[q.dtype] * (wanted.abs() + bound) + length * 2.0**-126 * wide[2].abs().nan_to_num().max()
    error = (got.double() - wanted).abs()
    numbers = ~wanted.isnan()
    assert torch.equal(got.isnan(), ~numbers)
    worst = (error - bound)[numbers]
    assert bool((worst <= 0).all()), f"off by {error[numbers].max():.3g}, beyond the bound by {worst.max():.3g}"
    return got


# -- shapes -----------------------------------------------------------------------------------------------------------

SIZES = (1, 8, 31, 32, 33, 64, 80, 96, 128, 200, 256)


@pytest.mark.parametrize("size", SIZES)
def test_attention_sizes_of_heads(kernel: str, size: int) -> None:
    for tokens, length in ((5, 70), (50, 129)):
        check(*three(2, 2, 2, tokens, length, size), None, size**-0.5)


LENGTHS = (1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 128, 129, 257, 600)


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_numbers_of_keys(kernel: str, length: int) -> None:
    for size in (32, 64):
        check(*three(1, 2, 2, 9, length, size), None, 0.2)


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 11, 12, 13, 23, 24, 25, 49, 128, 500])
def test_attention_numbers_of_queries(kernel: str, tokens: int) -> None:
    for size, length in ((32, 16), (64, 128), (40, 200)):
        check(*three(1, 2, 2, tokens, length, size), None, 0.2)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_attention_shares_heads_of_keys(kernel: str, groups: int) -> None:
    check(*three(2, 6, groups, 30, 40, 32), None, 0.2)


def test_attention_of_many_blocks_that_share_keys(kernel: str) -> None:
    check(*three(1, 8, 1, 100, 300, 16), None, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 30, 32, 64, 80, 256])
def test_attention_in_16_bits(kernel: str, dtype: torch.dtype, size: int) -> None:
    for tokens, length in ((1, 9), (16, 17), (33, 150), (48, 300)):
        q, k, v = three(2, 4, 2, tokens, length, size, dtype)
        check(q, k, v, None, size**-0.5)
        check(q, k, v, seeded(2, 1, 1, length, seed=3).to(dtype), size**-0.5)
        check(q, k, v, seeded(2, 1, tokens, length, seed=4) > 0, size**-0.5)
        check(q, k, v, None, size**-0.5, causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_16_bits_of_any_scale(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = three(2, 2, 2, 40, 150, 32, dtype)
    for scale in (-0.5, 0.0, 1e-3, 4.0):
        check(q, k, v, None, scale)
        check(q, k, v, None, scale, causal=True)
        check(q, k, v, seeded(2, 1, 40, 150, seed=4) > 0, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_16_bits_strides(kernel: str, dtype: torch.dtype) -> None:
    q = seeded(2, 3, 32, 71).to(dtype)[..., 7:39]
    k = seeded(20, 2, 3, 33, seed=1).to(dtype).permute(1, 2, 0, 3)[..., 1:]
    v = seeded(2, 3, 40, 32, seed=2).to(dtype)[:, :, ::2]
    check(q, k, v, None, 0.3)
    check(q[:1].expand(2, -1, -1, -1), k, v[:, :1].expand(-1, 3, -1, -1), None, 0.3)


def test_attention_strides(kernel: str) -> None:
    q = seeded(2, 3, 20, 64)[..., 7:39]
    k = seeded(20, 2, 3, 32, seed=1).permute(1, 2, 0, 3)
    v = seeded(2, 3, 40, 32, seed=2)[:, :, ::2]
    check(q, k, v, None, 0.3)
    check(q[:1].expand(2, -1, -1, -1), k, v[:, :1].expand(-1, 3, -1, -1), None, 0.3)


def test_attention_is_left_alone_where_features_are_apart(kernel: str) -> None:
    q, k, v = (seeded(1, 2, 20, 16, seed=i) for i in range(3))
    apart = seeded(1, 2, 16, 20).transpose(2, 3)
    assert cpu_attention.attention(q, k, v, None, 1.0) is not None
    assert cpu_attention.attention(apart, k, v, None, 1.0) is None
    assert cpu_attention.attention(q, k, apart, None, 1.0) is None


# -- masks ------------------------------------------------------------------------------------------------------------

SHAPES = ((2, 4, 30, 70), (1, 1, 30, 70), (2, 1, 1, 70), (1, 4, 1, 70), (1, 1, 1, 70), (2, 1, 30, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_attention_masks(kernel: str, shape: tuple[int, ...], kind: str) -> None:
    values = seeded(*shape, seed=5)
    check(*three(2, 4, 2, 30, 70, 32), values > 0 if kind == "bool" else values, 0.2)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_attention_masks_of_any_strides(kernel: str, kind: str) -> None:
    values = seeded(2, 70, 4, 30, seed=5).permute(0, 2, 3, 1)
    mask = values > 0 if kind == "bool" else values
    q, k, v = three(2, 4, 2, 30, 70, 32)
    check(q, k, v, mask, 0.2)
    check(q, k, v, mask[:, :1].expand(2, 4, 30, 70), 0.2)
    wide = seeded(2, 4, 30, 90, seed=6)[..., 11:81]
    check(q, k, v, wide > 0 if kind == "bool" else wide, 0.2)


@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_attention_rows_that_see_nothing_are_zero(kernel: str, kind: str) -> None:
    seen = seeded(2, 1, 30, 300, seed=5) > 0
    seen[:, :, 3] = False
    seen[0, :, 29] = False
    seen[1, :, 4, :290] = False  # whole parts of the keys, but not all
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    got = check(*three(2, 4, 2, 30, 300, 64), mask, 0.2)
    assert bool((got[:, 3] == 0).all())
    assert bool((got[0, 29] == 0).all())
    assert bool((got[1, 4] != 0).all())


def test_attention_padding_by_the_lowest_number(kernel: str) -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, 1, 40)
    mask[0, ..., 25:] = lowest
    mask[1] = lowest  # sees all alike, as in torch
    q, k, v = three(2, 4, 4, 20, 40, 32)
    got = check(q, k, v, mask, 0.2)
    torch.testing.assert_close(got[1], v[1].mean(1).expand(20, 4, 32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (40, 40), (300, 300), (20, 50), (150, 40)])
def test_attention_causal(kernel: str, tokens: int, length: int) -> None:
    check(*three(2, 4, 2, tokens, length, 32), None, 0.2, causal=True)


# -- values -----------------------------------------------------------------------------------------------------------


def test_attention_large_and_small_scores(kernel: str) -> None:
    q, k, v = three(1, 2, 2, 20, 150, 32)
    for factor in (1e-30, 1.0, 30.0, 1e4):
        check(q * factor, k, v, None, 1.0)
    check(q, k, v, None, -0.5)
    check(q, k, v, None, 0.0)


def test_attention_exponential(kernel: str) -> None:
    """Of two keys the second has the weight exp(-x) of the first, which is exact but for the exponential: of x within
    2 x u by its product with 1 / ln(2), 3 u in itself, and five roundings of sums and quotient."""
    x = torch.linspace(0, 87, 40001)
    q, k, v = x.view(1, 1, -1, 1), torch.tensor([0.0, -1.0]).view(1, 1, 2, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    got = cpu_attention.attention(q, k, v, None, 1.0)
    assert got is not None
    exact = torch.sigmoid(-x.double())
    error = (got.flatten().double() / exact - 1).abs() * 2.0**24
    assert bool((error <= 2 * x + 8).all())
    assert float(error[x < 1].max()) < 6
    hidden = cpu_attention.attention(q + 88, k, v, None, 1.0)
    assert hidden is not None
    assert bool((hidden == 0).all())


def test_attention_nan_stays_in_its_row(kernel: str) -> None:
    q, k, v = three(2, 2, 2, 20, 150, 32)
    q[0, 1, 7, 3] = torch.nan
    got = check(q, k, v, None, 0.2)
    assert bool(got[0, 7, 1].isnan().all())
    assert int(got.isnan().sum()) == 32


@pytest.mark.parametrize("at", [0, 20, 149])
def test_attention_nan_and_infinity_of_keys_and_values(kernel: str, at: int) -> None:
    q, k, v = three(2, 2, 2, 20, 150, 32)
    for odd in (torch.nan, torch.inf):
        broken = k.clone()
        broken[0, 1, at, 3] = odd
        got = cpu_attention.attention(q, broken, v, None, 0.2)
        wanted = reference.attention(q, broken, v, None, 0.2)
        assert got is not None
        assert torch.equal(got.isnan(), wanted.isnan())
    hidden = torch.ones(1, 1, 1, 150, dtype=torch.bool)
    hidden[..., at] = False
    broken = k.clone()
    broken[:, :, at] = torch.nan
    check(q, broken.nan_to_num(), v, hidden, 0.2)
    got = cpu_attention.attention(q, broken, v, hidden, 0.2)
    assert got is not None
    assert not bool(got.isnan().any()), "a bool mask hides it"
    values = v.clone()
    values[0, 1, at, 3] = torch.nan
    check(q, k, values, None, 0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_attention_in_16_bits_nan_and_infinity(kernel: str, dtype: torch.dtype, odd: float) -> None:
    for tokens in (20, 32):
        three_of_them = three(2, 2, 2, tokens, 150, 32, dtype)
        for which, at in itertools.product(range(3), (0, 19, 149)):
            broken = [x.clone() for x in three_of_them]
            broken[which][0, 1, min(at, broken[which].shape[2] - 1), 3] = odd
            got = cpu_attention.attention(broken[0], broken[1], broken[2], None, 0.2)
            wanted = reference.attention(broken[0], broken[1], broken[2], None, 0.2)
            assert got is not None
            assert torch.equal(got.isnan(), wanted.isnan())
            assert torch.equal(got.isposinf(), wanted.isposinf())
            assert torch.equal(got.isneginf(), wanted.isneginf())


def test_attention_nan_with_a_payload(kernel: str) -> None:
    payloads = torch.tensor([0x7FC00000, 0x7FC001FF, 0x7F8000FF, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    q, k, v = three(1, 1, 1, 8, 16, 16)
    mask = torch.zeros(1, 1, 8, 16)
    mask[0, 0, :5, 2] = payloads
    got = cpu_attention.attention(q, k, v, mask, 0.2)
    assert got is not None
    assert torch.equal(got[0, :, 0].isnan().all(-1), torch.arange(8) < 5)


def test_attention_ignores_flush_denormal(kernel: str) -> None:
    q, k, v = three(1, 2, 2, 20, 50, 32)
    wanted = cpu_attention.attention(q, k, v * 1e-38, None, 0.2)
    torch.set_flush_denormal(True)
    try:
        got = cpu_attention.attention(q, k, v * 1e-38, None, 0.2)
    finally:
        torch.set_flush_denormal(False)
    assert got is not None
    assert wanted is not None
    assert got.shape == wanted.shape


# -- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_same_bits_for_any_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = three(3, 4, 2, 61, 140, 64, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(cpu_attention.attention(q, k, v, None, 0.2))
    finally:
        torch.set_num_threads(before)
    assert results[0] is not None
    for other in results[1:]:
        assert other is not None
        assert_bits_equal(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_other_heads(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = three(2, 4, 4, 50, 140, 32, dtype)
    whole = cpu_attention.attention(q, k, v, None, 0.2)
    assert whole is not None
    for b, h in itertools.product(range(2), range(4)):
        own = [x[b : b + 1, h : h + 1] for x in (q, k, v)]
        alone = cpu_attention.attention(own[0], own[1], own[2], None, 0.2)
        assert alone is not None
        assert_bits_equal(alone[0, :, 0], whole[b, :, h])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_random_shapes(kernel: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(60):
        groups, tokens, length, size = pick(1, 3), pick(1, 70), pick(1, 330), pick(1, 140)
        q, k, v = three(pick(1, 2), groups * pick(1, 3), groups, tokens, length, size, dtype)
        kind = pick(0, 3)
        shape = [n if pick(0, 1) else 1 for n in (q.shape[0], q.shape[1], tokens)]
        values = torch.randn(*shape, length, generator=generator).to(dtype)
        mask = (None, None, values, values > 0.5)[kind]
        check(q, k, v, mask, size**-0.5, causal=kind == 1)


# -- who is served ----------------------------------------------------------------------------------------------------


def test_attention_scalar_tier_leaves_it_to_torch() -> None:
    q, k, v = three(1, 2, 2, 20, 20, 32)
    native = _C.Attention((1, 2, 2, 20, 20, 32), (0, 32, 64), (0, 32, 64), (0, 32, 64), (0, 0, 0), 0, 0, False)
    before = _C.info()["isa"]
    _C.set_isa("scalar")
    try:
        assert not cpu_attention.available()
        assert cpu_attention.attention(q, k, v, None, 1.0) is None
        assert not native.run(q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, q.data_ptr(), 1.0, 1)
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1, 1, 8), (1, 3, 2, 1, 1, 8), (1, 1, 1, 1, 1, 257)])
def test_attention_refuses_nonsense(sizes: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError):
        _C.Attention(sizes, (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), 0, 0, False)


needs_kernel = pytest.mark.skipif(not cpu_attention.available(), reason="this processor's tier has no attention")


@needs_kernel
def test_attention_leaves_what_it_does_not_know() -> None:
    q, k, v = three(2, 4, 2, 20, 20, 32)
    mask = torch.zeros(2, 1, 1, 20)
    assert cpu_attention.attention(q, k, v, mask, 1.0) is not None
    few = cpu_attention.FEWEST_QUERIES - 1
    wide = three(1, 1, 1, 20, 20, 264)
    for odd in (
        (q[:, :, :few], k, v, None),
        (*wide, None),
        (q.double(), k.double(), v.double(), None),
        (q, k.bfloat16(), v.bfloat16(), None),
        (q, k, v, mask.bfloat16()),
        (q, k, v, mask.long()),
        (q, k, v, mask[0, 0]),
        (q, k, v, mask[..., :19]),
        (q, k, v, mask.expand(2, 3, 1, 20)),
        (q[:1], k, v, None),
        (q[:, :3], k, v, None),
        (q, k, v[..., :16], None),
        (q[:, :, :0], k, v, None),
        (q, k[:, :, :0], v[:, :, :0], None),
        (q.clone().requires_grad_(), k, v, None),
        (q, k, v, mask.clone().requires_grad_()),
        (q.to("meta"), k.to("meta"), v.to("meta"), None),
        (nn.Parameter(q), k, v, None),
        (torch._neg_view(q), k, v, None),
    ):
        assert cpu_attention.attention(*odd, 1.0) is None  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_attention.attention(q, k, v, None, 1.0) is None


# -- in models --------------------------------------------------------------------------------------------------------


class Calls:
    """Counts what the kernel serves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._given = cpu_attention.attention
        monkeypatch.setattr(cpu_attention, "attention", self)

    def __call__(self, *args: object, **kwargs: object) -> Tensor | None:
        out = self._given(*args, **kwargs)  # type: ignore[arg-type]
        self.count += out is not None
        return out


def ids(length: int = 20) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m.__dict__.get("forward"), AttentionForward)]


def hidden(model: nn.Module, **inputs: Tensor) -> list[Tensor]:
    """What the attention blocks of a model return, before the Linear behind them."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0].detach().clone())) for block in blocks(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@needs_kernel
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_attend_by_the_kernel(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    report = qk.quantize_(model, "w8a8")
    assert len(blocks(model)) == 2
    assert "attention by a kernel" in str(report.to_dict())
    mask = torch.ones(2, 20, dtype=torch.long)
    if padded:
        mask[0, 13:] = 0
    calls = Calls(monkeypatch)
    got = hidden(model, input_ids=ids(), attention_mask=mask)
    assert calls.count == 2
    monkeypatch.setattr(cpu_attention, "available", lambda: False)
    wanted = hidden(model, input_ids=ids(), attention_mask=mask)
    assert calls.count == 2
    # The first block reads the same integers either way; a rounding of fp32 may move one of those behind it.
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)
    similar = torch.cosine_similarity(got[1].flatten(), wanted[1].flatten(), 0)
    assert float(similar) > 0.9999


@needs_kernel
@pytest.mark.parametrize("family", ["distilbert", "llama", "qwen2", "gemma", "phi3", "gpt2", "opt"])
def test_models_attend_by_the_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    qk.quantize_(model, "w8a8")
    calls = Calls(monkeypatch)
    with torch.no_grad():
        got = model(input_ids=ids())[0]
        served = calls.count
        monkeypatch.setattr(cpu_attention, "available", lambda: False)
        wanted = model(input_ids=ids())[0]
    assert served == len(blocks(model))
    assert float(torch.cosine_similarity(got.flatten(), wanted.flatten(), 0)) > 0.9999


@needs_kernel
def test_unfused_models_attend_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    qk.quantize_(model, "w8a8")
    qk.unfuse_(model)
    calls = Calls(monkeypatch)
    with torch.no_grad():
        model(input_ids=ids())
    assert calls.count == 0
    assert not blocks(model)


@needs_kernel
def test_training_and_gradients_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    qk.quantize_(model, "w8a8")
    calls = Calls(monkeypatch)
    embedded = seeded(2, 20, 32).requires_grad_()
    model(inputs_embeds=embedded).last_hidden_state.sum().backward()
    assert embedded.grad is not None
    with torch.no_grad():
        model.train()(input_ids=ids())  # with dropout
    assert calls.count == 0


@needs_kernel
@pytest.mark.parametrize("given", [None, False, True])
def test_causal_as_transformers_decides(given: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = pytest.importorskip("transformers.integrations.sdpa_attention").sdpa_attention_forward
    module = nn.Module()
    calls = Calls(monkeypatch)
    q, k, v = three(2, 4, 4, 20, 30, 16)
    for own in (None, False, True):
        if own is not None:
            module.is_causal = own
        for mask in (None, seeded(2, 1, 20, 30) > 0):
            wanted, _ = sdpa(module, q, k, v, mask, scaling=0.3, is_causal=given)
            got, _ = attention._attention(sdpa, module, q, k, v, mask, scaling=0.3, is_causal=given)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert calls.count == 6


@needs_kernel
def test_the_report_names_it_where_blocks_choose_it() -> None:
    model = build("bert")
    model.set_attn_implementation("eager")
    report = qk.quantize_(model, "w8a8")
    assert "attention by a kernel" not in str(report.to_dict())
