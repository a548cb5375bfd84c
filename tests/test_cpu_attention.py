"""Attention on the CPU: every tier against the reference, within the bound of qkernels/_attention.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from heads import check, three
from helpers import assert_bits_equal, seeded

from qkernels import cpu_attention, reference


@pytest.fixture
def kernel(isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tier that has the kernel, which serves any number of queries."""
    if isa == "scalar":
        pytest.skip("the scalar tier leaves attention to torch")
    monkeypatch.setattr(cpu_attention, "FEWEST_QUERIES", 1)
    return isa


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
@pytest.mark.parametrize("size", [1, 30, 32, 64, 80, 150, 200, 256])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_attention_rows_that_see_nothing_are_zero(kernel: str, kind: str, dtype: torch.dtype) -> None:
    seen = seeded(2, 1, 30, 300, seed=5) > 0
    seen[:, :, 3] = False
    seen[0, :, 29] = False
    seen[1, :, 4, :290] = False  # whole parts of the keys, but not all
    mask = seen if kind == "bool" else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    got = check(*three(2, 4, 2, 30, 300, 64, dtype), mask, 0.2)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_large_and_small_scores(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = three(1, 2, 2, 20, 150, 32, dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_nan_stays_in_its_row(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = three(2, 2, 2, 20, 150, 32, dtype)
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


@pytest.mark.usefixtures("one_thread")  # gives back what the test sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_same_bits_for_any_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = three(3, 4, 2, 61, 300, 64, dtype)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(cpu_attention.attention(q, k, v, None, 0.2))
    assert results[0] is not None
    for other in results[1:]:
        assert other is not None
        assert_bits_equal(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_other_heads(kernel: str, dtype: torch.dtype) -> None:
    q, k, v = three(2, 4, 4, 50, 300, 32, dtype)
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
