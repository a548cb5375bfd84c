"""Functions after a Linear: how near the truth, the same on every tier, and the same fused as alone."""

from __future__ import annotations

import copy
import pickle

import helpers as H
import pytest
import torch
from torch import Tensor

from qkernels import _C, reference
from qkernels.epilogues import EPILOGUES, apply_epilogue
from qkernels.nn import QuantLinear
from qkernels.scheme import Scheme

STATIC = {"act_scale": torch.tensor(0.02)}
by_name = pytest.mark.parametrize("name", EPILOGUES)


def truth(name: str, y: Tensor) -> Tensor:
    wide = y.double()
    if name == "gelu":
        return wide * 0.5 * torch.erfc(-wide / 2.0**0.5)
    if name == "gelu_tanh":
        return wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    return wide * torch.sigmoid(wide) if name == "silu" else wide.clamp(min=0)


@by_name
def test_values_lie_within_the_stated_bound(name, isa):
    y = torch.cat([torch.linspace(-100, 100, 100_003), H.seeded(50_000), torch.tensor([0.0, -0.0, 1e-40, 1e30])])
    out = torch.ops.qkernels.epilogue(y, name, None)
    assert _C.last_kernel() == f"activation.{isa}"
    bound = {"relu": 0.0, "gelu": 2.0**-23}.get(name, 2.0**-22) * y.double().abs() + 2.0**-149
    error = (out.double() - truth(name, y)).abs()
    assert bool((error <= bound).all()), float((error / bound).max())
    of_torch = (apply_epilogue(y, name).double() - out.double()).abs()
    assert bool((of_torch <= (6 if name == "gelu" else 3) * bound).all())


@by_name
def test_special_values(name, isa):
    y = torch.tensor([float("nan"), float("inf"), 0.0, 3e38, -3e38])
    out = torch.ops.qkernels.epilogue(y, name, None)
    assert out[0].isnan()
    assert out[1] == float("inf")
    assert out[2] == 0
    assert out[3] == y[3]
    assert abs(float(out[4])) < 4  # the true value is 0; exp(-88) of 3e38 is what the clamp leaves


@by_name
@pytest.mark.parametrize("out_dtype", H.DTYPES)
@pytest.mark.parametrize("dtype", H.DTYPES)
def test_tiers_agree_to_the_bit_in_every_dtype(name, dtype, out_dtype, isa):
    y = torch.cat([H.seeded(4099) * 4, torch.tensor([float("nan"), 1e-40])]).to(dtype)
    out = torch.ops.qkernels.epilogue(y, name, out_dtype)
    _C.set_isa("scalar")
    H.assert_bits_equal(out, torch.ops.qkernels.epilogue(y, name, out_dtype))
    _C.set_isa(isa)


def test_operator_takes_views_and_nothing_else():
    base = H.seeded(6, 10)
    view = base[:, ::2].T
    H.assert_bits_equal(
        torch.ops.qkernels.epilogue(view, "silu", None), torch.ops.qkernels.epilogue(view.contiguous(), "silu", None)
    )
    assert torch.ops.qkernels.epilogue(base[:0], "silu", None).shape == (0, 10)
    with pytest.raises(ValueError, match="name: expected one of relu, gelu"):
        torch.ops.qkernels.epilogue(base, "swish", None)
    with pytest.raises(TypeError, match="y: expected dtype"):
        torch.ops.qkernels.epilogue(base.double(), "silu", None)


@pytest.mark.filterwarnings("ignore")
@by_name
def test_operator_passes_opcheck(name):
    y = H.seeded(3, 5)
    torch.library.opcheck(torch.ops.qkernels.epilogue.default, (y.requires_grad_(), name, None))


# -- inside a Linear --------------------------------------------------------------------------------------------------


def layers(scheme: Scheme, name: str, n: int, k: int) -> tuple[QuantLinear, QuantLinear]:
    """The same layer with the epilogue and without."""
    given = {} if scheme.activation_dynamic else STATIC
    bare = QuantLinear.from_float(H.seeded(n, k), H.seeded(n, seed=1), scheme, **given)
    fused = copy.deepcopy(bare)
    fused.epilogue = name
    return fused, bare


@pytest.mark.parametrize("scheme", H.SERVED, ids=lambda s: s.name)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (65, 70), (192, 513)])
def test_fused_equals_the_function_of_the_unrounded_output(scheme, n, k, isa, threads):
    for name in EPILOGUES:
        fused, bare = layers(scheme, name, n, k)
        for m in (1, 2, 7, 40):
            for dtype in H.DTYPES:
                x = H.seeded(m, k, seed=m).to(dtype)
                x[0, 0] = float("nan")
                wide = bare._prepared.product(x, bare._prepared.tensors, torch.float32)
                H.assert_bits_equal(fused(x), torch.ops.qkernels.epilogue(wide, name, dtype))
    assert fused.kernel.endswith("+silu")


def test_fused_near_the_reference():
    fused, bare = layers(Scheme(), "gelu", 96, 64)
    x = H.seeded(9, 64)
    expected = reference.linear(x, bare.canonical(), bare.scheme, 64)
    torch.testing.assert_close(fused(x), apply_epilogue(expected, "gelu"), rtol=1e-5, atol=1e-6)


def test_every_way_around_the_direct_call(isa):
    fused, _ = layers(Scheme(), "silu", 33, 70)
    x = H.seeded(4, 70)
    direct = fused(x)
    H.assert_bits_equal(fused._prepared.call(x, fused._prepared.tensors), direct)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        H.assert_bits_equal(fused(x), fused(x.bfloat16()))
    through = torch.func.vmap(fused)(x)
    torch.testing.assert_close(through, direct, rtol=1e-5, atol=1e-6)


@by_name
def test_gradient_is_that_of_the_function(name):
    fused, bare = layers(Scheme(), name, 33, 70)
    ours, theirs = (H.seeded(4, 70).requires_grad_() for _ in range(2))
    fused(ours).square().sum().backward()
    apply_epilogue(bare(theirs), name).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
def test_rows_together_equal_rows_alone(isa, threads, name, dtype):
    """Many rows leave their registers finished, and the function comes after; one goes through it on the way."""
    fused, _ = layers(Scheme(), name, 130, 70)
    x = 4.0 * H.seeded(101, 70).to(dtype)
    H.assert_bits_equal(fused(x), torch.cat([fused(x[i : i + 1]) for i in range(len(x))]))


def test_compiled_equals_eager():
    fused, _ = layers(Scheme(), "gelu", 33, 70)
    x = H.seeded(4, 70)
    H.assert_bits_equal(torch.compile(fused, fullgraph=True)(x), fused(x))


def test_epilogue_survives_copies_pickles_and_moves():
    fused, _ = layers(Scheme(), "gelu", 33, 70)
    x = H.seeded(4, 70)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused).half()):
        assert other.epilogue == "gelu"
        H.assert_bits_equal(other(x), fused(x))
    state = fused.state_dict()
    assert set(state) == {"weight", "weight_scale", "bias"}
    fused.load_state_dict(state)
    assert fused.epilogue == "gelu"


def test_unknown_epilogue_is_refused():
    fused, _ = layers(Scheme(), "gelu", 4, 4)
    with pytest.raises(ValueError, match="epilogue: expected None or one of relu, gelu, gelu_tanh, silu, got 'tanh'"):
        fused.epilogue = "tanh"
    assert fused.epilogue == "gelu"
    with pytest.raises(ValueError, match="epilogue"):
        QuantLinear(4, 4, fused.canonical(), Scheme(), epilogue="tanh")
