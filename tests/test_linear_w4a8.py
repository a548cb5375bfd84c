"""W4A8 layers equal the reference on the bits: every tier, thread count, kind of group and hazard."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, assert_ran, hazard_rows, seeded, strided
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import _C, reference
from qkernels.nn import QuantLinear
from qkernels.scheme import Scheme

GRIDS = {
    "symmetric": {},
    "zero_point": {"weight_symmetric": False},
    "minimum": {"weight_symmetric": False, "weight_zero": "float"},
    "multiplier": {"group_scales": "int"},
    "multiplier_zero_point": {"group_scales": "int", "weight_symmetric": False},
}


def scheme(grid: str, group_size: int | None, **activations: object) -> Scheme:
    """No group size: one group of all."""
    if group_size is None and not grid.startswith("multiplier"):
        groups = {"weight_granularity": "per_channel"}
    else:
        groups = {"weight_granularity": "per_group", "group_size": group_size or 1 << 16}
    return Scheme(weight_bits=4, **groups, **GRIDS[grid], **activations)


def check(layer: QuantLinear, x: torch.Tensor, tier: str) -> None:
    actual = layer(x)
    rows = x[..., 0].numel()
    if rows:  # else no kernel runs
        assert_ran("w4a8", tier, rows)
    assert_bits_equal(actual, reference.linear(x, layer.canonical(), layer.scheme, layer.in_features))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group_size", [8, 32, 128, None])
def test_w4a8_every_grid_and_tail(isa: str, threads: int, grid: str, group_size: int | None) -> None:
    for rows, n, k in [(1, 1, 1), (2, 3, 37), (3, 65, 136), (5, 64, 200), (17, 130, 300), (97, 70, 264)]:
        layer = QuantLinear.from_float(seeded(n, k, seed=n), seeded(n, seed=k), scheme(grid, group_size))
        check(layer, seeded(rows, k, seed=rows), isa)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group_size", [32, 1200, None])
def test_w4a8_rows_around_the_change_of_path(isa: str, grid: str, group_size: int | None) -> None:
    rule = scheme(grid, group_size, activation_symmetric=False)
    layer = QuantLinear.from_float(seeded(70, 1300), seeded(70), rule)
    for rows in (1, 2, 4, 5, 6, 7, 8, 9, 23, 24, 25):
        check(layer, seeded(rows, 1300, seed=rows) + 0.4, isa)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a8_asymmetric_and_static_activations(isa: str, grid: str, dtype: torch.dtype) -> None:
    x = (seeded(9, 200) + 0.7).to(dtype)
    w = seeded(70, 200)
    check(QuantLinear.from_float(w, None, scheme(grid, 32, activation_symmetric=False)), x, isa)
    static = {"activation_granularity": "per_tensor", "activation_dynamic": False}
    scale = torch.tensor(0.03)
    check(QuantLinear.from_float(w, None, scheme(grid, 64, **static), act_scale=scale), x, isa)
    zero = torch.tensor(90, dtype=torch.int32)
    layer = QuantLinear.from_float(
        w, None, scheme(grid, 64, activation_symmetric=False, **static), act_scale=scale, act_zero_point=zero
    )
    check(layer, x, isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a8_hazard_rows(isa: str, threads: int, dtype: torch.dtype) -> None:
    """NaN, Inf, zero, tiny and extreme rows; direct (few rows) and panel paths; any strides."""
    layer = QuantLinear.from_float(seeded(67, 136), seeded(67), scheme("symmetric", 64), inv_smooth=seeded(136).exp())
    x = hazard_rows(136).to(dtype)
    check(layer, x, isa)
    for row in x:
        check(layer, row, isa)
    check(layer, strided(x), isa)
    check(layer, x[:0], isa)


@pytest.mark.parametrize("grid", ["symmetric", "multiplier"])
@pytest.mark.parametrize("group_size", [None, 512, 64])
def test_w4a8_extremes_do_not_saturate(isa: str, grid: str, group_size: int | None) -> None:
    """Every product at its largest: the AVX2 tier adds eight pairs in 16 bits."""
    layer = QuantLinear.from_float(torch.full((64, 4096), -1.0), None, scheme(grid, group_size))
    for code in (0xFF, 0x00):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.full((64, 2048), code, dtype=torch.uint8)})
        for rows in (1, 7, 40):
            check(layer, torch.full((rows, 4096), -3.0), isa)
            check(layer, torch.full((rows, 4096), 3.0), isa)


@pytest.mark.parametrize("factor", [1.0, 1e6, 1e-9])
@pytest.mark.parametrize("group_size", [8, 32, 64, 256])
def test_w4a8_scales_of_either_type(isa: str, group_size: int, factor: float) -> None:
    """Where scales are fp16, a tile may turn sums into floats without a conversion; these need fp32 but for factor 1.
    Several groups in a panel, and one that is left over."""
    layer = QuantLinear.from_float(seeded(70, 1064) * factor, None, scheme("symmetric", group_size))
    assert (layer.canonical()["weight_scale"].dtype == torch.float16) == (factor == 1.0)
    for rows in (9, 25, 40):
        check(layer, seeded(rows, 1064, seed=rows), isa)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 140), st.integers(1, 400), st.sampled_from([8, 24, 32, 64, 128, 256, None]),
    st.sampled_from(sorted(GRIDS)),
)  # fmt: skip
def test_w4a8_any_shape(rows: int, n: int, k: int, group_size: int | None, grid: str) -> None:
    layer = QuantLinear.from_float(seeded(n, k), None, scheme(grid, group_size))
    check(layer, seeded(rows, k), _C.info()["isa"])


@pytest.mark.parametrize("preset", ["w4a8", "w4a8_intscale"])
def test_w4a8_repeats_to_the_bit_across_threads_and_tiers(preset: str) -> None:
    layer = QuantLinear.from_float(seeded(200, 512), seeded(200), preset)
    before, tier = torch.get_num_threads(), _C.info()["isa"]
    try:
        for rows in (33, 251):
            x = seeded(rows, 512)
            expected = torch.cat([layer(x[i : i + 1]) for i in range(rows)])
            for name in _C.info()["usable"]:
                _C.set_isa(name)
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    assert_bits_equal(layer(x), expected)
            _C.set_isa(tier)
    finally:
        torch.set_num_threads(before)
        _C.set_isa(tier)
