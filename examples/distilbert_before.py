"""The dynamic-quantization script of many articles, as it is written for torch. distilbert_after.py changes one import.

python examples/distilbert_before.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch
from torch.ao.quantization import quantize_dynamic
from transformers import DistilBertConfig, DistilBertForQuestionAnswering


def size_in_megabytes(model: torch.nn.Module) -> float:
    """Size of the state dict on disk."""
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "model.pt")
        torch.save(model.state_dict(), path)
        return os.path.getsize(path) / 1e6


def milliseconds(model: torch.nn.Module, ids: torch.Tensor, repeats: int) -> float:
    """Median time of a forward pass."""
    times = []
    with torch.inference_mode():
        model(ids)
        for _ in range(repeats):
            start = time.perf_counter()
            model(ids)
            times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def main() -> None:
    """Print size and latency before and after."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    repeats = 3 if parser.parse_args().quick else 20

    torch.manual_seed(0)
    model = DistilBertForQuestionAnswering(DistilBertConfig()).eval()
    ids = torch.randint(1000, 30_000, (1, 128))
    quantized = quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    print(f"size:    {size_in_megabytes(model):.1f} MB -> {size_in_megabytes(quantized):.1f} MB")
    print(f"latency: {milliseconds(model, ids, repeats):.1f} ms -> {milliseconds(quantized, ids, repeats):.1f} ms")


if __name__ == "__main__":
    main()
