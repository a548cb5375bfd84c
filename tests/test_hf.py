"""Loading and storing Hugging Face directories, on tiny models made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import qkernels

transformers = pytest.importorskip("transformers")

from qkernels import hf  # noqa: E402

CONFIGS = {
    "BertModel": lambda: transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    ),
    "DistilBertForSequenceClassification": lambda: transformers.DistilBertConfig(
        vocab_size=100, dim=32, n_layers=1, n_heads=2, hidden_dim=48
    ),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64),
    "OPTForCausalLM": lambda: transformers.OPTConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32
    ),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    ),
    "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        tie_word_embeddings=True,
    ),
}
IDS = torch.arange(3, 23).reshape(2, 10)


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS)[0]


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_directory_round_trip_keeps_the_bits(name: str, embeddings: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    getattr(transformers, name)(CONFIGS[name]()).save_pretrained(tmp_path / "float")
    model = hf.load_float(tmp_path / "float")
    assert type(model).__name__ == name
    qkernels.quantize_(model, "w8a8", embeddings=embeddings)
    expected = outputs(model)

    hf.save_quantized(model, tmp_path / "int8", source=tmp_path / "float")
    loaded = hf.load_quantized(tmp_path / "int8")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(outputs(loaded), expected)


def test_directory_round_trip_keeps_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BertModel(CONFIGS["BertModel"]()).save_pretrained(tmp_path / "float")
    model = hf.load_float(tmp_path / "float", dtype=torch.bfloat16)
    qkernels.quantize_(model, "w8a8")
    hf.save_quantized(model, tmp_path / "int8")
    loaded = hf.load_quantized(tmp_path / "int8")
    assert outputs(loaded).dtype == torch.bfloat16
    assert torch.equal(outputs(loaded), outputs(model))


def test_skeleton_has_real_buffers_and_tied_weights() -> None:
    config = CONFIGS["Qwen2ForCausalLM"]()
    config.architectures = ["Qwen2ForCausalLM"]
    model = hf.skeleton(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.nn.Linear(2, 2).weight.is_meta  # registration is itself again


def test_skeleton_needs_a_class() -> None:
    with pytest.raises(ValueError, match="architectures"):
        hf.skeleton(CONFIGS["BertModel"]())


def test_load_quantized_refuses_a_float_directory(tmp_path: Path) -> None:
    transformers.BertModel(CONFIGS["BertModel"]()).save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="no quantized model"):
        hf.load_quantized(tmp_path / "float")


def test_save_names_the_class_and_copies_side_files(tmp_path: Path) -> None:
    transformers.BertModel(CONFIGS["BertModel"]()).save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "1_Pooling").mkdir()
    (tmp_path / "float" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "float" / "modules.json").write_text("[]")
    model = hf.load_float(tmp_path / "float")
    qkernels.quantize_(model, "w8a8")
    hf.save_quantized(model, tmp_path / "int8", source=tmp_path / "float", extra={"note.txt": "hello"})
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["architectures"] == ["BertModel"]
    assert (tmp_path / "int8" / "1_Pooling" / "config.json").is_file()
    assert (tmp_path / "int8" / "modules.json").read_text() == "[]"
    assert (tmp_path / "int8" / "note.txt").read_text() == "hello"


def test_save_refuses_a_model_without_a_configuration(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    qkernels.quantize_(model, "w8a8")
    with pytest.raises(TypeError, match="configuration"):
        hf.save_quantized(model, tmp_path / "int8")
    assert list(tmp_path.iterdir()) == []


def test_mean_pool_ignores_padding() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [99.0, -99.0]]])
    pooled = hf.mean_pool(hidden, torch.tensor([[1, 1, 0]]))
    assert torch.equal(pooled, torch.tensor([[0.6, 0.8]]))
    assert torch.equal(hf.mean_pool(hidden, torch.zeros(1, 3)), torch.zeros(1, 2))


def test_quiet_restores_the_settings() -> None:
    logging = transformers.utils.logging
    before = (logging.is_progress_bar_enabled(), logging.get_verbosity())
    with pytest.raises(RuntimeError), hf.quiet():
        raise RuntimeError
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
