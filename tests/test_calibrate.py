"""Calibration: running statistics equal those of all data at once, ranges, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn

import qkernels as qk
from qkernels.calibrate import LayerStats
from qkernels.ranges import METHODS, Histogram, choose_range


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).eval()


# -- statistics -----------------------------------------------------------------------------------------------


def test_statistics_of_batches_equal_those_of_all_rows_at_once():
    model, batches = mlp(), [seeded(n, 16, seed=n) for n in (1, 7, 30)]
    with qk.calibrate(model) as stats:
        for batch in batches:
            model(batch)
    rows = torch.cat(batches)
    layer = stats.layers["0"]
    assert layer.rows == 38
    assert_bits_equal(layer.low, rows.amin(0))
    assert_bits_equal(layer.high, rows.amax(0))
    assert_bits_equal(layer.absmax, rows.abs().amax(0))
    torch.testing.assert_close(layer.mean, rows.mean(0))
    torch.testing.assert_close(layer.rms, rows.square().mean(0).sqrt())
    assert_bits_equal(layer.group_absmax(8), rows.abs().reshape(38, 2, 8).amax(dim=(0, 2)))
    assert layer.histogram.total == rows.numel()


def test_statistics_take_any_leading_shape_and_changing_batch_shapes():
    model, x = mlp(), seeded(6, 16)
    with qk.calibrate(model) as stats:
        model(x.reshape(2, 3, 16))
        model(x[0])
        model(x[:0])
    assert stats.layers["0"].rows == 7
    assert_bits_equal(stats.layers["0"].high, x.amax(0))


def test_sample_is_bounded_and_made_of_real_rows():
    layer = LayerStats(4, capacity=5)
    rows = torch.arange(400, dtype=torch.float32).reshape(100, 4)
    for part in rows.split(9):
        layer.update(part)
    assert layer.sample.shape == (5, 4)
    assert {float(r[0]) for r in layer.sample} <= {float(r[0]) for r in rows}
    assert layer.sample[:, 0].max() > 150, "late rows have their chance too"


def test_hooks_are_gone_and_the_model_is_unchanged():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), qk.calibrate(model):
        model(seeded(2, 16))
        raise KeyError("from the block")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name])


def test_progress_counts_forward_passes():
    model, calls = mlp(), []
    with qk.calibrate(model, progress=lambda *a: calls.append(a[0])):
        model(seeded(2, 16))
        model(seeded(2, 16))
    assert calls == [0, 1, 2]


def test_layers_without_data_are_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Half()
    with qk.calibrate(model) as stats:
        model(torch.ones(1, 4))
    assert stats.unseen == ["spare"]
    assert stats.seen == ["used"]
    with pytest.raises(ValueError, match="no batch reached 'spare'"):
        qk.quantize_(model, "w8a8_static", calibration=stats)
    assert type(model.used) is nn.Linear
    qk.quantize_(model, "w8a8_static", calibration=stats, include=("used",))


def test_nothing_run_is_refused():
    model = mlp()
    with qk.calibrate(model) as stats:
        pass
    with pytest.raises(ValueError, match="no batch reached '0', '2'"):
        qk.quantize_(model, "w8a8_static", calibration=stats)


def test_nan_activations_are_refused_by_name():
    model = mlp()
    with qk.calibrate(model) as stats:
        model(seeded(2, 16))
        model(torch.full((1, 16), torch.nan))
    with pytest.raises(ValueError, match="NaN or infinite values entered '0'"):
        stats.range("0")


def test_statistics_of_another_model_are_refused():
    model = mlp()
    with qk.calibrate(nn.Sequential(nn.Linear(3, 3))) as stats:
        pass
    with pytest.raises(ValueError, match="hold nothing of '2'"):
        qk.quantize_(model, "w8a8_static", calibration=stats, include=("2",))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "best"}, "method: expected one of minmax"),
        ({"percentile": 30}, "percentile: expected a number above 50"),
        ({"samples": -1}, "samples: expected an integer of at least 0"),
        ({"include": ("nothing",)}, "include: the pattern 'nothing' matches no layer"),
        ({"exclude": ("*",)}, "holds none that are chosen"),
    ],
)
def test_calibrate_refuses(options, message):
    with pytest.raises(ValueError, match=message), qk.calibrate(mlp(), **options):
        pass


def test_patterns_choose_the_layers():
    with qk.calibrate(mlp(), exclude=("2",)) as stats:
        pass
    assert list(stats.layers) == ["0"]


# -- histogram and ranges -------------------------------------------------------------------------------------


def test_histogram_grows_without_losing_a_count():
    histogram = Histogram()
    parts = [seeded(500, seed=1) * 0.01, seeded(500, seed=2), seeded(500, seed=3) * 40, torch.zeros(7)]
    for part in parts:
        histogram.update(part)
    assert histogram.total == 1507
    x = torch.cat(parts)
    width = 2 * histogram.radius / len(histogram.counts)
    mean = float((histogram.counts * histogram.centers).sum() / histogram.total)
    assert abs(mean - float(x.double().mean())) <= width
    assert histogram.radius >= x.abs().max()


def outlying() -> tuple[torch.Tensor, Histogram]:
    x = torch.cat((seeded(20_000), torch.tensor([40.0])))
    histogram = Histogram()
    histogram.update(x)
    return x, histogram


def test_percentile_leaves_out_the_given_share():
    x, histogram = outlying()
    low, high = choose_range(float(x.min()), float(x.max()), histogram, "percentile", percentile=99.9)
    expected = float(x.abs().quantile(0.999))
    assert low == -high
    assert abs(high - expected) <= 2 * 2 * histogram.radius / len(histogram.counts)
    low, high = choose_range(float(x.min()), float(x.max()), histogram, "percentile", percentile=99.9, symmetric=False)
    assert -4.5 < low < -3.0
    assert 3.0 < high < 4.5


@pytest.mark.parametrize("symmetric", (True, False))
def test_mse_range_has_the_least_error_on_the_data_itself(symmetric):
    x, histogram = outlying()

    def error(low: float, high: float) -> float:
        if symmetric:
            scale = max(-low, high) / 127
            return float((x - (x / scale).round().clamp(-127, 127) * scale).square().sum())
        scale = (high - low) / 255
        zero = round(-low / scale)
        return float((x - ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale).square().sum())

    low, high = choose_range(float(x.min()), float(x.max()), histogram, "mse", symmetric=symmetric)
    full = max(x.abs().max().item(), 40.0)
    best = min(
        error(-full * s / 100, full * s / 100) if symmetric else error(float(x.min()) * s / 100, 40.0 * s / 100)
        for s in range(5, 101)
    )
    assert error(low, high) <= 1.02 * best


def test_entropy_cuts_a_lone_outlier():
    x, histogram = outlying()
    _, high = choose_range(float(x.min()), float(x.max()), histogram, "entropy")
    assert 2.0 < high < 20.0


def test_every_method_serves_zeros_and_needs_its_histogram():
    histogram = Histogram()
    histogram.update(torch.zeros(9))
    for method in METHODS:
        assert choose_range(0.0, 0.0, histogram, method) == (0.0, 0.0)
    with pytest.raises(ValueError, match="needs a histogram"):
        choose_range(-1.0, 1.0, None, "mse")
    with pytest.raises(ValueError, match="NaN or Inf"):
        histogram.update(torch.tensor([torch.inf]))


# -- static schemes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_static_quantization_uses_the_method(method):
    model, x = mlp(), torch.cat((seeded(300, 16), torch.full((1, 16), 60.0)))
    with qk.calibrate(model, method=method) as stats:
        model(x)
    expected = stats.range("0", method)[1]
    qk.quantize_(model, "w8a8_static", calibration=stats)
    scale = model[0].canonical()["act_scale"]
    torch.testing.assert_close(float(scale) * 127, max(expected, -stats.range("0", method)[0]))
    if method in ("mse", "percentile"):
        assert float(scale) * 127 <= 60.001
