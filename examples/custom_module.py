"""A model of your own: choose layers by name, read the report, store the result, load it, undo it.

python examples/custom_module.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import qkernels as qk


class Ranker(nn.Module):
    """Scores documents for a user: two embeddings, a trunk, a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(20_000, 256)
        self.documents = nn.Embedding(50_000, 256)
        self.trunk = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512), nn.GELU())
        self.head = nn.Linear(512, 1)

    def forward(self, user: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        """Scores `[batch]` of pairs given as indices `[batch]`."""
        joint = torch.cat([self.users(user), self.documents(document)], dim=-1)
        return self.head(self.trunk(joint)).squeeze(-1)


def main() -> None:
    """Quantize the trunk to INT8 and the embeddings too, keep the head in float."""
    torch.manual_seed(0)
    model = Ranker().eval()
    quantized = copy.deepcopy(model)
    report = qk.quantize_(quantized, "w8a8", exclude=("head",), embeddings=True)
    print(report)

    user, document = torch.randint(20_000, (64,)), torch.randint(50_000, (64,))
    with torch.inference_mode():
        expected, found = model(user, document), quantized(user, document)
    error = (found - expected).norm() / expected.norm()
    print(f"\nrelative error of the scores: {float(error):.4f}")

    with tempfile.TemporaryDirectory() as scratch:
        qk.save(quantized, Path(scratch) / "ranker")
        loaded = Ranker().eval()
        qk.load(loaded, Path(scratch) / "ranker")
    with torch.inference_mode():
        print(f"stored and loaded, same bits: {torch.equal(loaded(user, document), found)}")

    qk.dequantize_(quantized)
    print(f"back in float: {type(quantized.trunk[0]).__name__}, {type(quantized.users).__name__}")


if __name__ == "__main__":
    main()
