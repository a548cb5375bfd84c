"""Rows that are computed by the CUDA kernels and stay floats; those that become codes: test_row_ops.py."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, assert_steady_on_gpu, hazard_rows, seeded, strided
from test_row_ops import ACTIVATIONS, EPS, gpu, norm_case, norm_slack, within
from torch import Tensor

from qkernels import cuda, reference
from qkernels.cuda_rows import RowGrid, activate, normalize, quantize_activation, quantize_norm

DENORMAL = 2.0**-147
"""Steps of float32 next to zero that a factor's last bit may move a product."""


def on_gpu(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to("cuda") for tensor in tensors]


def misaligned(tensor: Tensor, offset: int) -> Tensor:
    """The same values on the GPU, ``offset`` elements behind an aligned address."""
    flat = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")[offset:]
    return flat.view(tensor.shape).copy_(tensor)


def check_norm(
    got: tuple[Tensor, Tensor | None],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    layer: bool,
    what: str = "",
) -> None:
    """The sum to the bit, and the norm's one rounding."""
    total = reference.add_residual(x, residual)
    if residual is None:
        assert got[1] is None, what
    else:
        assert_bits_equal(got[1], total, what)  # type: ignore[arg-type]
    ones, zeros = torch.ones(x.shape[-1]), torch.zeros(x.shape[-1])
    factors = (ones if weight is None else weight.float(), zeros if bias is None else bias.float())
    y = reference.layer_norm(total, weight, bias, EPS) if layer else reference.rms_norm(total, weight, EPS)
    assert got[0].dtype == x.dtype
    within(got[0], y, norm_slack(total, *factors, layer) + DENORMAL, what)


def check_activation(got: Tensor, x: Tensor, name: str | None, up: Tensor | None, what: str = "") -> None:
    slack = x.float().abs().nan_to_num(posinf=0.0, nan=0.0) * 2.0**-20
    slack = slack if up is None else slack * up.float().abs()
    if name in (None, "relu"):
        slack = torch.zeros_like(slack)
    assert got.dtype == x.dtype
    within(got, reference.activated(x, name, up), slack + DENORMAL * (name not in (None, "relu")), what)


@gpu
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("k", [1, 7, 136, 2056, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_round_their_own_float_value(layer: bool, k: int, dtype: torch.dtype) -> None:
    x, residual, *factors = norm_case(k, dtype)
    for given in (tuple(factors), tuple(t.to(dtype) for t in factors), (None, None), (factors[0], None)):
        weight, bias = given if layer else (given[0], None)
        for beside in (residual, None):
            on = on_gpu(x, weight, bias, beside)
            got = normalize(*on[:3], EPS, layer=layer, residual=on[3])  # type: ignore[arg-type]
            check_norm(got, x, weight, bias, beside, layer, f"residual {beside is not None}, weight {weight is None}")


@gpu
@pytest.mark.parametrize("k", [1, 7, 136, 1792, 2056, 14336])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_round_their_own_float_value(k: int, dtype: torch.dtype) -> None:
    x = torch.cat([hazard_rows(k), seeded(3, k) * torch.tensor([[1.0], [10.0], [1e-3]])]).to(dtype)
    up = seeded(*x.shape, seed=4).to(dtype)
    for name in ACTIVATIONS:
        for beside in (up, None):
            on = on_gpu(x, beside)
            check_activation(activate(on[0], name, on[1]), x, name, beside, f"{name}, up {beside is not None}")  # type: ignore[arg-type]


@gpu
@pytest.mark.parametrize("k", [4096, 4100, 16384, 16392, 28672, 40000])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_every_instance_of_the_kernels(k: int, rows: int) -> None:
    """One warp a row, a CTA a row, rows too long for registers, rows in pieces; few rows and many."""
    for dtype in DTYPES:
        x, up = seeded(rows, k, seed=rows).to(dtype), seeded(rows, k, seed=1).to(dtype)
        weight, bias = (seeded(k, seed=2) + 1.0).to(dtype), seeded(k, seed=3).to(dtype)
        a, b, w, c = (t.to("cuda") for t in (x, up, weight, bias))
        check_norm(normalize(a, w, None, EPS, layer=False, residual=b), x, weight, None, up, False, f"rms {dtype}")
        check_norm(normalize(a, w, c, EPS, layer=True), x, weight, bias, None, True, f"layer {dtype}")
        check_activation(activate(a, "silu", b), x, "silu", up, f"silu {dtype}")


@gpu
@pytest.mark.parametrize("k", [256, 1536, 11008, 14336])
def test_rows_in_pieces_are_whole(k: int) -> None:
    """Alone, among others, as halves of one product, and where no piece divides the row: the same bits."""
    x, up = seeded(9, k).to("cuda", torch.bfloat16), seeded(9, k, seed=1).to("cuda", torch.bfloat16)
    wanted = activate(x, "silu", up)
    check_activation(wanted, x.cpu(), "silu", up.cpu())
    both = torch.cat([x, up], -1)
    assert_bits_equal(activate(both[:, :k], "silu", both[:, k:]), wanted)
    assert_bits_equal(activate(x[:, : k - 1], "silu", up[:, : k - 1]), wanted[:, : k - 1].contiguous())
    many = activate(x.repeat(100, 1), "silu", up.repeat(100, 1))
    assert_bits_equal(many, wanted.repeat(100, 1))
    for row in range(9):
        one = both[row : row + 1]
        assert_bits_equal(activate(one[:, :k], "silu", one[:, k:]), wanted[row : row + 1])


@gpu
@pytest.mark.parametrize("offset", [1, 3, 4])
@pytest.mark.parametrize("k", [37, 264])
def test_misaligned_rows_write_only_their_own(offset: int, k: int) -> None:
    x, up, weight = seeded(9, k).bfloat16(), seeded(9, k, seed=1).bfloat16(), (seeded(k, seed=2) + 1.0).bfloat16()
    a, b, w = (misaligned(t, offset) for t in (x, up, weight))
    check_norm(normalize(a, w, w, EPS, layer=True, residual=b), x, weight, weight, up, True)
    check_norm(normalize(a, w, None, EPS, layer=False, residual=up.cuda()), x, weight, None, up, False)
    assert_bits_equal(activate(a, "gelu", b), activate(x.cuda(), "gelu", up.cuda()))
    assert_bits_equal(a, x)
    assert_bits_equal(b, up)


@gpu
def test_the_largest_value_is_127_at_any_magnitude() -> None:
    """A dynamic symmetric grid does not clamp: nothing may round beyond it."""
    exponents = torch.arange(-99.0, 128.0).repeat_interleave(64)
    largest = torch.ldexp(1.0 + torch.rand(exponents.numel(), generator=torch.manual_seed(0)), exponents.int())
    largest = largest[largest.isfinite()].unsqueeze(1)
    x = largest * torch.tensor([[1.0, -1.0, 0.5, -0.5, 1.0 / 3.0, 0.0, 2.0**-8, -(2.0**-9)]])
    q, scale, _ = cuda.quantize_rows(x.cuda())
    wanted = reference.quantize_activations(x)
    assert torch.equal(q.cpu(), wanted[0])
    assert_bits_equal(scale, wanted[1])
    assert int(q[:, 0].min()) == 127
    assert int(q[:, 1].max()) == -127


@gpu
def test_any_strides_and_no_rows() -> None:
    x, up, residual = (seeded(4, 3, 48, seed=seed).to("cuda") for seed in range(3))
    weight = seeded(48, seed=3).to("cuda")
    wanted, norm = activate(x, "silu", up), normalize(x, weight, None, EPS, layer=False, residual=residual)
    both = torch.cat([x, up], -1)
    for a, b in ((strided(x), up), (x, strided(up)), (both[..., :48], both[..., 48:])):
        got = activate(a, "silu", b)
        assert got.is_contiguous()
        assert_bits_equal(got, wanted)
    got = normalize(strided(x), weight, None, EPS, layer=False, residual=strided(residual))
    for ours, theirs in zip(got, norm, strict=True):
        assert ours is not None
        assert ours.is_contiguous()
        assert_bits_equal(ours, theirs)  # type: ignore[arg-type]
    assert activate(x[:0], "silu", up[:0]).shape == (0, 3, 48)
    y, total = normalize(x[:0], weight, None, EPS, layer=False, residual=residual[:0])
    assert y.shape == (0, 3, 48)
    assert total is not None
    assert total.shape == (0, 3, 48)


@gpu
def test_rows_that_leave_float32_become_nan() -> None:
    x = seeded(4, 32)
    x[0, 3], x[1, 5], x[2] = torch.inf, torch.nan, 1e30  # the third is finite, its squares are not
    for layer in (False, True):
        y, _ = normalize((x * seeded(32) if layer else x).cuda(), None, None, EPS, layer=layer)
        assert y.isnan().all(-1).tolist() == [True, True, True, False]
        assert not y[3].isnan().any()


@gpu
def test_codes_are_made_of_the_same_values() -> None:
    """One kernel, two ways to end: float32 values on a grid are its codes."""
    x, up = seeded(5, 1032).to("cuda"), seeded(5, 1032, seed=1).to("cuda")
    weight = seeded(1032, seed=2).to("cuda")
    y, total = normalize(x, weight, None, EPS, layer=False, residual=up)
    codes, other = quantize_norm(x, weight, None, EPS, RowGrid(), layer=False, residual=up)
    assert_bits_equal(total, other)  # type: ignore[arg-type]
    for codes_of, values in ((codes, y), (quantize_activation(x, "silu", up, RowGrid()), activate(x, "silu", up))):
        q, scale, _ = cuda.quantize_rows(values)
        assert_bits_equal(codes_of.q, q)
        assert_bits_equal(codes_of.scale, scale)


@gpu
def test_graph_replay_and_two_streams() -> None:
    x, residual = (seeded(65, 1024, seed=seed).to("cuda", torch.bfloat16) for seed in range(2))
    weight = torch.rand(1024, device="cuda").bfloat16()

    def both() -> tuple[Tensor, ...]:
        y, total = normalize(x, weight, weight, EPS, layer=True, residual=residual, for_gemm=True)
        assert total is not None
        return y, total, activate(y, "silu", total, for_gemm=True)

    assert_steady_on_gpu(both, lambda seed: x.copy_(seeded(65, 1024, seed=10 + seed)), 40)


@gpu
def test_module_refuses_what_has_no_one_target() -> None:
    x = torch.zeros(2, 16, device="cuda")
    at, stream = x.data_ptr(), cuda._stream(x.device)
    codes = (at, 16, at, 0, 0, 0, 0, False)
    for target in ((codes, at), ((), 0)):
        with pytest.raises(ValueError, match=r"codes\.size"):
            cuda._cuda.quantize_activation(at, 0, 2, 16, 16, *target, 4, 0, 0, False, False, stream)
        with pytest.raises(ValueError, match=r"codes\.size"):
            cuda._cuda.quantize_norm(at, 0, 2, 16, 16, *target, False, EPS, 0, 0, 0, 0, 0, True, False, False, stream)
    with pytest.raises(ValueError, match="residual"):
        cuda._cuda.quantize_norm(at, 0, 2, 16, 16, (), at, False, EPS, at, 16, 0, 0, 0, True, False, False, stream)
    with pytest.raises(ValueError, match="code"):
        cuda._cuda.quantize_activation(at, 7, 2, 16, 16, (), at, 4, 0, 0, False, False, stream)


@gpu
def test_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x, up = seeded(5, 128), seeded(5, 128, seed=1)
    there = activate(x.to("cuda:1"), "silu", up.to("cuda:1"))
    assert there.device.index == 1
    assert_bits_equal(there, activate(x.to("cuda:0"), "silu", up.to("cuda:0")))
