"""Products of multipliers in two launches: a head in whole waves of wide tiles, and what is behind it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import Tensor
from w4_on_gpu import canonical, gpu, on_gpu, scheme_of

from qkernels import cuda, cuda_w4, reference
from qkernels.scheme import Scheme

INTEGER_SCALES = Scheme.from_preset("w4a8_intscale")
MULTIPLIERS = 3  # W4Kind
WIDE = (192, 256)


@pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module")
def test_heads_are_whole_waves_of_wide_tiles() -> None:
    if not cuda._cuda.has_sm90a():
        pytest.skip("no wgmma in this build")
    found = set()
    for m, n, k in itertools.product(
        (1, 64, 100, 200, 768, 1024, 8192), (40, 1000, 6144, 17408, 28672), (256, 4096, 14336)
    ):
        plan = cuda._cuda.plan_w4(True, m, n, k, 128, MULTIPLIERS, 90, 132)
        head, tokens = plan[6:]
        if not head:
            assert tokens == 0
            continue
        found.add(tokens)
        assert tokens in WIDE if m > 128 else (m > 64 and tokens == 128)
        assert head % 256 == 0  # clusters of two
        assert 0 < head < n
        tiles = -(-m // tokens) * (head // 256)
        assert 0 <= -tiles % 66 < -(-m // tokens)  # no column more would fit
    assert {128, 256} <= found


class TestHeads:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def _needs_wgmma(self) -> None:
        if not (cuda.capability(torch.cuda.current_device()) == 90 and cuda._cuda.has_sm90a()):
            pytest.skip("no wgmma here")

    @pytest.mark.parametrize(("head_tokens", "rest"), list(itertools.product((128, *WIDE), ((128, 1), (32, 2)))))
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

    def test_a_head_as_large_as_the_product_is_refused(self) -> None:
        n, k = 256, 256
        prepared = on_gpu(canonical(INTEGER_SCALES, n, k), INTEGER_SCALES, k)
        weight = cuda_w4.describe(prepared.tensors, INTEGER_SCALES, n, k)
        q, scale, _ = cuda.quantize_rows(seeded(3, k).to("cuda", torch.bfloat16), for_gemm=True)
        with pytest.raises(ValueError, match="a head of fewer channels"):
            cuda_w4.gemm_w4a8(q, scale, weight, None, torch.bfloat16, plan=(1, 128, 1, 1, 0, 0, 256, 256))

    def test_products_without_multipliers_have_no_heads(self) -> None:
        scheme, n, k = scheme_of("symmetric", 64), 512, 256
        prepared = on_gpu(canonical(scheme, n, k), scheme, k)
        weight = cuda_w4.describe(prepared.tensors, scheme, n, k)
        x = seeded(3, k).to("cuda", torch.bfloat16)
        with pytest.raises(ValueError, match="no head"):
            cuda_w4.gemm_w4a16(x, weight, None, torch.bfloat16, plan=(1, 128, 1, 1, 0, 0, 256, 256))

    def test_layers_see_what_the_kernel_before_wrote(self) -> None:
        """What is behind a head does not wait for it, but for whatever wrote the activations; and is waited for."""
        scheme, rows, n, k = INTEGER_SCALES, 1024, 14336, 4096
        assert cuda._cuda.plan_w4(True, rows, n, k, 128, MULTIPLIERS, 90, 132)[6]
        tensors, some = reference.quantize_weight(seeded(n, k), scheme), slice(0, n, 97)
        prepared = on_gpu(tensors, scheme, k)
        inputs = [seeded(rows, k, seed=i).to("cuda", torch.bfloat16) for i in range(4)]
        few = {name: tensor[some].to("cuda") for name, tensor in tensors.items()}
        assert_bits_equal(prepared.run(inputs[0])[:, some], reference.linear(inputs[0], few, scheme, k))
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
