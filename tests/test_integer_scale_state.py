"""Layers of ``group_scales="int"`` in models: stored, copied, moved, shown and taken back."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import assert_bits_equal, seeded
from test_integer_scales import INT, by_scheme, varied
from toys import IDS, Toy, toy

import qkernels as qk
from qkernels import cli, reference
from qkernels.nn import QuantEmbedding, QuantLinear
from qkernels.scheme import Scheme

NAMES = ["weight", "weight_scale", "weight_multiplier", "bias"]


def quantized(scheme: Scheme, **options: object) -> Toy:
    model = toy(tied=True, head_bias=True)
    qk.quantize_(model, scheme, **options)
    return model


def assert_same(model: Toy, other: Toy) -> None:
    """Equal states and outputs, to the bit."""
    state, expected = other.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert_bits_equal(state[name], tensor, name)
    assert_bits_equal(other(IDS), model(IDS))


@by_scheme
def test_save_and_load_are_exact(scheme: Scheme, tmp_path: Path) -> None:
    model = quantized(scheme)
    qk.save(model, tmp_path / "out")
    other = Toy(tied=True, head_bias=True).eval()
    report = qk.load(other, tmp_path / "out")
    assert report["blocks.0.up"].scheme == scheme.name
    assert_same(model, other)
    manifest = json.loads((tmp_path / "out" / "qkernels.json").read_text())
    assert Scheme.from_dict(manifest["schemes"][scheme.name]) == scheme


@by_scheme
def test_copies_pickles_and_state_dicts_are_exact(scheme: Scheme) -> None:
    model = quantized(scheme)
    assert_same(model, copy.deepcopy(model))
    assert_same(model, pickle.loads(pickle.dumps(model)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = quantized(scheme)
    other.blocks[0]["up"] = QuantLinear.from_float(seeded(40, 24, seed=9), seeded(40, seed=9), scheme)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(model, other)


def test_state_has_multipliers_under_their_own_name() -> None:
    layer = quantized(INT).blocks[0]["down"]
    state = layer.state_dict()
    assert list(state) == NAMES
    assert (state["weight_multiplier"].dtype, tuple(state["weight_multiplier"].shape)) == (torch.uint8, (24, 1))
    assert layer.scheme.name == "w4a8_intscale"


@pytest.mark.parametrize(
    "name, bad, match",
    [
        ("weight_multiplier", 0, "1 to 8, got 0"),
        ("weight_multiplier", 9, "1 to 8, got 1 to 9"),
        ("weight_zero_point", 16, "0 to 15"),
    ],
)
def test_load_state_dict_refuses_what_takes_weights_out_of_a_byte(name: str, bad: int, match: str) -> None:
    layer = QuantLinear.from_float(varied(9, 256), None, INT.replace(weight_symmetric=False))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in before.items()}
    state[name][3, 1] = bad
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=f"{name}: expected values from {match}"):
            layer.load_state_dict(state, assign=assign)
        for key, tensor in layer.state_dict().items():
            assert_bits_equal(tensor, before[key], key)


def test_state_without_multipliers_is_refused_by_name() -> None:
    layer = QuantLinear.from_float(varied(9, 256), None, INT)
    state = layer.state_dict()
    del state["weight_multiplier"]
    with pytest.raises(RuntimeError, match="weight_multiplier"):
        layer.load_state_dict(state)
    tensors = reference.quantize_weight(varied(9, 256), INT)
    with pytest.raises(ValueError, match="weight_multiplier"):
        QuantLinear(256, 9, {name: t for name, t in tensors.items() if name != "weight_multiplier"}, INT)
    with pytest.raises(ValueError, match="weight_multiplier"):
        QuantLinear(256, 9, tensors, "w4a8")


def test_empty_layers_have_no_float_scales_of_groups() -> None:
    layer = QuantLinear.empty(256, 9, INT, bias=False, group_scale_dtype=torch.float16)
    assert layer.canonical()["weight_scale"].dtype == torch.float32
    source = QuantLinear.from_float(varied(9, 256), None, INT)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert_bits_equal(layer(seeded(3, 256)), source(seeded(3, 256)))


@pytest.mark.parametrize("scheme", [INT, INT.replace(weight_symmetric=False)], ids=lambda s: s.name)
def test_report_counts_a_byte_per_group_and_four_per_channel(scheme: Scheme) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 48))
    report = qk.quantize_(model, scheme)
    stored = sum(t.nbytes for t in model[0].state_dict().values())
    assert stored == 48 * 128 + 48 * 4 + 48 * 2 * (1 if scheme.weight_symmetric else 2) + 48 * 4
    assert report.bytes_after >= stored  # a kernel may pad
    assert report.bytes_after == sum(qk.report.measure(model).values())


def test_dequantize_gives_back_what_the_layer_stands_for() -> None:
    model = quantized(INT)
    layer = model.blocks[1]["up"]
    expected = reference.dequantize_weight(layer.canonical(), INT, 24)
    qk.dequantize_(model)
    assert type(model.blocks[1]["up"]) is torch.nn.Linear
    assert_bits_equal(model.blocks[1]["up"].weight.detach(), expected)


def test_tables_and_their_tied_heads_stay_eight_bit() -> None:
    model = quantized(INT, embeddings=True)
    assert isinstance(model.embed, QuantEmbedding)
    assert model.lm_head.scheme == Scheme.from_preset("w8a8")
    with pytest.raises(ValueError, match="overrides: expected an 8-bit scheme per channel"):
        quantized(INT, embeddings=True, overrides={"embed": INT})


def test_plan_and_sensitivity_take_the_scheme() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).eval()
    data = [seeded(16, 64)]
    ranking = qk.sensitivity(model, data, INT)
    assert {row.scheme for row in ranking.layers} == {"w4a8_intscale"}
    assert all(0.0 < row.harm < 0.05 for row in ranking.layers)
    smallest = qk.plan(model, data, max_loss=1.0, schemes=("w8a8", INT))
    assert smallest.share(INT) == 1.0
    assert qk.quantize_(model, "w8a8", overrides=smallest.overrides).bytes_after == smallest.bytes


def test_commands_take_the_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    from qkernels import hf

    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "float")
    options = ["--scheme", "w4a8_intscale", "--group-size", "16", "--asymmetric-weights", "--algorithm", "hqq"]
    assert cli.main(["quantize", str(tmp_path / "float"), "-o", str(tmp_path / "out"), *options, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["report"]
    scheme = INT.replace(group_size=16, weight_symmetric=False)
    assert {layer["scheme"] for layer in made["layers"] if layer["scheme"]} == {scheme.name}
    assert cli.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made
    loaded = hf.load_quantized(tmp_path / "out")
    layer = loaded.encoder.layer[0].output.dense
    assert (layer.scheme, layer.canonical()["weight_multiplier"].shape) == (scheme, (32, 3))
