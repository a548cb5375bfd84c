"""4-bit weights whose groups have multipliers (``group_scales="int"``) on a GPU: equal to the reference bit for bit."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, hazard_rows, seeded, static_grid
from torch import Tensor, nn
from w4_on_gpu import MMA_TILES, MULTIPLIER_TILES, TILES, gpu, on_gpu

import qkernels as qk
from qkernels import cuda, cuda_w4, cuda_w4_layer, joint, ops, packed, reference
from qkernels.cuda_w4_layer import PreparedCudaW4
from qkernels.scheme import Scheme

EVERY_TILE = [*MMA_TILES, *TILES, *MULTIPLIER_TILES]
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


def has_wgmma() -> bool:
    return cuda.capability(torch.cuda.current_device()) == 90 and cuda._cuda.has_sm90a()


def skip_without_wgmma(phases: int) -> None:
    """No phases: the kernel of mma.sync, which every GPU has."""
    if phases and not has_wgmma():
        pytest.skip("wgmma needs compute capability 9.0 and a build for sm_90a")


def tiles_of(k: int) -> list[tuple[int, int]]:
    """Those that run here on ``k`` features: each phase takes a slab."""
    return [(tokens, phases) for tokens, phases in EVERY_TILE if phases <= (-(-k // 128) if has_wgmma() else 0)]


# -- without a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def packs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes stay as they are; the rest of a layer's memory is what it is on a GPU."""

    def pack(weight: Tensor, features: int, order: int, into: Tensor | None = None) -> Tensor:
        return weight.flatten().clone() if into is None else into.copy_(weight.flatten())

    module = SimpleNamespace(w4_group_pitch=lambda n: -(-n // 16) * 16, has_sm90a=lambda: True)
    monkeypatch.setattr(cuda_w4, "_cuda", module)
    monkeypatch.setattr(cuda_w4_layer, "pack_w4", pack)
    monkeypatch.setattr(cuda_w4_layer, "unpack_w4", lambda codes, n, k, order: codes.reshape(n, -1))
    monkeypatch.setattr(cuda_w4_layer, "settle", lambda device: None)
    monkeypatch.setattr(cuda_w4_layer, "capability", lambda index: 90)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 96, 4096])
@pytest.mark.parametrize("at_once", [1, 3000, 1 << 22])
def test_channel_sums_are_those_of_the_whole_numbers(
    kind: str, group: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_SUMMED_AT_ONCE", at_once)
    scheme = scheme_of(kind, group, symmetric=False)
    for n, k in ((1, 1), (37, 333), (16, 1000)):
        tensors = canonical(scheme, n, k)
        sums = packed.channel_sums(tensors, scheme, k)
        assert sums.dtype == torch.int32
        assert sums.tolist() == reference.multiplied_codes(tensors, scheme, k).long().sum(1).tolist()


def test_totals_less_the_shift_fit_int32_and_equal_the_reference() -> None:
    """What the kernels do at the end of K, at the ends of all there is: K, zero points, weights."""
    k, scheme = reference.MAX_INTEGER_K, scheme_of("symmetric", 65536, symmetric=False)
    for code, multiplier, stored in ((0, 15, -128), (0, 15, 127), (15, 15, 127), (15, 15, -128)):
        tensors = {
            "weight": torch.full((1, k // 2), code * 17, dtype=torch.uint8),
            "weight_scale": torch.ones(1),
            "weight_multiplier": torch.full((1, 1), multiplier, dtype=torch.uint8),
        }
        sums = packed.channel_sums(tensors, scheme, k)
        total = stored * sums  # of one value in all places
        for zero in (0, 255):
            whole = total - (zero - 128) * sums
            assert whole.dtype == torch.int32
            assert int(whole) == (stored + 128 - zero) * (code - 8) * multiplier * k


@pytest.mark.usefixtures("packs_on_cpu")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_resident_where_zero_points_meet_them_and_follow_loads(kind: str, symmetric: bool) -> None:
    scheme, n, k = scheme_of(kind, 64, symmetric=symmetric), 32, 256
    tensors, other = canonical(scheme, n, k), reference.quantize_weight(seeded(n, k, seed=8), scheme)
    layer = PreparedCudaW4.from_canonical(tensors, scheme, k)
    assert ("packed_sum" in layer.resident()) != symmetric
    assert layer.reason == ""
    where = None if symmetric else layer.tensors["packed_sum"].data_ptr()
    for name in [None, *other]:  # one by one
        if name is not None:
            layer.load({name: other[name]})
            tensors[name] = other[name]
        for own, tensor in layer.canonical().items():
            assert_bits_equal(tensor, tensors[own], own)
        assert layer.canonical().keys() == tensors.keys()
        assert (cuda_w4.describe(layer.tensors, scheme, n, k)[12] == 0) == symmetric
        if not symmetric:
            assert layer.tensors["packed_sum"].data_ptr() == where
            assert_bits_equal(layer.tensors["packed_sum"], packed.channel_sums(tensors, scheme, k), str(name))


@pytest.mark.usefixtures("packs_on_cpu")
def test_sums_of_layers_over_one_input_lie_side_by_side() -> None:
    scheme, k = scheme_of("symmetric", 64, symmetric=False), 256
    each = [canonical(scheme, n, k, bias=False) for n in (32, 16)]
    layers = [PreparedCudaW4.from_canonical(tensors, scheme, k) for tensors in each]
    sums = [packed.channel_sums(tensors, scheme, k) for tensors in each]
    together = joint.join(layers)
    assert together is not None
    assert_bits_equal(together.whole.tensors["packed_sum"], torch.cat(sums))
    for layer, own in zip(layers, sums, strict=True):
        assert_bits_equal(layer.tensors["packed_sum"], own)
        assert layer.tensors["packed_sum"].untyped_storage().nbytes() == 4 * 48
    joint.separate(layers[0])
    assert layers[0].tensors["packed_sum"].untyped_storage().nbytes() == 4 * 32


def test_operators_want_sums_just_where_their_kernels_read_them() -> None:
    x = seeded(3, 256)
    for symmetric in (True, False):
        scheme = scheme_of("symmetric", 64, symmetric=symmetric)
        prepared = ops.prepare(canonical(scheme, 32, 256), scheme, 256)
        given = {name: prepared.tensors.get(name) for name in prepared.names}
        rest, sums = (prepared.scheme_key, 32, 256, None), torch.zeros(32, dtype=torch.int32)
        with pytest.raises(ValueError, match="packed_sum: expected none"):  # the CPU's kernels work them out
            torch.ops.qkernels.linear_packed(x, *{**given, "packed_sum": sums}.values(), *rest)
        for wrong in (sums,) if symmetric else (None, sums.float()):
            expected = "none" if symmetric else "torch.int32"
            with pytest.raises(ValueError, match=f"packed_sum: expected {expected} "):
                cuda_w4_layer.linear_packed(x, *{**given, "packed_sum": wrong}.values(), *rest)


# -- with one ---------------------------------------------------------------------------------------------------------


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
            assert prepared.kernel == f"w4a8.cuda.sm{found}"
            moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
            for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 330):
                x = (seeded(rows, k, seed=rows) + torch.linspace(-4.0, 4.0, rows)[:, None]).to("cuda", dtype)
                assert_bits_equal(prepared.run(x), reference.linear(x, moved, scheme, k), f"{n}x{k}, {rows} rows")
            for name, tensor in prepared.canonical().items():
                assert_bits_equal(tensor.cpu(), tensors[name], name)
            for out in DTYPES:
                wanted = reference.dequantize_weight(moved, scheme, k, out)
                assert_bits_equal(prepared.weight(out), wanted, "the float weight")

    @pytest.mark.parametrize(("tokens", "phases"), EVERY_TILE)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_every_tile_of_every_size(self, tokens: int, phases: int, kind: str, symmetric: bool) -> None:
        skip_without_wgmma(phases)
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

    @pytest.mark.parametrize(("tokens", "phases"), EVERY_TILE)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_tiles_of_uneven_sizes(self, tokens: int, phases: int, symmetric: bool) -> None:
        """The same with K that every phase has a share of, and tokens that end within a tile."""
        skip_without_wgmma(phases)
        for n, k, kind in ((203, 1027, "zero point"), (72, 1152, "symmetric"), (1, 1000, "symmetric")):
            scheme = scheme_of(kind, 64, symmetric=symmetric)
            product = Product(canonical(scheme, n, k, bias=n != 72), scheme, k)
            for rows in (1, 9, tokens - 1, tokens + 1, 2 * tokens + 5):
                x = (seeded(rows, k, seed=rows) + torch.linspace(-3.0, 3.0, rows)[:, None]).to("cuda")
                for out in DTYPES:
                    y = product.by_tile(x, tokens, phases, 1 + rows % 3, out)
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

    @pytest.mark.parametrize(("tokens", "phases"), EVERY_TILE)
    def test_tiles_repeat_to_the_bit(self, tokens: int, phases: int) -> None:
        """K of many slabs, a full chip of tiles."""
        skip_without_wgmma(phases)
        for symmetric in (True, False):
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
                for tokens, phases in tiles_of(k):
                    y = product.by_tile(x, tokens, phases, 1)
                    assert_bits_equal(y, wanted, f"{n}x{k}, {rows} rows in tiles of {tokens}, {phases} phases")

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
        for tokens, phases in tiles_of(k):
            y = product.by_tile(x, tokens, phases, 1)
            assert_bits_equal(y, product.wanted(x), f"tiles of {tokens}, {phases} phases")

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
            tensors |= static_grid(scheme, 0.021, 201)
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

    def test_asymmetric_activations_are_served_as_symmetric_ones(self) -> None:
        scheme = scheme_of("symmetric", 128, symmetric=False)
        prepared = ops.prepare(reference.quantize_weight(seeded(32, 256), scheme), scheme, 256, device="cuda")
        assert isinstance(prepared, PreparedCudaW4)
        assert prepared.reason == ""
        for rows in (4, 40, 400):
            asked = (8, rows, (32, 256, 128), 3, torch.cuda.current_device())
            plan = cuda_w4._plan(*asked, shifted=True)
            assert plan == cuda_w4._plan(*asked)
            assert plan[0] == has_wgmma()

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_sums_of_channels_follow_what_is_loaded(self, kind: str, symmetric: bool) -> None:
        scheme, n, k = scheme_of(kind, 96, symmetric=symmetric), 136, 1000
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        assert ("packed_sum" in prepared.resident()) != symmetric
        assert prepared.canonical().keys() == tensors.keys()
        other = reference.quantize_weight(seeded(n, k, seed=8), scheme)
        x = (seeded(19, k) + 1.0).to("cuda")
        for name in other:  # one by one
            prepared.load({name: other[name]})
            tensors[name] = other[name]
            moved = {own: tensor.to("cuda") for own, tensor in tensors.items()}
            assert_bits_equal(prepared.run(x), reference.linear(x, moved, scheme, k), name)
            if not symmetric:
                wanted = reference.multiplied_codes(tensors, scheme, k).sum(1, dtype=torch.int32)
                assert_bits_equal(prepared.tensors["packed_sum"].cpu(), wanted, name)

    def test_operator_refuses_sums_that_are_not_what_kernels_read(self) -> None:
        scheme, n, k = scheme_of("symmetric", 128, symmetric=False), 32, 256
        prepared = on_gpu(canonical(scheme, n, k), scheme, k)
        op, x = torch.ops.qkernels.linear_packed, (seeded(3, k) + 1.0).to("cuda")
        resident = {name: prepared.tensors.get(name) for name in prepared.names}
        rest = (prepared.scheme_key, n, k, None)
        assert_bits_equal(op(x, *resident.values(), *rest), prepared.run(x))
        sums = resident["packed_sum"]
        spread = torch.stack((sums, -sums), 1)[:, 0]
        assert_bits_equal(op(x, *{**resident, "packed_sum": spread}.values(), *rest), prepared.run(x))
        for wrong in (None, sums[:16], sums.float(), sums.cpu()):
            with pytest.raises(ValueError, match="packed_sum: expected"):
                op(x, *{**resident, "packed_sum": wrong}.values(), *rest)

    def test_what_no_instance_serves_is_refused(self) -> None:
        scheme, n, k = scheme_of("symmetric", 128, symmetric=False), 32, 256
        product = Product(canonical(scheme, n, k), scheme, k)
        x = seeded(3, k).to("cuda")
        with pytest.raises(ValueError, match="expected a tile of 8, 16, 64 or 128 tokens, got 32"):
            product.by_tile(x, 32, 0, 1)
        product.weight = (*product.weight[:-1], 0)
        for tokens, phases in ((8, 0), (8, 1)):
            with pytest.raises(ValueError, match="expected sums of channels"):
                product.by_tile(x, tokens, phases, 1)
