"""Rotary embedding on the CPU: every tier against the definition, to the bit, and blocks that call it."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY, build
from helpers import assert_bits_equal, seeded
from torch import Tensor, nn

import qkernels as qk
from qkernels import _C, cpu_attention, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(
    batch: int, heads: int, groups: int, tokens: int, size: int, dtype: torch.dtype = torch.float32, angles: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys as Linears leave them, and cosines and sines of transformers, whose halves are equal."""
    q, k = (seeded(batch, tokens, n, size, seed=n).to(dtype).transpose(1, 2) for n in (heads, groups))
    half = seeded(angles, tokens, size // 2, seed=9) * 10
    angle = torch.cat((half, half), -1)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    turned = cpu_attention.rotary(q, k, cos, sin)
    assert turned is not None
    for got, x in zip(turned, (q, k), strict=True):
        assert_bits_equal(got, reference.rotary(x, cos, sin))
        assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 6, 14, 16, 18, 30, 32, 34, 64, 66, 80, 128, 256])
def test_rotary_of_any_size(isa: str, dtype: torch.dtype, size: int) -> None:
    for tokens in (1, 3):
        check(*inputs(2, 4, 2, tokens, size, dtype))
    assert _C.last_kernel() == f"rotary.{isa}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_of_many_tokens_and_threads(isa: str, threads: int, dtype: torch.dtype) -> None:
    for batch, angles in ((1, 1), (3, 1), (3, 3)):
        check(*inputs(batch, 9, 3, 129, 64, dtype, angles))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_of_halves_that_differ_and_other_strides(isa: str, dtype: torch.dtype) -> None:
    wide = seeded(2, 3, 5, 100, seed=3).to(dtype)
    q, k = wide[..., 1:65], wide[:, 1:, :, 3:67]
    cos, sin = seeded(2, 5, 80, seed=4).to(dtype)[..., :64], seeded(2, 5, 80, seed=5).to(dtype)[..., 7:71]
    check(q, k, cos, sin)
    check(q[:1, :, :3], k[:1, :, :3], cos[1:, 2:], sin[1:, 2:])
    check(k[..., 2:50].expand(2, 2, 5, 48), q[:, :1, :, :48], cos[1:, :, 9:57], sin[1:, :, 9:57])


def test_rotary_keeps_nan_infinity_and_signs_of_zero(isa: str) -> None:
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -1e-40, 3e38])
    for dtype in DTYPES:
        q = odd.to(dtype).repeat(8).view(1, 1, 1, 64).expand(1, 2, 2, 64).contiguous()
        angle = odd.to(dtype).repeat_interleave(8).view(1, 1, 64).expand(1, 2, 64).contiguous()
        check(q, q, angle, angle.flip(-1).contiguous())


def test_rotary_leaves_what_it_does_not_know() -> None:
    q, k, cos, sin = inputs(2, 4, 2, 5, 32)
    assert cpu_attention.rotary(q, k, cos, sin) is not None
    for others in (
        (q, k, cos.double(), sin.double()),
        (q, k.bfloat16(), cos, sin),
        (q.double(), k.double(), cos.double(), sin.double()),
        (q, k, cos[..., :16], sin[..., :16]),
        (q, k, cos, sin[:, :4]),
        (q, k[:, :, :3], cos, sin),
        (q[..., :31], k[..., :31], cos[..., :31], sin[..., :31]),
        (q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0]),
        (q[..., ::2], k[..., ::2], cos[..., :16], sin[..., :16]),
        (q[0], k[0], cos, sin),
        (q, k, cos.expand(3, 5, 32), sin.expand(3, 5, 32)),
        (q, k, cos, torch.cat((sin, sin), -1)[..., :32]),
        (q.clone().requires_grad_(), k, cos, sin),
        (torch._neg_view(q), k, cos, sin),
        (q.to("meta"), k.to("meta"), cos.to("meta"), sin.to("meta")),
        (q, k.to("meta"), cos, sin),
        (nn.Parameter(q), k, cos, sin),
    ):
        assert cpu_attention.rotary(*others) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_attention.rotary(q, k, cos, sin) is None


def test_rotary_refuses_nonsense() -> None:
    steps = (0, 0, 0)
    for sizes in ((0, 1, 1, 1, 2), (1, 1, 1, 1, 3), (1, 1, 0, 1, 2)):
        with pytest.raises(ValueError, match="expected"):
            _C.Rotary(sizes, steps, steps, steps, 0)
    with pytest.raises(ValueError, match="expected"):
        _C.Rotary((1, 1, 1, 1, 2), steps, steps, steps, 3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma"])
def test_blocks_turn_their_heads_by_the_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    report = qk.quantize_(model, "w8a16")
    served = []
    given = cpu_attention.rotary

    def rotary(*args: Tensor) -> tuple[Tensor, Tensor] | None:
        turned = given(*args)
        served.append(turned is not None)
        return turned

    ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        monkeypatch.setattr(cpu_attention, "rotary", lambda *args: None)
        expected = model(ids).logits
        monkeypatch.setattr(cpu_attention, "rotary", rotary)
        assert_bits_equal(model(ids).logits, expected)
    assert served
    assert all(served)
    assert "rotary embedding by a kernel" in str(report.to_dict())
