"""Who is timed: the base class of all contenders, and ours."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkernels import _C, nn, reference
from qkernels.bench.timing import Rotation, Sampler
from qkernels.checks import DTYPE_CODES
from qkernels.native import pack_w8
from qkernels.scheme import Scheme

MAX_COPIES = 1024


class Contender(ABC):
    """One implementation of ``y [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Attributes:
        name: of the row.
        bytes_per_weight: what one weight takes in memory; decides how many copies make a cold rotation.
        most_copies: more than these take too long to make.
        input_itemsize: bytes of one value that it reads; None: of the dtype of the run.
        scheme: what it computes; its limit is what its times are measured against. W8A8 where it computes no scheme.
        holds: the scheme whose codes and scales it was given; None: it made its own of the weight, or took it as it is.
        rival_of: names of the schemes of the run that a rival is compared with.
    """

    name: str
    ours: ClassVar[bool] = False
    scheme: Scheme = Scheme.resolve("w8a8")
    holds: Scheme | None = None
    rival_of: tuple[str, ...] = ()
    bytes_per_weight: float = 1.0
    most_copies: int = MAX_COPIES
    input_itemsize: int | None = None

    def refuses(self, k: int, n: int) -> str | None:
        """Why it cannot take a weight of ``n`` x ``k``; None if it can."""
        return None

    @abstractmethod
    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """Take fp32 ``weight`` [N, K] and ``bias`` [N]; ``copies`` of the result lie apart in memory."""

    @abstractmethod
    def bind(self, x: Tensor) -> None:
        """The rows that are timed from now on: ``x`` [M, K] in the dtype of the run."""

    @abstractmethod
    def output(self) -> Tensor:
        """What the first copy computes from the rows bound: [M, N], any float dtype."""

    @abstractmethod
    def sampler(self, *, cold: bool) -> Sampler:
        """Something that times single calls: over all copies in turn (cold) or over the first (warm)."""

    def copies_for(self, elements: int, cold_bytes: int) -> int:
        """How many copies of ``elements`` weights fill ``cold_bytes``."""
        return max(1, -(-cold_bytes // max(1, int(elements * self.bytes_per_weight))))

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
        """The exact result for rows ``x``, or None where none is defined (then the relative error is only reported)."""
        return None

    def close(self) -> None:  # noqa: B027 (most hold nothing but memory)
        """Give back processes and memory."""


def signed_codes(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The codes of a symmetric ``scheme`` less their zero point, int8 [N, G, group], and their scales, fp32 [N, G].

    Per channel G is 1. A short last group is filled up with zeros.
    """
    n, k = weight.shape
    canonical = reference.quantize_weight(weight, scheme)
    codes = canonical["weight"]
    if scheme.weight_bits == 4:
        codes = reference.unpack_int4(codes, k).to(torch.int8) - scheme.zero_code
    group = scheme.resolve_group_size(k)
    codes = torch.nn.functional.pad(codes, (0, -k % group))
    return codes.reshape(n, -1, group), canonical["weight_scale"].float().reshape(n, -1)


class LocalContender(Contender):
    """A contender of this process: calls that take no argument."""

    calls: list[Callable[[], Any]]

    def output(self) -> Tensor:
        """See :meth:`Contender.output`."""
        return self.calls[0]()

    def sampler(self, *, cold: bool) -> Sampler:
        """See :meth:`Contender.sampler`."""
        return Rotation(self.calls if cold else self.calls[:1])


class FillingContender(LocalContender):
    """One whose calls write what they compute into ``y``."""

    y: Tensor

    def output(self) -> Tensor:
        """See :meth:`Contender.output`."""
        self.calls[0]()
        return self.y


class Layer(LocalContender):
    """``QuantLinear`` called as a model calls it."""

    ours = True

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = self.holds = scheme
        self.name = f"{scheme.name} layer"
        self.bytes_per_weight = scheme.weight_bits / 8
        self.layers: list[nn.QuantLinear] = []
        self.canonical: dict[str, Tensor] = {}

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See :meth:`Contender.build`."""
        extra = {} if self.scheme.activation_dynamic else {"act_scale": torch.tensor(4.0 / 127)}
        self.canonical = {**reference.quantize_weight(weight, self.scheme), "bias": bias, **extra}
        n, k = weight.shape
        self.layers = [nn.QuantLinear(k, n, self.canonical, self.scheme) for _ in range(copies)]

    def bind(self, x: Tensor) -> None:
        """See :meth:`Contender.bind`."""
        self.calls = [functools.partial(layer, x) for layer in self.layers]

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
        """The reference's result; None for schemes whose order of summation is the kernel's own."""
        exact = self.scheme.activation_bits == 8
        return reference.linear(x, self.canonical, self.scheme, x.shape[1], x.dtype) if exact else None

    @property
    def kernel(self) -> str:
        """Which kernel serves it."""
        return self.layers[0].kernel


class _NativeW8A8(FillingContender):
    """The binding's object over copies of packed weights, writing into one output."""

    ours = True

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = self.holds = scheme
        self.weights: list[tuple[Tensor, Tensor, Any]] = []  # packed, colsum, and the object that borrows both
        self.canonical: dict[str, Tensor] = {}

    def build(self, weight: Tensor, bias: Tensor, copies: int) -> None:
        """See :meth:`Contender.build`."""
        self.canonical = {**reference.quantize_weight(weight, self.scheme), "bias": bias}
        n, k = weight.shape
        self.weights = []
        for _ in range(copies):
            packed, colsum, minus128 = pack_w8(self.canonical["weight"])
            scale = self.canonical["weight_scale"]
            native = _C.LinearW8A8(
                *(packed.data_ptr(), colsum.data_ptr(), scale.data_ptr(), bias.data_ptr(), n, k, minus128),
                *(self.scheme.activation_symmetric, 0.0, 0, 0),
            )
            self.weights.append((packed, colsum, native))

    def bind(self, x: Tensor) -> None:
        """See :meth:`Contender.bind`."""
        self.x = x
        self.y = torch.empty(x.shape[0], self.canonical["weight"].shape[0], dtype=x.dtype)
        arguments = self.arguments(x, self.y)
        self.calls = [functools.partial(self.function(native), *arguments) for _, _, native in self.weights]

    def function(self, native: Any) -> Callable[..., None]:
        """Which function of the binding is timed."""
        raise TypeError("a subclass says which")

    def arguments(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        """Its arguments."""
        raise TypeError("a subclass says which")

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
        """The reference's result."""
        return reference.linear(x, self.canonical, self.scheme, x.shape[1], x.dtype)


class FusedW8A8(_NativeW8A8):
    """Quantize + GEMM + epilogue, without a layer around it."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.name = f"{scheme.name} quantize+gemm"

    def function(self, native: Any) -> Callable[..., None]:
        """See the base class."""
        return native.run

    def arguments(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        """See the base class."""
        (m, k), code = x.shape, DTYPE_CODES[x.dtype]
        return x.data_ptr(), code, m, k, y.data_ptr(), code, y.shape[1], torch.get_num_threads()


class GemmW8A8(_NativeW8A8):
    """GEMM + epilogue over activations that are int8 already."""

    input_itemsize = 1

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.name = f"{scheme.name} gemm"

    def function(self, native: Any) -> Callable[..., None]:
        """See the base class."""
        return native.run_quantized

    def arguments(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        """See the base class."""
        q, scale, zero_point = reference.quantize_activations(x, symmetric=self.scheme.activation_symmetric)
        self.quantized = (q, scale, zero_point)  # the addresses below are theirs
        m, k = q.shape
        zero = 0 if zero_point is None else zero_point.data_ptr()
        code = DTYPE_CODES[y.dtype]
        return q.data_ptr(), k, scale.data_ptr(), zero, m, y.data_ptr(), code, y.shape[1], torch.get_num_threads()


def ours(schemes: Sequence[str]) -> list[Contender]:
    """Our contenders for the schemes named: three rows for 8-bit integers, the layer alone for the others."""
    found: list[Contender] = []
    for scheme in map(Scheme.resolve, schemes):
        integers = (scheme.weight_bits, scheme.activation_bits, scheme.weight_granularity) == (8, 8, "per_channel")
        if integers and scheme.activation_dynamic:
            found += [GemmW8A8(scheme), FusedW8A8(scheme)]
        found.append(Layer(scheme))
    return found
