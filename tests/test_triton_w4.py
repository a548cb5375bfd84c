"""The W4A16 Triton kernel against the reference: in the interpreter on the CPU, compiled where there is a GPU.

Tolerance: that of ``test_cuda_w4.py``, K products and sums in fp32 with exact integers, and a codebook's entries
rounded to the dtype of x.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers import CODEBOOK, W4_KINDS, run_in_interpreter, seeded

from qkernels import reference
from qkernels.scheme import Scheme

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

if DEVICE.type == "cpu" and not INTERPRETED:

    def test_triton_w4_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

else:
    pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

    from qkernels.triton.gemm_w4a16 import gemm_w4a16
    from qkernels.triton.tiles import Tile

    SMALL = Tile(16, 16, 128, 4, 2)
    # The interpreter truncates float32 to bfloat16: fp16 and fp32 inputs and fp32 outputs there.
    INPUTS = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

    @pytest.mark.parametrize("dtype", INPUTS)
    @pytest.mark.parametrize("group", [None, 32, 64, 128])
    @pytest.mark.parametrize("kind", W4_KINDS)
    def test_gemm_w4a16_odd_shapes(kind: str, group: int | None, dtype: torch.dtype) -> None:
        options = {} if group is None else {"weight_granularity": "per_group", "group_size": group}
        scheme = Scheme(4, activation_bits=None, **options, **W4_KINDS[kind])  # type: ignore[arg-type]
        for m, n, k in [(1, 8, 64), (3, 5, 33), (17, 40, 200)]:
            tensors = reference.quantize_weight(seeded(n, k, seed=n), scheme)
            bias, x = seeded(n, seed=2), seeded(m, k, seed=3).to(dtype)
            at = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
            y = gemm_w4a16(
                x.to(DEVICE),
                at["weight"],
                at["weight_scale"],
                bias.to(DEVICE),
                group_size=group,
                weight_zero_point=at.get("weight_zero_point"),
                weight_min=at.get("weight_min"),
                codebook=torch.tensor(CODEBOOK, device=DEVICE) if kind == "codebook" else None,
                out_dtype=torch.float32,
                tile=SMALL,
            )
            weight = reference.dequantize_weight(tensors, scheme, k).double()
            expected = x.double() @ weight.T + bias.double()
            plain = scheme.replace(codebook=None, weight_symmetric=True, weight_zero="int")
            sevens = {"weight": torch.full_like(tensors["weight"], 0xFF), "weight_scale": tensors["weight_scale"]}
            scale = reference.dequantize_weight(sevens, plain, k).double()
            bound = (2 * k + 64) * 2.0**-24 * (x.double().abs() @ (8 * scale.abs() + weight.abs()).T)
            if kind == "codebook" and dtype != torch.float32:
                step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
                bound = bound + step * (x.double().abs() @ weight.abs().T)
            bound = bound + 2.0**-24 * (expected.abs() + 1)
            off = (y.cpu().double() - expected).abs()
            assert bool((off <= bound).all()), f"{m}x{n}x{k}: up to {(off / bound).max()} of the bound"

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
