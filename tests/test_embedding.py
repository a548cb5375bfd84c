"""QuantEmbedding, and heads that share its table."""

from __future__ import annotations

import copy
import io
import pickle

import helpers as H
import pytest
import torch
from torch import nn

from qkernels import _C, reference
from qkernels.nn import QuantEmbedding, QuantLinear, TiedQuantLinear
from qkernels.scheme import Scheme

V, K = 130, 70
W8A16 = Scheme(activation_bits=None)


def table(seed: int = 0, rows: int = V, features: int = K) -> nn.Embedding:
    return nn.Embedding.from_pretrained(H.seeded(rows, features, seed=seed), padding_idx=3)


def pair(seed: int = 0, scheme: str = "w8a8", bias: bool = True) -> nn.ModuleDict:
    embedding = QuantEmbedding.from_embedding(table(seed))
    given = {"act_scale": torch.tensor(0.02)} if scheme == "w8a8_static" else {}
    head = embedding.shared_head(H.seeded(V, seed=seed + 1) if bias else None, scheme=scheme, **given)
    return nn.ModuleDict({"embedding": embedding, "head": head})


def check_pair(model: nn.ModuleDict, seed: int) -> None:
    """Table and head answer as two separate modules over the same integers would."""
    made = reference.quantize_weight(H.seeded(V, K, seed=seed), W8A16)
    ids = torch.tensor([[0, 1, 63], [64, V - 1, 3]])
    expected = made["weight"][ids].float() * made["weight_scale"][ids].unsqueeze(-1)
    H.assert_bits_equal(model["embedding"](ids), expected.to(model["embedding"].dtype))
    head = model["head"]
    x = H.hazard_rows(K)
    given = {"act_scale": torch.tensor(0.02)} if "act_scale" in head.canonical() else {}
    bias = head.bias
    assert (bias is None) == ("bias" not in head.canonical())
    extra = {} if bias is None else {"bias": H.seeded(V, seed=seed + 1)}
    H.assert_bits_equal(head(x), reference.linear(x, {**made, **extra, **given}, head.scheme, K))
    assert head._table is model["embedding"]


@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
@pytest.mark.parametrize("shared", (False, True))
def test_embedding_lookup_is_row_times_scale(dtype, shared):
    source = table().to(dtype)
    layer = QuantEmbedding.from_embedding(source)
    if shared:
        layer.shared_head()
    made = reference.quantize_weight(source.weight, W8A16)
    for ids in (
        torch.arange(V),
        torch.tensor(5),
        torch.tensor([], dtype=torch.int64),
        torch.randint(0, V, (2, 3, 4)),
        torch.randint(0, V, (6, 5))[:, ::2].t(),
        torch.tensor([1, 1, V - 1], dtype=torch.int32),
    ):
        flat = ids.long()
        expected = (made["weight"][flat].float() * made["weight_scale"][flat].unsqueeze(-1)).to(dtype)
        H.assert_bits_equal(layer(ids), expected)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (V, K, 3)
    H.assert_bits_equal(layer.weight.clone(), layer(torch.arange(V)))
    back = layer.to_embedding()
    assert type(back) is nn.Embedding
    assert back.padding_idx == 3
    H.assert_bits_equal(back(torch.arange(V)).detach(), layer(torch.arange(V)))


@pytest.mark.parametrize("features", (1, 3, 4, 63, 64, 65))
def test_embedding_packed_lookup_tails(features):
    layer = QuantEmbedding.from_embedding(table(rows=67, features=features))
    expected = layer(torch.arange(67))
    layer.shared_head()
    assert set(dict(layer.named_buffers())) == {"packed", "colsum", "weight_scale"}
    H.assert_bits_equal(layer(torch.arange(67)), expected)


@pytest.mark.parametrize("shared", (False, True))
def test_embedding_bad_ids(shared):
    layer = QuantEmbedding.from_embedding(table())
    if shared:
        layer.shared_head()
    for ids, error, word in (
        (torch.tensor([0.0]), TypeError, "float32"),
        (torch.tensor([True]), TypeError, "bool"),
        ([1], TypeError, "list"),
        (torch.tensor([V]), IndexError, "range"),
        (torch.tensor([-1]), IndexError, "range"),
    ):
        with pytest.raises(error, match=word):
            layer(ids)


def test_embedding_bad_arguments():
    with pytest.raises(ValueError, match="max_norm"):
        QuantEmbedding.from_embedding(nn.Embedding(3, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="meta"):
        QuantEmbedding.from_embedding(nn.Embedding(3, 4, device="meta"))
    with pytest.raises(ValueError, match="finite"):
        QuantEmbedding.from_embedding(nn.Embedding.from_pretrained(torch.full((3, 4), float("inf"))))
    made = reference.quantize_weight(torch.ones(3, 4), W8A16)
    with pytest.raises(ValueError, match="padding_idx"):
        QuantEmbedding(3, 4, made, padding_idx=3)
    with pytest.raises(ValueError, match="weight: expected shape"):
        QuantEmbedding(4, 4, made)
    assert QuantEmbedding(3, 4, made, padding_idx=-1).padding_idx == 2
    layer = QuantEmbedding.from_embedding(table())
    for scheme in ("w4a8", "w4a16"):
        with pytest.raises(ValueError, match="8-bit"):
            layer.shared_head(scheme=scheme)
    with pytest.raises(ValueError, match="bias"):
        layer.shared_head(torch.zeros(V + 1))
    assert set(dict(layer.named_buffers())) == {"table", "weight_scale"}, "a refused head changed the table"
    layer.shared_head()
    with pytest.raises(ValueError, match="other head"):
        layer.shared_head(scheme="w8a16")


@pytest.mark.parametrize("scheme", ("w8a8", "w8a8_static", "w8a16"))
@pytest.mark.parametrize("bias", (False, True))
def test_head_shares_one_table(isa, scheme, bias):
    model = pair(scheme=scheme, bias=bias)
    check_pair(model, 0)
    head = model["head"]
    assert isinstance(head, TiedQuantLinear)
    assert isinstance(head, QuantLinear)
    if scheme != "w8a16":
        assert head.kernel == f"w8a8.{isa}"
        head(H.seeded(1, K))
        H.assert_ran("w8a8", isa, 1)
    own = {name for name, _ in head.named_buffers()}
    assert own == {name for name in ("bias", "act_scale") if name in head.canonical()}
    total = sum(t.nbytes for t in model.buffers())
    assert total <= _C.packed_w8_bytes(V, K) + 3 * 4 * V + 4, "the table is resident twice"
    x = H.seeded(3, K).requires_grad_()
    head(x).sum().backward()
    torch.testing.assert_close(x.grad, model["embedding"].weight.clone().sum(0).expand(3, K))
    H.assert_bits_equal(head.weight.clone(), model["embedding"].weight.clone())


def test_two_heads_share_one_table():
    embedding = QuantEmbedding.from_embedding(table())
    first, second = embedding.shared_head(), embedding.shared_head(H.seeded(V))
    x = H.seeded(3, K)
    H.assert_bits_equal(first(x) + H.seeded(V), second(x))


def test_state_dict_names_the_table_twice_and_stores_it_once():
    model = pair()
    state = model.state_dict()
    assert set(state) == {"embedding.weight", "embedding.weight_scale", "head.weight", "head.weight_scale", "head.bias"}
    assert state["embedding.weight"] is state["head.weight"]
    assert state["embedding.weight_scale"] is state["head.weight_scale"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert buffer.tell() < 1.5 * V * K + 3 * 4 * V + 6000
    H.assert_bits_equal(state["head.weight"], reference.quantize_weight(H.seeded(V, K), W8A16)["weight"])


def test_state_dict_that_was_written_to_is_not_handed_out_again():
    model = pair()
    state = model.state_dict()
    state["embedding.weight"].zero_()
    assert model.state_dict()["embedding.weight"].any()
    with torch.inference_mode():
        assert model.state_dict()["head.weight"].any()


@pytest.mark.parametrize("scheme", ("w8a8", "w8a8_static", "w8a16"))
@pytest.mark.parametrize("assign", (False, True))
def test_load_keeps_the_table_shared(scheme, assign):
    model, source = pair(scheme=scheme), pair(seed=4, scheme=scheme)
    check_pair(model, 0)
    model.load_state_dict(source.state_dict(), assign=assign)
    check_pair(model, 4)
    model.to("meta")
    model.load_state_dict(pair(seed=9, scheme=scheme).state_dict(), assign=True)
    check_pair(model, 9)
    empty = model.to("meta").to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    check_pair(empty, 4)
    assert sum(t.nbytes for t in empty.buffers()) == sum(t.nbytes for t in source.buffers())


@pytest.mark.parametrize("which", ("embedding", "head"))
def test_load_of_one_side_is_seen_by_both(isa, which):
    model, source = pair(bias=False), pair(seed=4, bias=False)
    check_pair(model, 0)
    model[which].load_state_dict(source[which].state_dict())
    check_pair(model, 4)
    state = source[which].state_dict()
    state["weight"] = torch.full((V, K), -128, dtype=torch.int8)
    model[which].load_state_dict(state)
    x = -torch.ones(2, K)
    H.assert_bits_equal(model["head"](x), reference.linear(x, state, Scheme(), K))


@pytest.mark.parametrize("scheme", ("w8a8", "w8a16"))
def test_copies_share_their_own_table(scheme):
    model = pair(scheme=scheme)
    check_pair(model, 0)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert twin["head"]._table is twin["embedding"]
        assert twin["embedding"] is not model["embedding"]
        check_pair(twin, 0)
        assert sum(t.nbytes for t in twin.buffers()) == sum(t.nbytes for t in model.buffers())
        twin["embedding"].load_state_dict(pair(seed=4)["embedding"].state_dict())
        twin["head"].bias = None
        H.assert_bits_equal(twin["embedding"](torch.arange(V)), pair(seed=4)["embedding"](torch.arange(V)))
        check_pair(model, 0)


@pytest.mark.parametrize("move", (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.share_memory()))
def test_moves_keep_the_table_shared(move):
    model = pair()
    check_pair(model, 0)
    move(model)
    check_pair(model, 0)
    assert model["head"].dtype == model["embedding"].dtype
    move(model["head"])
    check_pair(model, 0)
    assert model["embedding"].weight_scale.dtype == torch.float32


def test_head_alone_is_a_whole_layer():
    model = pair()
    head = copy.deepcopy(model["head"])
    x = H.seeded(3, K)
    H.assert_bits_equal(head(x), model["head"](x))
    other = QuantLinear(K, V, head.state_dict(), "w8a8")
    H.assert_bits_equal(other(x), head(x))


def test_empty_embedding_loads():
    layer = QuantEmbedding.empty(V, K, padding_idx=3)
    assert layer(torch.tensor([1, 2], device="meta")).shape == (2, K)
    source = QuantEmbedding.from_embedding(table())
    layer.load_state_dict(source.state_dict(), assign=True)
    H.assert_bits_equal(layer(torch.arange(V)), source(torch.arange(V)))
    with pytest.raises(RuntimeError, match=r"weight: expected dtype torch.int8"):
        layer.load_state_dict(table().state_dict(), strict=False)


def test_lookup_kernel_equals_a_gather_and_a_product(isa: str, threads: int) -> None:
    """Canonical and packed tables, every dtype, odd widths, repeated and no ids."""
    for rows, width in [(1, 1), (70, 37), (130, 200), (65, 515)]:
        codes = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
        scale = torch.rand(rows) + 0.01
        ids = torch.randint(0, rows, (3, 5))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layer = QuantEmbedding(rows, width, {"weight": codes, "weight_scale": scale}, dtype=dtype)
            expected = (codes[ids].float() * scale[ids].unsqueeze(-1)).to(dtype)
            H.assert_bits_equal(layer(ids), expected)
            assert _C.last_kernel() == f"embedding.{isa}"
            layer.shared_head()
            H.assert_bits_equal(layer(ids.to(torch.int32)), expected)
            assert layer(ids[:0]).shape == (0, 5, width)


def test_lookup_kernel_refuses_ids_outside_the_table() -> None:
    layer = QuantEmbedding(4, 8, {"weight": torch.ones(4, 8, dtype=torch.int8), "weight_scale": torch.ones(4)})
    for bad in (4, -1):
        with pytest.raises(IndexError, match=f"0 to 3, got {bad}"):
            layer(torch.tensor([0, bad]))
