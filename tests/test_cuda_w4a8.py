"""4-bit weights and 8-bit activations on a GPU: equal to the reference bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, hazard_rows, seeded, static_grid
from w4_on_gpu import MMA_TILES, PHASED_TILES, TILES, canonical, gpu, on_gpu, scheme_of

from qkernels import cuda, cuda_w4, reference
from qkernels.scheme import Scheme


class TestW4A8:
    pytestmark = gpu

    @pytest.mark.parametrize("kind", ["symmetric", "zero point", "minimum"])
    @pytest.mark.parametrize("group", [None, 32, 64, 128, 96, 256])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_products_equal_the_reference(self, kind: str, group: int | None, symmetric: bool) -> None:
        for (n, k), dtype in zip([(8, 64), (203, 1000), (136, 333), (576, 3000)], (*DTYPES, DTYPES[1]), strict=True):
            scheme = scheme_of(kind, group, activation_bits=8, fp32=(n == 203), symmetric=symmetric)
            tensors = canonical(scheme, n, k, bias=n != 136)
            prepared = on_gpu(tensors, scheme, k)
            moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
            for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 330):
                x = (seeded(rows, k, seed=rows) + torch.linspace(-4.0, 4.0, rows)[:, None]).to("cuda", dtype)
                assert_bits_equal(prepared.run(x), reference.linear(x, moved, scheme, k), f"{n}x{k}, {rows} rows")

    @pytest.mark.parametrize(("tokens", "phases"), MMA_TILES + TILES[:5] + PHASED_TILES[8])
    @pytest.mark.parametrize("kind", ["symmetric", "zero point", "minimum"])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_every_tile_of_every_size(self, tokens: int, phases: int, kind: str, symmetric: bool) -> None:
        """No phases: the kernel of mma.sync, which alone takes activations with zero points."""
        if phases and cuda.capability(torch.cuda.current_device()) != 90:
            pytest.skip("wgmma is an instruction of compute capability 9.0")
        missing = phases > 0 and kind == "minimum" and (tokens == 128 or phases > 1)
        if missing or (phases and not symmetric):
            pytest.skip("no such instance")
        n, k = 264, 1100
        for group in (32, 64, 128) if phases > 1 else (32, 64, 96, 128, 256, 512, None):
            scheme = scheme_of(kind, group, activation_bits=8, symmetric=symmetric)
            tensors = canonical(scheme, n, k)
            prepared = on_gpu(tensors, scheme, k)
            moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
            weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
            for rows in (1, 5, 33, 150):
                x = (seeded(rows, k, seed=rows) + 0.25 * (rows - 30)).to("cuda", torch.bfloat16)
                q, scale, zero = cuda.quantize_rows(x, symmetric=symmetric, for_gemm=True)
                plan = (min(phases, 1), tokens, phases, 1 + rows % 3, 0, 0)
                y = cuda_w4.gemm_w4a8(q, scale, weight, moved["bias"], torch.float32, x_zero_point=zero, plan=plan)
                wanted = reference.linear(x, moved, scheme, k, torch.float32)
                assert_bits_equal(y, wanted, f"group {group}, {rows} rows")

    @pytest.mark.parametrize(("tokens", "phases"), PHASED_TILES[8])
    def test_tiles_of_wgmma_repeat_to_the_bit(self, tokens: int, phases: int) -> None:
        """K of many slabs, a full chip of tiles: what phases hand on to one another never comes too early or late."""
        if cuda.capability(torch.cuda.current_device()) != 90:
            pytest.skip("wgmma is an instruction of compute capability 9.0")
        scheme, n, k = Scheme.from_preset("w4a8"), 4096, 9600 + 40
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
        weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
        x = seeded(2 * tokens + 9, k).to("cuda", torch.bfloat16)
        q, scale, _ = cuda.quantize_rows(x, for_gemm=True)
        wanted = reference.linear(x, moved, scheme, k, torch.float32)
        for _ in range(20):
            y = cuda_w4.gemm_w4a8(q, scale, weight, moved["bias"], torch.float32, plan=(1, tokens, phases, 66, 0, 0))
            assert_bits_equal(y, wanted)

    @pytest.mark.parametrize(
        ("group", "k", "plan", "message"),
        [
            (128, 1024, (1, 24, 1, 1, 0, 0), "no instance with 24 tokens"),
            (128, 1024, (1, 32, 2, 1, 0, 0), "no instance with 32 tokens and 2 phases"),
            (256, 1024, (1, 32, 4, 1, 0, 0), "expected groups of 32, 64 or 128 for phases, got groups of 256"),
            (128, 384, (1, 32, 4, 1, 0, 0), "expected K of 4 slabs or more, got K = 384"),
            (128, 1024, (1, 32, 1, 0, 0, 0), "expected at least 1 cluster, got 0"),
            (128, 1024, (1, 32, 4, 1, 8, 65536), "expected whole tiles, got shared ones"),
        ],
    )
    def test_a_plan_that_no_instance_serves_is_refused(
        self, group: int, k: int, plan: tuple[int, ...], message: str
    ) -> None:
        if cuda.capability(torch.cuda.current_device()) != 90:
            pytest.skip("wgmma is an instruction of compute capability 9.0")
        scheme = scheme_of("symmetric", group, activation_bits=8)
        prepared = on_gpu(canonical(scheme, 128, k), scheme, k)
        q, scale, _ = cuda.quantize_rows(seeded(3, k).to("cuda"), for_gemm=True)
        weight = cuda_w4.describe(prepared.tensors, scheme, 128, k)
        with pytest.raises(ValueError, match=message):
            cuda_w4.gemm_w4a8(q, scale, weight, None, torch.float32, plan=plan)

    def test_the_wgmma_kernel_refuses_zero_points(self) -> None:
        scheme, n, k = scheme_of("symmetric", 128, activation_bits=8, symmetric=False), 128, 256
        prepared = on_gpu(canonical(scheme, n, k), scheme, k)
        assert prepared.reason == cuda_w4.wgmma_objection(scheme, cuda.capability(torch.cuda.current_device()))
        q, scale, zero = cuda.quantize_rows(seeded(3, k).to("cuda"), symmetric=False, for_gemm=True)
        weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
        with pytest.raises(ValueError, match=r"expected the mma\.sync kernel"):
            cuda_w4.gemm_w4a8(q, scale, weight, None, torch.float32, x_zero_point=zero, plan=(1, 8, 1, 1, 0, 0))

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_codes_and_activations_at_their_ends(self, symmetric: bool) -> None:
        for n, k, group in [(32, 256, 256), (24, 65536, None), (8, 640, 128)]:
            scheme = scheme_of("symmetric", group, activation_bits=8, symmetric=symmetric)
            groups = 1 if group is None else -(-k // group)
            shape = (n,) if group is None else (n, groups)
            scale = torch.rand(shape) + 0.5
            tensors = {"weight": torch.zeros(n, k // 2, dtype=torch.uint8), "weight_scale": scale}  # codes of -8
            if group is not None:
                tensors["weight_scale"] = scale.to(torch.float16)
                tensors["weight_scale"][1, 0], tensors["weight_scale"][2, 0] = torch.inf, 2.0**-24
            prepared = on_gpu(tensors, scheme, k)
            for rows in (1, 20, 130):
                x = torch.full((rows, k), 127.0)
                x[0].neg_()
                assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, tensors, scheme, k), f"{n}x{k}")

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_hazardous_rows_static_scales_and_smoothing(self, symmetric: bool) -> None:
        k = 200
        for static, smooth in itertools.product((False, True), repeat=2):
            scheme = scheme_of("symmetric", 64, activation_bits=8, symmetric=symmetric)
            tensors = canonical(scheme, 72, k, smooth=smooth)
            if static:
                scheme = scheme.replace(activation_dynamic=False, activation_granularity="per_tensor")
                tensors |= static_grid(scheme, 0.021, 201)
            prepared = on_gpu(tensors, scheme, k)
            x = hazard_rows(k)
            assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, tensors, scheme, k))

    @pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4864, 896), (1024, 13824)])
    def test_shapes_of_checkpoints(self, n: int, k: int) -> None:
        scheme = Scheme.from_preset("w4a8")
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
        for rows in (1, 16, 64, 300):
            x = seeded(rows, k, seed=rows).to("cuda", torch.float16)
            assert_bits_equal(prepared.run(x), reference.linear(x, moved, scheme, k), f"{rows} rows")

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_cuda_graph_compiled_and_canonical(self, symmetric: bool) -> None:
        scheme, n, k = Scheme.from_preset("w4a8").replace(activation_symmetric=symmetric), 96, 256
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        x = seeded(7, k).to("cuda")
        wanted = reference.linear(x.cpu(), tensors, scheme, k)
        prepared.run(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = prepared.run(x)
        graph.replay()
        assert_bits_equal(y, wanted)
        compiled = torch.compile(lambda t: prepared.call(t, prepared.tensors), fullgraph=True)
        assert_bits_equal(compiled(x), wanted)
        for name, tensor in prepared.canonical().items():
            assert_bits_equal(tensor, tensors[name], name)
