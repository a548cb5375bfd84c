"""What several test files share: equality on the bits, hazardous inputs, and a second implementation of the contract.

The implementation here is numpy, a scalar at a time where rounding happens, and shares nothing with the package:
Python integers for the products, ``np.float32`` for every step of the arithmetic, bit twiddling for bfloat16.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkernels.scheme import PRESETS, Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SERVED = [scheme for scheme in PRESETS.values() if scheme.weight_bits >= 4]
"""The presets that kernels serve; the others run on the reference."""
F = np.float32
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_ran(operation: str, isa: str, rows: int) -> None:
    """The newest call of this thread ran on the forced tier, but for the few rows that AMX leaves to VNNI."""
    from qkernels import _C

    tier = "avx512vnni" if isa == "amx" and rows < 16 else isa
    assert _C.last_kernel() == f"{operation}.{tier}"


def assert_bits_equal(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same dtype, shape and bits; NaN equals NaN whatever its payload, and -0 is not +0."""
    assert isinstance(actual, Tensor), f"{what}: {type(actual).__name__} is no tensor"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    a, b = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    same = torch.ones_like(a, dtype=torch.bool)
    if a.dtype.is_floating_point:
        nan = a.isnan()
        assert torch.equal(nan, b.isnan()), f"{what}: NaN in other places ({int(nan.sum())} and {int(b.isnan().sum())})"
        same = ~nan
        a, b = a.view(_INTS[a.element_size()]), b.view(_INTS[b.element_size()])
    wrong = ((a != b) & same).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {a.numel()} elements differ; first at {at}: "
            f"{actual.detach().cpu()[at].item()!r}, expected {expected.detach().cpu()[at].item()!r}"
        )


def assert_steady_on_gpu(call: Callable[[], Sequence[Tensor]], refill: Callable[[int], object], turns: int) -> None:
    """A call gives the same bits in a CUDA graph, replayed over inputs that ``refill`` writes, and on two streams in
    turn."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(3):
        refill(seed)
        graph.replay()
        for ours, theirs in zip(captured, call(), strict=True):
            assert_bits_equal(ours, theirs)
    wanted = call()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for turn in range(turns):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(call())
    torch.cuda.synchronize()
    for result in results:
        for ours, theirs in zip(result, wanted, strict=True):
            assert_bits_equal(ours, theirs)


# -- inputs ---------------------------------------------------------------------------------------------------

TINY = 2.0**-100


def hazard_rows(k: int) -> Tensor:
    """float32 ``[rows, k]``: one row for everything that has ever gone wrong, and ordinary rows between."""
    ramp = torch.arange(k, dtype=torch.float32)
    wave = torch.sin(ramp * 1.7 + 0.3)
    sign = torch.where(ramp % 2 == 0, 1.0, -1.0)
    rows = [
        wave,
        torch.zeros(k),
        -torch.zeros(k),
        sign * 127.0,  # every code at the limit
        sign * TINY,  # just not zero
        sign * 2.0**-101,  # just zero
        wave * 2.0**-120,
        sign * 2.0**-149,  # smallest denormal
        wave * 2.0**-130,  # denormals
        wave * 2.0**-98,
        wave.abs() + 0.5,  # one-sided ranges
        -wave.abs() - 0.5,
        (ramp % 9 - 4) * 0.5 + 127.0 * (ramp == 0),  # ties: scale 1, halves
        (ramp % 7) * 0.5 + 255.0 * (ramp == 0),  # ties of an asymmetric grid: scale 1
        wave * 3e38,  # near overflow
        sign * 3.4028234663852886e38,
        wave * 2.0**-126 + sign * 2.0**20,
        torch.full((k,), 0.1),
    ]
    for bad in (math.nan, math.inf, -math.inf):
        for at in {0, k // 2, k - 1} & set(range(k)):
            row = wave.clone()
            row[at] = bad
            rows.append(row)
    mixed = wave.clone()
    mixed[: k // 2] = math.inf
    mixed[k // 2 :] = math.nan
    rows += [mixed, wave * 0.01]
    return torch.stack(rows)


def seeded(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Reproducible normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def static_grid(scheme: Scheme, scale: float, zero_point: int) -> dict[str, Tensor]:
    """The canonical tensors of the activations of a static scheme; none of a dynamic one."""
    grid = {"act_scale": torch.tensor(scale), "act_zero_point": torch.tensor(zero_point, dtype=torch.int32)}
    if scheme.activation_symmetric:
        del grid["act_zero_point"]
    return {} if scheme.activation_dynamic else grid


def strided(x: Tensor) -> Tensor:
    """Equal to ``x``, with a last stride of 2 elements."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7.0)
    view = wide[..., ::2]
    view.copy_(x)
    return view


# -- numpy: floats --------------------------------------------------------------------------------------------


def widen(x: Tensor) -> np.ndarray:
    """float32 values of a float32, bfloat16 or float16 tensor."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        bits = x.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(x.shape)
    return x.numpy().astype(np.float32)


def narrow(y: np.ndarray, dtype: torch.dtype) -> Tensor:
    """float32 values rounded to nearest even in ``dtype``."""
    y = np.ascontiguousarray(y, dtype=np.float32)
    if dtype == torch.float32:
        return torch.from_numpy(y.copy())
    if dtype == torch.float16:
        with np.errstate(all="ignore"):
            return torch.from_numpy(y.astype(np.float16))
    bits = y.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(y), np.uint16(0x7FC0), rounded)
    return torch.from_numpy(rounded.view(np.int16).copy()).view(torch.bfloat16).reshape(y.shape)


def _half_even(value: np.float32) -> float:
    """Nearest integer, ties to even, as an exact float (infinities stay)."""
    exact = float(value)
    if math.isinf(exact):
        return exact
    below = math.floor(exact)
    rest = exact - below
    return float(below + (rest > 0.5 or (rest == 0.5 and below % 2 == 1)))


def _clamp(value: float, low: int, high: int) -> int:
    return low if value < low else high if value > high else int(value)


# -- numpy: quantization --------------------------------------------------------------------------------------


def oracle_granule(
    values: np.ndarray,
    *,
    bits: int = 8,
    symmetric: bool = True,
    scale: float | None = None,
    zero_point: int | None = None,
) -> tuple[list[int], np.float32, int]:
    """One granule: codes around zero (symmetric) or from 0 (asymmetric), scale, zero point."""
    with np.errstate(all="ignore"):
        limit, bottom = (127, -127) if bits == 8 else (7, -8)
        levels = 255 if bits == 8 else 15
        numbers = [F(v) for v in values]
        if any(not math.isfinite(v) for v in numbers):
            return [0] * len(numbers), F(np.nan), 0
        zero, inv = 0, F(0)
        if scale is not None:
            step, inv, zero = F(scale), F(1) / F(scale), zero_point or 0
        elif symmetric:
            absmax = F(0)
            for v in numbers:
                absmax = max(absmax, F(abs(v)))
            if float(absmax) < 2.0**-100:
                return [0] * len(numbers), F(1), 0
            step = F(absmax / F(limit))
            inv = F(F(127) / absmax) if bits == 8 else F(F(1) / step)
        else:
            hi, lo = F(max([0.0, *map(float, numbers)])), F(min([0.0, *map(float, numbers)]))
            step = F(F(hi / F(255)) - F(lo / F(255))) if bits == 8 else F(F(hi - lo) / F(15))
            inv = F(F(1) / step)
            if not math.isfinite(inv):
                return [0] * len(numbers), F(1), 0
            zero = _clamp(_half_even(F(F(-lo) * inv)), 0, levels)
        codes = []
        for v in numbers:
            rounded = _half_even(F(v * inv))
            codes.append(_clamp(rounded, bottom, limit) if symmetric else _clamp(rounded + zero, 0, levels))
        return codes, step, zero


def oracle_activations(
    x: np.ndarray,
    *,
    symmetric: bool = True,
    scale: float | None = None,
    zero_point: int | None = None,
    inv_smooth: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows ``[M, K]``: codes int64 ``[M, K]``, scales float32 ``[M]``, zero points int64 ``[M]``."""
    m, k = x.shape
    codes, scales, zeros = np.zeros((m, k), np.int64), np.zeros(m, np.float32), np.zeros(m, np.int64)
    for i in range(m):
        with np.errstate(all="ignore"):
            row = x[i] if inv_smooth is None else np.array([F(a) * F(b) for a, b in zip(x[i], inv_smooth, strict=True)])
        codes[i], scales[i], zeros[i] = oracle_granule(row, symmetric=symmetric, scale=scale, zero_point=zero_point)
    return codes, scales, zeros


def oracle_weight_w8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 ``[N, K]`` and float32 ``[N]``."""
    codes, scales, _ = oracle_activations(w)
    return codes.astype(np.int8), scales


# -- numpy: products ------------------------------------------------------------------------------------------


def oracle_linear_w8a8(
    x: Tensor,
    weight: np.ndarray,
    weight_scale: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    symmetric: bool = True,
    act_scale: float | None = None,
    act_zero_point: int | None = None,
    inv_smooth: np.ndarray | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x [..., K]`` through the whole contract: quantize, exact product, epilogue step by step, cast."""
    rows = widen(x).reshape(-1, x.shape[-1]) if x.numel() else np.zeros((math.prod(x.shape[:-1]), x.shape[-1]), F)
    codes, scales, zeros = oracle_activations(
        rows, symmetric=symmetric, scale=act_scale, zero_point=act_zero_point, inv_smooth=inv_smooth
    )
    w = weight.astype(np.int64)
    acc = codes @ w.T - zeros[:, None] * w.sum(1)[None, :]
    assert acc.size == 0 or np.abs(acc).max() < 2**31, "the accumulator left int32"
    y = _epilogue(acc, scales, weight_scale, bias)
    return narrow(y, out_dtype or x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _epilogue(acc: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    with np.errstate(all="ignore"):
        y = acc.astype(np.int32).astype(np.float32)
        y = np.multiply(y, x_scale.astype(np.float32)[:, None], dtype=np.float32)
        y = np.multiply(y, w_scale.astype(np.float32)[None, :], dtype=np.float32)
        return y if bias is None else np.add(y, bias.astype(np.float32)[None, :], dtype=np.float32)


def oracle_linear_grouped_a8(
    x: Tensor,
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    group_size: int,
    zero: np.ndarray | int = 8,
    minimum: np.ndarray | None = None,
    symmetric: bool = True,
) -> Tensor:
    """W4A8 (or grouped W8A8 with ``zero=0``): codes ``[N, K]``, scale ``[N, G]``, zero an int or ``[N, G]``."""
    q, x_scale, x_zero = oracle_activations(widen(x), symmetric=symmetric)
    a = q - x_zero[:, None]
    (m, k), n = a.shape, codes.shape[0]
    zeros = np.broadcast_to(np.asarray(zero, np.int64), scale.shape)
    y = np.zeros((m, n), np.float32)
    with np.errstate(all="ignore"):
        for i in range(m):
            for j in range(n):
                total = F(0)
                for g in range(scale.shape[1]):
                    part = slice(g * group_size, min(k, (g + 1) * group_size))
                    sum_a = int(a[i, part].sum())
                    d = int(np.dot(a[i, part], codes[j, part].astype(np.int64))) - int(zeros[j, g]) * sum_a
                    total = F(total + F(F(np.int32(d)) * F(scale[j, g])))
                    if minimum is not None:
                        total = F(total + F(F(minimum[j, g]) * F(np.int32(sum_a))))
                out = F(total * x_scale[i])
                y[i, j] = out if bias is None else F(out + F(bias[j]))
    return narrow(y, x.dtype)


def oracle_unpack(packed: Tensor, count: int, bits: int = 4) -> np.ndarray:
    """Codes ``[N, count]`` of bytes ``[N, ceil(count * bits / 8)]``: every row one little-endian number."""
    out = np.zeros((packed.shape[0], count), np.int64)
    for row, data in enumerate(packed.cpu().numpy()):
        number = int.from_bytes(data.tobytes(), "little")
        for i in range(count):
            out[row, i] = number >> bits * i & (1 << bits) - 1
    return out


# -- what tests of several kernels ask ---------------------------------------------------------------------------------

CODEBOOK = tuple((i - 7.3) * abs(i - 7.3) / 60 for i in range(16))
W4_KINDS: dict[str, dict[str, object]] = {
    "symmetric": {},
    "zero point": {"weight_symmetric": False},
    "minimum": {"weight_symmetric": False, "weight_zero": "float"},
    "codebook": {"codebook": CODEBOOK},
}
"""Options of a 4-bit Scheme."""


def run_in_interpreter(path: str) -> None:
    """A test file again, in a process of its own: Triton's interpreter is chosen when triton is imported."""
    file = Path(path).resolve()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr


def assert_compiled_and_differentiated(prepared: Any, x: Tensor, wanted: Tensor, weight: Tensor) -> None:
    """A layer's compiled call and its differentiable one give ``wanted``, and the gradient of their sum is the float
    ``weight [N, K]``'s column sums."""
    n, k = weight.shape
    compiled = torch.compile(lambda t: prepared.call(t, prepared.tensors), fullgraph=True)
    assert_bits_equal(compiled(x), wanted)
    leaf = x.clone().requires_grad_()
    y = prepared.run(leaf)
    assert_bits_equal(y, wanted)
    y.sum().backward()
    assert leaf.grad is not None
    # n products and sums in fp32 on both sides
    expected = weight.sum(0).expand(x.shape[0], k)
    torch.testing.assert_close(leaf.grad.cpu(), expected, rtol=n * 2.0**-23, atol=n * 2.0**-23)
