"""4-bit weights on a GPU against the reference.  What needs no GPU runs without one.

Tolerance of W4A16.  Weights are multiplied as exact integers and scaled in fp32; the reference here is the fp32 weight
times x in float64.  With u = 2**-24, per output:

    |kernel - reference| <= (2.5 * K + 64) * u * sum_k |x_k| * B_k,   B_k = 56 * |scale| + |w|

(each of K products and additions rounds once, in any order; sums that go from the units of a group's scale to those of
the next, every 32 k at most, are off by less than 16 u each time; 64 covers scales, offsets, the bias and the split of
fp32 inputs), plus half a step of what is rounded to 16 bits: a codebook's entries under 16-bit inputs, in products of
many rows the weight and the bias, and at the end the output.
"""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    DTYPES,
    W4_KINDS,
    assert_bits_equal,
    assert_compiled_and_differentiated,
    seeded,
    strided,
)
from torch import Tensor
from w4_on_gpu import MULTIPLIER_TILES, PHASED_TILES, TILES, TILES_OF_HALVES, canonical, gpu, on_gpu, scheme_of

from qkernels import cuda, cuda_w4, cuda_w4_layer, ops, reference
from qkernels.cuda_w4_layer import PreparedCudaW4
from qkernels.scheme import Scheme

INTEGER_SCALES = Scheme.from_preset("w4a8_intscale")
STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_close(
    y: Tensor, x: Tensor, tensors: dict[str, Tensor], scheme: Scheme, k: int, *, fused: bool = True
) -> None:
    """The tolerance of the file's head.  Not fused: the weight was dequantized first."""
    at = {name: tensor.to("cuda") for name, tensor in tensors.items()}
    weight = reference.dequantize_weight(at, scheme, k).double()
    plain = scheme.replace(codebook=None, weight_symmetric=True, weight_zero="int")
    sevens = {"weight": torch.full_like(at["weight"], 0xFF), "weight_scale": at["weight_scale"]}
    scale = reference.dequantize_weight(sevens, plain, k)  # 7 times the scale of each weight
    wide = x.to("cuda", torch.float32)
    if "inv_smooth" in at:
        wide = wide * at["inv_smooth"]
    wide = wide.double()
    expected = wide @ weight.T
    reach = wide.abs() @ (8 * scale.abs() + weight.abs()).double().T
    bound = (2.5 * k + 64) * 2.0**-24 * reach
    terms = 3 if x.dtype == torch.float32 or "inv_smooth" in at else 1
    minima = scheme.weight_zero == "float"
    most = cuda_w4.fused_rows(torch.cuda.current_device(), minima=minima)
    fused = fused and terms * x.shape[0] <= most
    if scheme.codebook is not None and fused and terms == 1:
        bound = bound + STEP[x.dtype] * (wide.abs() @ weight.abs().T)
    if not fused:
        bound = bound + STEP[torch.float32 if "inv_smooth" in at else x.dtype] * (wide.abs() @ weight.abs().T)
        bound = bound + STEP[x.dtype] * (expected.abs() + at["bias"].abs() if "bias" in at else expected.abs())
    if "bias" in at:
        expected = expected + at["bias"].double()
    bound = bound + STEP[y.dtype] * (expected.abs() + bound) + 2.0**-24
    off = (y.double() - expected).abs()
    assert bool((off <= bound).all()), f"{int((off > bound).sum())} of {y.numel()} off, up to {(off / bound).max()}"


# -- without a GPU ----------------------------------------------------------------------------------------------------


def test_w4_kernels_say_what_they_leave_alone() -> None:
    cpu, there = torch.device("cpu"), torch.device("cuda", 0)
    assert PreparedCudaW4.objection(scheme_of("symmetric", 128), 256, 64, cpu)
    assert "8-bit" not in PreparedCudaW4.objection(scheme_of("symmetric", 128), 256, 64, there)
    assert "groups of 40" in PreparedCudaW4.objection(scheme_of("symmetric", 40), 256, 64, there)
    assert "empty" in PreparedCudaW4.objection(scheme_of("symmetric", 128), 0, 64, there)
    shifted = scheme_of("symmetric", 128, activation_bits=8, symmetric=False)
    for scheme in (shifted, INTEGER_SCALES, INTEGER_SCALES.replace(activation_symmetric=False)):
        assert PreparedCudaW4.objection(scheme, 256, 64, there) == cuda.unavailable(there)
    prepared = ops.prepare(canonical(scheme_of("symmetric", 128), 8, 256), scheme_of("symmetric", 128), 256)
    assert prepared.kernel.startswith("w4a16.")
    assert not prepared.reason


@pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module")
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_w4_plans_have_room_for_what_is_shared(eight_bits: bool, capability: int) -> None:
    kinds = (0, 1, 3) if eight_bits else (0, 1, 2)  # codebooks under 16-bit activations, multipliers under 8-bit ones
    rows, channels = (1, 8, 9, 16, 17, 33, 64, 65, 129, 320, 8192), (1, 129, 4096, 17408, 22016, 28672, 128256)
    sizes = (rows, channels, (1, 129, 4096, 14336), kinds, (96, 128), (78, 114, 132))
    for m, n, k, kind, group, sms in itertools.product(*sizes):
        plan = cuda._cuda.plan_w4(eight_bits, m, n, k, group, kind, capability, sms)
        kernel, tokens, phases, ctas, counters, floats, head, head_tokens = plan
        assert not head or (kernel == 1 and kind == 3 and m > 64 and (head_tokens > 128) == (m > 128))
        assert kernel == (1 if capability == 90 and cuda._cuda.has_sm90a() else 0)
        if kernel == 0:
            assert tokens in ((8, 16, 64, 128) if eight_bits else (8, 16, 32, 64))
            assert eight_bits or 1 <= ctas <= min(2 * sms, -(-m // tokens) * -(-n // 128) * -(-k // 128))
            assert eight_bits or floats == ctas * 2 * 128 * tokens
            continue
        every = TILES if eight_bits or kind == 1 else TILES_OF_HALVES
        tiles = every[: 4 if kind == 1 else 5 if eight_bits and kind != 3 else 8]
        if kind == 3:
            tiles = tiles + MULTIPLIER_TILES
        elif kind == 0:
            tiles = tiles + PHASED_TILES[8 if eight_bits else 16]
        assert (tokens, phases) in tiles
        assert phases == 1 or (k > 128 and (not eight_bits or kind == 3 or group == 128))
        assert phases == 1 or not counters
        assert 1 <= ctas <= 2 * sms
        assert (floats == 0) == (counters == 0)
        assert counters == 0 or (floats == counters * 64 * tokens and counters % (2 * ctas) == 0)
        assert counters == 0 or not eight_bits


class Plans:
    """Stands for the CUDA module: what a plan was asked for."""

    def plan_w4(self, *asked: int) -> tuple[int, ...]:
        return asked

    def has_sm90a(self) -> bool:
        return True


@pytest.mark.parametrize(("capability", "asked"), [(80, 80), (89, 89), (90, 89), (100, 89)])
def test_w4a8_of_float_scales_with_zero_points_is_planned_for_mma_and_says_so(
    capability: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_w4, "_cuda", Plans())
    for module in (cuda_w4, cuda_w4_layer):
        monkeypatch.setattr(module, "capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=132))
    plan = cuda_w4._plan.__wrapped__
    for kind, wanted in ((1, asked), (3, capability)):
        assert plan(8, 5, (264, 1100, 128), kind, 0, shifted=True) == (True, 5, 264, 1100, 128, kind, wanted, 132)
        assert plan(8, 5, (264, 1100, 128), kind, 0) == (True, 5, 264, 1100, 128, kind, capability, 132)
    assert not cuda_w4.wgmma_objection(scheme_of("symmetric", 128), capability)
    for symmetric in (scheme_of("symmetric", 128, activation_bits=8), INTEGER_SCALES):
        shifted, mma = symmetric.replace(activation_symmetric=False), capability == 90 and symmetric != INTEGER_SCALES
        assert ("mma.sync" in cuda_w4.wgmma_objection(shifted, capability)) == mma
        assert not cuda_w4.wgmma_objection(symmetric, capability)
        layer = PreparedCudaW4({"packed": torch.empty(0), "weight_scale": torch.empty(0)}, shifted, 256, 64)
        assert layer.kernel == f"w4a8.cuda.{'mma.' if mma else ''}sm{capability}"


# -- packing ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (16, 128), (17, 129), (130, 333), (576, 1536), (203, 4864)]


class TestPacking:
    """Copies, and the float weight."""

    pytestmark = gpu

    @pytest.mark.parametrize("order", [0, 1])
    @pytest.mark.parametrize(("n", "k"), SHAPES)
    def test_pack_returns_every_byte(self, n: int, k: int, order: int) -> None:
        weight = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8, device="cuda")
        packed = cuda_w4.pack_w4(weight, k, order)
        assert_bits_equal(cuda_w4.unpack_w4(packed, n, k, order), weight)
        if n * k > 1:
            assert not torch.equal(packed, cuda_w4.pack_w4(weight, k, 1 - order))

    @pytest.mark.parametrize("kind", W4_KINDS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dequantize_equals_the_reference(self, kind: str, dtype: torch.dtype) -> None:
        for (n, k), group in itertools.product([(1, 1), (17, 129), (130, 333), (203, 1000)], (None, 32, 64, 128, 96)):
            scheme = scheme_of(kind, group)
            tensors = canonical(scheme, n, k)
            prepared = on_gpu(tensors, scheme, k)
            wanted = reference.dequantize_weight(tensors, scheme, k, dtype)
            assert_bits_equal(prepared.weight(dtype), wanted, f"{n}x{k} group {group}")


# -- W4A16 ------------------------------------------------------------------------------------------------------------


def check_repeats(n: int, k: int, rows: int, plans: list[tuple[int, ...]]) -> None:
    """Each plan's product of bf16 rows is right, and launches of it that overlap have its bits."""
    scheme = scheme_of("symmetric", 128)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    tensors = {"weight": codes, "weight_scale": (torch.rand(n, k // 128, device="cuda") + 0.5).half()}
    prepared = on_gpu(tensors, scheme, k)
    weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
    some = slice(0, n, 111)
    few = {name: tensor[some].contiguous() for name, tensor in tensors.items()}
    x = seeded(rows, k).to("cuda", torch.bfloat16)
    for plan in plans:
        wanted = cuda_w4.gemm_w4a16(x, weight, None, torch.bfloat16, plan=plan)
        assert_close(wanted[:, some], x, few, scheme, k)
        for _ in range(40):
            y = cuda_w4.gemm_w4a16(x, weight, None, torch.bfloat16, plan=plan, dependent=True)
            assert torch.equal(y.view(torch.int16), wanted.view(torch.int16))


class TestW4A16:
    """Products and layers."""

    pytestmark = gpu

    @pytest.mark.parametrize("kind", W4_KINDS)
    @pytest.mark.parametrize("group", [None, 32, 64, 128, 96, 256])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_products_are_within_rounding(self, kind: str, group: int | None, dtype: torch.dtype) -> None:
        for n, k in [(8, 64), (203, 1000), (136, 333), (576, 1536)]:
            scheme = scheme_of(kind, group, fp32=(n == 203))
            tensors = canonical(scheme, n, k, bias=n != 136)
            prepared = on_gpu(tensors, scheme, k)
            for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 330):
                x = seeded(rows, k, seed=rows).to(dtype)
                assert_close(prepared.run(x.to("cuda")), x, tensors, scheme, k)

    @pytest.mark.parametrize(("tokens", "phases"), TILES_OF_HALVES + PHASED_TILES[16])
    @pytest.mark.parametrize("kind", W4_KINDS)
    def test_every_wgmma_tile_of_every_size(self, tokens: int, phases: int, kind: str) -> None:
        if cuda.capability(torch.cuda.current_device()) != 90:
            pytest.skip("wgmma is an instruction of compute capability 9.0")
        if phases > 1 and kind not in ("symmetric", "zero point"):
            pytest.skip("no such instance")
        if tokens > 64 and kind == "minimum":
            pytest.skip("no such instance")
        n, k = 328, 1100
        for group, dtype in itertools.product((32, 64, 96, 128, 256, 512, None), DTYPES[1:]):
            scheme = scheme_of(kind, group)
            tensors = canonical(scheme, n, k)
            # Groups that are nothing, the first and the last among them, and neighbours far apart; negative scales.
            scales = tensors["weight_scale"].view(n, -1)
            scales[::5, 0], scales[1::5, -1], scales[2::5], scales[3::7] = 0.0, 0.0, 0.0, -scales[3::7]
            scales[4::5, ::2] *= 2.0**-7
            prepared = on_gpu(tensors, scheme, k)
            weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
            for rows, ctas in itertools.product((1, 33, 300), (1, 2, 5) if phases == 1 else (1,)):
                x = seeded(rows, k, seed=rows).to("cuda", dtype)
                shared = ctas > 1 and phases == 1
                room = (4096, 2 * ctas * 2 * 128 * tokens) if shared else (0, 0)
                bias = tensors["bias"].to("cuda")
                y = cuda_w4.gemm_w4a16(x, weight, bias, dtype, plan=(1, tokens, phases, ctas, *room))
                assert_close(y, x, tensors, scheme, k)

    @pytest.mark.parametrize(("tokens", "phases"), [(8, 2), (16, 2), (8, 4), (16, 4), (8, 8), (16, 8)])
    def test_few_tokens_repeat_to_the_bit(self, tokens: int, phases: int) -> None:
        """More tiles than run at a time, K of many times the stages, launches that overlap: every stage's slabs change
        hands again and again."""
        if cuda.capability(torch.cuda.current_device()) != 90:
            pytest.skip("wgmma is an instruction of compute capability 9.0")
        check_repeats(28672, 14336, tokens, [(1, tokens, phases, 1, 0, 0)])

    @pytest.mark.parametrize("tokens", [8, 16, 32, 64, 96, 128, 192, 256])
    def test_shared_tiles_repeat_to_the_bit(self, tokens: int) -> None:
        """Tiles of one to many clusters, launches that overlap: sums that others leave, and their flags, are used
        again at once."""
        if cuda.capability(torch.cuda.current_device()) != 90:
            pytest.skip("wgmma is an instruction of compute capability 9.0")
        plans = [(1, tokens, 1, ctas, 4 * ctas, 2 * ctas * 128 * tokens) for ctas in (66, 61)]
        for n, rows in ((1024, tokens), (4096, tokens), (10240, 2 * tokens)):
            check_repeats(n, 14336, rows, plans)
        check_repeats(35840, 1024, tokens, plans)  # behind whole tiles

    @pytest.mark.parametrize(("tokens", "phases"), [(8, 2), (16, 2), (8, 4), (16, 4), (8, 8), (16, 8)])
    def test_few_tokens_of_every_width(self, tokens: int, phases: int) -> None:
        """From five blocks of 16 channels to more tiles than run at a time; stages that are used again where few."""
        if cuda.capability(torch.cuda.current_device()) != 90:
            pytest.skip("wgmma is an instruction of compute capability 9.0")
        sms = torch.cuda.get_device_properties("cuda").multi_processor_count
        widths = [*range(1, 10), 14, 17]  # blocks of 16 channels for each multiprocessor
        for each, (kind, group) in itertools.product(widths, (("symmetric", 128), ("zero point", 64))):
            scheme, n, k = scheme_of(kind, group), 16 * (sms * (each - 1) + 5) - 3, 4200 if each < 3 else 1100
            tensors = canonical(scheme, n, k)
            prepared = on_gpu(tensors, scheme, k)
            weight, bias = cuda_w4.describe(prepared.tensors, scheme, n, k), tensors["bias"].to("cuda")
            for rows in (1, tokens, tokens + 3):
                x = seeded(rows, k, seed=rows).to("cuda", torch.bfloat16)
                y = cuda_w4.gemm_w4a16(x, weight, bias, torch.bfloat16, plan=(1, tokens, phases, 1, 0, 0))
                assert_close(y, x, tensors, scheme, k)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_products_by_slices_are_within_rounding(self, dtype: torch.dtype) -> None:
        scheme, n, k = scheme_of("zero point", 64), 203, 1000
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        x = seeded(40, k).to(dtype)
        weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
        y = cuda_w4._by_slices(x.to("cuda"), weight, prepared.tensors["bias"], dtype)
        assert_close(y, x, tensors, scheme, k, fused=False)

    def test_every_number_of_rows(self) -> None:
        scheme, n, k = scheme_of("symmetric", 128), 264, 1088
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        for rows in (*range(1, 34), 40, 47, 48, 49, 63, 80, 81, 127, 129):  # only those that exist are copied
            x = seeded(rows, k, seed=rows).to(torch.bfloat16)
            assert_close(prepared.run(x.to("cuda")), x, tensors, scheme, k)

    @pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4864, 896), (1024, 13824)])
    def test_shapes_of_checkpoints_repeat_to_the_bit(self, n: int, k: int) -> None:
        scheme = scheme_of("zero point", 128)
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        for rows in (1, 16, 64, 130):
            x = seeded(rows, k, seed=rows).to("cuda", torch.float16)
            first = prepared.run(x)
            assert_close(first, x, tensors, scheme, k)
            for _ in range(20):
                assert_bits_equal(prepared.run(x), first)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_smoothing_is_not_narrowed(self, dtype: torch.dtype) -> None:
        scheme, n, k = scheme_of("symmetric", 64), 96, 320
        tensors = canonical(scheme, n, k, smooth=True)
        prepared = on_gpu(tensors, scheme, k)
        for rows in (1, 20, 330):
            x = seeded(rows, k, seed=rows).to(dtype)
            assert_close(prepared.run(x.to("cuda")), x, tensors, scheme, k)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_and_infinity_stay_in_their_rows(self, dtype: torch.dtype) -> None:
        scheme, n, k = scheme_of("zero point", 128), 64, 256
        tensors = canonical(scheme, n, k)
        x = seeded(5, k).to(dtype)
        x[1, 3], x[3, 200] = torch.nan, torch.inf
        y = on_gpu(tensors, scheme, k).run(x.to("cuda"))
        assert bool(y[1].isnan().all())
        assert not bool(y[3].isfinite().all())
        rest = [0, 2, 4]
        assert_close(y[rest], x[rest], tensors, scheme, k)

    def test_any_strides_and_no_rows(self) -> None:
        scheme, n, k = scheme_of("symmetric", 32), 64, 96
        prepared = on_gpu(canonical(scheme, n, k), scheme, k)
        x = seeded(6, 5, k).to("cuda", torch.bfloat16)
        wanted = prepared.run(x)
        assert_bits_equal(prepared.run(strided(x)), wanted)
        flat = torch.empty(6 * 5 * k + 1, dtype=torch.bfloat16, device="cuda")[1:].view(6, 5, k)
        assert_bits_equal(prepared.run(flat.copy_(x)), wanted)
        assert prepared.run(x[:0]).shape == (0, 5, n)

    @pytest.mark.parametrize("kind", W4_KINDS)
    def test_canonical_tensors_come_back(self, kind: str) -> None:
        scheme, n, k = scheme_of(kind, 64), 75, 201
        tensors = canonical(scheme, n, k, smooth=True)
        prepared = on_gpu(tensors, scheme, k)
        for name, tensor in prepared.canonical().items():
            assert_bits_equal(tensor, tensors[name], name)
        other = canonical(scheme, n, k, smooth=True)
        other = {name: tensor.flip(0).contiguous() for name, tensor in other.items()}
        prepared.load(other)
        for name, tensor in prepared.canonical().items():
            assert_bits_equal(tensor, other[name], name)

    def test_layer_moves_and_copies(self) -> None:
        from qkernels.nn import QuantLinear

        layer = QuantLinear.from_float(seeded(72, 200), seeded(72), "w4a16")
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.to("cuda")
        assert layer.kernel.startswith("w4a16.cuda.")
        x = seeded(3, 200).to("cuda")
        y = layer(x)
        assert_bits_equal(copy.deepcopy(layer)(x), y)
        for name, tensor in layer.state_dict().items():
            assert_bits_equal(tensor, state[name], name)
        layer.to("cpu")
        assert "cuda" not in layer.kernel
        for name, tensor in layer.state_dict().items():
            assert_bits_equal(tensor, state[name], name)
        assert_bits_equal(layer.to("cuda")(x), y)

    @pytest.mark.parametrize("rows", [1, 40, 330])
    def test_cuda_graphs_give_the_same_bits(self, rows: int) -> None:
        scheme, n, k = scheme_of("symmetric", 128), 1024, 1024
        prepared = on_gpu(canonical(scheme, n, k), scheme, k)
        x = torch.zeros(rows, k, dtype=torch.bfloat16, device="cuda")
        prepared.run(x)
        torch.cuda.synchronize()
        graphs, outputs = [], []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs.append(prepared.run(prepared.run(x)))
            graphs.append(graph)
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for seed in range(5):
            x.copy_(seeded(rows, k, seed=seed))
            wanted = prepared.run(prepared.run(x))
            torch.cuda.synchronize()
            for stream, graph in zip(streams, graphs, strict=True):  # beside each other
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            for output in outputs:
                assert_bits_equal(output, wanted)

    def test_two_streams_at_once(self) -> None:
        scheme, n, k = scheme_of("symmetric", 128), 2048, 2048
        prepared = on_gpu(canonical(scheme, n, k), scheme, k)
        inputs = [seeded(rows, k, seed=rows).to("cuda", torch.bfloat16) for rows in (1, 3, 64, 150)]
        wanted = [prepared.run(x) for x in inputs]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        results: list[Tensor] = []
        for turn in range(40):
            with torch.cuda.stream(streams[turn % 2]):
                results.append(prepared.run(inputs[turn % 4]))
        torch.cuda.synchronize()
        for turn, result in enumerate(results):
            assert_bits_equal(result, wanted[turn % 4])

    def test_compiled_and_differentiated(self) -> None:
        scheme, n, k = scheme_of("symmetric", 32), 96, 64
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        x = seeded(7, k).to("cuda")
        weight = reference.dequantize_weight(tensors, scheme, k)
        assert_compiled_and_differentiated(prepared, x, prepared.run(x), weight)
