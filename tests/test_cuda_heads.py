"""Products in two launches: a head in whole waves of wide tiles, and what is behind it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import Tensor
from w4_on_gpu import canonical, gpu, on_gpu, scheme_of

from qkernels import cuda, cuda_w4, cuda_w8a16, ops, reference
from qkernels.scheme import Scheme

INTEGER_SCALES, W8A16 = Scheme.from_preset("w4a8_intscale"), Scheme.from_preset("w8a16")
WIDE = (192, 256)


@pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module")
@pytest.mark.parametrize("what", ["w4a16", "w4a8_intscale", "w8a16"])
def test_heads_are_whole_waves_of_wide_tiles(what: str) -> None:
    if not cuda._cuda.has_sm90a():
        pytest.skip("no wgmma in this build")
    found = 0
    for m, n, k in itertools.product((1, 64, 200, 768, 1024, 8192), (40, 1000, 4096, 6144, 28672), (256, 4096, 8192)):
        if what == "w8a16":
            plan = cuda._cuda.plan_w8a16(m, n, k, 90, 132)
        else:
            eight_bits = what == "w4a8_intscale"
            plan = cuda._cuda.plan_w4(eight_bits, m, n, k, 128, 3 if eight_bits else 0, 90, 132)
        head, tokens = plan[6:]
        if not head:
            assert tokens == 0
            continue
        found += 1
        assert tokens in WIDE
        assert m > 128
        assert head % 256 == 0  # clusters of two
        assert 0 < head < n
        tiles = -(-m // tokens) * (head // 256)
        assert 0 <= -tiles % 66 < -(-m // tokens)  # no column more would fit
    assert found


class TestHeads:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def _needs_wgmma(self) -> None:
        if not (cuda.capability(torch.cuda.current_device()) == 90 and cuda._cuda.has_sm90a()):
            pytest.skip("no wgmma here")

    @pytest.mark.parametrize(("head_tokens", "rest"), list(itertools.product(WIDE, ((128, 1), (64, 2), (16, 4)))))
    @pytest.mark.parametrize("kind", ["symmetric", "zero point", "fp32", "codebook"])
    def test_w4a16_equals_its_parts(self, head_tokens: int, rest: tuple[int, int], kind: str) -> None:
        if kind == "codebook" and rest[1] > 1:
            pytest.skip("no such instance")
        scheme, n, k = scheme_of(kind if kind != "fp32" else "symmetric", 64, fp32=kind == "fp32"), 712, 1100
        prepared = on_gpu(canonical(scheme, n, k), scheme, k)
        weight, bias = cuda_w4.describe(prepared.tensors, scheme, n, k), prepared.tensors["bias"]
        for rows, out in ((300, torch.bfloat16), (33, torch.float32)):
            x = seeded(rows, k, seed=rows).to("cuda", torch.bfloat16)

            def product(*plan: int, x: Tensor = x, out: torch.dtype = out) -> Tensor:
                return cuda_w4.gemm_w4a16(x, weight, bias, out, plan=plan)

            check_parts(product, head_tokens, rest)

    @pytest.mark.parametrize(("head_tokens", "rest"), list(itertools.product(WIDE, ((128, 1), (32, 2)))))
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_multipliers_equal_their_parts(self, head_tokens: int, rest: tuple[int, int], symmetric: bool) -> None:
        scheme, n, k = INTEGER_SCALES.replace(activation_symmetric=symmetric), 712, 1152
        tensors = canonical(scheme, n, k)
        prepared = on_gpu(tensors, scheme, k)
        weight, bias = cuda_w4.describe(prepared.tensors, scheme, n, k), prepared.tensors["bias"]
        x = (seeded(300, k) + 0.5).to("cuda", torch.bfloat16)
        q, scale, zero = cuda.quantize_rows(x, symmetric=symmetric, for_gemm=True)

        def product(*plan: int) -> Tensor:
            return cuda_w4.gemm_w4a8(q, scale, weight, bias, torch.float32, x_zero_point=zero, plan=plan)

        check_parts(product, head_tokens, rest)
        moved = {name: tensor.to("cuda") for name, tensor in tensors.items()}
        y = product(1, *rest, 2, 0, 0, 256, head_tokens)
        assert_bits_equal(y, reference.linear(x, moved, scheme, k, torch.float32))

    @pytest.mark.parametrize(("head_tokens", "rest"), list(itertools.product(WIDE, ((128, 1), (64, 2)))))
    def test_w8a16_equals_its_parts(self, head_tokens: int, rest: tuple[int, int]) -> None:
        n, k = 712, 1100
        prepared = ops.prepare(reference.quantize_weight(seeded(n, k), W8A16), W8A16, k, device="cuda")
        packed, scale = prepared.tensors["packed"], prepared.tensors["packed_scale"]
        x, bias = seeded(300, k).to("cuda", torch.float16), seeded(n, seed=1).to("cuda")

        def product(*plan: int) -> Tensor:
            return cuda_w8a16.gemm_w8a16(x, packed, scale, bias, torch.float16, plan=plan)

        check_parts(product, head_tokens, rest)

    def test_a_head_as_large_as_the_product_is_refused(self) -> None:
        scheme, n, k = scheme_of("symmetric", 64), 256, 256
        prepared = on_gpu(canonical(scheme, n, k), scheme, k)
        weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
        x = seeded(3, k).to("cuda", torch.bfloat16)
        with pytest.raises(ValueError, match="a head of fewer channels"):
            cuda_w4.gemm_w4a16(x, weight, None, torch.bfloat16, plan=(1, 128, 1, 1, 0, 0, 256, 256))

    @pytest.mark.parametrize(("preset", "n"), [("w4a16", 6144), ("w4a8_intscale", 14336)])
    def test_layers_see_what_the_kernel_before_wrote(self, preset: str, n: int) -> None:
        """What is behind a head does not wait for it, but for whatever wrote the activations; and is waited for."""
        scheme, rows, k = Scheme.from_preset(preset), 1024, 4096
        bits = 8 if preset != "w4a16" else None
        kind = 3 if bits else 0
        assert cuda._cuda.plan_w4(bool(bits), rows, n, k, 128, kind, 90, 132)[6]
        prepared = on_gpu(reference.quantize_weight(seeded(n, k), scheme), scheme, k)
        inputs = [seeded(rows, k, seed=i).to("cuda", torch.bfloat16) for i in range(4)]
        wanted = []
        for x in inputs:
            torch.cuda.synchronize()
            wanted.append(prepared.run(x).double().sum(1))
        x, y = torch.empty_like(inputs[0]), torch.empty(rows, n, dtype=torch.bfloat16, device="cuda")

        def step() -> Tensor:
            y.copy_(prepared.run(x))
            return y.double().sum(1)

        x.copy_(inputs[0])
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sums = step()
        for turn in range(12):
            x.copy_(inputs[turn % 4])
            graph.replay()
            assert_bits_equal(sums, wanted[turn % 4], f"replay {turn}")
            x.copy_(inputs[(turn + 1) % 4])
            assert_bits_equal(step(), wanted[(turn + 1) % 4], f"call {turn}")


def check_parts(product: Callable[..., Tensor], head_tokens: int, rest: tuple[int, int]) -> None:
    """product(*plan) of 712 channels with a head of 512 or 256 has the bits of either tile alone."""
    head, behind = product(1, head_tokens, 1, 3, 0, 0), product(1, *rest, 6 if rest[1] > 1 else 3, 0, 0)
    for channels in (256, 512):
        y = product(1, *rest, 2, 0, 0, channels, head_tokens)
        assert_bits_equal(y[:, :channels], head[:, :channels], f"a head of {channels}")
        assert_bits_equal(y[:, channels:], behind[:, channels:], f"behind a head of {channels}")
