"""Weights side by side on a GPU: one launch for query, key and value, or gate and up.

What is joined and how layers keep what is theirs, wherever that is: test_joint.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_bits_equal, seeded
from test_cuda_w4 import assert_close
from test_cuda_w8a16 import assert_close as assert_close_w8
from torch import nn
from toys import Block, K, close
from w4_on_gpu import MMA_TILES

import qkernels as qk
from qkernels import cuda, cuda_w4, ops
from qkernels.cuda_w4_layer import PreparedCudaW4
from qkernels.cuda_w8a8 import PreparedCudaW8A8
from qkernels.cuda_w8a16 import PreparedCudaW8A16
from qkernels.joint import join, separate
from qkernels.nn import QuantLinear

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
    pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module"),
]
W4A8, W4A16 = qk.Scheme.from_preset("w4a8"), qk.Scheme.from_preset("w4a16")
INTEGER_SCALES = qk.Scheme.from_preset("w4a8_intscale")
SCHEMES = {
    "w8a8": qk.Scheme(),
    "w8a8 asymmetric": qk.Scheme(activation_symmetric=False),
    "w4a8": W4A8,
    "w4a8 per channel": qk.Scheme(4),
    "w4a8 asymmetric": W4A8.replace(activation_symmetric=False, weight_symmetric=False),
    "w4a8 minimum": W4A8.replace(weight_symmetric=False, weight_zero="float"),
    "w4a8 multipliers": INTEGER_SCALES,
    "w4a8 multipliers asymmetric": INTEGER_SCALES.replace(activation_symmetric=False, weight_symmetric=False),
    "w4a16": W4A16,
    "w4a16 zero points": W4A16.replace(weight_symmetric=False, group_size=32),
    "w8a16": qk.Scheme.from_preset("w8a16"),
}
ROWS = (1, 5, 8, 16, 17, 33, 64, 65, 150, 330)


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self, n: tuple[int, ...], k: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(k, width, bias=index != 1) for index, width in enumerate(n))

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


class Counted:
    """An object of the CUDA module, and what was called in it."""

    def __init__(self, module: object) -> None:
        self.module, self.asked = module, []

    def __getattr__(self, name: str) -> object:
        self.asked.append(name)
        return getattr(self.module, name)


def pair(n: tuple[int, ...], k: int, scheme: qk.Scheme) -> tuple[nn.Module, nn.Module]:
    """The model with joined weights, and without, on the GPU."""
    torch.manual_seed(0)
    model = Attention(n, k).eval()
    alone = copy.deepcopy(model).cuda()
    qk.quantize_(alone, scheme, exclude=(), fuse=False)
    report = qk.quantize_(model.cuda(), scheme, exclude=())
    assert "runs with q and v" in (report["k"].reason or "")
    assert model.q._group[0].joined
    assert len({layer._buffers["packed"].untyped_storage().data_ptr() for layer in (model.q, model.k, model.v)}) == 1
    return model, alone


def test_slabs_of_a_joined_weight_are_told_apart() -> None:
    """What kernels are told of a weight among others, and of one that has memory of its own again."""
    joined = torch.zeros(3, 10, cuda.ATOM_ROWS * cuda.SLAB_K, dtype=torch.int8).view(3, 80, 128)
    view = joined.narrow(1, 16, 24)
    assert cuda.slab_rows(view, 24) == 80
    assert cuda.slab_rows(view.contiguous(), 24) == 24
    assert cuda.slab_rows(view.contiguous().flatten(), 21) == 24
    assert cuda.slab_rows(joined[:1].narrow(1, 16, 24), 24) == 24
    packed, scale = torch.zeros(3, 12, 1024), torch.zeros(5, 12 * 16)
    assert cuda_w4.blocks_of(packed.narrow(1, 2, 4), scale.narrow(1, 32, 64), 64) == 12
    assert cuda_w4.blocks_of(packed[:1].narrow(1, 2, 4), scale.narrow(1, 32, 64), 64) == 12
    assert cuda_w4.blocks_of(packed[:1].narrow(1, 2, 4), scale[:, 32:96].contiguous(), 64) == 4
    assert cuda_w4.blocks_of(packed[:1].narrow(1, 2, 4), scale[:1].narrow(1, 32, 64), 64) == 4
    assert cuda_w4.blocks_of(packed[:, 2:6].contiguous(), scale[:, 32:96].contiguous(), 64) == 4
    assert cuda_w4.blocks_of(packed[:, 2:6].flatten(), scale.flatten(), 51) == 4


@pytest.mark.parametrize("kind", [PreparedCudaW8A8, PreparedCudaW4, PreparedCudaW8A16])
def test_layers_join_by_rows(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the CUDA layers, by torch alone: packed bytes that stand for themselves."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    scheme, features, sizes = (W4A8 if kind is PreparedCudaW4 else qk.Scheme()), 300, (48, 16, 37)
    layers = []
    for rows in sizes:
        step, row = (cuda_w4.BLOCK_ROWS, 64) if kind is PreparedCudaW4 else (cuda.ATOM_ROWS, 128)
        wide = -(-rows // step) * step
        tensors = {"packed": torch.randint(0, 100, (3 * wide * row,), dtype=torch.int8), "bias": torch.rand(rows)}
        if kind is PreparedCudaW8A8:
            tensors |= {"colsum": torch.randint(0, 9, (rows,)), "weight_scale": torch.rand(rows)}
        else:
            tensors |= {"packed_scale": torch.rand(3 * wide if kind is PreparedCudaW4 else rows)}
        layers.append(kind(tensors, scheme, features, rows))
    before = [{name: tensor.clone() for name, tensor in layer.tensors.items()} for layer in layers]
    joint = join(layers)
    assert joint is not None
    assert joint.holds(layers)
    for layer, old in zip(layers, before, strict=True):
        for name, tensor in layer.tensors.items():
            assert torch.equal(tensor.flatten(), old[name]), name
            assert tensor.untyped_storage().data_ptr() == joint.whole.tensors[name].untyped_storage().data_ptr()
    if kind is not PreparedCudaW4:
        for rows, layer in zip((48, 16, 37, 101), (*layers, joint.whole), strict=True):
            assert cuda.slab_rows(layer.tensors["packed"], rows) == 104
    else:
        for rows, layer in zip((48, 16, 37, 101), (*layers, joint.whole), strict=True):
            assert cuda_w4.blocks_of(layer.tensors["packed"], layer.tensors["packed_scale"], rows) == 7
    for layer, old in zip(layers, before, strict=True):
        separate(layer)
        for name, tensor in layer.tensors.items():
            assert torch.equal(tensor.flatten(), old[name]), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert not joint.holds(layers)


class TestJoint:
    """On a GPU."""

    pytestmark = gpu

    @pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("n", "k"), [((48, 16, 130), 64), ((272, 144, 203), 1000), ((128, 64, 64), 2048)])
    def test_joined_layers_equal_lone_ones(
        self, scheme: qk.Scheme, dtype: torch.dtype, n: tuple[int, ...], k: int
    ) -> None:
        """To the bit; behind floating-point activations within rounding, since sums are cut elsewhere."""
        model, alone = pair(n, k, scheme)
        for rows in ROWS:
            x = (seeded(rows, k, seed=rows) + 0.3).to("cuda", dtype)
            with torch.inference_mode():
                y, wanted = model(x), alone(x)
            if not scheme.weight_only:
                assert_bits_equal(y, wanted, f"{rows} rows")
                continue
            first = 0
            for layer in (model.q, model.k, model.v):
                part = y[:, first : first + layer.out_features]
                tensors = {name: tensor.cpu() for name, tensor in layer.canonical().items()}
                if scheme.weight_bits == 8:
                    assert_close_w8(part, x.cpu(), tensors)
                else:
                    assert_close(part, x.cpu(), tensors, scheme, k)
                first += layer.out_features

    @pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
    @pytest.mark.parametrize("k", [64, 1000])
    def test_members_alone_read_their_own_weight(self, scheme: qk.Scheme, k: int) -> None:
        """By every kernel that some number of rows chooses, eager and through the operators."""
        model, alone = pair((272, 144, 203), k, scheme)
        for rows in (*ROWS, 2100):
            x = (seeded(rows, k, seed=rows) + 0.3).to("cuda", torch.bfloat16)
            for name in "qkv":
                layer, other = getattr(model, name), getattr(alone, name)
                with torch.inference_mode():
                    wanted = other._prepared.run(x)
                    assert_bits_equal(layer._prepared.run(x), wanted, f"{name}, {rows} rows")
                    assert_bits_equal(layer._prepared.call(x, layer._tensors()), wanted, f"{name}, {rows} rows")
        for name in "qkv":
            layer, other = getattr(model, name), getattr(alone, name)
            for dtype in (torch.float32, torch.bfloat16):
                assert_bits_equal(layer._prepared.weight(dtype), other._prepared.weight(dtype), name)

    @pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
    def test_every_kernel_of_w8a8_reads_a_weight_among_others(self, scheme: qk.Scheme) -> None:
        if scheme.weight_bits != 8 or scheme.weight_only:
            pytest.skip("test_every_tile_of_w4a8 and the numbers of rows above")
        model, alone = pair((272, 144, 203), 1000, scheme)
        configs = [(0, 16, 1, 1, 0, 0), (0, 64, 1, 1, 0, 0), (0, 128, 1, 1, 0, 0)]
        if cuda.capability(torch.cuda.current_device()) == 90 and cuda._cuda.has_sm90a():
            configs += [(1, 8, 1, 1, 0, 128), (1, 16, 2, 1, 0, 64), (1, 64, 1, 4, 1, 128), (1, 128, 1, 1, 1, 64)]
            configs += [(2, 128, 1, 1, 0, 0), (2, 224, 1, 2, 0, 0), (2, 256, 1, 1, 0, 0)]
        x = (seeded(70, 1000) + 0.3).to("cuda")
        codes = cuda.quantize_rows(x, symmetric=scheme.activation_symmetric)
        for config in configs:
            for name in "qkv":
                got, wanted = (
                    cuda.gemm_w8a8(*codes, getattr(m, name)._prepared.tensors, out_dtype=torch.float32, config=config)
                    for m in (model, alone)
                )
                assert_bits_equal(got, wanted, f"{config}, {name}")

    @pytest.mark.parametrize(
        ("tokens", "phases"),
        [
            *MMA_TILES,
            *((tokens, 1) for tokens in (8, 16, 32, 64, 128)),
            *((tokens, 4) for tokens in (8, 16, 32)),
        ],
    )
    @pytest.mark.parametrize("group", [32, 64, 128])
    @pytest.mark.parametrize("of", [W4A8, INTEGER_SCALES], ids=["w4a8", "w4a8_intscale"])
    def test_every_tile_of_w4a8_reads_a_weight_among_others(
        self, tokens: int, phases: int, group: int, of: qk.Scheme
    ) -> None:
        if phases and cuda.capability(torch.cuda.current_device()) != 90:
            pytest.skip("wgmma is an instruction of compute capability 9.0")
        scheme = of.replace(group_size=group, weight_symmetric=False)
        model, alone = pair((272, 144, 203), 1100, scheme)
        for rows in (5, 150):
            x = seeded(rows, 1100, seed=rows).to("cuda", torch.bfloat16)
            q, scale, _ = cuda.quantize_rows(x)
            plan = (min(phases, 1), tokens, phases, 1 + rows % 3, 0, 0)
            for name in "qkv":
                got, wanted = (
                    cuda_w4.gemm_w4a8(
                        q,
                        scale,
                        cuda_w4.describe(layer._prepared.tensors, scheme, layer.out_features, 1100),
                        None,
                        torch.float32,
                        plan=plan,
                    )
                    for layer in (getattr(model, name), getattr(alone, name))
                )
                assert_bits_equal(got, wanted, f"{rows} rows, {name}")

    @pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
    def test_state_moves_and_copies(self, scheme: qk.Scheme) -> None:
        model, alone = pair((48, 16, 130), 192, scheme)
        x = seeded(7, 192).to("cuda", torch.bfloat16)
        with torch.inference_mode():
            y = model(x)
            wanted = alone.state_dict()
            for name, tensor in model.state_dict().items():
                assert_bits_equal(tensor, wanted[name], name)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
            clone = copy.deepcopy(model)
            assert clone.q._group[0].joined
            assert_bits_equal(clone(x), y)
            back = clone.cpu()
            assert "cuda" not in back.q.kernel
            assert not back.q._group[0].joined
            for name, tensor in back.state_dict().items():
                assert_bits_equal(tensor, wanted[name], name)
            back.cuda()
            assert back.q._group[0].joined
            assert_bits_equal(back(x), y)
            changed = {name: tensor.flip(0).contiguous() for name, tensor in wanted.items()}
            for assign in (False, True):
                back.load_state_dict(changed, assign=assign)
                assert back.q._group[0].joined
                alone.load_state_dict(changed)
                for name, tensor in back.state_dict().items():
                    assert_bits_equal(tensor, changed[name], name)
                if not scheme.weight_only:
                    assert_bits_equal(back(x), alone(x))
            qk.unfuse_(back)
            for layer in (back.q, back.k, back.v):
                assert layer._group is None
                for tensor in layer._prepared.resident().values():
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert_bits_equal(back(x), alone(x))

    @pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "w8a16"])
    def test_converted_on_the_cpu_joined_on_the_gpu(self, scheme: str) -> None:
        torch.manual_seed(0)
        model = Attention((48, 16, 130), 256).eval()
        qk.quantize_(model, scheme, exclude=())
        assert not model.q._group[0].joined
        model.cuda()
        assert model.q._group[0].joined
        model.to(torch.bfloat16)
        assert model.q._group[0].joined

    @pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "w8a16"])
    def test_one_launch_for_all(self, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counted at the objects of the module; a graph, streams, and a compiled model."""
        model, alone = pair((48, 16, 130), 256, qk.Scheme.from_preset(scheme))
        x = seeded(7, 256).to("cuda", torch.bfloat16)
        with torch.inference_mode():
            model(x)
            bounds = [
                model.q._group[0]._joint.whole.bound(),
                *(m._prepared.bound() for m in (model.q, model.k, model.v)),
            ]
            counted = [Counted(bound.layer) for bound in bounds]
            for bound, layer in zip(bounds, counted, strict=True):
                monkeypatch.setattr(bound, "layer", layer)
            model(x)
            assert [layer.asked for layer in counted] == [["run"], [], [], []]
            monkeypatch.undo()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
            for seed in range(3):
                x.copy_(seeded(7, 256, seed=seed))
                graph.replay()
                assert_bits_equal(y, model(x))
            streams = [torch.cuda.Stream(), torch.cuda.Stream()]
            wanted = model(x)
            torch.cuda.synchronize()
            results = []
            for turn in range(20):
                with torch.cuda.stream(streams[turn % 2]):
                    results.append(model(x))
            torch.cuda.synchronize()
            for result in results:
                assert_bits_equal(result, wanted)
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True)(x)
            if scheme in ("w4a16", "w8a16"):
                assert close(compiled.float(), alone(x).float())
            else:
                assert_bits_equal(compiled, alone(x))

    def test_another_stream_does_not_take_what_is_not_there_yet(self) -> None:
        model, alone = pair((48, 16, 130), 256, qk.Scheme())
        x = seeded(7, 256).to("cuda")
        with torch.inference_mode():
            wanted = alone.k(x)
            torch.cuda.synchronize()
            q = model.q(x)
            with torch.cuda.stream(torch.cuda.Stream()):
                k = model.k(x)
                torch.cuda.synchronize()
                assert k.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
                assert_bits_equal(k, wanted)

    @pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "w8a16"])
    def test_a_block_with_norms_and_gates(self, scheme: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block()).eval()
        plain = copy.deepcopy(model)
        qk.quantize_(model.cuda().to(torch.bfloat16), scheme, exclude=())
        qk.quantize_(plain.cuda().to(torch.bfloat16), scheme, exclude=(), fuse=False)
        assert model[0].attention.q._group[0].joined
        assert model[1].mlp.gate._group[0].joined
        for rows in (1, 3, 200):
            x = seeded(rows, 4, K).to("cuda", torch.bfloat16)
            with torch.no_grad():
                assert close(model(x).float(), plain(x).float())

    def test_layers_of_other_devices_or_kinds_do_not_join(self) -> None:
        one = QuantLinear.from_float(seeded(32, 128), None, "w8a8").cuda()._prepared
        two = QuantLinear.from_float(seeded(32, 128), None, "w8a8")._prepared
        other = ops.prepare(QuantLinear.from_float(seeded(32, 128), None, "w4a8").canonical(), "w4a8", 128, "cuda")
        assert join([one, two]) is None
        assert join([one, other]) is None
        assert join([one, one]) is None
