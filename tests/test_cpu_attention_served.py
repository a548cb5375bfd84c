"""Whom attention on the CPU serves, and models that run it."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY, build
from heads import three
from helpers import seeded
from torch import Tensor, nn

import qkernels as qk
from qkernels import _C, attention, cpu_attention, reference
from qkernels.attention import AttentionForward

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


def test_attention_of_few_queries(isa: str) -> None:
    """Where it was measured to be worth it: on AVX2, in 16 bits, or where three heads and more share their keys."""
    few = isa in ("avx2", "avxvnni")
    assert _C.has_attention_of_few() is few
    for tokens in (1, cpu_attention.FEWEST_QUERIES - 1):
        for heads, dtype, worth in ((4, torch.float32, False), (6, torch.float32, few), (2, torch.bfloat16, few)):
            q, k, v = three(2, heads, 2, tokens, 30, 32, dtype)
            got = cpu_attention.attention(q, k, v, None, 0.2)
            assert (got is not None) is worth
            if got is not None:
                wanted = reference.attention(q, k, v, None, 0.2)
                assert torch.allclose(got.float(), wanted.float(), rtol=2.0**-7, atol=1e-4)


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
