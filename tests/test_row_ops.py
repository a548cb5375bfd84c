"""Norms and activations quantized in one pass: the definition, the operators around it, and the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_bits_equal, assert_steady_on_gpu, hazard_rows, seeded, strided
from torch import Tensor
from torch.nn import functional

from qkernels import cuda, reference, row_ops

EPS = 1e-5
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch built without CUDA"),
    pytest.mark.skipif(cuda._cuda is None, reason="this installation was built without the CUDA module"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
Given = dict[str, Tensor | None]


def gpu(function):
    """Marks of a test that needs a GPU."""
    for mark in needs_gpu:
        function = mark(function)
    return function


def grids(k: int) -> list[dict]:
    """Options of every kind of quantization."""
    smooth = seeded(k, seed=5).abs() + 0.5
    static, zero = torch.tensor(0.031), torch.tensor(100, dtype=torch.int32)
    return [
        {"symmetric": True},
        {"symmetric": False},
        {"symmetric": True, "inv_smooth": smooth},
        {"symmetric": False, "inv_smooth": smooth},
        {"symmetric": True, "scale": static},
        {"symmetric": False, "scale": static, "zero_point": zero, "inv_smooth": smooth},
    ]


def moved(options: dict, device: str) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


def assert_follows(
    got: tuple[Tensor, Tensor, Tensor | None],
    y: Tensor,
    slack: Tensor,
    *,
    symmetric: bool,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    what: str = "",
) -> None:
    """Codes, scale and zero point are what the contract makes of float32 values within ``slack`` of ``y``.

    The scale is that of an extreme within the slack, a code is the rounding of a value within the slack (times
    1 / scale) of the true one.  On top of that 127 to 255 roundings of 2^-23: the factor 1 / scale and the product are
    rounded.  Rows next to the limit below which they count as zero are left out.
    """
    q, s, z = (None if t is None else t.cpu() for t in got)
    assert q is not None
    assert s is not None
    wide, slack = y.double(), slack.double()
    if inv_smooth is not None:
        wide, slack = (
            (y * inv_smooth).double(),
            slack * inv_smooth.double() + (y * inv_smooth).abs().double() * 2.0**-24,
        )
    dead = ~torch.isfinite(wide).all(-1)
    assert torch.equal(s.isnan(), dead), f"{what}: NaN scales in other rows"
    assert not q[dead].any(), f"{what}: codes in a row of NaN"
    low, high = wide.amin(-1).clamp(max=0.0), wide.amax(-1).clamp(min=0.0)
    extent = torch.maximum(high, -low) * 2.0**100 if symmetric else (high - low) / 255.0 * 2.0**128
    zero = (extent < 1.0 - 2.0**-10) & ~dead & torch.tensor(scale is None)
    assert bool((s[zero] == 1.0).all()), f"{what}: scales of zero rows"
    assert not q[zero].any(), f"{what}: codes of zero rows"
    live = ~dead & ((extent >= 1.0 + 2.0**-10) | torch.tensor(scale is not None))
    wide, slack, low, high = wide[live], slack[live], low[live], high[live]
    codes, steps = q[live].double(), s[live].double()
    off = slack.amax(-1)
    if scale is not None:
        assert bool((s[live] == scale.cpu()).all())
    else:
        wanted = wide.abs().amax(-1) / 127.0 if symmetric else (high - low) / 255.0
        wrong = (steps - wanted).abs() > 2.0 * off / (127.0 if symmetric else 255.0) + wanted * 2.0**-22 + 2.0**-147
        assert not wrong.any(), f"{what}: scale {steps[wrong][:3]}, expected {wanted[wrong][:3]}"
    zeros = torch.zeros_like(steps)
    if not symmetric:
        assert z is not None
        zeros = z[live].double()
        if scale is None:
            assert bool(((zeros + low / steps).abs() <= 0.5 + off / steps + 2.0**-14).all()), f"{what}: zero points"
        else:
            assert bool((zeros == float(zero_point)).all())  # type: ignore[arg-type]
    bottom, top = (-127, 127) if symmetric else (0, 255)
    exact = wide / steps.unsqueeze(-1) + zeros.unsqueeze(-1)
    allowed = 0.5 + slack / steps.unsqueeze(-1) + 2.0**-14
    wrong = ((codes - exact.clamp(bottom, top)).abs() > allowed) & torch.isfinite(exact)
    assert not wrong.any(), f"{what}: {int(wrong.sum())} codes, first {codes[wrong][:3]} for {exact[wrong][:3]}"


def norm_case(k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight and bias, with every hazard."""
    x = torch.cat([hazard_rows(k), seeded(3, k) * torch.tensor([[1.0], [100.0], [1e-3]])]).to(dtype)
    return x, seeded(*x.shape, seed=3).to(dtype), seeded(k, seed=1) + 1.0, seeded(k, seed=2)


def norm_slack(total: Tensor, weight: Tensor, bias: Tensor, layer: bool) -> Tensor:
    """How far a float32 norm may lie from the reference's: the roundings of its sums, 2^-18 of what enters them."""
    wide = total.float().nan_to_num(posinf=0.0, neginf=0.0)
    if not layer:
        return reference.rms_norm(wide, weight, EPS).abs() * 2.0**-18
    spread = (wide.double() - wide.double().mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + EPS
    entering = (wide.abs() + wide.abs().mean(-1, keepdim=True)) / spread.sqrt() * weight.abs() + bias.abs()
    return entering * 2.0**-17


def within(got: Tensor, y: Tensor, slack: Tensor, what: str = "") -> None:
    """``got`` is the rounding, to its dtype, of values within ``slack`` of ``y``: rounding never changes an order."""
    assert got.shape == y.shape, f"{what}: shape {list(got.shape)}, expected {list(y.shape)}"
    got, wide, slack = got.detach().cpu(), y.double(), slack.double()
    assert torch.equal(got.isnan(), y.isnan()), f"{what}: NaN in other places"
    finite = torch.isfinite(y)
    assert torch.equal(got[~finite & ~y.isnan()].double(), wide[~finite & ~y.isnan()]), f"{what}: infinities"
    low, high = (bound.float().to(got.dtype) for bound in (wide - slack, wide + slack))
    wrong = ((got < low) | (got > high)) & finite
    assert not wrong.any(), f"{what}: {int(wrong.sum())} values, first {got[wrong][:3]} for {y[wrong][:3]}"


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_torchs_own_but_for_rounding(dtype: torch.dtype) -> None:
    x, weight, bias = (seeded(7, 96) * 5 + 1).to(dtype), seeded(96, seed=1), seeded(96, seed=2)
    wanted = functional.rms_norm(x.double(), (96,), weight.double(), EPS)
    assert float((reference.rms_norm(x, weight, EPS) - wanted).abs().max()) < 1e-6
    wanted = functional.layer_norm(x.double(), (96,), weight.double(), bias.double(), EPS)
    assert float((reference.layer_norm(x, weight, bias, EPS) - wanted).abs().max()) < 2e-6


def test_residual_is_rounded_to_the_stream_before_the_norm() -> None:
    x, residual = seeded(5, 64).to(torch.bfloat16), seeded(5, 64, seed=1).to(torch.bfloat16)
    q, scale, zero, total = row_ops.rms_norm_quantize(x, None, eps=EPS, residual=residual)
    assert_bits_equal(total, x + residual)
    again = row_ops.rms_norm_quantize(x + residual, None, eps=EPS)
    assert_bits_equal(q, again[0])
    assert_bits_equal(scale, again[1])
    assert zero is None
    assert again[3] is not total


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_leave_float32_become_nan(symmetric: bool) -> None:
    x = seeded(4, 32)
    x[0, 3], x[1, 5], x[2] = torch.inf, torch.nan, 1e30  # the third is finite, its squares are not
    for operator in (
        lambda: row_ops.rms_norm_quantize(x, None, eps=EPS, symmetric=symmetric),
        lambda: row_ops.layer_norm_quantize(x * seeded(32), None, None, eps=EPS, symmetric=symmetric),
    ):
        q, scale, zero, _ = operator()
        assert scale.isnan().tolist() == [True, True, True, False]
        assert not q[:3].any()
        assert zero is None or not zero[:3].any()


def test_activation_names_what_it_expects() -> None:
    x = seeded(2, 8)
    with pytest.raises(ValueError, match="activation"):
        row_ops.activation_quantize(x, "swish")
    with pytest.raises(TypeError, match="up"):
        row_ops.activation_quantize(x, "silu", x.half())
    with pytest.raises(ValueError, match="up"):
        row_ops.activation_quantize(x, "silu", x[:1])
    with pytest.raises(ValueError, match="weight"):
        row_ops.rms_norm_quantize(x, torch.ones(7), eps=EPS)
    with pytest.raises(TypeError, match="bias"):
        row_ops.layer_norm_quantize(x, None, torch.ones(8, dtype=torch.int32), eps=EPS)
    with pytest.raises(ValueError, match="eps"):
        row_ops.rms_norm_quantize(x, None, eps=-1.0)
    with pytest.raises(ValueError, match="x"):
        row_ops.rms_norm_quantize(x[:, :0], None, eps=EPS)
    with pytest.raises(TypeError, match="x"):
        row_ops.rms_norm_quantize(x.int(), None, eps=EPS)
    with pytest.raises(ValueError, match="zero_point"):
        row_ops.activation_quantize(x, None, symmetric=False, scale=torch.tensor(1.0))


# -- operators, on every device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("k", [1, 7, 136, 2056, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_quantize_their_own_float_value(device: str, layer: bool, k: int, dtype: torch.dtype) -> None:
    x, residual, weight, bias = norm_case(k, dtype)
    for number, options in enumerate(grids(k)):
        beside = residual if number % 2 else None
        factors = [t if number < 3 else t.to(dtype) for t in (weight, bias)]
        total = reference.add_residual(x, beside)
        inputs = [None if t is None else t.to(device) for t in (beside, *factors)]
        if layer:
            y = reference.layer_norm(total, *factors, EPS)
            got = row_ops.layer_norm_quantize(
                x.to(device), inputs[1], inputs[2], eps=EPS, residual=inputs[0], **moved(options, device)
            )
        else:
            y = reference.rms_norm(total, factors[0], EPS)
            got = row_ops.rms_norm_quantize(
                x.to(device), inputs[1], eps=EPS, residual=inputs[0], **moved(options, device)
            )
        what = f"{options.keys()}, residual {beside is not None}"
        assert_bits_equal(got[3], total, what)
        slack = norm_slack(total, factors[0].float(), factors[1].float(), layer)
        assert_follows(got[:3], y, slack, **options, what=what)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 7, 136, 2056, 14336])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_quantize_their_own_float_value(device: str, k: int, dtype: torch.dtype) -> None:
    rows = [hazard_rows(k), seeded(3, k) * torch.tensor([[1.0], [10.0], [1e-3]])]
    x = torch.cat(rows).to(dtype)
    up = seeded(*x.shape, seed=4).to(dtype)
    for number, (options, activation) in enumerate(zip(grids(k), (*ACTIVATIONS, "silu"), strict=True)):
        for beside in (up, None):
            y = reference.activated(x, activation, beside)
            got = row_ops.activation_quantize(
                x.to(device), activation, None if beside is None else beside.to(device), **moved(options, device)
            )
            slack = x.float().abs().nan_to_num(posinf=0.0, nan=0.0) * 2.0**-20
            slack = slack if beside is None else slack * beside.float().abs()
            if activation in (None, "relu"):
                slack = torch.zeros_like(slack)
            clear = slack.amax(-1) < y.nan_to_num(posinf=0.0, neginf=0.0).abs().amax(-1)  # else nothing is pinned
            clear |= (slack.amax(-1) == 0) | ~torch.isfinite(y).all(-1)
            picked = tuple(None if t is None else t.cpu()[clear] for t in got)
            assert int(clear.sum()) >= len(x) // 2
            assert_follows(picked, y[clear], slack[clear], **options, what=f"{number}: {activation} {options.keys()}")


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_and_no_rows(device: str) -> None:
    x, up = seeded(4, 3, 48).to(device), seeded(4, 3, 48, seed=1).to(device)
    residual = seeded(4, 3, 48, seed=2).to(device)
    weight = seeded(48, seed=3).to(device)
    wanted = row_ops.activation_quantize(x, "silu", up)
    norm = row_ops.rms_norm_quantize(x, weight, eps=EPS, residual=residual)
    both = torch.cat([x, up], -1)
    views = [
        (strided(x), up),
        (x, strided(up)),
        (both[..., :48], both[..., 48:]),  # one product for gate and up, split
    ]
    for a, b in views:
        for ours, theirs in zip(row_ops.activation_quantize(a, "silu", b)[:2], wanted, strict=False):
            assert_bits_equal(ours, theirs)
    got = row_ops.rms_norm_quantize(strided(x), strided(weight), eps=EPS, residual=strided(residual))
    for index in (0, 1, 3):
        assert_bits_equal(got[index], norm[index])
    assert row_ops.activation_quantize(x[:0], "silu", up[:0])[0].shape == (0, 3, 48)
    q, scale, _, total = row_ops.rms_norm_quantize(x[:0], weight, eps=EPS, residual=residual[:0])
    assert q.shape == total.shape == (0, 3, 48)
    assert scale.shape == (0, 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_operators_compile_whole(device: str, symmetric: bool) -> None:
    x, residual = seeded(6, 40).to(device, torch.bfloat16), seeded(6, 40, seed=1).to(device, torch.bfloat16)
    weight = seeded(40, seed=2).to(device)

    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        a = torch.ops.qkernels.rms_norm_quantize(x, residual, weight, EPS, symmetric, None, None, None)
        b = torch.ops.qkernels.layer_norm_quantize(a[3], None, weight, None, EPS, symmetric, None, None, weight.abs())
        return (*a, *b, *torch.ops.qkernels.activation_quantize(x, residual, "silu", symmetric, None, None, None))

    wanted = block(x, residual)
    backend = "aot_eager" if device == "cpu" else "inductor"
    got = torch.compile(block, fullgraph=True, backend=backend)(x, residual)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_bits_equal(ours, theirs)


def test_operators_describe_themselves() -> None:
    x, weight = seeded(3, 5, 16), seeded(16)
    norm, activation = torch.ops.qkernels.rms_norm_quantize, torch.ops.qkernels.activation_quantize
    torch.library.opcheck(norm, (x, x, weight, EPS, True, None, None, None))
    torch.library.opcheck(norm, (x, None, None, EPS, False, None, None, weight))
    torch.library.opcheck(torch.ops.qkernels.layer_norm_quantize, (x, x, weight, weight, EPS, True, None, None, None))
    torch.library.opcheck(activation, (x, x, "silu", True, None, None, None))
    torch.library.opcheck(activation, (x, None, "gelu", False, None, None, weight))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("k", [4096, 4100, 16384, 16392, 28672, 40000])
@pytest.mark.parametrize("rows", [3, 300])
def test_every_instance_of_the_kernels(k: int, rows: int) -> None:
    """One warp a row, a CTA a row, rows too long for registers; few rows and many."""
    for dtype in DTYPES:
        x, up = seeded(rows, k, seed=rows).to(dtype), seeded(rows, k, seed=1).to(dtype)
        weight, bias = (seeded(k, seed=2) + 1.0).to(dtype), seeded(k, seed=3).to(dtype)
        on = [t.to("cuda") for t in (x, up, weight, bias)]
        total = reference.add_residual(x, up)
        got = row_ops.rms_norm_quantize(on[0], on[2], eps=EPS, residual=on[1])
        assert_bits_equal(got[3], total)
        slack = norm_slack(total, weight.float(), bias.float(), False)
        assert_follows(got[:3], reference.rms_norm(total, weight, EPS), slack, symmetric=True, what=f"rms {dtype}")
        got = row_ops.layer_norm_quantize(on[0], on[2], on[3], eps=EPS, symmetric=False)
        slack = norm_slack(x, weight.float(), bias.float(), True)
        y = reference.layer_norm(x, weight, bias, EPS)
        assert_follows(got[:3], y, slack, symmetric=False, what=f"layer {dtype}")
        gated = row_ops.activation_quantize(on[0], "silu", on[1])
        slack = (x.float() * up.float()).abs() * 2.0**-20
        assert_follows(gated, reference.activated(x, "silu", up), slack, symmetric=True, what=f"silu {dtype}")


@gpu
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_rows_write_only_their_own(offset: int) -> None:
    k, rows = 264, 9
    x = torch.empty(rows * k + offset, dtype=torch.bfloat16, device="cuda")[offset:].view(rows, k)
    x.copy_(seeded(rows, k))
    plain = x.clone()
    weight = torch.empty(k + offset, dtype=torch.bfloat16, device="cuda")[offset:]
    weight.copy_(seeded(k, seed=1) + 1.0)
    got = row_ops.rms_norm_quantize(x, weight, eps=EPS, residual=plain)
    y = reference.rms_norm(reference.add_residual(plain, plain), weight, EPS).cpu()
    assert_follows(got[:3], y, y.abs() * 2.0**-18, symmetric=True)
    ours = row_ops.activation_quantize(x, "gelu", plain)
    theirs = row_ops.activation_quantize(plain, "gelu", plain)
    assert_bits_equal(ours[0], theirs[0])
    assert_bits_equal(ours[1], theirs[1])


@gpu
def test_graph_replay_and_two_streams() -> None:
    x = seeded(65, 1024).to("cuda", torch.bfloat16)
    residual, weight = seeded(65, 1024, seed=1).to("cuda", torch.bfloat16), torch.rand(1024, device="cuda")

    def both() -> tuple[Tensor, ...]:
        q, scale, zero, total = torch.ops.qkernels.rms_norm_quantize(x, residual, weight, EPS, False, None, None, None)
        return (
            q,
            scale,
            zero,
            total,
            *torch.ops.qkernels.activation_quantize(x, total, "silu", True, None, None, None),
        )

    assert_steady_on_gpu(both, lambda seed: x.copy_(seeded(65, 1024, seed=10 + seed)), 40)


@gpu
def test_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x, up = seeded(5, 128), seeded(5, 128, seed=1)
    here = row_ops.activation_quantize(x.to("cuda:0"), "silu", up.to("cuda:0"))
    there = row_ops.activation_quantize(x.to("cuda:1"), "silu", up.to("cuda:1"))
    assert there[0].device.index == 1
    for ours, theirs in zip(there[:2], here[:2], strict=True):
        assert_bits_equal(ours, theirs)
    with pytest.raises(ValueError, match="up"):
        row_ops.activation_quantize(x.to("cuda:0"), "silu", up.to("cuda:1"))
