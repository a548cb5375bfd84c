"""Models whose modules read `.weight` of their children, and whole architectures of transformers at toy size."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn
from toys import all_tensors

import qkernels as qk
from qkernels.nn import QuantEmbedding, QuantLinear

transformers = pytest.importorskip("transformers")


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.detach().float().flatten(), b.detach().float().flatten(), dim=0))


# -- torch's own ----------------------------------------------------------------------------------------------------


def encoder(layers: int = 2, **options: bool) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not options.get("norm_first", False)).eval()


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer_does_not_bypass_the_quantized_children(norm_first):
    model = encoder(norm_first=norm_first)
    x = seeded(2, 7, 32)
    with torch.no_grad():
        y = model(x)
        qk.quantize_(model)
        calls = []
        model.layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))
        quantized = model(x)
        assert calls
        assert cosine(quantized, y) > 0.999
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow_result = model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(quantized, slow_result, rtol=1e-3, atol=1e-2)


def test_transformer_encoder_layer_equals_its_parts():
    """Not close: the feed-forward block is exactly what the quantized children give."""
    layer = encoder(1).layers[0]
    qk.quantize_(layer)
    x = seeded(2, 7, 32)
    with torch.no_grad():
        attended = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        expected = layer.norm2(attended + layer.linear2(torch.relu(layer.linear1(attended))))
        assert_bits_equal(layer(x), expected)


def test_transformer_encoder_with_padding_and_one_layer_quantized():
    """The encoder makes nested tensors when its first layer could take the fused path; the second cannot read them."""
    model = encoder()
    x = seeded(2, 7, 32)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    with torch.no_grad():
        y = model(x, src_key_padding_mask=mask)
        qk.quantize_(model, include=("layers.1.*",), exclude=("*out_proj",))
        quantized = model(x, src_key_padding_mask=mask)
    assert cosine(quantized[~mask], y[~mask]) > 0.999


def test_transformer_encoder_fast_path_comes_back():
    model = encoder()
    state = [copy.copy(vars(m)) for m in (model, *model.layers)]
    qk.quantize_(model)
    assert model.layers[0].activation_relu_or_gelu == 0
    assert not model.use_nested_tensor
    clone = copy.deepcopy(model)
    for each in (model, clone):
        qk.dequantize_(each)
        for module, before in zip((each, *each.layers), state, strict=True):
            assert {k: v for k, v in vars(module).items() if isinstance(v, (int, bool))} == {
                k: v for k, v in before.items() if isinstance(v, (int, bool))
            }


def test_multihead_attention_is_left_and_says_so():
    model = encoder(1)
    report = qk.quantize_(model)
    assert "in_proj" in report["layers.0.self_attn"].reason
    assert "NonDynamicallyQuantizableLinear" in report["layers.0.self_attn.out_proj"].reason
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    attention.out_proj = nn.Linear(16, 16)  # a plain one, whose weight it still reads
    holder = nn.Sequential(attention, nn.Linear(16, 16)).eval()
    x = seeded(1, 3, 16)
    with torch.no_grad():
        y = attention(x, x, x)[0]
        report = qk.quantize_(holder)
        assert "reads its weight" in report["0.out_proj"].reason
        assert_bits_equal(attention(x, x, x)[0], y)


def test_recurrent_layers_are_left_and_say_so():
    report = qk.quantize_(nn.ModuleDict({"rnn": nn.LSTM(8, 8), "fc": nn.Linear(8, 8)}))
    assert "recurrent" in report["rnn"].reason


# -- transformers ---------------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    t = transformers
    models = {
        "bert": lambda: t.BertModel(t.BertConfig(**SMALL)),
        "bert_mlm": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=100)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=128,
                vocab_size=100,
                word_embed_proj_dim=64,
            )
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER, tie_word_embeddings=True)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**DECODER, head_dim=16)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**DECODER, num_local_experts=4)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0
            )
        ),
    }
    return models[name]().eval()


NAMES = ["bert", "bert_mlm", "distilbert", "gpt2", "opt", "llama", "qwen2", "gemma", "mixtral", "t5"]
IDS = torch.arange(1, 25).reshape(2, 12)


def run(name: str, model: nn.Module) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS[:, :5]} if name == "t5" else {}
    with torch.no_grad():
        out = model(input_ids=IDS, **extra)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def unique_bytes(model: nn.Module) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in all_tensors(model)}
    return sum(storages.values())


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_architecture_converts_runs_and_accounts_for_every_byte(name, embeddings):
    model = build(name)
    before, y = unique_bytes(model), run(name, model)
    report = qk.quantize_(model, "w8a8", embeddings=embeddings)
    assert report.bytes_before == before
    assert report.bytes_after == unique_bytes(model)
    assert report.bytes_after < before
    assert all(layer.reason for layer in report.left)
    assert cosine(run(name, model), y) > 0.98
    left = [n for n, m in model.named_modules() if type(m) is nn.Linear and "lm_head" not in n]
    assert not left


@pytest.mark.parametrize("name", NAMES)
def test_architecture_converts_in_bfloat16(name):
    model = build(name).to(torch.bfloat16)
    y = run(name, model)
    qk.quantize_(model, "w8a8", embeddings=True)
    z = run(name, model)
    assert z.dtype == y.dtype
    assert cosine(z, y) > 0.97


@pytest.mark.parametrize("name", NAMES)
def test_architecture_saves_and_loads_on_the_meta_device(name, tmp_path):
    model = build(name)
    qk.quantize_(model, "w8a8", embeddings=True)
    qk.save(model, tmp_path / "out")
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.tie_weights()
    qk.load(empty.eval(), tmp_path / "out")
    assert not any(t.is_meta for t in all_tensors(empty))
    assert_bits_equal(run(name, empty), run(name, model))


@pytest.mark.parametrize("name", NAMES)
def test_architecture_dequantizes_to_the_same_state_dict(name):
    model = build(name)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    bytes_before = unique_bytes(model)
    qk.quantize_(model, "w8a16", embeddings=True)
    y = run(name, model)
    qk.dequantize_(model)
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert unique_bytes(model) == bytes_before
    assert not any(isinstance(m, (QuantLinear, QuantEmbedding)) for m in model.modules())
    assert cosine(run(name, model), y) > 0.9999


def test_gpt2_conv1d_is_converted_with_its_weight_turned():
    model = build("gpt2")
    conv = model.transformer.h[0].attn.c_attn
    x = seeded(3, 64)
    y, weight = conv(x), conv.weight.detach().clone()
    qk.quantize_(model)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, QuantLinear)
    assert (layer.in_features, layer.out_features) == (64, 192)
    assert cosine(layer(x), y) > 0.999
    torch.testing.assert_close(layer.weight.detach().t(), weight, rtol=0, atol=float(weight.abs().max()) / 127)
    qk.dequantize_(model)
    assert type(model.transformer.h[0].attn.c_attn) is type(conv)
    assert model.transformer.h[0].attn.c_attn.weight.shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_asks_for_the_dtype_of_wo(dtype):
    model = build("t5").to(dtype)
    qk.quantize_(model)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, QuantLinear)
    assert wo.weight.dtype == dtype
    assert run("t5", model).dtype == dtype


def test_experts_of_unknown_form_are_left_with_the_reason():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 16))

    model = nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(8, 8)})
    layer = qk.quantize_(model)["experts"]
    assert "3-D" in layer.reason
    assert "gate_up_proj" in layer.reason
    assert layer.bytes_before == layer.bytes_after == 4 * 8 * 16 * 4


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "opt", "bert_mlm", "t5"])
def test_tied_models_hold_one_int8_table(name):
    model = build(name)
    table = model.get_input_embeddings()
    assert table.weight is model.get_output_embeddings().weight
    report = qk.quantize_(model, embeddings=True)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert report[head].bytes_after <= 100 * 4
    assert "shares" in report[head].reason


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_generation_with_cache_works(name):
    model = build(name)
    qk.quantize_(model, embeddings=True)
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 16)
