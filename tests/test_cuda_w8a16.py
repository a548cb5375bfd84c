"""W8A16 layers, 8-bit tables and the heads that share them on a GPU.  What needs no GPU runs without one.

Tolerance of W8A16.  Codes enter the products exactly and the sum of a channel is scaled once; the reference here is the
fp32 weight times x in float64.  With u = 2**-24, per output:

    |kernel - reference| <= (4 * K + 64) * u * sum_k |x_k| * |w_k|

(K products and additions of tensor cores, which cut off where they align: two roundings each; 64 covers scale, bias and
the split of fp32 inputs), plus half a step of what is rounded to 16 bits: in products of many rows the weight and the
bias, and at the end the output.
"""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, assert_compiled_and_differentiated, hazard_rows, seeded, strided
from torch import Tensor, nn

from qkernels import cuda, cuda_w4, cuda_w8a16, ops, reference
from qkernels.cuda_w8a16 import PreparedCudaW8A16, fused_rows
from qkernels.nn import QuantEmbedding, QuantLinear
from qkernels.scheme import Scheme

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
    pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module"),
]
STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SCHEME = Scheme.from_preset("w8a16")
TILES = [*cuda_w4.TILES, *cuda_w8a16.PHASED_TILES]
SHAPES = [(8, 64), (1, 1), (203, 1000), (136, 333), (576, 1536)]


def canonical(n: int, k: int, *, bias: bool = True, smooth: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    tensors = {"weight": torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)}
    tensors["weight_scale"] = seeded(n, seed=n).abs() * 0.01 + 0.001
    if bias:
        tensors["bias"] = seeded(n, seed=1)
    if smooth:
        tensors["inv_smooth"] = seeded(k, seed=2).abs() + 0.5
    return tensors


def on_gpu(tensors: dict[str, Tensor], k: int) -> PreparedCudaW8A16:
    prepared = ops.prepare(tensors, SCHEME, k, device="cuda")
    assert isinstance(prepared, PreparedCudaW8A16), prepared.reason
    return prepared


def assert_close(y: Tensor, x: Tensor, tensors: dict[str, Tensor]) -> None:
    """The tolerance of the file's head."""
    at = {name: tensor.to("cuda") for name, tensor in tensors.items()}
    k = x.shape[-1]
    weight = reference.dequantize_weight(at, SCHEME, k).double()
    wide = x.to("cuda", torch.float32)
    if "inv_smooth" in at:
        wide = wide * at["inv_smooth"]
    wide = wide.double()
    expected, reach = wide @ weight.T, wide.abs() @ weight.abs().T
    bound = (4 * k + 64) * 2.0**-24 * reach
    summed = torch.float32 if "inv_smooth" in at else x.dtype
    if x.shape[0] > fused_rows(torch.cuda.current_device()):
        bound = bound + STEP[summed] * reach
        bound = bound + STEP[x.dtype] * (expected.abs() + at["bias"].abs() if "bias" in at else expected.abs())
    if "bias" in at:
        expected = expected + at["bias"].double()
    bound = bound + STEP[y.dtype] * (expected.abs() + bound) + 2.0**-24
    off = (y.double() - expected).abs()
    assert bool((off <= bound).all()), f"{int((off > bound).sum())} of {y.numel()} off, up to {(off / bound).max()}"


# -- without a GPU ----------------------------------------------------------------------------------------------------


def test_w8a16_kernels_say_what_they_leave_alone() -> None:
    cpu, there = torch.device("cpu"), torch.device("cuda", 0)
    assert "cpu" in PreparedCudaW8A16.objection(SCHEME, 256, 64, cpu)
    groups = SCHEME.replace(weight_granularity="per_group", group_size=64)
    assert "group-wise 8-bit" in PreparedCudaW8A16.objection(groups, 256, 64, there)
    assert "empty" in PreparedCudaW8A16.objection(SCHEME, 0, 64, there)
    prepared = ops.prepare(canonical(8, 64), SCHEME, 64)
    assert prepared.kernel.startswith("w8a16.")
    assert not prepared.reason


@pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module")
def test_w8a16_plans_are_of_instances() -> None:
    for rows, channels, features in itertools.product(
        (1, 8, 9, 16, 17, 64, 129, 2048), (1, 576, 4096, 14336, 128256), (1, 500, 1000, 1024, 14336)
    ):
        kernel, tokens, blocks, _, counters, floats, *head = cuda._cuda.plan_w8a16(rows, channels, features, 89, 132)
        assert (kernel, counters, floats, *head) == (0, 0, 0, 0, 0)
        assert tokens in (8, 16, 32)
        assert blocks == 1 or channels // 32 >= 132  # wide ones leave work for every multiprocessor
        if cuda._cuda.has_sm90a():
            plan = cuda._cuda.plan_w8a16(rows, channels, features, 90, 132)
            kernel, tokens, phases, ctas, counters, floats, *head = plan
            assert kernel == 1
            assert head == [0, 0]
            assert (tokens, phases) in TILES
            assert phases == 1 or (features > 896 and not counters)
            assert ctas >= 1
            assert (counters > 0) == (floats > 0)


# -- products ---------------------------------------------------------------------------------------------------------


class TestW8A16:
    """Products and layers."""

    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_products_are_within_rounding(self, dtype: torch.dtype) -> None:
        for n, k in SHAPES:
            tensors = canonical(n, k, bias=n != 136)
            prepared = on_gpu(tensors, k)
            for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130, 700, 2049):
                x = seeded(rows, k, seed=rows).to(dtype)
                assert_close(prepared.run(x.to("cuda")), x, tensors)

    @pytest.mark.parametrize("plan", [(0, 8, 1), (0, 8, 2), *((1, *tile) for tile in TILES)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_every_tile_of_every_size(self, plan: tuple[int, int, int], dtype: torch.dtype) -> None:
        kernel, _, phases = plan
        if kernel == 1 and not (cuda.capability(0) == 90 and cuda._cuda.has_sm90a()):
            pytest.skip("no wgmma here")
        for n, k in [(24, 1100), (203, 1032), (712, 4096)]:
            tensors = canonical(n, k)
            tensors["weight"][0], tensors["weight"][n // 2] = -128, 127
            at = {name: tensor.to("cuda") for name, tensor in tensors.items()}
            packed, _ = cuda.pack_w8(at["weight"], layout=cuda.W8Layout.PAIRS)
            weight = reference.dequantize_weight(at, SCHEME, k).double()
            shares = (1, 3, 7) if kernel == 1 and phases == 1 else (1,)
            for rows, ctas in itertools.product((1, 9, 33, 64, 300), shares):
                x = seeded(rows, k, seed=rows).to("cuda", dtype)
                room = (4096, 1 << 21) if ctas > 1 else (0, 0)
                y = cuda_w8a16.gemm_w8a16(
                    x, packed, at["weight_scale"], at["bias"], torch.float32, plan=(*plan, ctas, *room)
                )
                expected = x.double() @ weight.T + at["bias"].double()
                bound = (4 * k + 64) * 2.0**-24 * (x.double().abs() @ weight.abs().T) + 2.0**-23 * expected.abs() + 1e-7
                assert bool(((y.double() - expected).abs() <= bound).all()), f"{n}x{k}, {rows} rows, {ctas} CTAs"

    @pytest.mark.parametrize("tokens", [16, 64, 192, 256])
    def test_shared_tiles_repeat_to_the_bit(self, tokens: int) -> None:
        """Launches that overlap use the sums that clusters leave, and their flags, again at once.  From 192 tokens on
        a stage holds half of what a warpgroup leaves; the second product's shared tiles are behind whole ones."""
        if not (cuda.capability(0) == 90 and cuda._cuda.has_sm90a()):
            pytest.skip("no wgmma here")
        plan = (1, tokens, 1, 66, 4 * 66, 2 * 66 * 128 * tokens)
        for n, k in ((4096, 4096), (35840, 1024)):
            weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
            scale = torch.rand(n, device="cuda") + 0.5
            packed, _ = cuda.pack_w8(weight, layout=cuda.W8Layout.PAIRS)
            x = seeded(tokens, k).to("cuda", torch.bfloat16)
            wanted = cuda_w8a16.gemm_w8a16(x, packed, scale, None, torch.float32, plan=plan)
            few, factor = weight[::111].double().T, scale[::111].double()
            expected = x.double() @ few * factor
            bound = (4 * k + 64) * 2.0**-24 * (x.double().abs() @ few.abs() * factor) + 2.0**-23 * expected.abs()
            assert bool(((wanted[:, ::111].double() - expected).abs() <= bound).all())
            for _ in range(40):
                y = cuda_w8a16.gemm_w8a16(x, packed, scale, None, torch.float32, plan=plan, dependent=True)
                assert_bits_equal(y, wanted)

    @pytest.mark.parametrize("plan", [(0, 8, 1), (0, 8, 2), *((1, *tile) for tile in TILES)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_every_code_is_exact_at_every_place(self, plan: tuple[int, int, int], dtype: torch.dtype) -> None:
        if plan[0] == 1 and not (cuda.capability(0) == 90 and cuda._cuda.has_sm90a()):
            pytest.skip("no wgmma here")
        n, k = 256, 1024
        weight = (torch.arange(n)[:, None] + 37 * torch.arange(k)[None] - 128).to(torch.int8).to("cuda")
        scale = torch.linspace(0.001, 3.0, n, device="cuda")
        packed, _ = cuda.pack_w8(weight, layout=cuda.W8Layout.PAIRS)
        for first in (0, 336, 768):  # one value each, so that nothing is rounded but by the scale
            x = torch.zeros(256, k, dtype=dtype, device="cuda")
            x[torch.arange(256), first + torch.arange(256)] = -1.0
            y = cuda_w8a16.gemm_w8a16(x, packed, scale, None, torch.float32, plan=(*plan, 1, 0, 0))
            assert_bits_equal(y, -weight[:, first : first + 256].float().T * scale + 0.0)

    @pytest.mark.parametrize("rows", [1, 20, 130])
    @pytest.mark.parametrize("exponent", [-126, -100, 100, 125])
    def test_scales_at_the_ends_of_their_range(self, rows: int, exponent: int) -> None:
        tensors = canonical(72, 256, bias=False)
        tensors["weight_scale"] = torch.full((72,), 2.0**exponent)
        x = (seeded(rows, 256) * 2.0 ** (-exponent / 2 - 20)).to(torch.bfloat16)
        y = ops_linear(on_gpu(tensors, 256), x.to("cuda"), torch.float32)
        unscaled = {**tensors, "weight_scale": torch.ones(72)}
        wanted = ops_linear(on_gpu(unscaled, 256), x.to("cuda"), torch.float32) * 2.0**exponent
        assert bool(wanted.isfinite().all())
        assert_bits_equal(y, wanted)

    def test_plans_that_fit_nothing_are_refused(self) -> None:
        if not (cuda.capability(0) == 90 and cuda._cuda.has_sm90a()):
            pytest.skip("no wgmma here")
        tensors = {name: tensor.to("cuda") for name, tensor in canonical(64, 256).items()}
        packed, _ = cuda.pack_w8(tensors["weight"], layout=cuda.W8Layout.PAIRS)
        x = seeded(3, 256).to("cuda", torch.bfloat16)
        for plan, message in [
            ((1, 512, 1, 1, 0, 0), "no instance"),
            ((1, 128, 2, 1, 0, 0), "no instance"),
            ((1, 8, 8, 1, 0, 0), "8 slabs"),
            ((1, 8, 1, 0, 0, 0), "cluster"),
            ((0, 8, 3, 1, 0, 0), "1 or 2 blocks"),
        ]:
            with pytest.raises(ValueError, match=message):
                cuda_w8a16.gemm_w8a16(x, packed, tensors["weight_scale"], None, torch.float32, plan=plan)

    def test_integers_are_exact(self) -> None:
        # Every partial sum is an integer below 2**24: any order of summation gives the same bits.
        n, k = 72, 96
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        weight[0], weight[1], weight[2] = -128, 127, -127
        tensors = {"weight": weight, "weight_scale": torch.ones(n)}
        prepared = on_gpu(tensors, k)
        for dtype in DTYPES:
            x = torch.randint(-127, 128, (11, k), generator=torch.Generator().manual_seed(1)).to(dtype)
            x[0], x[1] = 127, -127
            wanted = (x.double() @ weight.double().T).to(torch.float32)
            y = ops_linear(prepared, x.to("cuda"), torch.float32)
            assert_bits_equal(y, wanted, str(dtype))

    @pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4864, 896), (1024, 13824)])
    def test_shapes_of_checkpoints_repeat_to_the_bit(self, n: int, k: int) -> None:
        tensors = canonical(n, k)
        prepared = on_gpu(tensors, k)
        for rows in (1, 16, 64, 130):
            x = seeded(rows, k, seed=rows).to("cuda", torch.float16)
            first = prepared.run(x)
            assert_close(first, x, tensors)
            for _ in range(10):
                assert_bits_equal(prepared.run(x), first)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_smoothing_is_not_narrowed(self, dtype: torch.dtype) -> None:
        tensors = canonical(96, 320, smooth=True)
        prepared = on_gpu(tensors, 320)
        for rows in (1, 20, 130):
            x = seeded(rows, 320, seed=rows).to(dtype)
            assert_close(prepared.run(x.to("cuda")), x, tensors)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_and_infinity_stay_in_their_rows(self, dtype: torch.dtype) -> None:
        tensors = canonical(64, 250)
        x = seeded(5, 250).to(dtype)
        x[1, 3], x[3, 249] = torch.nan, torch.inf
        y = on_gpu(tensors, 250).run(x.to("cuda"))
        assert bool(y[1].isnan().all())
        assert not bool(y[3].isfinite().all())
        rest = [0, 2, 4]
        assert_close(y[rest], x[rest], tensors)

    def test_any_strides_and_no_rows(self) -> None:
        prepared = on_gpu(canonical(64, 90), 90)
        x = seeded(6, 5, 90).to("cuda", torch.bfloat16)
        wanted = prepared.run(x)
        assert_bits_equal(prepared.run(strided(x)), wanted)
        flat = torch.empty(6 * 5 * 90 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(6, 5, 90)
        assert_bits_equal(prepared.run(flat.copy_(x)), wanted)
        assert prepared.run(x[:0]).shape == (0, 5, 64)

    def test_graph_of_two_layers(self) -> None:
        prepared = on_gpu(canonical(1024, 1024), 1024)
        x = torch.zeros(3, 1024, dtype=torch.bfloat16, device="cuda")
        prepared.run(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = prepared.run(prepared.run(x))
        x.copy_(seeded(3, 1024))
        wanted = prepared.run(prepared.run(x))
        graph.replay()
        assert_bits_equal(y, wanted)

    def test_compiled_and_differentiated(self) -> None:
        tensors = canonical(96, 64)
        prepared = on_gpu(tensors, 64)
        x = seeded(7, 64).to("cuda")
        weight = reference.dequantize_weight(tensors, SCHEME, 64)
        assert_compiled_and_differentiated(prepared, x, prepared.run(x), weight)

    def test_canonical_tensors_come_back(self) -> None:
        tensors = canonical(75, 201, smooth=True)
        prepared = on_gpu(tensors, 201)
        for name, tensor in prepared.canonical().items():
            assert_bits_equal(tensor, tensors[name], name)
        other = {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}
        prepared.load(other)
        for name, tensor in prepared.canonical().items():
            assert_bits_equal(tensor, other[name], name)
        for dtype in DTYPES:
            plain = {name: tensor for name, tensor in tensors.items() if name != "inv_smooth"}
            wanted = reference.dequantize_weight(tensors, SCHEME, 201, dtype)
            assert_bits_equal(on_gpu(plain, 201).weight(dtype), wanted)

    def test_layer_moves_and_copies(self) -> None:
        layer = QuantLinear.from_float(seeded(72, 200), seeded(72), "w8a16")
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.to("cuda")
        assert layer.kernel.startswith("w8a16.cuda.")
        x = seeded(3, 200).to("cuda")
        y = layer(x)
        assert_bits_equal(copy.deepcopy(layer)(x), y)
        layer.to("cpu")
        assert "cuda" not in layer.kernel
        for name, tensor in layer.state_dict().items():
            assert_bits_equal(tensor, state[name], name)
        assert_bits_equal(layer.to("cuda")(x), y)


def ops_linear(prepared: PreparedCudaW8A16, x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A layer through its operator, in another dtype than that of ``x``."""
    return prepared.product(x, prepared.tensors, out_dtype)


# -- tables -----------------------------------------------------------------------------------------------------------


def made(rows: int, features: int, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    return nn.Embedding.from_pretrained(seeded(rows, features, seed=features).to(dtype))


class TestEmbedding:
    """Lookups, alone and beside a head."""

    pytestmark = gpu

    @pytest.mark.parametrize("head", [None, "w8a8", "w8a16"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_lookups_equal_the_definition(self, dtype: torch.dtype, head: str | None) -> None:
        for rows, features in [(50, 1), (50, 16), (77, 70), (1000, 576)]:
            layer = QuantEmbedding.from_embedding(made(rows, features, dtype))
            kept = [] if head is None else [layer.shared_head(scheme=head)]
            wanted = layer.to_embedding().weight.detach()
            layer.to("cuda")
            assert layer.kernel == f"embedding.cuda.sm{cuda.capability(0)}"
            assert not layer.reason
            for index in (torch.int32, torch.int64):
                ids = torch.randint(0, rows, (3, 41), generator=torch.Generator().manual_seed(5)).to(index)
                ids[0, 0], ids[0, 1] = 0, rows - 1
                assert_bits_equal(layer(ids.to("cuda")), wanted[ids.long()], f"{rows}x{features}")
                assert_bits_equal(layer(ids.t().to("cuda")), wanted[ids.t().long()])
            assert layer(ids[:0].to("cuda")).shape == (0, 41, features)
            assert_bits_equal(layer(torch.tensor(3, device="cuda")), wanted[3])
            assert len(kept) == (head is not None)

    @pytest.mark.parametrize("head", [None, "w8a8", "w8a16"])
    def test_compiled_and_mapped_lookups(self, head: str | None) -> None:
        layer = QuantEmbedding.from_embedding(made(77, 70))
        kept = None if head is None else layer.shared_head(scheme=head)
        layer.to("cuda")
        ids = torch.arange(12, device="cuda").view(3, 4)
        wanted = layer(ids)
        assert_bits_equal(torch.compile(layer, fullgraph=True)(ids), wanted)
        assert_bits_equal(torch.func.vmap(layer)(ids), wanted)
        assert_bits_equal(layer.weight, layer.to_embedding().weight)
        assert kept is None or kept.in_features == 70
        table = layer._buffers["packed" if head else "table"]
        with pytest.raises(ValueError, match="layout: expected"):
            torch.ops.qkernels.embedding_w8(ids, table, layer._buffers["weight_scale"], 3, 77, 70, torch.float32)

    @pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
    def test_heads_share_the_table_through_moves(self, scheme: str) -> None:
        rows, features = 300, 70
        layer = QuantEmbedding.from_embedding(made(rows, features))
        head = layer.shared_head(seeded(rows), scheme=scheme)
        model = nn.ModuleDict({"table": layer, "head": head})
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        x = hazard_rows(features)
        wanted = head(x)
        model.to("cuda")
        assert head.kernel == f"{scheme}.cuda.sm{cuda.capability(0)}"
        assert not head.reason
        y = head(x.to("cuda"))
        if scheme == "w8a8":
            assert_bits_equal(y, wanted)
        else:
            finite = x.isfinite().all(-1) & (x.abs().amax(-1) < 1e30)
            torch.testing.assert_close(
                y.cpu()[finite], wanted[finite], rtol=1e-5, atol=1e-5 * float(wanted[finite].abs().max())
            )
        for name, tensor in model.state_dict().items():
            assert_bits_equal(tensor, state[name], name)
        assert model.state_dict()["table.weight"] is model.state_dict()["head.weight"]
        resident = sum(t.nbytes for t in layer._buffers.values() if t is not None)
        assert resident < 2 * rows * features + 64 * rows
        fresh = {name: tensor.flip(0) for name, tensor in state.items()}
        model.load_state_dict(fresh)
        for name, tensor in model.state_dict().items():
            assert_bits_equal(tensor, fresh[name], name)
        assert_bits_equal(
            layer(torch.tensor([0], device="cuda")).cpu()[0],
            (fresh["table.weight"][0].float() * fresh["table.weight_scale"][0]),
        )
        model.load_state_dict(state)
        model.to("cpu")
        assert_bits_equal(head(x), wanted)

    def test_ids_elsewhere_are_refused(self) -> None:
        layer = QuantEmbedding.from_embedding(made(5, 8)).to("cuda")
        with pytest.raises(ValueError, match="input"):
            layer(torch.tensor([1]))

    @pytest.mark.parametrize("bad", [5, -1])
    def test_ids_outside_the_table_stop_the_kernel(self, bad: int) -> None:
        # In a process of its own: as with torch's lookups, the CUDA context does not outlive it.
        code = (
            "import torch; from qkernels.nn import QuantEmbedding\n"
            "layer = QuantEmbedding.from_embedding(torch.nn.Embedding(5, 8)).to('cuda')\n"
            f"layer(torch.tensor([{bad}], device='cuda')); torch.cuda.synchronize()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0
        assert "assert" in done.stderr
