"""Sensitivity and mixed precision: the fragile layer is found, budgets are met or refused, the model stays."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn

import qkernels as qk

pytestmark = pytest.mark.usefixtures("one_thread")


def model_with_a_fragile_layer() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).eval()
    with torch.no_grad():
        model[2].weight[:, 0] *= 60.0  # one column takes the whole range of every row
    return model


BATCHES = [seeded(16, 64, seed=s) for s in range(2)]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_sensitivity_ranks_the_fragile_layer_first_and_leaves_the_model():
    model = model_with_a_fragile_layer()
    before = bits(model)
    ranking = qk.sensitivity(model, BATCHES, qk.Scheme(weight_bits=4, activation_bits=None))
    assert ranking.layers[0].name == "2"
    assert ranking.layers[0].harm > 3 * ranking.layers[1].harm
    assert [type(m) for m in model] == [nn.Linear] * 4
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name])
    assert "2" in str(ranking).splitlines()[1]
    assert ranking.to_dict()[0]["bytes_before"] == 64 * 65 * 4


def test_harm_of_one_layer_is_what_quantizing_it_does():
    model = model_with_a_fragile_layer()
    ranking = qk.sensitivity(model, BATCHES, "w8a8", include=("1",))
    expected = [model(batch).detach() for batch in BATCHES]
    qk.quantize_(model, "w8a8", include=("1",))
    change = sum(float((model(b) - y).detach().double().square().sum()) for b, y in zip(BATCHES, expected, strict=True))
    size = sum(float(y.double().square().sum()) for y in expected)
    assert ranking.layers[0].harm == pytest.approx(change / size, rel=1e-9)


def test_sensitivity_takes_a_loss_and_static_schemes():
    model = model_with_a_fragile_layer()
    ranking = qk.sensitivity(model, BATCHES, "w8a8_static", loss=lambda y, batch: float(y.square().mean()))
    assert len(ranking.layers) == 4


def test_plan_meets_a_size_and_keeps_the_fragile_layer_finer():
    model = model_with_a_fragile_layer()
    full = sum(p.numel() * 4 for p in model.parameters())
    four = qk.Scheme(weight_bits=4, activation_bits=None)
    budget = int(full * 0.22)
    found = qk.plan(model, BATCHES, max_bytes=budget, schemes=(four, "w8a16"))
    assert found.bytes <= budget
    assert found.overrides["2"] != four
    assert found.front[0] == (full, 0.0)
    sizes = [size for size, _ in found.front]
    assert sizes == sorted(sizes, reverse=True)
    report = qk.quantize_(model, "w8a16", overrides=found.overrides)
    assert report.bytes_after == found.bytes
    assert "x w" in str(found)


def test_plan_meets_a_loss_as_measured():
    model = model_with_a_fragile_layer()
    found = qk.plan(model, BATCHES, max_loss=1e-4, schemes=("w4a16", "w8a8"))
    assert found.measured <= 1e-4
    assert found.bytes < found.front[0][0]
    tighter = qk.plan(model, BATCHES, max_loss=4e-5, schemes=("w4a16", "w8a8"))
    assert tighter.bytes >= found.bytes
    expected = [model(batch).detach() for batch in BATCHES]
    qk.quantize_(model, "w8a8", overrides=found.overrides)
    change = sum(float((model(b) - y).detach().double().square().sum()) for b, y in zip(BATCHES, expected, strict=True))
    assert change / sum(float(y.double().square().sum()) for y in expected) == pytest.approx(found.measured, rel=1e-6)


def test_plan_draws_its_front(tmp_path):
    pytest.importorskip("matplotlib")
    found = qk.plan(model_with_a_fragile_layer(), BATCHES, max_loss=1.0, schemes=("w8a8",))
    found.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
    assert found.to_dict()["layers"]["0"] == "w8a8"
    assert found.share("w8a8") == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "expected exactly one of them"),
        ({"max_bytes": 10, "max_loss": 1.0}, "expected exactly one of them"),
        ({"max_bytes": -1}, "expected a number above 0"),
        ({"max_bytes": 100}, "max_bytes: expected at least"),
        ({"max_loss": 1e-30}, "max_loss: no layer can be quantized within"),
        ({"max_bytes": 10**9, "schemes": ()}, "schemes: expected at least one"),
        ({"max_bytes": 10**9, "exclude": ("*",)}, "holds none that are chosen"),
    ],
)
def test_plan_refuses(options, message):
    model = model_with_a_fragile_layer()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        qk.plan(model, BATCHES, **options)
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name])


def test_non_finite_outputs_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        qk.sensitivity(model_with_a_fragile_layer(), [torch.full((2, 64), torch.nan)])


def test_overrides_go_to_the_layers_that_suffer_most_for_their_size():
    model = model_with_a_fragile_layer()
    model.append(nn.Linear(64, 8))
    ranking = qk.sensitivity(model, BATCHES, "w8a8")
    total = sum(layer.bytes_before for layer in ranking.layers)
    overrides = ranking.overrides("w8a16", share=0.3)
    assert overrides["2"] == qk.Scheme.resolve("w8a16")
    assert sum(layer.bytes_before for layer in ranking.layers if layer.name in overrides) <= 0.3 * total
    assert ranking.overrides("w8a16", share=0.0) == {}
    assert ranking.overrides(None, share=1) == dict.fromkeys(layer.name for layer in ranking.layers)
    report = qk.quantize_(model, "w8a8", overrides=overrides)
    assert report["2"].scheme == "w8a16"
    with pytest.raises(ValueError, match=r"share: expected a number from 0 to 1, got 1\.5"):
        ranking.overrides("w8a16", share=1.5)
