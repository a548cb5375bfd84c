"""4-bit weights whose groups have multipliers (``group_scales="int"``) on a GPU: equal to the reference bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, hazard_rows, seeded
from torch import Tensor, nn
from w4_on_gpu import MMA_TILES, PHASED_TILES_MULTIPLIERS, TILES, gpu, on_gpu

import qkernels as qk
from qkernels import cuda, cuda_w4, ops, reference
from qkernels.cuda_w4_layer import PreparedCudaW4
from qkernels.scheme import Scheme

MULTIPLIER_TILES = [*MMA_TILES, *TILES, *PHASED_TILES_MULTIPLIERS]
KINDS = ["symmetric", "zero point"]


def scheme_of(kind: str, group: int | str, *, symmetric: bool = True) -> Scheme:
    """``symmetric``: the activations."""
    scheme = Scheme.from_preset("w4a8_intscale").replace(group_size=group, weight_symmetric=kind == "symmetric")
    return scheme if symmetric else scheme.replace(activation_symmetric=False)


def canonical(scheme: Scheme, n: int, k: int, *, bias: bool = True) -> dict[str, Tensor]:
    """A weight whose groups differ in size."""
    w = seeded(n, k, seed=n + k) * torch.exp(seeded(n, -(-k // 32), seed=3).repeat_interleave(32, 1)[:, :k])
    tensors = reference.quantize_weight(w, scheme)
    return {**tensors, "bias": seeded(n, seed=1)} if bias else tensors


def skip_without_wgmma(phases: int, symmetric: bool = True) -> None:
    """No phases: the kernel of mma.sync, which every GPU has, and which alone takes activations with zero points."""
    if phases and not symmetric:
        pytest.skip("no such instance")
    if phases and not (cuda.capability(torch.cuda.current_device()) == 90 and cuda._cuda.has_sm90a()):
        pytest.skip("wgmma needs compute capability 9.0 and a build for sm_90a")


class Product:
    """The products of one weight by a tile, and what they should be."""

    def __init__(self, tensors: dict[str, Tensor], scheme: Scheme, k: int) -> None:
        self.scheme, self.k = scheme, k
        self.prepared = on_gpu(tensors, scheme, k)
        self.moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
        self.weight = cuda_w4.describe(self.prepared.tensors, scheme, self.prepared.out_features, k)

    def by_tile(self, x: Tensor, tokens: int, phases: int, ctas: int, out: torch.dtype = torch.float32) -> Tensor:
        """Through the kernel of wgmma, or without phases of mma.sync, in tiles of so many tokens."""
        q, scale, zero = cuda.quantize_rows(x, symmetric=self.scheme.activation_symmetric, for_gemm=True)
        plan = (min(phases, 1), tokens, phases, ctas, 0, 0)
        bias = self.moved.get("bias")
        return cuda_w4.gemm_w4a8(q, scale, self.weight, bias, out, x_zero_point=zero, plan=plan)

    def wanted(self, x: Tensor, out: torch.dtype = torch.float32) -> Tensor:
        """The definition."""
        return reference.linear(x, self.moved, self.scheme, self.k, out)


class TestMultipliers:
    pytestmark = gpu

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("group", [32, 64, 128, 96, 256, 4096])
    def test_layers_equal_the_reference(self, kind: str, group: int, symmetric: bool) -> None:
        for (n, k), dtype in zip([(8, 64), (203, 1000), (136, 333), (576, 3000)], (*DTYPES, DTYPES[1]), strict=True):
            scheme = scheme_of(kind, group, symmetric=symmetric)
            tensors = canonical(scheme, n, k, bias=n != 136)
            prepared = on_gpu(tensors, scheme, k)
            found = cuda.capability(torch.cuda.current_device())
            mma = "mma." if cuda_w4.wgmma_objection(scheme, found) else ""
            assert prepared.kernel == f"w4a8.cuda.{mma}sm{found}"
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
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_every_tile_of_every_size(self, tokens: int, phases: int, kind: str, symmetric: bool) -> None:
        skip_without_wgmma(phases, symmetric)
        n, k = 264, 1100
        for group in (32, 64, 96, 128, 256, 512, 2048):
            scheme = scheme_of(kind, group, symmetric=symmetric)
            product = Product(canonical(scheme, n, k), scheme, k)
            for rows in (1, 5, 33, 150, 290):
                x = (seeded(rows, k, seed=rows) + 0.25 * (rows - 30)).to("cuda", torch.bfloat16)
                y = product.by_tile(x, tokens, phases, 1 + rows % 3)
                assert_bits_equal(y, product.wanted(x), f"group {group}, {rows}")

    @pytest.mark.parametrize(("tokens", "phases"), MMA_TILES)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_mma_tiles_of_every_number_of_rows(self, tokens: int, phases: int, symmetric: bool) -> None:
        """Channels that end within a block, outputs that are stored one by one, in pairs and in fours."""
        for n, k, kind in ((203, 333, "zero point"), (72, 256, "symmetric"), (1, 40, "symmetric")):
            scheme = scheme_of(kind, 64, symmetric=symmetric)
            product = Product(canonical(scheme, n, k, bias=n != 72), scheme, k)
            for rows in range(1, 34):
                x = (seeded(rows, k, seed=rows) + torch.linspace(-3.0, 3.0, rows)[:, None]).to("cuda")
                for out in DTYPES:
                    y = product.by_tile(x, tokens, phases, 1, out)
                    assert_bits_equal(y, product.wanted(x, out), f"{n}x{k}, {rows} rows, {out}")

    @pytest.mark.parametrize(("tokens", "phases"), MMA_TILES)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_mma_tiles_of_short_last_groups(self, tokens: int, phases: int, symmetric: bool) -> None:
        """K from less than a step of 32 to slabs of every warp and a bit: what lies beyond K adds nothing."""
        for k in (1, 31, 33, 63, 97, 129, 161, 225, 1000, 1025, 2081):
            for group in (32, 64, 96, 128, 256):
                scheme = scheme_of("zero point", group, symmetric=symmetric)
                product = Product(canonical(scheme, 40, k), scheme, k)
                x = (seeded(19, k, seed=k) + 1.5).to("cuda")
                y = product.by_tile(x, tokens, phases, 1)
                assert_bits_equal(y, product.wanted(x), f"K = {k}, groups of {group}")

    @pytest.mark.parametrize(("tokens", "phases"), MULTIPLIER_TILES)
    def test_tiles_repeat_to_the_bit(self, tokens: int, phases: int) -> None:
        """K of many slabs, a full chip of tiles."""
        skip_without_wgmma(phases)
        for symmetric in (True, False) if phases == 0 else (True,):
            scheme, n, k = scheme_of("symmetric", 128, symmetric=symmetric), 4096, 9600 + 40
            product = Product(canonical(scheme, n, k), scheme, k)
            x = seeded(2 * tokens + 9, k).to("cuda", torch.bfloat16)
            wanted = product.wanted(x)
            for _ in range(20):
                assert_bits_equal(product.by_tile(x, tokens, phases, 66), wanted)

    @pytest.mark.parametrize(("code", "multiplier"), [(0, 15), (15, 15), (0, 1), (15, 1)])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_codes_and_activations_at_their_ends(self, code: int, multiplier: int, symmetric: bool) -> None:
        """Zero points of activations too: 0 below rows of +127, 255 below those of -127."""
        for n, k, group in [(32, 256, 256), (24, 65536, 65536), (8, 640, 128)]:
            scheme, groups = scheme_of("symmetric", group, symmetric=symmetric), -(-k // group)
            tensors = {
                "weight": torch.full((n, k // 2), code * 17, dtype=torch.uint8),
                "weight_scale": torch.rand(n) + 0.5,
                "weight_multiplier": torch.full((n, groups), multiplier, dtype=torch.uint8),
            }
            product = Product(tensors, scheme, k)
            for rows in (1, 20, 130, 300):
                x = torch.full((rows, k), 127.0, device="cuda")
                x[0].neg_()
                wanted = product.wanted(x)
                assert_bits_equal(product.prepared.run(x), wanted, f"{n}x{k}, {rows} rows")
                for tokens, phases in MMA_TILES:
                    y = product.by_tile(x, tokens, phases, 1)
                    assert_bits_equal(y, wanted, f"{n}x{k}, {rows} rows in tiles of {tokens}")

    @pytest.mark.parametrize("zero", [0, 15])
    def test_zero_points_at_their_ends(self, zero: int) -> None:
        """Of weights, whose signed bytes are -120 or 120 then, and of activations."""
        scheme, n, k = scheme_of("zero point", 32, symmetric=False), 40, 4096 + 24
        tensors = {
            "weight": torch.full((n, k // 2), (15 - zero) * 17, dtype=torch.uint8),
            "weight_scale": torch.rand(n) + 0.5,
            "weight_multiplier": torch.full((n, -(-k // 32)), 8, dtype=torch.uint8),
            "weight_zero_point": torch.full((n, -(-k // 32)), zero, dtype=torch.uint8),
        }
        product = Product(tensors, scheme, k)
        x = seeded(37, k).to("cuda")
        x[::3], x[1::3] = x[::3].abs(), -x[1::3].abs()  # zero points 0, 255, and in between
        zeros = cuda.quantize_rows(x, symmetric=False, for_gemm=True)[2]
        assert zeros is not None
        assert zeros.min() == 0
        assert zeros.max() == 255
        assert_bits_equal(product.prepared.run(x), product.wanted(x))
        for tokens, phases in MMA_TILES:
            assert_bits_equal(product.by_tile(x, tokens, phases, 1), product.wanted(x), f"tiles of {tokens}")

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("smooth", [False, True])
    def test_hazardous_rows_static_scales_and_smoothing(self, symmetric: bool, static: bool, smooth: bool) -> None:
        scheme, k = scheme_of("zero point", 64, symmetric=symmetric), 200
        tensors = canonical(scheme, 72, k)
        if smooth:
            tensors["inv_smooth"] = seeded(k, seed=2).abs() + 0.5
        if static:
            scheme = scheme.replace(activation_dynamic=False, activation_granularity="per_tensor")
            tensors["act_scale"] = torch.tensor(0.021)
            if not symmetric:
                tensors["act_zero_point"] = torch.tensor(201, dtype=torch.int32)
        prepared = on_gpu(tensors, scheme, k)
        x = hazard_rows(k)
        assert_bits_equal(prepared.run(x.to("cuda")), reference.linear(x, tensors, scheme, k))

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_state_moves_and_loads(self, symmetric: bool) -> None:
        scheme = scheme_of("zero point", 64, symmetric=symmetric)
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

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_layers_over_one_input_run_as_one(self, symmetric: bool) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = nn.Linear(256, 128), nn.Linear(256, 32), nn.Linear(256, 48)

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat((self.q(x), self.k(x), self.v(x)), -1)

        torch.manual_seed(0)
        model = Attention().cuda().bfloat16()
        qk.quantize_(model, scheme_of("symmetric", 64, symmetric=symmetric))
        assert model.q._joined()
        x = seeded(5, 256).to("cuda", torch.bfloat16)
        wanted = [reference.linear(x, layer.canonical(), layer.scheme, 256) for layer in (model.q, model.k, model.v)]
        assert_bits_equal(model(x), torch.cat(wanted, -1))
        assert_bits_equal(model.k(x), wanted[1])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_bits_equal(compiled(x), torch.cat(wanted, -1))

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_graph_replays(self, symmetric: bool) -> None:
        scheme, k = scheme_of("symmetric", 128, symmetric=symmetric), 512
        prepared = on_gpu(canonical(scheme, 256, k), scheme, k)
        x = seeded(4, k).to("cuda", torch.bfloat16)
        prepared.run(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = prepared.run(x)
        x.copy_(seeded(4, k, seed=5))
        graph.replay()
        assert_bits_equal(y, prepared.run(x))

    def test_asymmetric_activations_are_served_and_say_by_what(self) -> None:
        scheme = scheme_of("symmetric", 128, symmetric=False)
        prepared = ops.prepare(reference.quantize_weight(seeded(32, 256), scheme), scheme, 256, device="cuda")
        assert isinstance(prepared, PreparedCudaW4)
        found = cuda.capability(torch.cuda.current_device())
        assert prepared.reason == cuda_w4.wgmma_objection(scheme, found)
        kernel, tokens, *_ = cuda_w4._plan(8, 4, (32, 256, 128), 3, torch.cuda.current_device(), shifted=True)
        assert (kernel, tokens) == (0, 8)

    def test_what_no_instance_serves_is_refused(self) -> None:
        scheme, n, k = scheme_of("symmetric", 128, symmetric=False), 32, 256
        product = Product(canonical(scheme, n, k), scheme, k)
        x = seeded(3, k).to("cuda")
        with pytest.raises(ValueError, match="expected a tile of 8, 16, 64 or 128 tokens, got 32"):
            product.by_tile(x, 32, 0, 1)
        with pytest.raises(ValueError, match=r"expected the mma\.sync kernel"):
            product.by_tile(x, 8, 1, 1)
