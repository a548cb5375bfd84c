"""Attention blocks whose rotary embedding and attention are looked up anew: what stays the same on a CPU.

The kernels themselves: test_cuda_attention.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from helpers import seeded
from torch import Tensor, nn

import qkernels as qk
from qkernels import attention, cuda_attention, reference
from qkernels.norms import NormForward

TURNING = ("llama", "qwen2", "gemma", "phi3")
"""Families that look both up by name."""


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m.__dict__.get("forward"), attention.AttentionForward)]


def ids(length: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


class Recorder:
    """Counts calls of what would run on a GPU, and answers them by the reference."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turned, self.attended, self.appended = 0, 0, 0
        monkeypatch.setattr(cuda_attention, "rotary", self.rotary)
        monkeypatch.setattr(cuda_attention, "attention", self.attention)
        monkeypatch.setattr(cuda_attention, "append", self.append)

    def rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.turned += 1
        return reference.rotary(q, cos, sin), reference.rotary(k, cos, sin)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        self.attended += 1
        return reference.attention(q, k, v, mask, scale)

    def append(self, keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> bool:
        self.appended += 1
        reference.append(keys, values, length, key, value)
        return True


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_is_that_of_transformers(dtype: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = seeded(2, 4, 5, 16).to(dtype), seeded(2, 2, 5, 16, seed=1).to(dtype)
    cos, sin = seeded(2, 5, 16, seed=2).to(dtype), seeded(2, 5, 16, seed=3).to(dtype)
    wanted = llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.equal(reference.rotary(q, cos, sin), wanted[0])
    assert torch.equal(reference.rotary(k, cos, sin), wanted[1])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(masked: bool) -> None:
    q, k, v = seeded(2, 6, 3, 8), seeded(2, 2, 11, 8, seed=1), seeded(2, 2, 11, 8, seed=2)
    mask = (seeded(2, 1, 3, 11, seed=3) > 0) | (torch.arange(11) == 2) if masked else None
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(reference.attention(q, k, v, mask, 0.3), wanted.float().transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, k, v = seeded(1, 2, 2, 8), seeded(1, 1, 4, 8, seed=1), seeded(1, 1, 4, 8, seed=2)
    mask = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    mask[:, :, 1] = False
    y = reference.attention(q, k, v, mask, 1.0)
    assert torch.equal(y[:, 1], torch.zeros_like(y[:, 1]))
    assert bool((y[:, 0] != 0).all())


# -- which blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TURNING)
def test_blocks_call_the_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    qk.quantize_(model, "w8a8")
    assert len(blocks(model)) == 2
    wanted = logits(model, ids())
    record = Recorder(monkeypatch)
    got = logits(model, ids())
    assert record.turned == 2
    assert record.attended == 0, "seven queries without a mask see only what is before them"
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "t5"])
def test_blocks_of_other_kinds_keep_their_rotary_embedding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    qk.quantize_(model, "w8a8")
    record = Recorder(monkeypatch)
    if family == "bert":
        with torch.no_grad():
            model(ids())
    assert record.turned == 0


def test_decoding_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    qk.quantize_(model, "w8a8")
    wanted = model.generate(ids(), max_new_tokens=5, do_sample=False)
    record = Recorder(monkeypatch)
    got = model.generate(ids(), max_new_tokens=5, do_sample=False)
    assert record.attended == 2 * 4, "two layers, four tokens behind the first"
    assert torch.equal(got, wanted)


def test_a_static_cache_hides_what_is_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    qk.quantize_(model, "w8a8")
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    wanted = model.generate(ids(), **options)
    record = Recorder(monkeypatch)
    got = model.generate(ids(), **options)
    assert record.attended >= 2 * 4
    assert record.appended >= 2 * 4
    assert torch.equal(got, wanted)


def test_append_is_that_of_a_static_layer() -> None:
    layer = pytest.importorskip("transformers.cache_utils").StaticLayer(max_cache_len=9)
    keys, values = torch.zeros(2, 3, 9, 8), torch.zeros(2, 3, 9, 4)
    length = torch.tensor(0)
    for tokens in (4, 1, 1, 3):
        key, value = seeded(2, 3, tokens, 8, seed=tokens), seeded(2, 3, tokens, 4, seed=tokens + 9)
        reference.append(keys, values, length, key, value)
        for got, wanted in zip(layer.update(key, value), (keys, values), strict=True):
            assert torch.equal(got, wanted)
        assert layer.cumulative_length == length


def test_the_first_tokens_and_other_caches_take_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = pytest.importorskip("transformers.cache_utils")
    model = build("llama")
    qk.quantize_(model, "w8a8")
    record = Recorder(monkeypatch)

    class Own(caches.StaticCache):  # type: ignore[misc, name-defined]
        pass

    with torch.no_grad():
        for kind, appended in ((caches.StaticCache, 2), (Own, 0)):
            cache, record.appended = kind(config=model.config, max_cache_len=12), 0
            model(ids(5), past_key_values=cache)
            assert record.appended == 0, "a layer that is not there yet"
            model(ids(1), past_key_values=cache)
            assert record.appended == appended
            assert [int(layer.cumulative_length) for layer in cache.layers] == [6, 6]
        record.appended = 0
        model(ids(5), past_key_values=caches.DynamicCache(config=model.config))
    assert record.appended == 0


def test_questions_about_functions_stay_on_the_cpu() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    with torch.device("meta"):  # whose tensors have no values to compare
        assert attention._turns_halves(llama.apply_rotary_pos_emb)


def test_models_without_quantized_linears_keep_their_blocks() -> None:
    model = build("llama")
    qk.fuse_(model)
    assert not blocks(model)


def test_unfuse_takes_it_away() -> None:
    model = build("llama")
    qk.quantize_(model, "w8a8")
    qk.unfuse_(model)
    assert not blocks(model)
    qk.fuse_(model)
    assert len(blocks(model)) == 2


def test_a_forward_of_somebody_else_stays() -> None:
    model = build("llama")
    block = model.model.layers[0].self_attn
    given = type(block).forward.__get__(block)
    block.forward = given
    qk.quantize_(model, "w8a8")
    assert block.forward is given
    assert len(blocks(model)) == 1


def test_a_second_conversion_reads_the_blocks_as_the_first() -> None:
    once, twice = build("llama"), build("llama")
    qk.quantize_(once, "w8a8")
    qk.quantize_(twice, "w8a8", include=("*.o_proj",))
    qk.quantize_(twice, "w8a8")
    assert torch.equal(logits(once, ids()), logits(twice, ids()))
    groups = [{id(m._group[0]) for m in model.modules() if getattr(m, "_group", None)} for model in (once, twice)]
    assert len(groups[0]) == len(groups[1])


# -- what happens to blocks -------------------------------------------------------------------------------------------


def test_copies_call_their_own_children() -> None:
    model = build("llama")
    qk.quantize_(model, "w8a8")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.Embedding):
                module.weight.zero_()
    assert len(blocks(twin)) == 2
    assert all(m.__dict__["forward"]._module is m for m in blocks(twin))
    assert not torch.equal(logits(model, ids()), logits(twin, ids()))


def test_models_are_pickled() -> None:
    model = build("llama")
    qk.quantize_(model, "w8a8")
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    again = pickle.load(buffer)
    assert len(blocks(again)) == 2
    assert torch.equal(logits(model, ids()), logits(again, ids()))


def test_gradients_go_the_usual_way() -> None:
    model = build("llama")
    qk.quantize_(model, "w8a8")
    x = seeded(1, 4, 32).requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    for block in blocks(model):
        del block.__dict__["forward"]
    other = x.detach().clone().requires_grad_()
    model(inputs_embeds=other).logits.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, other.grad)


def test_compiled_models_give_the_same() -> None:
    model = build("llama")
    qk.quantize_(model, "w8a8")
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(ids()).logits
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), NormForward):
            del module.__dict__["forward"]  # compiled models have the norms of their classes
    assert torch.equal(compiled, logits(model, ids()))


# -- functions that are rewired ---------------------------------------------------------------------------------------


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of neighbours instead of halves."""
    return q * cos.unsqueeze(1), k * sin.unsqueeze(1)


class Interleaved(nn.Module):
    """Has a rotary embedding of that name, of another kind."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """Turned."""
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_another_embedding_of_that_name_stays() -> None:
    assert not attention.attends(Interleaved())


def test_a_decorator_without_a_closure_stays() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")

    class Odd(llama.LlamaAttention):  # type: ignore[misc,name-defined]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return None

    Odd.forward.__wrapped__ = llama.LlamaAttention.forward  # type: ignore[attr-defined]
    assert attention._rewired(Odd.forward) is None
    assert attention._rewired(llama.LlamaAttention.forward) is not None


def test_the_module_of_the_class_is_left_alone() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    before = dict(vars(llama))
    model = build("llama")
    qk.quantize_(model, "w8a8")
    logits(model, ids())
    assert all(vars(llama)[name] is value for name, value in before.items())


def test_the_table_of_functions_is_that_of_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    table = attention._Interfaces(llama.ALL_ATTENTION_FUNCTIONS)
    assert table["flex_attention"] is llama.ALL_ATTENTION_FUNCTIONS["flex_attention"]
    assert table.valid_keys() == llama.ALL_ATTENTION_FUNCTIONS.valid_keys()
    with pytest.raises(KeyError):
        table["none of that name"]


@pytest.mark.parametrize("odd", [{"softcap": 3.0}, {"position_bias": torch.zeros(1)}, {"dropout": 0.5}])
def test_options_that_no_kernel_knows_go_where_they_went(odd: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    record = Recorder(monkeypatch)
    seen: list[dict[str, Any]] = []

    def original(*args: Any, **kwargs: Any) -> str:
        seen.append(kwargs)
        return "theirs"

    q, k = seeded(1, 2, 1, 8), seeded(1, 1, 4, 8, seed=1)
    assert attention._attention(original, nn.Module(), q, k, k, None, scaling=0.5, **odd) == "theirs"
    assert record.attended == 0
    assert seen == [{"dropout": 0.0, "scaling": 0.5, **odd}]


def test_a_cpu_is_not_served() -> None:
    q, cos = seeded(1, 2, 1, 64).bfloat16(), seeded(1, 1, 64).bfloat16()
    assert cuda_attention.rotary(q, q, cos, cos) is None
    assert cuda_attention.attention(q, q, q, None, 1.0) is None
