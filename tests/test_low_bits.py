"""3-bit and 2-bit weights: the reference serves them and says so, every algorithm rounds to them, and they are the same
after a way to a file and back."""

from __future__ import annotations

import copy
import json
import struct

import pytest
import torch
from families import batches, build, error, output
from helpers import assert_bits_equal, hazard_rows, seeded
from test_gptq import correlated, output_error
from test_hostile_files import refuses, rewrite_file
from toys import IDS, Toy, toy

import qkernels as qk
from qkernels import reference
from qkernels.gptq import gptq_weight
from qkernels.nn import QuantLinear
from qkernels.scheme import PRESETS, Scheme

ASYMMETRIC = {"weight_symmetric": False}
KINDS = {"symmetric": {}, "zero point": ASYMMETRIC, "minimum": {**ASYMMETRIC, "weight_zero": "float"}}
SCHEMES = {
    f"w{bits} {kind}": Scheme(bits, "per_group", 16, activation_bits=None, **options)
    for bits in (3, 2)
    for kind, options in KINDS.items()
}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))


@by_scheme
@pytest.mark.parametrize("rows", (1, 2, 7))
@pytest.mark.parametrize("k", (8, 31, 72))
def test_layer_computes_its_float_weight_and_says_that_the_reference_serves(scheme, k, rows):
    w, x, bias = seeded(5, k, seed=k), seeded(rows, k, seed=3), seeded(5, seed=4)
    layer = QuantLinear.from_float(w, bias, scheme)
    assert layer.kernel == "reference"
    assert scheme.name in layer.reason
    values = reference.dequantize_weight(layer.canonical(), scheme, k)
    assert len(values.unique(dim=1).T.unique(dim=0)) > 1
    assert (layer.weight.float() - values).abs().max() == 0.0
    # k products and sums in fp32 on both sides
    torch.testing.assert_close(layer(x), x @ values.T + bias, rtol=k * 2.0**-22, atol=k * 2.0**-22)
    assert layer.canonical()["weight"].numel() == 5 * -(-k * scheme.weight_bits // 8)


@pytest.mark.parametrize("bits", (3, 2))
def test_layer_with_int8_inputs_keeps_the_contract_of_nan_rows(bits):
    scheme = Scheme(bits, "per_group", 32)
    layer = QuantLinear.from_float(seeded(4, 40), None, scheme)
    x = hazard_rows(40)
    y = layer(x)
    assert torch.equal(y.isnan().all(1), ~torch.isfinite(x).all(1))
    assert_bits_equal(y, reference.linear(x, layer.canonical(), scheme, 40))


@pytest.mark.parametrize("name", ("w3a16", "w2a16"))
def test_model_round_trip_by_state_dict_file_and_back_to_float(name, tmp_path):
    model = toy()
    before = sum(p.nbytes for p in model.parameters())
    report = qk.quantize_(model, name, exclude=("*.1.down", "lm_head"))
    scheme = PRESETS[name]
    assert {layer.kernel for layer in report.quantized} == {"reference"}
    assert all("no native kernel" in layer.reason for layer in report.quantized)
    for layer in report.quantized:
        rows, columns = layer.shape
        groups = -(-columns // scheme.resolve_group_size(columns))
        assert layer.bytes_after == rows * (-(-columns * scheme.weight_bits // 8) + 2 * groups + 4)  # bias: 4
    assert report.bytes_before == before
    assert report.bytes_after == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

    x = model(IDS)
    qk.save(model, tmp_path / "out")
    other = toy()
    loaded = qk.load(other, tmp_path / "out")
    assert [layer.scheme for layer in loaded.quantized] == [name] * 3
    again = copy.deepcopy(model)
    again.load_state_dict(other.state_dict())
    for copied in (other, again):
        assert_bits_equal(copied(IDS), x)
        for key, tensor in model.state_dict().items():
            assert_bits_equal(copied.state_dict()[key], tensor, key)
    qk.dequantize_(model)
    assert type(model.blocks[0]["up"]) is torch.nn.Linear
    torch.testing.assert_close(model(IDS), x, rtol=1e-5, atol=1e-5)


@by_scheme
@pytest.mark.parametrize("algorithm", ("mse", "hqq", "gptq"))
def test_every_algorithm_beats_rounding_to_nearest(algorithm, scheme):
    x, w = correlated(256, 72), seeded(24, 72, seed=5) * seeded(24, 72, seed=6).abs()
    plain = reference.quantize_weight(w, scheme)
    if algorithm == "gptq":
        tensors = gptq_weight(w, x.t() @ x, scheme)
        found, start = (output_error(x, w, t, scheme) for t in (tensors, plain))
    else:
        quantizer = {"mse": qk.MSE(), "hqq": qk.HQQ()}[algorithm](torch.nn.Module(), [], None)
        tensors = quantizer("", w, scheme)
        power = 2.4 if algorithm == "mse" else 0.7
        found, start = (
            float((reference.dequantize_weight(t, scheme, 72) - w).abs().pow(power).sum()) for t in (tensors, plain)
        )
    assert {k: (v.shape, v.dtype) for k, v in tensors.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    top = scheme.code_range[1]
    if "weight_zero_point" in tensors:
        assert int(tensors["weight_zero_point"].max()) <= top
    assert found < (0.99 if algorithm == "hqq" else 0.95) * start


@pytest.mark.parametrize("algorithm", ("rtn", "mse", "hqq", "awq", "gptq"))
@pytest.mark.parametrize("bits", (3, 2))
def test_every_algorithm_quantizes_a_model(algorithm, bits):
    model, data = build("llama", width=64, layers=1), batches("llama", count=4, rows=4)
    expected = output(model, data[0])
    scheme = Scheme(bits, "per_group", 16, activation_bits=None, weight_symmetric=False)
    report = qk.quantize_(model, scheme, algorithm=algorithm, calibration=data)
    assert {layer.scheme for layer in report.quantized} == {scheme.name}
    assert len(report.quantized) == 7
    assert 0.01 < error(model, data[0], expected) < (0.5 if bits == 3 else 1.0)


@pytest.mark.parametrize("bits, allowed", ((3, 7), (2, 3)))
def test_hostile_zero_points_beyond_the_codes_are_refused(bits, allowed, tmp_path):
    model = Toy(tied=True, head_bias=True).eval()
    scheme = Scheme(bits, "per_group", 8, activation_bits=None, weight_symmetric=False)
    qk.quantize_(model, scheme)
    qk.save(model, tmp_path / "out")
    content = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    begin, _ = header["blocks.0.up.weight_zero_point"]["data_offsets"]
    assert max(content[8 + length + begin :][:40]) <= allowed
    content[8 + length + begin + 3] = allowed + 1
    rewrite_file(tmp_path / "out", bytes(content))
    refuses(tmp_path / "out", f"blocks.0.up.weight_zero_point: expected values from 0 to {allowed}")


def test_packed_codes_of_another_width_are_refused(tmp_path):
    model = Toy(tied=True, head_bias=True).eval()
    qk.quantize_(model, "w3a16")
    state = model.state_dict()
    qk.save(model, tmp_path / "out")
    path = tmp_path / "out" / "qkernels.json"
    path.write_text(path.read_text().replace('"weight_bits": 3', '"weight_bits": 2'))
    refuses(tmp_path / "out", r"weight: expected torch.uint8 \[40, 6\] for scheme w2a16, got torch.uint8 \[40, 9\]")
    narrow = Toy(tied=True, head_bias=True).eval()
    qk.quantize_(narrow, "w2a16")
    with pytest.raises(RuntimeError, match=r"weight: expected shape \(40, 6\), got \(40, 9\)"):
        narrow.load_state_dict(state)


@pytest.mark.parametrize("bits", (3, 2))
def test_training_converts_to_what_was_trained(bits):
    model = toy()
    qk.prepare_qat_(model, Scheme(bits, "per_group", 8), learnable_scale=True)
    model(IDS).square().mean().backward()
    assert model.blocks[0]["up"].weight_scale.grad.abs().sum() > 0
    trained = model(IDS)
    qk.convert_(model)
    assert_bits_equal(model(IDS), trained)


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits: expected 4, 3 or 2, got 5"):
        reference.linear_w4a16(
            torch.ones(1, 8), torch.zeros(1, 5, dtype=torch.uint8), torch.ones(1), in_features=8, bits=5
        )
    with pytest.raises(ValueError, match="codebook: expected weight_bits=4"):
        Scheme(2, codebook=tuple(range(16)), activation_bits=None)
