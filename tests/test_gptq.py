"""GPTQ: less error than rounding to nearest on correlated inputs, block by block, the model untouched until the end."""

from __future__ import annotations

import copy

import pytest
import torch
from families import batches, build, error, output
from helpers import assert_bits_equal, seeded
from torch import nn

import qkernels as qk
from qkernels import reference
from qkernels.blocks import Inputs, run_by_blocks
from qkernels.gptq import gptq_weight
from qkernels.hooks import Target

pytestmark = pytest.mark.usefixtures("one_thread")

G16 = qk.Scheme(weight_bits=4, weight_granularity="per_group", group_size=16, activation_bits=None)
SCHEMES = {
    "w4 g16": G16,
    "w4 g16 asymmetric": G16.replace(weight_symmetric=False),
    "w4 g16 minimum": G16.replace(weight_symmetric=False, weight_zero="float"),
    "w4 per channel": qk.Scheme(weight_bits=4, activation_bits=None),
    "w8 per channel": qk.Scheme(),
    "w4 g16 code book": G16.replace(codebook=tuple(float(v) for v in range(-8, 8))),
    "w4 g16 multiples": G16.replace(activation_bits=8, group_scales="int", scale_dtype=None),
    "w4 g16 multiples asymmetric": G16.replace(
        activation_bits=8, group_scales="int", scale_dtype=None, weight_symmetric=False
    ),
}


def correlated(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Inputs as real ones are: few directions, some features much larger than others."""
    mixing = seeded(columns // 4, columns, seed=seed) * torch.linspace(0.1, 2.0, columns)
    return seeded(rows, columns // 4, seed=seed + 1) @ mixing + 0.05 * seeded(rows, columns, seed=seed + 2)


def output_error(x: torch.Tensor, w: torch.Tensor, tensors: dict, scheme: qk.Scheme) -> float:
    rounded = reference.dequantize_weight(tensors, scheme, w.shape[1])
    return float((x @ (rounded - w).t()).norm() / (x @ w.t()).norm())


@pytest.mark.parametrize("act_order", (True, False))
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_gptq_beats_rounding_to_nearest(scheme, act_order):
    x, w = correlated(256, 72), seeded(24, 72, seed=5)
    tensors = gptq_weight(w, x.t() @ x, scheme, act_order=act_order, block_size=32)
    plain = reference.quantize_weight(w, scheme)
    assert {k: (v.shape, v.dtype) for k, v in tensors.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    assert output_error(x, w, tensors, scheme) < 0.6 * output_error(x, w, plain, scheme)


def test_gptq_equals_the_formula_column_by_column():
    x, w, scheme = correlated(64, 16), seeded(6, 16, seed=2), SCHEMES["w4 g16"]
    h = (x.t() @ x).double()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    grid = reference.weight_grid(w, scheme)
    left, codes = w.double().clone(), torch.zeros(6, 16)
    for i in range(16):
        column = left[:, i].float()
        codes[:, i] = (torch.round(column / grid["weight_scale"][:, 0].float()) + 8).clamp(0, 15)
        err = (left[:, i] - (codes[:, i] - 8) * grid["weight_scale"][:, 0]) / upper[i, i]
        left[:, i + 1 :] -= err.unsqueeze(1) * upper[i, i + 1 :]
    tensors = gptq_weight(w, x.t() @ x, scheme, act_order=False, search=False, block_size=5)
    assert torch.equal(reference.unpack_int4(tensors["weight"], 16).float(), codes)


@pytest.mark.parametrize("block_size", (1, 7, 72, 500))
def test_gptq_does_not_depend_on_the_block_size(block_size):
    x, w, scheme = correlated(256, 72), seeded(8, 72, seed=5), SCHEMES["w4 g16"]
    expected = gptq_weight(w, x.t() @ x, scheme, block_size=32)
    tensors = gptq_weight(w, x.t() @ x, scheme, block_size=block_size)
    same = (tensors["weight"] == expected["weight"]).float().mean()
    assert same > 0.95, "sums in another order may tip a value between two codes"


def test_gptq_dead_columns_become_zero_and_singular_moments_are_damped():
    x, w = correlated(3, 32), seeded(8, 32, seed=5)
    x[:, 4] = 0.0
    scheme = SCHEMES["w4 g16"]
    rounded = reference.dequantize_weight(gptq_weight(w, x.t() @ x, scheme), scheme, 32)
    assert torch.isfinite(rounded).all()
    assert not rounded[:, 4].any()
    zero = gptq_weight(w, torch.zeros(32, 32), scheme)
    assert not reference.dequantize_weight(zero, scheme, 32).any()


def test_gptq_short_last_group():
    x, w = correlated(128, 40), seeded(8, 40, seed=5)
    for act_order in (True, False):
        tensors = gptq_weight(w, x.t() @ x, G16, act_order=act_order)
        assert tensors["weight_scale"].shape == (8, 3)
        assert output_error(x, w, tensors, G16) < output_error(x, w, reference.quantize_weight(w, G16), G16)


@pytest.mark.parametrize(
    "weight, hessian, message",
    [
        (torch.ones(4, 8), torch.eye(7), r"hessian: expected shape \[8, 8\]"),
        (torch.full((4, 8), torch.nan), torch.eye(8), "weight: expected finite"),
        (torch.ones(4, 8), torch.full((8, 8), torch.inf), "hessian: expected finite"),
    ],
)
def test_gptq_refuses(weight, hessian, message):
    with pytest.raises(ValueError, match=message):
        gptq_weight(weight, hessian, G16)


# -- whole models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "t5"))
def test_gptq_quantizes_models_better_than_rounding(family):
    data = batches(family, count=6, rows=4)
    model = build(family)
    expected, plain = output(model, data[0]), copy.deepcopy(model)
    qk.quantize_(plain, G16)
    report = qk.quantize_(model, G16, algorithm="gptq", calibration=data)
    assert len(report.quantized) > 4
    assert error(model, data[0], expected) < 0.8 * error(plain, data[0], expected)


def test_blocks_see_what_quantized_blocks_before_give_them():
    model, data = build("llama"), batches("llama", count=1)
    targets = [
        Target(name, module, G16, False)
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "down_proj"))
    ]
    seen: dict[str, torch.Tensor] = {}

    def visit(target: Target, inputs: Inputs) -> torch.Tensor:
        seen[target.name] = inputs.moments.clone()
        return target.weight() * (0.0 if "layers.0" in target.name else 1.0)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_by_blocks(model, targets, data, visit)
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.zero_()
        changed.model.layers[0].self_attn.q_proj.weight.zero_()
    for which, where in ((model, "model.layers.0.self_attn.q_proj"), (changed, "model.layers.1.self_attn.q_proj")):
        inputs = []
        handle = which.get_submodule(where).register_forward_pre_hook(lambda m, a, i=inputs: i.append(a[0]))
        output(which, data[0])
        handle.remove()
        rows = inputs[0].reshape(-1, 32)
        torch.testing.assert_close(seen[where], rows.t() @ rows, rtol=1e-4, atol=1e-4)


def test_gptq_serves_layers_outside_of_blocks_and_changing_shapes():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    data = [correlated(n, 16, seed=n) for n in (3, 40, 90)]
    report = qk.quantize_(model, G16, algorithm="gptq", calibration=data)
    assert len(report.quantized) == 2


def test_gptq_bias_correction_centres_the_error():
    x = correlated(200, 16) + 1.0
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    expected = model(x)
    qk.quantize_(model, G16, algorithm=qk.GPTQ(bias_correction=True), calibration=[x])
    assert (model(x) - expected).mean(0).abs().max() < 1e-4
    assert model[0].bias is not None


def test_gptq_after_smoothing_sees_smoothed_inputs():
    data = batches("bert", count=4, rows=4)
    model = build("bert")
    expected = output(model, data[0])
    scheme = G16.replace(activation_bits=8)
    qk.quantize_(model, scheme, algorithm="gptq", smooth=0.5, calibration=data)
    assert error(model, data[0], expected) < 0.15


def test_gptq_failures_leave_the_model(monkeypatch):
    model, data = build("llama"), batches("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="algorithm 'gptq' needs batches, got none"):
        qk.quantize_(model, G16, algorithm="gptq")
    with qk.calibrate(model) as stats:
        output(model, data[0])
    with pytest.raises(ValueError, match="needs batches, got statistics"):
        qk.quantize_(model, G16, algorithm="gptq", calibration=stats)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values entered 'model.layers.1.self_attn.q_proj'"):
        qk.quantize_(model, G16, algorithm="gptq", calibration=data)
    for name, tensor in model.state_dict().items():
        if name != "model.layers.1.input_layernorm.weight":
            assert_bits_equal(tensor, before[name])
    with pytest.raises(ValueError, match="damping: expected"):
        qk.GPTQ(damping=2.0)
    with pytest.raises(TypeError, match="algorithm: expected a name"):
        qk.quantize_(model, G16, algorithm=qk.GPTQ)


def test_gptq_leaves_tied_heads_to_their_table():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    model, data = transformers.LlamaForCausalLM(config).eval(), batches("llama")
    report = qk.quantize_(model, G16, algorithm="gptq", embeddings=True, calibration=data)
    assert "shares" in (report["lm_head"].reason or "")
    assert report["model.layers.0.mlp.up_proj"].scheme == G16.name
