"""Small models that several test files convert, and what it means that nothing changed."""

from __future__ import annotations

import torch
from helpers import assert_bits_equal
from torch import nn

K = 32  # features of a Block


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


class RMSNorm(nn.Module):
    """As in transformers' Llama."""

    def __init__(self, size: int = K, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.variance_epsilon = eps

    def forward(self, hidden):
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden.to(dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, hidden, mask=None):
        shape = hidden.shape[:-1]
        q = self.q(hidden).view(*shape, 2, -1)
        k = self.k(hidden).view(*shape, 2, -1)
        return self.o((q * k).reshape(*shape, -1)), mask


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, 48), nn.Linear(K, 48), nn.Linear(48, K)
        self.act = activation or nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class PlainMlp(Mlp):
    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """As in transformers' Llama."""

    def __init__(self, norm=RMSNorm, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), mlp or Mlp()
        self.first, self.second = norm(K), norm(K)

    def forward(self, hidden, mask=None, **kwargs):
        residual = hidden
        hidden = self.first(hidden)
        hidden, _ = self.attention(hidden=hidden, mask=mask, **kwargs)
        hidden = residual + hidden
        residual = hidden
        hidden = self.second(hidden)
        hidden = self.mlp(hidden)
        return residual + hidden


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One code of a row of this size may be rounded the other way now and then."""
    return float((a - b).norm() / b.norm()) < 0.01
