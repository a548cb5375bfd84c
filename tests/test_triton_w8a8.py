"""Triton kernels against the reference: in the interpreter on the CPU (fp32 outputs), compiled where there is a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, hazard_rows, run_in_interpreter, seeded

from qkernels import reference

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

if DEVICE.type == "cpu" and not INTERPRETED:

    def test_triton_kernels_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

else:
    pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

    from qkernels.triton.gemm_w8a8 import MANY_ROWS, WIDE_TILES, Tile, gemm_w8a8, tile_for
    from qkernels.triton.quantize import quantize_rows

    # The interpreter truncates float32 to bfloat16 and is slow: fp32 outputs and small shapes there.
    OUTPUTS = (torch.float32,) if INTERPRETED else DTYPES
    SHAPES = [(1, 8, 16), (3, 5, 33), (17, 70, 130)] if INTERPRETED else [(1, 8, 16), (3, 5, 33), (300, 257, 1000)]
    SMALL_TILE = Tile(16, 32, 64, 1, 1) if INTERPRETED else None

    def expected_codes(q: torch.Tensor) -> torch.Tensor:
        """Codes as the kernels store them: asymmetric ones less 128."""
        return (q ^ 128).view(torch.int8) if q.dtype == torch.uint8 else q

    @pytest.mark.parametrize("k", [1, 17, 64])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_quantize_rows_hazards(k: int, dtype: torch.dtype, symmetric: bool) -> None:
        x = hazard_rows(k).to(dtype)
        if INTERPRETED and dtype != torch.float32:  # its conversion from 16 bits is wrong for denormal values
            x = x[~((x != 0) & (x.abs() < torch.finfo(dtype).tiny)).any(-1)]
        q, scale, zero = reference.quantize_activations(x, symmetric=symmetric)
        got_q, got_scale, got_zero = quantize_rows(x.to(DEVICE), symmetric=symmetric)
        assert_bits_equal(got_scale, scale, "scale")
        assert_bits_equal(got_q, expected_codes(q), "q")
        if zero is not None and got_zero is not None:
            assert_bits_equal(got_zero, zero, "zero_point")

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_quantize_rows_static_and_smoothed(symmetric: bool) -> None:
        x, smooth = seeded(5, 40, scale=3.0), seeded(40, seed=1).abs() + 0.5
        x[2, 7] = float("nan")
        scale, zero = torch.tensor(0.031), None if symmetric else torch.tensor(100, dtype=torch.int32)
        q, scales, _ = reference.quantize_activations(
            x, symmetric=symmetric, scale=scale, zero_point=zero, inv_smooth=smooth
        )
        got_q, got_scales, _ = quantize_rows(
            x.to(DEVICE),
            symmetric=symmetric,
            scale=scale.to(DEVICE),
            zero_point=None if zero is None else zero.to(DEVICE),
            inv_smooth=smooth.to(DEVICE),
        )
        assert_bits_equal(got_scales, scales, "scale")
        assert_bits_equal(got_q, expected_codes(q), "q")

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("out_dtype", OUTPUTS)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_gemm_odd_shapes(shape: tuple[int, int, int], out_dtype: torch.dtype, symmetric: bool) -> None:
        m, n, k = shape
        generator = torch.Generator().manual_seed(3)
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        weight_scale, bias = seeded(n, seed=2).abs() + 0.01, seeded(n, seed=4)
        x = seeded(m, k, seed=5)
        x[0, k // 2] = float("inf")
        q, scale, zero = reference.quantize_activations(x, symmetric=symmetric)
        wanted = reference.linear_w8a8_prequantized(q, scale, zero, weight, weight_scale, bias, out_dtype)
        got = gemm_w8a8(
            expected_codes(q).to(DEVICE),
            scale.to(DEVICE),
            None if zero is None else zero.to(DEVICE),
            weight.to(DEVICE),
            weight_scale.to(DEVICE),
            bias.to(DEVICE),
            colsum=weight.sum(1, dtype=torch.int32).to(DEVICE),
            out_dtype=out_dtype,
            tile=SMALL_TILE,
        )
        assert_bits_equal(got, wanted)

    @pytest.mark.parametrize("tile", [*WIDE_TILES, tile_for(MANY_ROWS, 4096)])
    def test_every_wide_tile_with_ragged_edges(tile: Tile) -> None:
        m, n, k = tile.m + 3, tile.n + 7, tile.k + 9
        generator = torch.Generator().manual_seed(7)
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        q = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
        scale, weight_scale = seeded(m, seed=8).abs() + 0.01, seeded(n, seed=9).abs() + 0.01
        wanted = reference.linear_w8a8_prequantized(q, scale, None, weight, weight_scale, None, torch.float32)
        moved = [t.to(DEVICE) for t in (q, scale, weight, weight_scale)]
        assert_bits_equal(gemm_w8a8(moved[0], moved[1], None, moved[2], moved[3], tile=tile), wanted)

    def test_tiles_leave_room_for_two_programs_and_keep_the_chip_busy() -> None:
        for tile in WIDE_TILES:
            assert (tile.m + tile.n) * tile.k * tile.stages <= 96 * 1024
        picks = {(256, 4096): (64, 64), (512, 4096): (64, 128), (1024, 4096): (128, 128), (128, 14336): (64, 128)}
        for (rows, channels), wanted in picks.items():
            assert (tile_for(rows, channels).m, tile_for(rows, channels).n) == wanted
        assert tile_for(MANY_ROWS - 1, 4096).group < tile_for(MANY_ROWS, 4096).group

    def test_gemm_needs_the_sums_with_zero_points() -> None:
        ones = torch.ones(1, 16, dtype=torch.int8, device=DEVICE)
        scale = torch.ones(1, device=DEVICE)
        with pytest.raises(ValueError, match="colsum"):
            gemm_w8a8(ones, scale, torch.zeros(1, dtype=torch.int32, device=DEVICE), ones, scale)
