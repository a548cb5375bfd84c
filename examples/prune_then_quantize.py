"""Prune first, quantize after: half of the weights become zero, and zeros stay zero in eight bits.

python examples/prune_then_quantize.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

import qkernels as qk


def main() -> None:
    """Prune the smallest weights of every layer, make it permanent, quantize."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
    x = torch.randn(64, 256)
    expected = model(x).detach()

    for module in model:
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", amount=0.5)
    # While a mask is applied in every call there is no plain weight to quantize: the report says so, and strict=False
    # leaves such layers alone.
    print(qk.quantize_(model, "w8a8", strict=False))
    for module in model:
        if isinstance(module, nn.Linear):
            prune.remove(module, "weight")
    pruned = model(x).detach()
    qk.quantize_(model, "w8a8")
    zeros = sum(float((model[i].canonical()["weight"] == 0).float().mean()) for i in (0, 2)) / 2

    print(f"zero weights after quantizing: {100 * zeros:.0f} %")
    print(f"outputs moved by pruning: {float((pruned - expected).norm() / expected.norm()):.3f}")
    print(f"and by quantizing what was left: {float((model(x) - pruned).norm() / pruned.norm()):.4f}")


if __name__ == "__main__":
    main()
