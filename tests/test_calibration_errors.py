"""What can go wrong with calibration data, on every way that takes some: a clear error, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn
from toys import assert_unchanged, snapshot

import qkernels as qk

WAYS = {
    "static": lambda model, data: qk.quantize_(model, "w8a8_static", calibration=data),
    "smooth": lambda model, data: qk.quantize_(model, "w8a8", smooth=0.5, calibration=data),
    "smooth auto": lambda model, data: qk.quantize_(model, "w8a8", smooth="auto", calibration=data),
    "awq": lambda model, data: qk.quantize_(model, "w4a16", algorithm="awq", calibration=data),
    "gptq": lambda model, data: qk.quantize_(model, "w4a16", algorithm="gptq", calibration=data),
    "w2 gptq": lambda model, data: qk.quantize_(model, "w2a16", algorithm="gptq", calibration=data),
    "bias correction": lambda model, data: qk.quantize_(
        model, "w4a16", algorithm=qk.MSE(bias_correction=True), calibration=data
    ),
    "smooth_": lambda model, data: qk.smooth_(model, data),
}
by_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


class Block(nn.Module):
    """A norm and two Linears, and a third that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.spare = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.relu(self.up(self.norm(x) if x.shape[-1] == 16 else x)))
        return x if self.spare is None or len(x) < 1000 else self.spare(x)


class Model(nn.Module):
    """Blocks in a ModuleList, which GPTQ walks, and a Linear outside."""

    def __init__(self, *, spare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        if spare:
            self.blocks[1].spare = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def refuses(way, data, match: str, *, spare: bool = False) -> None:
    model = Model(spare=spare).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        way(model, data)
    assert_unchanged(model, before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._buffers


@by_way
def test_no_data(way):
    refuses(way, [], "calibration: expected at least one batch, got none")
    refuses(way, [torch.zeros(0, 16)], "no batch reached 'blocks.0.up'")


@by_way
def test_a_layer_that_no_batch_reaches(way):
    refuses(way, [seeded(12, 16), seeded(20, 16)], r"no batch reached 'blocks\.1\.spare'", spare=True)


@by_way
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_activations_that_are_not_finite(way, bad):
    broken = seeded(12, 16)
    broken[3, 2] = bad
    refuses(way, [seeded(12, 16), broken], r"NaN or infinite values entered 'blocks\.0\.up'")


@by_way
@pytest.mark.parametrize(
    "data", ([seeded(12, 16), seeded(12, 8)], [seeded(12, 8), seeded(12, 16)]), ids=("last", "first")
)
def test_batches_of_another_width(way, data):
    refuses(way, data, r"calibration: expected 16 features to enter 'blocks\.0\.up', got shape \[12, 8\]")


@by_way
def test_batches_of_other_lengths_and_ranks_are_fine(way):
    model = Model().eval()
    x = seeded(9, 16)
    expected = model(x).detach()
    way(model, [seeded(12, 16), seeded(3, 16), seeded(2, 5, 16), seeded(1, 16)])
    y = model(x)
    assert y.isfinite().all()
    if way is WAYS["smooth_"]:
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("way", ("static", "smooth"))
def test_statistics_of_another_model_with_the_same_names(way):
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    other = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    with qk.calibrate(other) as stats:
        other(seeded(12, 8))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"expected statistics of 16 features for '1', got them of 8"):
        WAYS[way](model, stats)
    assert_unchanged(model, before)


def test_calibrate_names_the_layer_and_lets_go_of_the_model():
    model = Model().eval()
    expected = model(seeded(4, 16))
    with pytest.raises(ValueError, match=r"expected 16 features to enter 'blocks\.0\.up'"), qk.calibrate(model):
        model(seeded(4, 16))
        model(seeded(4, 8))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert_bits_equal(model(seeded(4, 16)), expected)
