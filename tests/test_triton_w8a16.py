"""The W8A16 Triton kernel against the reference: in the interpreter on the CPU, compiled where there is a GPU.

Tolerance: K products and sums in fp32 on both sides, of codes and entries of x that are exact.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_compiled_and_differentiated, run_in_interpreter, seeded

from qkernels import reference
from qkernels.scheme import Scheme

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
SCHEME = Scheme.from_preset("w8a16")

if DEVICE.type == "cpu" and not INTERPRETED:

    def test_triton_w8a16_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

    def test_layers_say_what_they_leave_alone() -> None:
        from qkernels.triton.layer_weight_only import PreparedTritonWeightOnly

        there = torch.device("cuda", 0)
        assert PreparedTritonWeightOnly.objection(SCHEME, 256, 64, there) == ""
        groups = SCHEME.replace(weight_granularity="per_group", group_size=64)
        assert "group-wise 8-bit" in PreparedTritonWeightOnly.objection(groups, 256, 64, there)
        assert "empty" in PreparedTritonWeightOnly.objection(SCHEME, 256, 0, there)
        assert "w8a8" in PreparedTritonWeightOnly.objection(Scheme(), 256, 64, there)

else:
    pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

    from qkernels.triton.gemm_w8a16 import gemm_w8a16, tile_for
    from qkernels.triton.tiles import Tile

    # The interpreter truncates float32 to bfloat16: fp16 and fp32 inputs and fp32 outputs there.
    INPUTS = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", INPUTS)
    def test_gemm_w8a16_odd_shapes(dtype: torch.dtype, bias: bool) -> None:
        shapes = [(1, 8, 64), (3, 5, 33), (17, 40, 200)]
        if not INTERPRETED:
            shapes += [(130, 203, 1000), (70, 576, 1536)]
        for m, n, k in shapes:
            weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(n))
            scale, x = seeded(n, seed=2).abs() + 0.01, seeded(m, k, seed=3).to(dtype)
            shift = seeded(n, seed=4) if bias else None
            y = gemm_w8a16(
                x.to(DEVICE),
                weight.to(DEVICE),
                scale.to(DEVICE),
                None if shift is None else shift.to(DEVICE),
                out_dtype=torch.float32,
                tile=Tile(16, 16, 64, 4, 2) if INTERPRETED else None,
            ).cpu()
            wide = weight.double() * scale.double()[:, None]
            expected = x.double() @ wide.T + (0.0 if shift is None else shift.double())
            bound = (k + 4) * 2.0**-24 * (x.double().abs() @ wide.abs().T) + 2.0**-23 * (expected.abs() + 1)
            off = (y.double() - expected).abs()
            assert bool((off <= bound).all()), f"{m}x{n}x{k}: up to {(off / bound).max()} of the bound"

    @pytest.mark.parametrize("dtype", INPUTS)
    @pytest.mark.parametrize("k", [3, 330])  # fewer than programs; no multiple of a block
    def test_gemm_w8a16_odd_addresses_and_programs_that_share_k(dtype: torch.dtype, k: int) -> None:
        n = 20
        codes = torch.randint(-128, 128, (n * k + 1,), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
        codes[1:9], codes[9:17] = -128, 127
        scale, shift = seeded(n, seed=2).abs() + 0.01, seeded(n, seed=4)
        x = seeded(6, 2 * k, seed=5).to(dtype)[::2, :k]
        weight = codes[1:].view(n, k)  # bytes at an odd address: no two codes are loaded together
        wide = weight.double() * scale.double()[:, None]
        expected = x.double() @ wide.T + shift.double()
        bound = (k + 4) * 2.0**-24 * (x.double().abs() @ wide.abs().T) + 2.0**-23 * (expected.abs() + 1)
        at = codes.to(DEVICE)[1:].view(n, k)
        for weights in (at, at.clone()):
            for splits in (1, 2, 4, 16):
                tile = Tile(16, 16, 64, 4, 2, splits=splits)
                calls = [
                    gemm_w8a16(
                        x.to(DEVICE),
                        weights,
                        scale.to(DEVICE),
                        shift.to(DEVICE),
                        out_dtype=torch.float32,
                        tile=tile,
                    )
                    for _ in range(2)
                ]
                assert bool(((calls[0].cpu().double() - expected).abs() <= bound).all())
                assert torch.equal(*calls)

    def test_tile_for_shares_k_where_programs_are_few() -> None:
        cases = {
            (1, 14336, 4096): (16, 64, 1),
            (16, 4096, 14336): (16, 32, 4),
            (16, 8192, 8192): (16, 32, 2),
            (1, 64, 512): (16, 32, 1),
            (17, 4096, 4096): (32, 64, 4),
            (64, 8192, 8192): (64, 64, 2),
            (128, 14336, 4096): (128, 128, 1),
            (128, 4096, 4096): (64, 64, 2),
            (256, 14336, 4096): (256, 128, 1),
            (256, 4096, 4096): (128, 64, 2),
            (256, 4096, 2047): (128, 64, 1),
            (384, 4096, 4096): (128, 64, 1),
        }
        for shape, wanted in cases.items():
            tile = tile_for(*shape)
            assert (tile.m, tile.n, tile.splits) == wanted, shape

    @pytest.mark.skipif(DEVICE.type == "cpu", reason="layers of the kernel live on a GPU")
    def test_layer_compiled_and_differentiated() -> None:
        from qkernels.triton.layer_weight_only import PreparedTritonWeightOnly

        n, k = 96, 256
        tensors = reference.quantize_weight(seeded(n, k), SCHEME)
        moved = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
        prepared = PreparedTritonWeightOnly.from_canonical(moved, SCHEME, k)
        assert prepared.kernel == "w8a16.triton"
        x = seeded(7, k).to(DEVICE)
        y = prepared.run(x)
        torch.testing.assert_close(y.cpu(), reference.linear(x.cpu(), tensors, SCHEME, k), rtol=1e-4, atol=1e-4)
        assert_compiled_and_differentiated(prepared, x, y, reference.dequantize_weight(tensors, SCHEME, k))
