"""4-bit weights whose groups have multipliers (``group_scales="int"``) on a GPU: equal to the reference bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, hazard_rows, seeded
from torch import Tensor, nn
from w4_on_gpu import PHASED_TILES_MULTIPLIERS, TILES, gpu, on_gpu

import qkernels as qk
from qkernels import cuda, cuda_w4, ops, reference
from qkernels.scheme import Scheme

MULTIPLIER_TILES = [*TILES, *PHASED_TILES_MULTIPLIERS]


def scheme_of(kind: str, group: int | str) -> Scheme:
    return Scheme.from_preset("w4a8_intscale").replace(group_size=group, weight_symmetric=kind == "symmetric")


def canonical(scheme: Scheme, n: int, k: int, *, bias: bool = True) -> dict[str, Tensor]:
    """A weight whose groups differ in size."""
    w = seeded(n, k, seed=n + k) * torch.exp(seeded(n, -(-k // 32), seed=3).repeat_interleave(32, 1)[:, :k])
    tensors = reference.quantize_weight(w, scheme)
    return {**tensors, "bias": seeded(n, seed=1)} if bias else tensors


hopper = [
    *gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="wgmma is an instruction of compute capability 9.0",
    ),
]


class TestMultipliers:
    pytestmark = hopper

    @pytest.mark.parametrize("kind", ["symmetric", "zero point"])
    @pytest.mark.parametrize("group", [32, 64, 128, 96, 256, 4096])
    def test_layers_equal_the_reference(self, kind: str, group: int) -> None:
        for (n, k), dtype in zip([(8, 64), (203, 1000), (136, 333), (576, 3000)], (*DTYPES, DTYPES[1]), strict=True):
            scheme = scheme_of(kind, group)
            tensors = canonical(scheme, n, k, bias=n != 136)
            prepared = on_gpu(tensors, scheme, k)
            assert prepared.kernel == "w4a8.cuda.sm90"
            moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
            for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 330):
                x = (seeded(rows, k, seed=rows) + torch.linspace(-4.0, 4.0, rows)[:, None]).to("cuda", dtype)
                assert_bits_equal(prepared.run(x), reference.linear(x, moved, scheme, k), f"{n}x{k}, {rows} rows")
            for name, tensor in prepared.canonical().items():
                assert_bits_equal(tensor.cpu(), tensors[name], name)
            for out in DTYPES:
                wanted = reference.dequantize_weight(moved, scheme, k, out)
                assert_bits_equal(prepared.weight(out), wanted, "the float weight")

    @pytest.mark.parametrize(("tokens", "phases"), MULTIPLIER_TILES)
    @pytest.mark.parametrize("kind", ["symmetric", "zero point"])
    def test_every_tile_of_every_size(self, tokens: int, phases: int, kind: str) -> None:
        n, k = 264, 1100
        for group in (32, 64, 96, 128, 256, 512, 2048):
            scheme = scheme_of(kind, group)
            tensors = canonical(scheme, n, k)
            prepared = on_gpu(tensors, scheme, k)
            moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
            weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
            for rows in (1, 5, 33, 150, 290):
                x = (seeded(rows, k, seed=rows) + 0.25 * (rows - 30)).to("cuda", torch.bfloat16)
                q, scale, _ = cuda.quantize_rows(x, for_gemm=True)
                plan = (1, tokens, phases, 1 + rows % 3, 0, 0)
                y = cuda_w4.gemm_w4a8(q, scale, weight, moved["bias"], torch.float32, plan=plan)
                assert_bits_equal(y, reference.linear(x, moved, scheme, k, torch.float32), f"group {group}, {rows}")

    @pytest.mark.parametrize(("tokens", "phases"), MULTIPLIER_TILES)
    def test_tiles_repeat_to_the_bit(self, tokens: int, phases: int) -> None:
        """K of many slabs, a full chip of tiles."""
        scheme, n, k = scheme_of("symmetric", 128), 4096, 9600 + 40
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

    def test_codes_and_activations_at_their_ends(self) -> None:
        for n, k, group in [(32, 256, 256), (24, 65536, 65536), (8, 640, 128)]:
            scheme, groups = scheme_of("symmetric", group), -(-k // group)
            tensors = {
                "weight": torch.zeros(n, k // 2, dtype=torch.uint8),  # codes of -8
                "weight_scale": torch.rand(n) + 0.5,
                "weight_multiplier": torch.full((n, groups), 15, dtype=torch.uint8),
            }
            prepared = on_gpu(tensors, scheme, k)
            for rows in (1, 20, 130, 300):
                x = torch.full((rows, k), 127.0)
                x[0].neg_()
                assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, tensors, scheme, k), f"{n}x{k}")

    def test_hazardous_rows(self) -> None:
        scheme, k = scheme_of("zero point", 64), 200
        tensors = canonical(scheme, 72, k)
        prepared = on_gpu(tensors, scheme, k)
        x = hazard_rows(k)
        assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, tensors, scheme, k))

    def test_state_moves_and_loads(self) -> None:
        scheme = scheme_of("zero point", 64)
        layer = qk.nn.QuantLinear.from_float(seeded(72, 200), seeded(72), scheme)
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.to("cuda")
        x = seeded(5, 200).to("cuda")
        y = layer(x)
        for name, tensor in layer.state_dict().items():
            assert_bits_equal(tensor.cpu(), state[name], name)
        other = qk.nn.QuantLinear.from_float(seeded(72, 200, seed=9), seeded(72), scheme).to("cuda")
        other.load_state_dict(state)
        assert_bits_equal(other(x), y)
        assert_bits_equal(copy.deepcopy(layer)(x), y)
        assert_bits_equal(layer.to("cpu")(x.cpu()), reference.linear(x.cpu(), state, scheme, 200))
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        assert_bits_equal(compiled(x), y)

    def test_layers_over_one_input_run_as_one(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = nn.Linear(256, 128), nn.Linear(256, 32), nn.Linear(256, 48)

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat((self.q(x), self.k(x), self.v(x)), -1)

        torch.manual_seed(0)
        model = Attention().cuda().bfloat16()
        qk.quantize_(model, scheme_of("symmetric", 64))
        assert model.q._joined()
        x = seeded(5, 256).to("cuda", torch.bfloat16)
        wanted = [reference.linear(x, layer.canonical(), layer.scheme, 256) for layer in (model.q, model.k, model.v)]
        assert_bits_equal(model(x), torch.cat(wanted, -1))
        assert_bits_equal(model.k(x), wanted[1])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_bits_equal(compiled(x), torch.cat(wanted, -1))

    def test_graph_replays(self) -> None:
        scheme, k = scheme_of("symmetric", 128), 512
        prepared = on_gpu(canonical(scheme, 256, k), scheme, k)
        x = seeded(4, k).to("cuda", torch.bfloat16)
        prepared.run(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = prepared.run(x)
        x.copy_(seeded(4, k, seed=5))
        graph.replay()
        assert_bits_equal(y, prepared.run(x))

    def test_what_no_kernel_serves_says_so(self) -> None:
        scheme = scheme_of("symmetric", 128).replace(activation_symmetric=False)
        prepared = ops.prepare(reference.quantize_weight(seeded(32, 256), scheme), scheme, 256, device="cuda")
        assert not prepared.kernel.startswith("w4a8.cuda")
        weight = (1, 1, 0, 0, 0, 2, 1, 8, 64, 64, 1, 16)
        with pytest.raises(ValueError, match="no mma"):
            cuda_w4._plan(8, 4, weight[7:10], 3, 0, shifted=True)
