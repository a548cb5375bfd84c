"""qk.quantize and qk.dequantize: kernels against the reference and numpy, on the bits, on every tier."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DTYPES, assert_bits_equal, hazard_rows, oracle_granule, seeded, strided, widen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkernels import _C, reference
from qkernels import _native_tensors as native
from qkernels.qtensor import QTensor, dequantize, quantize

KINDS = [
    {"bits": 8, "signed": True, "symmetric": True},
    {"bits": 8, "signed": False, "symmetric": True},
    {"bits": 8, "signed": True, "symmetric": False},
    {"bits": 8, "signed": False, "symmetric": False},
    {"bits": 4, "symmetric": True},
    {"bits": 4, "symmetric": False},
]
WHERE = [
    {"granularity": "tensor"},
    {"granularity": "token"},
    {"granularity": "token", "axis": 0},
    {"granularity": "channel", "axis": 0},
    {"granularity": "channel", "axis": 1},
    {"granularity": "channel", "axis": -1},
    {"granularity": "group", "group_size": 32},
    {"granularity": "group", "group_size": 7},
    {"granularity": "group", "group_size": 8, "axis": 0},
]
SHAPES = [(37, 130), (1, 1), (3, 5, 34), (2, 1, 3, 64), (40, 1), (2, 300)]


def _name(arguments: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in arguments.values())


def _bounds(bits: int, signed: bool, symmetric: bool) -> tuple[int, int, int]:
    """Lowest and highest code, and what is added to a code around zero (symmetric) or from zero."""
    if bits == 4:
        return 0, 15, 8 if symmetric else 0
    if symmetric:
        return (-127, 127, 0) if signed else (1, 255, 128)
    return (-128, 127, -128) if signed else (0, 255, 0)


def _oracle(x: torch.Tensor, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes (int64, shape of x), scales and zero points, by indexing every granule in numpy."""
    values = widen(x)
    bits, symmetric, signed = arguments["bits"], arguments["symmetric"], arguments.get("signed", False)
    granularity, axis = arguments["granularity"], arguments.get("axis", -1) % max(x.dim(), 1)
    codes = np.zeros(values.shape, np.int64)
    shift = _bounds(bits, signed, symmetric)[2]

    def one(cut: tuple[Any, ...]) -> tuple[np.float32, int]:
        part = values[cut]
        q, scale, zero = oracle_granule(part.flatten(), bits=bits, symmetric=symmetric)
        codes[cut] = np.array(q, np.int64).reshape(part.shape) + shift
        return scale, zero + (0 if symmetric else shift)

    everything = (slice(None),) * x.dim()
    if granularity == "tensor":
        pairs, shape = [one(everything)], ()
    elif granularity == "channel":
        cuts = [(*everything[:axis], slice(c, c + 1), *everything[axis + 1 :]) for c in range(x.shape[axis])]
        pairs, shape = [one(cut) for cut in cuts], (x.shape[axis],)
    else:
        size = x.shape[axis] if granularity == "token" else arguments["group_size"]
        count = -(-x.shape[axis] // size)
        grid = (*x.shape[:axis], count, *x.shape[axis + 1 :])
        pairs = []
        for index in np.ndindex(*grid):
            cut = [slice(i, i + 1) for i in index]
            cut[axis] = slice(index[axis] * size, (index[axis] + 1) * size)
            pairs.append(one(tuple(cut)))
        shape = grid if granularity == "group" else (*x.shape[:axis], *x.shape[axis + 1 :])
    scales = np.array([p[0] for p in pairs], np.float32).reshape(shape)
    zeros = None if symmetric else np.array([p[1] for p in pairs], np.int64).reshape(shape)
    return codes, scales, zeros


def _assert_same(
    actual: QTensor, x: torch.Tensor, arguments: dict[str, Any], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    data, scale, zero_point = reference.quantize(x, **arguments)
    assert_bits_equal(actual.data, data, "data")
    assert_bits_equal(actual.scale, scale, "scale")
    if zero_point is None:
        assert actual.zero_point is None
    else:
        assert actual.zero_point is not None
        assert_bits_equal(actual.zero_point, zero_point, "zero_point")
    for dtype in dtypes:
        layout = {n: arguments[n] for n in arguments if n not in ("scale", "zero_point")}
        expected = reference.dequantize(data, scale, zero_point, shape=tuple(x.shape), dtype=dtype, **layout)
        assert_bits_equal(dequantize(actual, dtype), expected, f"dequantized to {dtype}")


# -- the reference against numpy ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("where", WHERE, ids=_name)
@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 8)])
def test_quantize_reference_is_the_contract(
    kind: dict[str, Any], where: dict[str, Any], shape: tuple[int, ...], device: torch.device
) -> None:
    arguments = {**kind, **where}
    x = seeded(*shape)
    x.flatten()[3] = 0.0
    x[1] *= 1e-3
    if where["granularity"] != "tensor":
        x.select(where.get("axis", -1), -1).mul_(-50)
    codes, scales, zeros = _oracle(x, arguments)
    data, scale, zero_point = reference.quantize(x.to(device), **arguments)
    q = QTensor(data, scale, zero_point, shape, **arguments)
    np.testing.assert_array_equal(q.codes().cpu().numpy(), codes)
    assert_bits_equal(scale, torch.from_numpy(scales), "scale")
    zero: Any = _bounds(kind["bits"], kind.get("signed", False), True)[2]
    if zeros is not None:
        assert zero_point is not None
        assert_bits_equal(zero_point, torch.from_numpy(zeros).to(torch.int32), "zero_point")
    back = reference.dequantize(data, scale, zero_point, shape=shape, **arguments).cpu()
    # Half a step everywhere, and the clamp of -8 and 7 levels (one more half step for 4 bits).
    step = scale.max().item() * (1.0 if kind["bits"] == 4 else 0.5) * 1.001
    assert (back - x).abs().max() <= step, zero


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_reference_hazard_rows(kind: dict[str, Any], dtype: torch.dtype) -> None:
    x = hazard_rows(34).to(dtype)
    arguments = {**kind, "granularity": "token"}
    codes, scales, zeros = _oracle(x, arguments)
    data, scale, zero_point = reference.quantize(x, **arguments)
    np.testing.assert_array_equal(QTensor(data, scale, zero_point, x.shape, **arguments).codes().numpy(), codes)
    assert_bits_equal(scale, torch.from_numpy(scales))
    if zeros is not None:
        assert zero_point is not None
        assert_bits_equal(zero_point, torch.from_numpy(zeros).to(torch.int32))


# -- kernels against the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_every_view(isa: str, kind: dict[str, Any], dtype: torch.dtype) -> None:
    served = 0
    for shape in SHAPES:
        for where in WHERE:
            if not -len(shape) <= where.get("axis", -1) < len(shape):
                continue
            x = seeded(*shape, seed=len(shape)).to(dtype)
            arguments = {**kind, **where}
            actual = quantize(x, **arguments)
            if not native.objection(actual._layout, x.device):
                served += 1
                assert _C.last_kernel() == f"quantize.{isa}"
                actual.dequantize()
                assert _C.last_kernel() == f"dequantize.{isa}"
            _assert_same(actual, x, arguments)
    assert served >= 12, "the kernels served next to nothing"


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 15, 16, 34, 129])
def test_quantize_hazards(isa: str, threads: int, kind: dict[str, Any], dtype: torch.dtype, k: int) -> None:
    x = hazard_rows(k).to(dtype)
    for where in ({"granularity": "token"}, {"granularity": "group", "group_size": 32}, {"granularity": "tensor"}):
        _assert_same(quantize(x, **kind, **where), x, {**kind, **where})
    columns = x.T.contiguous()
    for where in ({"granularity": "channel", "axis": 1}, {"granularity": "token", "axis": 0}):
        _assert_same(quantize(columns, **kind, **where), columns, {**kind, **where})
    finite = x[torch.isfinite(x).all(-1)]
    _assert_same(quantize(finite, **kind, granularity="tensor"), finite, {**kind, "granularity": "tensor"})


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_static_hazards(isa: str, kind: dict[str, Any], dtype: torch.dtype) -> None:
    x = hazard_rows(50).to(dtype)
    low, high, _ = _bounds(kind["bits"], kind.get("signed", False), kind["symmetric"])
    for zero_point in (low, high, (low + high) // 2):
        for where in WHERE:
            given_zero = None if kind["symmetric"] else zero_point
            arguments = {**kind, **where, "scale": 0.037, "zero_point": given_zero}
            _assert_same(quantize(x, **arguments), x, arguments)
    steps = torch.linspace(1e-3, 1e3, len(x))
    zeros = None if kind["symmetric"] else torch.arange(len(x)) % (high - low) + low
    arguments = {**kind, "granularity": "token", "scale": steps, "zero_point": zeros}
    _assert_same(quantize(x, **arguments), x, arguments)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("shape", [(3, 4133), (2, 700, 5), (3, 2, 2049)])
def test_quantize_strided_channels_across_blocks(
    isa: str, threads: int, kind: dict[str, Any], shape: tuple[int, ...]
) -> None:
    x = seeded(*shape)
    x[0, ..., -1] = float("nan")
    arguments = {**kind, "granularity": "channel", "axis": 1}
    _assert_same(quantize(x, **arguments), x, arguments)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_quantize_large_tensor_is_shared_by_threads(isa: str, threads: int, kind: dict[str, Any]) -> None:
    dtypes = (torch.float32,)
    x = seeded(2, 70_001)
    x[1, -1] = 1e4  # the largest value in the last thread's share
    for where in ({"granularity": "tensor"}, {"granularity": "token"}, {"granularity": "group", "group_size": 128}):
        _assert_same(quantize(x, **kind, **where), x, {**kind, **where}, dtypes)
    x[0, 65_000] = math.nan
    _assert_same(quantize(x, **kind), x, kind, dtypes)
    columns = seeded(300, 300)
    _assert_same(quantize(columns, **kind, granularity="channel"), columns, {**kind, "granularity": "channel"}, dtypes)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 48, 64, 128])
def test_quantize_groups_beyond_one_batch(
    isa: str, threads: int, kind: dict[str, Any], dtype: torch.dtype, size: int
) -> None:
    x = seeded(700, 2 * size + 6).to(dtype)  # rows whose last group is short, and below rows of whole groups
    x[3, 5], x[400, 1], x[699, -1], x[500, :size] = math.nan, math.inf, -math.inf, 0.0
    where = {"granularity": "group", "group_size": size}
    _assert_same(quantize(x, **kind, **where), x, {**kind, **where}, DTYPES)
    whole = x[:, : 2 * size].contiguous()
    _assert_same(quantize(whole, **kind, **where), whole, {**kind, **where}, DTYPES)
    tokens = whole.view(-1, size)
    _assert_same(quantize(tokens, **kind), tokens, kind, DTYPES)


@pytest.mark.parametrize("kind", KINDS[:4], ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 77), (9, 4133), (4500, 260), (17, 5, 3)])
def test_quantize_columns_over_rows_and_blocks(
    isa: str, threads: int, kind: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = seeded(*shape).to(dtype)
    x[..., 0] = 0.0
    x[-1, ..., 1] = 70.0  # the largest of its channel in the last row alone
    where = {"granularity": "channel", "axis": 1 if len(shape) == 3 else -1}
    _assert_same(quantize(x, **kind, **where), x, {**kind, **where}, DTYPES)
    x[-1, ..., 2] = math.nan
    _assert_same(quantize(x, **kind, **where), x, {**kind, **where}, DTYPES)


@pytest.mark.parametrize("kind", KINDS[:4], ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7, 2048), (2, 3, 2600), (67, 8200), (130, 3, 2047)])
def test_quantize_long_runs_and_whole_rows(
    isa: str, threads: int, kind: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Granules written while the next is read, in both directions; rows wider than one block of columns."""
    x = seeded(*shape).to(dtype)
    x[-1, 0, ...] = 90.0  # the largest of its channel in the last run
    x[0, 2].view(-1)[-1] = -80.0  # and in the last element of the first
    where = {"granularity": "channel", "axis": 1}
    _assert_same(quantize(x, **kind, **where), x, {**kind, **where}, DTYPES)
    x[0, 1].view(-1)[-1], x[-1, 0].view(-1)[0] = math.nan, -math.inf
    _assert_same(quantize(x, **kind, **where), x, {**kind, **where}, DTYPES)
    arguments = {**kind, **where, "scale": 0.37, "zero_point": None if kind["symmetric"] else 3}
    _assert_same(quantize(x, **arguments), x, arguments, DTYPES)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1023, 1024, 1090, 4096])
def test_quantize_long_rows(isa: str, threads: int, kind: dict[str, Any], dtype: torch.dtype, k: int) -> None:
    x = seeded(19, k).to(dtype)
    x[4, -1], x[5, 512], x[18, 0] = 60.0, -70.0, math.inf  # last of a row, first of a piece
    x[7], x[9, 700] = 0.0, math.nan
    for where in ({"granularity": "token"}, {"granularity": "group", "group_size": 1024}):
        _assert_same(quantize(x, **kind, **where), x, {**kind, **where}, DTYPES)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_quantize_every_group_of_a_vector(isa: str, kind: dict[str, Any], dtype: torch.dtype, size: int) -> None:
    """Each lane of a vector of groups has its own extremes, at every place within a group."""
    x = torch.full((64, size), 0.5)
    groups = torch.arange(64)
    x[groups, (groups * 7) % size] = torch.where(groups % 2 == 0, 1.0, -1.0) * (groups + 2.0)
    x = torch.cat([x, x.flip(1), seeded(23, size)]).to(dtype)
    _assert_same(quantize(x, **kind), x, kind, DTYPES)
    x[70, size - 1], x[3, 0] = math.nan, -math.inf  # one group of a vector alone is marked
    _assert_same(quantize(x, **kind), x, kind, DTYPES)


@given(
    rows=st.integers(0, 5),
    k=st.integers(0, 70),
    kind=st.sampled_from(KINDS),
    where=st.sampled_from(WHERE),
    exponent=st.integers(-130, 120),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quantize_any_shape(
    isa: str,
    rows: int,
    k: int,
    kind: dict[str, Any],
    where: dict[str, Any],
    exponent: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    x = (seeded(rows, k, seed=seed).double() * 2.0**exponent).to(dtype)
    _assert_same(quantize(x, **kind, **where), x, {**kind, **where})


def test_quantize_strided_and_gradients(isa: str) -> None:
    x = seeded(4, 33)
    for view in (strided(x), x.T.contiguous().T, x.clone().requires_grad_(True)):
        _assert_same(quantize(view), x, {})
        assert not quantize(view).scale.requires_grad


def test_quantize_scalar_and_empty() -> None:
    q = quantize(torch.tensor(-2.0), granularity="tensor")
    assert q.data.item() == -127
    assert q.dequantize().item() == -2.0
    assert quantize(torch.tensor(3.0), granularity="tensor", bits=4).data.tolist() == [15]
    for shape in ((0,), (3, 0), (0, 3), (2, 0, 4)):
        for where in (
            {"granularity": "tensor"},
            {},
            {"granularity": "channel"},
            {"granularity": "group", "group_size": 4},
        ):
            for kind in KINDS:
                q = quantize(torch.zeros(shape), **kind, **where)
                assert q.dequantize().shape == shape
                assert (q.scale == 1).all()


# -- numbers people know --------------------------------------------------------------------------------------


def test_quantize_minus_six_to_five() -> None:
    # Range 11 over 255 steps; zero lies 6 / 11 of the way up: 139.09.
    x = torch.arange(-6.0, 6.0)
    q = quantize(x, signed=False, symmetric=False, granularity="tensor")
    assert q.scale.item() == pytest.approx(11 / 255, rel=1e-6)
    assert q.zero_point is not None
    assert q.zero_point.item() == 139
    assert q.data.tolist() == [0, 23, 46, 69, 93, 116, 139, 162, 185, 209, 232, 255]
    signed = quantize(x, symmetric=False, granularity="tensor")
    assert signed.zero_point is not None
    assert signed.zero_point.item() == 11
    assert signed.data.tolist() == [code - 128 for code in q.data.tolist()]
    for tensor in (q, signed):
        assert (tensor.dequantize() - x).abs().max() <= tensor.scale.item() / 2 * 1.001
        assert tensor.dequantize()[6] == 0, "zero is exact"


def test_quantize_zero_to_ten() -> None:
    x = torch.arange(0.0, 11.0)
    q = quantize(x, signed=False, symmetric=False, granularity="tensor")
    assert q.scale.item() == pytest.approx(10 / 255, rel=1e-6)
    assert q.zero_point is not None
    assert q.zero_point.item() == 0
    # 25.5 steps per unit: the reciprocal of the rounded scale decides the odd multiples.
    assert [abs(code - 25.5 * i) <= 0.5 for i, code in enumerate(q.data.tolist())] == [True] * 11
    assert (q.data[0].item(), q.data[10].item()) == (0, 255)
    signed = quantize(x, symmetric=False, granularity="tensor")
    assert signed.zero_point is not None
    assert signed.zero_point.item() == -128


# -- arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"bits": 3}, ValueError, "bits: expected 8 or 4, got 3"),
        ({"bits": 8.0}, ValueError, "bits"),
        ({"signed": 1}, TypeError, "signed: expected a bool"),
        ({"symmetric": None}, TypeError, "symmetric"),
        ({"granularity": "row"}, ValueError, "granularity: expected one of tensor, channel, token, group, got 'row'"),
        ({"axis": 2}, ValueError, r"axis: expected -2..1 for shape \[3, 4\], got 2"),
        ({"axis": 0.0}, TypeError, "axis"),
        ({"group_size": 4}, ValueError, "group_size: expected None with granularity='token'"),
        ({"granularity": "group"}, TypeError, "group_size: expected an int"),
        ({"granularity": "group", "group_size": 0}, ValueError, "group_size: expected >= 1, got 0"),
        ({"scale": 0.0}, ValueError, "scale: expected finite values > 0"),
        ({"scale": math.nan}, ValueError, "scale"),
        ({"scale": -1}, ValueError, "scale"),
        ({"scale": True}, TypeError, "scale"),
        ({"scale": "1"}, TypeError, "scale: expected a tensor or a number, got '1'"),
        ({"scale": torch.ones(3, dtype=torch.int64)}, TypeError, "scale"),
        ({"scale": torch.ones(4)}, ValueError, r"scale: expected a number or shape \[3\]"),
        ({"zero_point": 3}, ValueError, "zero_point: expected None where no scale is given"),
        ({"scale": 1.0, "zero_point": 3}, ValueError, "zero_point: expected None with symmetric=True"),
        ({"scale": 1.0, "symmetric": False}, ValueError, "zero_point: expected a value beside scale"),
        (
            {"scale": 1.0, "symmetric": False, "zero_point": 128},
            ValueError,
            r"expected values in -128..127",
        ),
        ({"scale": 1.0, "symmetric": False, "zero_point": 1.5}, TypeError, "zero_point"),
        ({"scale": 1.0, "symmetric": False, "zero_point": torch.zeros(4, dtype=torch.int32)}, ValueError, "zero_point"),
        ({"bits": 4, "scale": 1.0, "symmetric": False, "zero_point": 16}, ValueError, r"in 0..15"),
    ],
)
def test_quantize_rejects(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(torch.ones(3, 4), **arguments)


def test_quantize_rejects_inputs() -> None:
    with pytest.raises(TypeError, match=r"x: expected float32, bfloat16 or float16, got torch\.int64"):
        quantize(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got list"):
        quantize([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="granularity: expected 'tensor'"):
        quantize(torch.tensor(1.0))
    with pytest.raises(TypeError, match="dtype"):
        quantize(torch.ones(3)).dequantize(torch.float64)
    with pytest.raises(TypeError, match="qtensor: expected a QTensor"):
        dequantize(torch.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_quantize_operators(kind: dict[str, Any]) -> None:
    for where in WHERE:
        q = quantize(seeded(6, 34), **kind, **where)
        layout = (q.bits, q.signed, q.granularity, q.axis, q.group_size, q.symmetric)
        zero_point = None if q.symmetric else torch.tensor(5)
        for static in ((None, None), (torch.tensor(0.1), zero_point)):
            torch.library.opcheck(torch.ops.qkernels.quantize.default, (seeded(6, 34), *layout, *static))
        parts = (q.data, q.scale, q.zero_point, list(q.shape), *layout, torch.bfloat16)
        torch.library.opcheck(torch.ops.qkernels.dequantize.default, parts)


@pytest.mark.parametrize("kind", KINDS, ids=_name)
def test_quantize_traced_without_breaks(kind: dict[str, Any]) -> None:
    def round_trip(x: torch.Tensor) -> torch.Tensor:
        return quantize(x * 2, **kind, granularity="group", group_size=8).dequantize() + 1

    compiled = torch.compile(round_trip, backend="eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = seeded(rows, 34)
        assert_bits_equal(compiled(x), round_trip(x))


def test_qtensor_checks_its_parts() -> None:
    q = quantize(seeded(3, 4))
    with pytest.raises(ValueError, match=r"data: expected torch.int8 of shape \[3, 4\]"):
        QTensor(q.data[:2], q.scale, None, (3, 4))
    with pytest.raises(ValueError, match="scale"):
        QTensor(q.data, q.scale.double(), None, (3, 4))
    with pytest.raises(ValueError, match="zero_point: expected None"):
        QTensor(q.data, q.scale, q.scale.int(), (3, 4))
    with pytest.raises(ValueError, match="zero_point: expected an int32 tensor"):
        QTensor(q.data, q.scale, None, (3, 4), symmetric=False)
    with pytest.raises(TypeError, match="data"):
        QTensor([1], q.scale, None, (3, 4))  # type: ignore[arg-type]


def test_qtensor_describes_itself(device: torch.device) -> None:
    q = quantize(seeded(3, 70), bits=4, granularity="group", group_size=32)
    assert repr(q) == (
        "QTensor(uint4, shape=[3, 70], symmetric, granularity='group', axis=1, group_size=32, device='cpu', 141 bytes)"
    )
    moved = q.to(device)
    assert moved.device.type == device.type
    assert_bits_equal(moved.dequantize(), q.dequantize())
    with pytest.raises(AttributeError):
        q.bits = 8  # type: ignore[misc]
