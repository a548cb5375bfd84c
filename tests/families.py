"""Small random models of the families that smoothing is proved on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

EXPERTS = ("mixtral", "qwen2_moe", "gpt_oss")
"""Families that hold their experts in 3-D parameters."""

FAMILIES = ("opt", "gpt2", "bert", "distilbert", "llama", "qwen2", "gemma", "t5", "phi3", *EXPERTS)
VOCABULARY = 100


def build(family: str, *, width: int = 32, layers: int = 2, seed: int = 0) -> nn.Module:
    """A model of the family in eval mode, random weights drawn wide enough that attention is not uniform."""
    transformers = pytest.importorskip("transformers")
    common = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    grouped = {**common, "num_key_value_heads": 2}
    configs = {
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                hidden_size=width,
                ffn_dim=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
                max_position_embeddings=64,
                word_embed_proj_dim=width,
                init_std=0.1,
            )
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=width, n_layer=layers, n_head=4, vocab_size=VOCABULARY, n_positions=64, initializer_range=0.1
            )
        ),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**common)),
        "distilbert": lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(
                dim=width,
                hidden_dim=2 * width,
                n_layers=layers,
                n_heads=4,
                vocab_size=VOCABULARY,
                initializer_range=0.1,
            )
        ),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped)),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**grouped)),
        "gemma": lambda: transformers.GemmaForCausalLM(
            transformers.GemmaConfig(**{**common, "num_key_value_heads": 1}, head_dim=8)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=width,
                d_kv=width // 4,
                d_ff=2 * width,
                num_layers=layers,
                num_heads=4,
                vocab_size=VOCABULARY,
                decoder_start_token_id=0,
            )
        ),
        "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**grouped, pad_token_id=0)),
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**grouped, num_local_experts=4)),
        "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
            transformers.Qwen2MoeConfig(
                **grouped,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=width,
                shared_expert_intermediate_size=width,
            )
        ),
        "gpt_oss": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**grouped, head_dim=width // 4, num_local_experts=4, num_experts_per_tok=2)
        ),
    }
    torch.manual_seed(seed)
    return configs[family]().eval()


def batches(family: str, *, count: int = 2, rows: int = 2, tokens: int = 16) -> list[dict[str, Tensor]]:
    """Token ids, different in every batch."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
        found.append({"input_ids": ids, "decoder_input_ids": ids} if family == "t5" else {"input_ids": ids})
    return found


@torch.no_grad()
def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The first tensor the model gives back: logits, or hidden states."""
    return model(**batch)[0]


def error(model: nn.Module, batch: dict[str, Tensor], expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((output(model, batch) - expected).norm() / expected.norm())
