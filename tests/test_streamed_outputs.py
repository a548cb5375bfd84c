"""Outputs that L2 would not keep, which kernels may store past the caches: the same bits, wherever their lines lie."""

from __future__ import annotations

from collections.abc import Callable

import helpers as H
import pytest
import torch
from torch import Tensor

from qkernels import _C, cpu_packed, cpu_w8a8, native, reference
from qkernels.epilogues import EPILOGUES
from qkernels.nn import QuantLinear
from qkernels.scheme import Scheme

W4A8 = Scheme.from_preset("w4a8")
INTEGER = Scheme.from_preset("w4a8_intscale")
SCHEMES = {
    "w8a8": (Scheme(), 70),
    "w8a8-asymmetric": (Scheme(activation_symmetric=False), 70),
    "w8a8-slices": (Scheme(), 4170),  # AMX adds the sums of two slices of K
    "w4a8": (W4A8.replace(group_size=32), 128),
    "w4a8-tails": (W4A8.replace(group_size=64), 133),
    "w4a8-integer": (INTEGER.replace(group_size=32), 128),
    "w4a8-integer-slices": (INTEGER.replace(weight_symmetric=False, activation_symmetric=False), 4170),
    "w4a8-asymmetric": (W4A8.replace(weight_symmetric=False, activation_symmetric=False), 70),
}
VECTORS = pytest.mark.parametrize("isa", ("avx2", "avx512vnni", "amx"), indirect=True)
PIECE = 32  # rows of an output that is small
MIB = 1 << 20
GUARD = 7.0


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Tensor]]:
    """``place(n)``: outputs lie n elements behind a multiple of 64 bytes from now on, in the buffers of the list."""

    def at(offset: int) -> list[Tensor]:
        buffers: list[Tensor] = []

        def new_empty(x: Tensor, *shape: int) -> Tensor:
            count = torch.Size(shape).numel()
            buffers.append(torch.full((offset + count + 64,), GUARD, dtype=x.dtype))
            assert buffers[-1].data_ptr() % 64 == 0
            return buffers[-1][offset : offset + count].view(shape)

        for module in (cpu_w8a8, cpu_packed):
            monkeypatch.setattr(module, "_new_empty", new_empty)
        return buffers

    return at


def layer(scheme: Scheme, n: int, k: int, epilogue: str | None = None) -> QuantLinear:
    made = QuantLinear.from_float(H.seeded(n, k), H.seeded(n, seed=1), scheme)
    made.epilogue = epilogue
    return made


def in_pieces(made: QuantLinear, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The layer over a few rows at a time, whose outputs stay in caches."""
    rows = [slice(i, i + PIECE) for i in range(0, len(x), PIECE)]
    return torch.cat([made(x[r], residual=None if residual is None else residual[r]) for r in rows])


def row_count(threads: int, dtype: torch.dtype) -> int:
    """Rows of 4100 columns or more that come to over 1 MiB a thread; the last ones are half a tile."""
    return 32 * (2 * threads * 4 // dtype.itemsize) + 9


@VECTORS
@pytest.mark.parametrize("name", SCHEMES)
def test_large_outputs_equal_the_reference(name, isa, threads, place):
    scheme, k = SCHEMES[name]
    # Whole lines and whole blocks; a tail of 16 columns; lines that begin elsewhere; rows of an odd length.
    layouts = ((4128, 0), (4112, 0), (4128, 1), (4111, 0))
    for n, offset in layouts[:1] if k > 4096 else layouts:
        made = layer(scheme, n, k)
        for dtype in H.DTYPES:
            x = H.seeded(row_count(threads, dtype), k).to(dtype)
            x[-1, 0] = float("nan")
            x[-2] = 0
            buffers = place(offset)
            y = made(x)
            H.assert_ran(name[:4], isa, len(x))
            assert y.nbytes > MIB * threads
            assert y.data_ptr() == buffers[-1].data_ptr() + offset * y.itemsize
            assert bool((buffers[-1][:offset] == GUARD).all())
            assert bool((buffers[-1][-64:] == GUARD).all())
            H.assert_bits_equal(y, in_pieces(made, x), f"{n} columns, {offset} behind")
        H.assert_bits_equal(y, reference.linear(x, made.canonical(), scheme, k))


@VECTORS
@pytest.mark.parametrize("scheme", (Scheme(), W4A8), ids=lambda s: s.name)
def test_large_outputs_of_every_epilogue(scheme, isa, threads):
    for epilogue in (None, *EPILOGUES):
        for n in (4128, 4112) if epilogue in (None, "gelu") else (4128,):
            made = layer(scheme, n, 64, epilogue)
            for dtype in (torch.float32, torch.bfloat16):
                m = row_count(threads, dtype)
                x, residual = H.seeded(m, 64).to(dtype), 3 * H.seeded(m, n, seed=1).to(dtype)
                H.assert_bits_equal(made(x), in_pieces(made, x))
                H.assert_bits_equal(made(x, residual=residual), in_pieces(made, x, residual))


@VECTORS
@pytest.mark.parametrize("dtype", H.DTYPES, ids=str)
def test_large_outputs_of_several_members(dtype, isa, threads):
    members = [layer(Scheme(), n, 70) for n in (2080, 33, 16, 2063)]  # rows of whole lines, and such as are not
    group = _C.LinearW8A8Group([made._prepared.native().__self__ for made in members])
    x = H.seeded(row_count(threads, dtype), 70).to(dtype)
    out = [torch.full((len(x), made.out_features), GUARD, dtype=dtype) for made in members]
    code = native.DTYPE_CODES[dtype]
    group.run(x.data_ptr(), code, len(x), 70, [y.data_ptr() for y in out], code, threads)
    for made, y in zip(members, out, strict=True):
        H.assert_bits_equal(y, in_pieces(made, x), f"{made.out_features} columns")
