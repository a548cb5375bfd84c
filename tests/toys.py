"""Small models that several test files convert, and what it means that nothing changed."""

from __future__ import annotations

import torch
from helpers import assert_bits_equal
from torch import nn


class Toy(nn.Module):
    """Two blocks, a norm, an embedding and an output head; optionally tied."""

    def __init__(self, *, tied: bool = False, head_bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 50, bias=head_bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.lm_head(self.norm(x))


IDS = torch.arange(12).reshape(2, 6)


def toy(**options: bool) -> Toy:
    torch.manual_seed(0)
    return Toy(**options).eval()


def snapshot(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    """Modules, parameters and a copy of their values, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    return modules, parameters, {n: p.detach().clone() for n, p in parameters.items()}


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    """The very same modules and parameters, with the same bits."""
    after = snapshot(model)
    for kind in (0, 1):
        assert {n: id(x) for n, x in after[kind].items()} == {n: id(x) for n, x in before[kind].items()}
    for name, value in before[2].items():
        assert_bits_equal(after[2][name], value, name)


def all_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]
