"""The W4A16 Triton kernel against the reference: in the interpreter on the CPU, compiled where there is a GPU.

Tolerance: that of ``test_cuda_w4.py``, K products and sums in fp32 with exact integers, and a codebook's entries
rounded to the dtype of x.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from helpers import W4_KINDS, run_in_interpreter, seeded
from torch import Tensor

from qkernels import cuda_slices, reference
from qkernels.scheme import Scheme

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

if DEVICE.type == "cpu" and not INTERPRETED:

    def test_triton_w4_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

else:
    pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

    from qkernels.triton.dequantize import dequantize_w4
    from qkernels.triton.gemm_w4a16 import SLICED_ROWS, block_for, gemm_w4a16, tile_for
    from qkernels.triton.tiles import Tile

    SMALL = Tile(16, 16, 128, 4, 2)
    # The interpreter truncates float32 to bfloat16: fp16 and fp32 inputs and fp32 outputs there.
    INPUTS = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

    def product(
        x: Tensor,
        tensors: dict[str, Tensor],
        scheme: Scheme,
        tile: Tile | None = SMALL,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        at = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
        return gemm_w4a16(
            x.to(DEVICE),
            at["weight"],
            at["weight_scale"],
            None if bias is None else bias.to(DEVICE),
            group_size=scheme.resolve_group_size(x.shape[1]),
            weight_zero_point=at.get("weight_zero_point"),
            weight_min=at.get("weight_min"),
            codebook=None if scheme.codebook is None else torch.tensor(scheme.codebook, device=DEVICE),
            out_dtype=out_dtype,
            tile=tile,
        ).cpu()

    def assert_within_bound(
        y: Tensor, x: Tensor, tensors: dict[str, Tensor], scheme: Scheme, bias: Tensor | None = None
    ) -> None:
        """The tolerance of the file's head."""
        k, what = x.shape[1], f"{y.shape[0]}x{y.shape[1]}x{x.shape[1]}"
        weight = reference.dequantize_weight(tensors, scheme, k).double()
        expected = x.double() @ weight.T + (0.0 if bias is None else bias.double())
        plain = scheme.replace(codebook=None, weight_symmetric=True, weight_zero="int")
        sevens = {"weight": torch.full_like(tensors["weight"], 0xFF), "weight_scale": tensors["weight_scale"]}
        scale = reference.dequantize_weight(sevens, plain, k).double()
        bound = (2 * k + 64) * 2.0**-24 * (x.double().abs() @ (8 * scale.abs() + weight.abs()).T)
        if scheme.codebook is not None and x.dtype != torch.float32:
            step = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-11
            bound = bound + step * (x.double().abs() @ weight.abs().T)
        bound = bound + 2.0**-24 * (expected.abs() + 1)
        off = (y.double() - expected).abs()
        assert bool((off <= bound).all()), f"{what}: up to {(off / bound).max()} of the bound"

    def scheme_of(kind: str, group: int | None) -> Scheme:
        options = {} if group is None else {"weight_granularity": "per_group", "group_size": group}
        return Scheme(4, activation_bits=None, **options, **W4_KINDS[kind])  # type: ignore[arg-type]

    @pytest.mark.parametrize("dtype", INPUTS)
    @pytest.mark.parametrize("group", [None, 32, 64, 128])
    @pytest.mark.parametrize("kind", W4_KINDS)
    def test_gemm_w4a16_odd_shapes(kind: str, group: int | None, dtype: torch.dtype) -> None:
        scheme = scheme_of(kind, group)
        for m, n, k in [(1, 8, 64), (3, 5, 33), (17, 40, 200)]:
            tensors = reference.quantize_weight(seeded(n, k, seed=n), scheme)
            bias, x = seeded(n, seed=2), seeded(m, k, seed=3).to(dtype)
            assert_within_bound(product(x, tensors, scheme, SMALL, bias), x, tensors, scheme, bias)

    @pytest.mark.parametrize("dtype", INPUTS)
    @pytest.mark.parametrize("group", [None, 96])
    @pytest.mark.parametrize("kind", W4_KINDS)
    def test_gemm_w4a16_programs_that_share_k(kind: str, group: int | None, dtype: torch.dtype) -> None:
        scheme = scheme_of(kind, group)
        tensors = reference.quantize_weight(seeded(20, 330), scheme)
        bias, x = seeded(20, seed=2), seeded(3, 330, seed=3).to(dtype)
        for splits in (2, 4, 8):  # 8: more than there are blocks
            tile = replace(SMALL, k=64, splits=splits)
            y = product(x, tensors, scheme, tile, bias)
            assert_within_bound(y, x, tensors, scheme, bias)
            assert torch.equal(product(x, tensors, scheme, tile, bias), y)
        tensors, x = reference.quantize_weight(seeded(20, 3), scheme), x[:, :3]  # fewer of k than programs
        assert_within_bound(product(x, tensors, scheme, replace(SMALL, splits=8), bias), x, tensors, scheme, bias)

    @pytest.mark.parametrize("dtype", INPUTS)
    def test_gemm_w4a16_codes_and_zero_points_at_their_limits(dtype: torch.dtype) -> None:
        scheme = scheme_of("zero point", 32)
        tensors = reference.quantize_weight(seeded(6, 64), scheme)
        tensors["weight"][::2], tensors["weight"][1::2] = 0x00, 0xFF
        tensors["weight_zero_point"][:4] = torch.tensor([[0], [15], [16], [255]], dtype=torch.uint8)
        x = seeded(5, 64, seed=3).to(dtype)
        assert_within_bound(product(x, tensors, scheme), x, tensors, scheme)

    @pytest.mark.parametrize("dtype", INPUTS)
    @pytest.mark.parametrize(("n", "k"), [(37, 1), (5, 33), (40, 200), (16, 391)])
    @pytest.mark.parametrize("group", [None, 32, 128])
    @pytest.mark.parametrize("kind", W4_KINDS)
    def test_dequantize_w4(kind: str, group: int | None, n: int, k: int, dtype: torch.dtype) -> None:
        scheme = scheme_of(kind, group)
        tensors = reference.quantize_weight(seeded(n, k, seed=n), scheme)
        at = {name: tensor.to(DEVICE).view(n, -1) for name, tensor in tensors.items()}
        out = torch.full((n, k), float("nan"), dtype=dtype, device=DEVICE)
        length = k if group is None else min(group, k)
        done = dequantize_w4(
            at["weight"],
            at["weight_scale"],
            at.get("weight_zero_point"),
            at.get("weight_min"),
            None if scheme.codebook is None else torch.tensor(scheme.codebook, device=DEVICE),
            out,
            group=length,
            block=block_for(k, length),
        )
        assert done is out
        assert torch.equal(out.cpu(), reference.dequantize_weight(tensors, scheme, k).to(dtype))

    @pytest.mark.parametrize("group", [None, 32])
    @pytest.mark.parametrize("kind", W4_KINDS)
    def test_gemm_w4a16_of_many_rows_by_slices(kind: str, group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        k, n = 100, 300
        monkeypatch.setattr(cuda_slices, "_SLICE_BYTES", 1)  # slices of 128 rows, the last one of 44
        scheme = scheme_of(kind, group)
        tensors = reference.quantize_weight(seeded(n, k), scheme)
        bias, x = seeded(n, seed=2), seeded(SLICED_ROWS, 2 * k, seed=3).to(torch.float16)[:, :k]
        y = product(x, tensors, scheme, None, bias, torch.float16)
        # The weight, the bias and the output are rounded to float16 once each.
        weight = reference.dequantize_weight(tensors, scheme, k).to(torch.float16).double()
        expected = x.double() @ weight.T + bias.to(torch.float16).double()
        size = x.double().abs() @ weight.abs().T + 1
        bound = 2.0**-11 * expected.abs() + (k + 4) * 2.0**-23 * size + 2.0**-24
        assert bool(((y.double() - expected).abs() <= bound).all())

    def test_gemm_w4a16_slices_where_nothing_is_rounded_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def by_slices(x: Tensor, channels: int, *rest: object) -> Tensor:
            calls.append(x.shape[0])
            return x.new_zeros(x.shape[0], channels)

        monkeypatch.setattr("qkernels.triton.gemm_w4a16.by_slices", by_slices)
        scheme = scheme_of("symmetric", 32)
        tensors = reference.quantize_weight(seeded(4, 32), scheme)
        x = seeded(SLICED_ROWS, 32, seed=3)
        half = x.to(torch.float16)
        product(x, tensors, scheme, None)  # three terms of float32, and outputs in float32, stay exact
        product(half, tensors, scheme, None, None, torch.float32)
        product(half, tensors, scheme, SMALL, None, torch.float16)
        product(half[1:], tensors, scheme, None, None, torch.float16)
        assert not calls
        product(half, tensors, scheme, None, None, torch.float16)
        assert calls == [SLICED_ROWS]

    def test_tile_for_shares_k_where_programs_are_few() -> None:
        cases = {
            (1, 14336, 4096): (16, 64, 4),
            (16, 4096, 14336): (16, 64, 8),
            (16, 64, 4096): (16, 64, 4),
            (1, 64, 512): (16, 64, 1),
            (1, 65536, 8192): (16, 64, 1),
            (17, 4096, 4096): (32, 64, 4),
            (64, 8192, 8192): (64, 64, 2),
            (64, 14336, 4096): (64, 64, 1),
            (65, 4096, 2048): (128, 64, 2),
            (65, 4096, 2047): (128, 64, 1),
            (256, 14336, 4096): (128, 128, 1),
        }
        for shape, wanted in cases.items():
            tile = tile_for(*shape)
            assert (tile.m, tile.n, tile.splits) == wanted, shape

    def test_gemm_w4a16_rows_apart_and_not_a_number() -> None:
        scheme = scheme_of("symmetric", 32)
        tensors = reference.quantize_weight(seeded(9, 70), scheme)
        wide = seeded(6, 150, seed=3).to(torch.float16)
        for x in (wide[::2, :70], wide[:, 1:71], wide[:, ::2][:, :70], wide[:1, :70]):
            assert torch.equal(product(x, tensors, scheme), product(x.contiguous(), tensors, scheme))
        wide[2, 5] = float("nan")
        y = product(wide[:, :70], tensors, scheme)
        assert bool(y[2].isnan().all())
        assert not bool(y[torch.arange(6) != 2].isnan().any())

    def test_gemm_w4a16_says_which_groups_it_takes() -> None:
        x, weight = torch.ones(1, 96, device=DEVICE), torch.zeros(2, 48, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(ValueError, match="group_size"):
            gemm_w4a16(x, weight, torch.ones(2, 3, device=DEVICE), group_size=40)

    @pytest.mark.skipif(DEVICE.type == "cpu", reason="layers of the kernel live on a GPU")
    def test_layer_compiled_and_differentiated() -> None:
        from qkernels.triton.layer_weight_only import PreparedTritonWeightOnly

        scheme, n, k = Scheme.from_preset("w4a16"), 96, 256
        tensors = reference.quantize_weight(seeded(n, k), scheme)
        prepared = PreparedTritonWeightOnly.from_canonical({key: t.to(DEVICE) for key, t in tensors.items()}, scheme, k)
        x = seeded(7, k).to(DEVICE)
        y = prepared.run(x)
        torch.testing.assert_close(y.cpu(), reference.linear(x.cpu(), tensors, scheme, k), rtol=1e-4, atol=1e-4)
        compiled = torch.compile(lambda t: prepared.call(t, prepared.tensors), fullgraph=True)
        assert torch.equal(compiled(x), y)
        leaf = x.clone().requires_grad_()
        prepared.run(leaf).sum().backward()
        assert leaf.grad is not None
        wanted = reference.dequantize_weight(tensors, scheme, k).sum(0).expand(7, k)
        torch.testing.assert_close(leaf.grad.cpu(), wanted, rtol=n * 2.0**-23, atol=n * 2.0**-22)
