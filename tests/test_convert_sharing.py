"""Conversion of modules and weights that sit in several places, tied heads above all."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn
from toys import IDS, all_tensors, toy

import qkernels as qk
from qkernels.nn import QuantEmbedding, QuantLinear


def test_quantize_module_in_two_places_stays_one():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, shared)})
    report = qk.quantize_(model)
    assert model["a"] is model["b"][0] is model["b"][1]
    assert len(report.quantized) == 1
    assert qk.quantize_(nn.Sequential(nn.Sequential(nn.Linear(4, 4)))).bytes_after > 0


def test_quantize_include_by_the_second_name_of_a_shared_module():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    qk.quantize_(model, include=("b",))
    assert isinstance(model["a"], QuantLinear)
    assert model["a"] is model["b"]
    assert type(model["c"]) is nn.Linear


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16"])
def test_quantize_shared_weight_stays_shared(scheme):
    model = nn.ModuleDict({"a": nn.Linear(40, 24), "b": nn.Linear(40, 24)})
    model["b"].weight = model["a"].weight
    x = seeded(3, 40)
    lone = copy.deepcopy(nn.Sequential(model["b"]))
    report = qk.quantize_(model, scheme)
    qk.quantize_(lone, scheme)
    assert_bits_equal(model["b"](x), lone(x))
    assert report["b"].bytes_after == 24 * 4  # its bias
    assert "shares the weight of a" in report["b"].reason
    qk.dequantize_(model)
    assert model["a"].weight is model["b"].weight


def test_quantize_shared_weight_of_which_one_is_excluded():
    model = nn.ModuleDict({"a": nn.Linear(40, 24), "b": nn.Linear(40, 24)})
    model["b"].weight = model["a"].weight
    report = qk.quantize_(model, exclude=("a",))
    assert "a uses it" in report["b"].reason
    assert report["a"].bytes_after == report["a"].bytes_before


def test_quantize_tied_head_shares_one_int8_table():
    model = toy(tied=True, head_bias=True)
    y = model(IDS)
    report = qk.quantize_(model, embeddings=True)
    assert isinstance(model.embed, QuantEmbedding)
    assert isinstance(model.lm_head, QuantLinear)
    assert report["lm_head"].bytes_after == 50 * 4
    assert report["lm_head"].scheme == "w8a8"
    assert "embed" in report["lm_head"].reason
    assert torch.nn.functional.cosine_similarity(model(IDS).flatten(), y.flatten(), dim=0) > 0.99
    assert_bits_equal(model.lm_head.weight.detach().clone(), model.embed.weight.detach().clone())


@pytest.mark.parametrize(
    "scheme, expected", [("w8a16", "w8a16"), ("w4a16", "w8a16"), ("w4a8", "w8a8"), ("w4a8_intscale", "w8a8")]
)
def test_quantize_tied_head_keeps_the_activations_of_the_scheme(scheme, expected):
    report = qk.quantize_(toy(tied=True), scheme, embeddings=True)
    assert report["lm_head"].scheme == expected


def test_quantize_tied_head_named_by_the_callers_exclude_stays_float():
    model = toy(tied=True)
    report = qk.quantize_(model, embeddings=True, exclude=("lm_head",))
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.embed, QuantEmbedding)
    assert "lm_head uses it" in report["embed"].reason
    assert report.bytes_after == sum(
        {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in all_tensors(model)}.values()
    )


def test_quantize_tied_head_by_override():
    model = toy(tied=True)
    report = qk.quantize_(model, embeddings=True, overrides={"lm_head": "w4a16"})
    assert report["lm_head"].scheme == "w4a16"
    assert "own" in report["lm_head"].reason
    model = toy(tied=True)
    assert not qk.quantize_(model, embeddings=True, overrides={"lm_head": None})["lm_head"].quantized
    with pytest.raises(ValueError, match="embed"):
        qk.quantize_(toy(), embeddings=True, overrides={"embed": "w4a16"})


def test_quantize_tied_head_without_embeddings_says_the_table_stays():
    model = toy(tied=True)
    report = qk.quantize_(model, exclude=())
    assert report["lm_head"].quantized
    assert "embed uses it" in report["lm_head"].reason
    assert type(model.embed) is nn.Embedding


def test_quantize_embedding_hazards():
    model = nn.ModuleDict(
        {"a": nn.Embedding(10, 8, padding_idx=3), "b": nn.Embedding(10, 8, max_norm=1.0), "c": nn.EmbeddingBag(10, 8)}
    )
    report = qk.quantize_(model, embeddings=True)
    assert model["a"].padding_idx == 3
    assert "max_norm" in report["b"].reason
    assert "EmbeddingBag" in report["c"].reason
