"""Quantized Linears in the form a kernel reads, and the choice of that kernel.

:func:`prepare` turns the canonical tensors of a layer into a :class:`Prepared`: the first class in ``CANDIDATES`` with
no objection to the scheme, the sizes and the device takes it, and the reference, which serves everything, comes last.
A new kernel is a subclass of Prepared, registered with :func:`register`.

The eager path of a layer goes from here straight to the binding; whatever needs torch's dispatcher (gradients, tracing,
compilation, function transforms, tensor subclasses, autocast) goes through ``torch.ops.qkernels``.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C, reference
from .checks import DTYPE_CODES, check_canonical, check_input, check_static
from .native import ALIGNMENT, native_linear_w8a8, pack_w8, run_native, unpack_w8
from .scheme import MAX_INTEGER_K, Scheme

__all__ = [
    "CANDIDATES",
    "Prepared",
    "PreparedReference",
    "PreparedW8A8",
    "prepare",
    "register",
    "scheme_from_key",
    "scheme_key",
]

_CPU = torch.device("cpu")

# Is anything between a call and the kernel that a direct call would go around?  Each is a cheap question to torch;
# where a release of torch does not know it, the dispatcher serves every call.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)
_jit_trace = getattr(torch._C, "_get_tracing_state", lambda: True)
_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled())
_strided = torch.strided
_dtype_code = DTYPE_CODES.get
_num_threads = torch.get_num_threads
_new_empty = Tensor.new_empty


@functools.lru_cache(maxsize=256)
def scheme_key(scheme: Scheme) -> str:
    """A scheme as the string that operators take: its JSON, the same for equal schemes."""
    return json.dumps(scheme.to_dict(), sort_keys=True)


@functools.lru_cache(maxsize=256)
def scheme_from_key(key: str) -> Scheme:
    """The scheme :func:`scheme_key` wrote.  A preset's name is understood too.

    Raises:
        ValueError: neither.
    """
    if not key.startswith("{"):
        return Scheme.from_preset(key)
    return Scheme.from_dict(json.loads(key))


# -- layers ---------------------------------------------------------------------------------------------------------


class Prepared(ABC):
    """One quantized Linear, resident in the form its kernel reads.

    Attributes:
        tensors: what is resident, by name.  A module may own this very mapping and replace entries; every call
            looks at what is in it.
        scheme, in_features, out_features: what the layer is.
        reason: why no faster kernel serves it; "" where there is nothing to explain.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """Every name that may occur in ``tensors``."""

    def __init__(
        self, tensors: Mapping[str, Any], scheme: Scheme, in_features: int, out_features: int, reason: str = ""
    ) -> None:
        self.tensors = tensors
        self.scheme = scheme
        self.in_features = in_features
        self.out_features = out_features
        self.reason = reason

    @classmethod
    @abstractmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """Why this kernel cannot serve such a layer; "" if it can."""

    @classmethod
    @abstractmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> Prepared:
        """Make the resident form of checked canonical tensors."""

    @property
    @abstractmethod
    def kernel(self) -> str:
        """Name of the kernel, as the report shows it."""

    @abstractmethod
    def call(self, x: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """:meth:`run` through torch's dispatcher, over ``tensors`` in place of the resident ones."""

    @abstractmethod
    def weight_of(self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """The float weight ``[N, K]`` that ``tensors`` stand for, run-time smoothing included, in ``dtype``."""

    @abstractmethod
    def canonical(self) -> dict[str, Tensor]:
        """The canonical tensors, bit for bit what was prepared.  Those that need no unpacking are not copied."""

    @abstractmethod
    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Overwrite resident values with checked canonical tensors, all or some, of unchanged shapes."""

    @property
    def device(self) -> torch.device:
        """Where the resident tensors are."""
        return self.tensors["weight_scale"].device

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self.resident().values())

    def resident(self) -> dict[str, Tensor]:
        """The resident tensors that this layer has."""
        tensors = self.tensors
        return {name: tensor for name in self.names if (tensor := tensors.get(name)) is not None}

    def run(self, x: Tensor) -> Tensor:
        """``x [..., K]`` through the layer: ``[..., N]`` in the dtype of ``x`` (under autocast, in its dtype).

        Raises:
            TypeError: not a float32, bfloat16 or float16 tensor.
            ValueError: wrong size of the last dimension, or wrong device.
        """
        return self.call(x, self.tensors)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """:meth:`weight_of` the resident tensors."""
        return self.weight_of(self.tensors, dtype)

    def moved(self) -> None:  # noqa: B027 (most kernels have nothing to do)
        """To be called when resident tensors were replaced by equal ones elsewhere."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        """Copies of the tensors; nothing that depends on addresses comes along."""
        clone = copy.copy(self)
        memo[id(self)] = clone
        clone.tensors = copy.deepcopy(self.tensors, memo)
        clone.moved()
        return clone


def effective_weight(
    canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The float weight a layer stands for: the dequantized one, times ``inv_smooth`` where there is one."""
    weight = reference.dequantize_weight(canonical, scheme, in_features)
    smooth = canonical.get("inv_smooth")
    return (weight if smooth is None else weight * smooth).to(dtype)


def _autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives the inputs of a Linear; unchanged outside autocast."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPE_CODES:
        return x
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


class PreparedReference(Prepared):
    """The pure torch definition over canonical tensors, on any device."""

    names = (
        "q_weight",
        "weight_scale",
        "weight_zero_point",
        "weight_min",
        "bias",
        "act_scale",
        "act_zero_point",
        "inv_smooth",
    )

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """Nothing: the reference serves every layer."""
        return ""

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> PreparedReference:
        """The tensors as they are."""
        tensors = {"q_weight" if name == "weight" else name: tensor for name, tensor in canonical.items()}
        return cls(tensors, scheme, in_features, canonical["weight"].shape[0], reason)

    @property
    def kernel(self) -> str:
        """``"reference"``."""
        return "reference"

    def call(self, x: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """Through ``torch.ops.qkernels.linear_quantized``."""
        x = _autocast_input(x)
        check_input(x, self.in_features, self.device)
        get = tensors.get
        return torch.ops.qkernels.linear_quantized(
            x,
            get("q_weight"),
            get("weight_scale"),
            get("weight_zero_point"),
            get("weight_min"),
            get("bias"),
            get("act_scale"),
            get("act_zero_point"),
            get("inv_smooth"),
            scheme_key(self.scheme),
            self.in_features,
            None,
        )

    def weight_of(self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """Through ``torch.ops.qkernels.dequantize_quantized``."""
        get = tensors.get
        return torch.ops.qkernels.dequantize_quantized(
            get("q_weight"),
            get("weight_scale"),
            get("weight_zero_point"),
            get("weight_min"),
            get("inv_smooth"),
            scheme_key(self.scheme),
            self.in_features,
            dtype,
        )

    def canonical(self) -> dict[str, Tensor]:
        """The resident tensors themselves."""
        return {"weight" if name == "q_weight" else name: tensor for name, tensor in self.resident().items()}

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Copy in place."""
        own = self.canonical()
        with torch.no_grad():
            for name, tensor in canonical.items():
                own[name].copy_(tensor)


_W8A8_DTYPES = {
    "packed": torch.int8,
    "colsum": torch.int32,
    "weight_scale": torch.float32,
    "bias": torch.float32,
    "act_scale": torch.float32,
    "act_zero_point": torch.int32,
    "inv_smooth": torch.float32,
}

_Binding = tuple[int, int, int, int, Any, Any, int, int]
"""Addresses of packed, colsum, weight_scale and bias; an _Extras or None; the native call; K; N.  Replaced whole."""
_UNBOUND: _Binding = (-1, -1, -1, -1, None, None, 0, 0)


class _Extras:
    """What a native object knows of the rarer tensors: the address of one, the values of two."""

    def __init__(self, scale: Tensor | None, zero_point: Tensor | None, smooth: Tensor | None) -> None:
        self.addresses = (_address(scale), _address(zero_point), _address(smooth))
        # Cells over the same memory: reading a value through them takes a tenth of ``Tensor.item``.
        self.scale = None if scale is None else ctypes.c_float.from_address(scale.data_ptr())
        self.zero_point = None if zero_point is None else ctypes.c_int32.from_address(zero_point.data_ptr())
        self.values = (
            None if self.scale is None else self.scale.value,
            None if self.zero_point is None else self.zero_point.value,
        )

    def stale(self, tensors: Mapping[str, Any]) -> bool:
        """Whether one of them has moved or changed."""
        get = tensors.get
        now = (_address(get("act_scale")), _address(get("act_zero_point")), _address(get("inv_smooth")))
        if now != self.addresses:
            return True
        scale, zero_point = self.scale, self.zero_point
        return (None if scale is None else scale.value, None if zero_point is None else zero_point.value) != self.values


class PreparedW8A8(Prepared):
    """8-bit weights per output channel and 8-bit activations on the CPU, by the native kernels.

    Resident: ``packed`` and ``colsum`` (see :func:`pack_w8`) and the small canonical tensors.  The binding's object
    borrows their addresses; each call compares the addresses first and asks for another object when one has moved.
    """

    names = ("packed", "colsum", "weight_scale", "bias", "act_scale", "act_zero_point", "inv_smooth")

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps the native kernel from a layer."""
        if scheme.weight_bits != 8 or scheme.activation_bits != 8:
            return f"no native kernel for scheme {scheme.name}"
        if scheme.weight_granularity != "per_channel":
            return f"no native kernel for group-wise 8-bit weights (scheme {scheme.name})"
        if device.type not in ("cpu", "meta"):
            return f"no native kernel for device {device.type}"
        if in_features == 0 or out_features == 0:
            return f"no native kernel for an empty weight [{out_features}, {in_features}]"
        return ""

    @classmethod
    def from_canonical(
        cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int, reason: str = ""
    ) -> PreparedW8A8:
        """Packs the weight."""
        weight = canonical["weight"]
        if weight.device.type == "meta":
            packed = torch.empty(_C.packed_w8_bytes(*weight.shape), dtype=torch.int8, device="meta")
            colsum, minus = torch.empty(weight.shape[0], dtype=torch.int32, device="meta"), True
        else:
            packed, colsum, minus = pack_w8(weight)
        tensors = {"packed": packed, "colsum": colsum, "bias": None}
        tensors.update((name, tensor) for name, tensor in canonical.items() if name != "weight")
        return cls(tensors, scheme, in_features, weight.shape[0], reason, has_minus128=minus)

    def __init__(
        self,
        tensors: Mapping[str, Any],
        scheme: Scheme,
        in_features: int,
        out_features: int,
        reason: str = "",
        *,
        has_minus128: bool = True,
    ) -> None:
        super().__init__(tensors, scheme, in_features, out_features, reason)
        self.has_minus128 = has_minus128
        self.act_symmetric = scheme.activation_symmetric
        self.static = not scheme.activation_dynamic
        self.moved()

    @property
    def kernel(self) -> str:
        """``"w8a8."`` and the tier of instructions in use."""
        return f"w8a8.{_C.info()['isa']}"

    def moved(self) -> None:
        """Drop the object that borrows addresses; the next call makes another."""
        self._packed_id = id(self.tensors["packed"])
        self._binding = _UNBOUND

    def _bind(self) -> _Binding:
        """The binding for what is resident now; ``_UNBOUND`` where that is not what a kernel can read."""
        tensors = self.resident()
        if any(type(t) is not Tensor or t.device.type != "cpu" or not t.is_contiguous() for t in tensors.values()):
            return _UNBOUND
        packed = tensors["packed"]
        rows, features = self.out_features, self.in_features
        sizes = {"packed": _C.packed_w8_bytes(rows, features), "inv_smooth": features, "act_scale": 1}
        sizes["act_zero_point"] = 1
        if any(
            tensor.dtype != _W8A8_DTYPES[name] or tensor.numel() != sizes.get(name, rows)
            for name, tensor in tensors.items()
        ):
            return _UNBOUND  # the operator says what is wrong
        if packed.data_ptr() % ALIGNMENT:
            return _UNBOUND  # memory of somebody else's making: the operator copies it
        if id(packed) != self._packed_id:  # put there by somebody else: what it holds is not known
            self.has_minus128 = bool((packed == -128).any())
            self._packed_id = id(packed)
        scale, zero_point, smooth = (tensors.get(name) for name in ("act_scale", "act_zero_point", "inv_smooth"))
        addresses = tuple(_address(tensors.get(name)) for name in ("packed", "colsum", "weight_scale", "bias"))
        check_static(scale, zero_point)
        native = native_linear_w8a8(
            *addresses,
            rows,
            features,
            self.has_minus128,
            self.act_symmetric,
            0.0 if scale is None else float(scale),
            0 if zero_point is None else int(zero_point),
            _address(smooth),
        )
        more = None if scale is None and smooth is None else _Extras(scale, zero_point, smooth)
        a, b, c, d = addresses
        self._binding = (a, b, c, d, more, native.run, features, rows)
        return self._binding

    def run(self, x: Tensor) -> Tensor:
        """See :meth:`Prepared.run`.  Plain eager calls go straight to the binding."""
        # What follows costs as much as a small product: every line was timed.
        if (
            type(x) is Tensor
            and x.is_cpu
            and not x.requires_grad
            and not _dispatch_modes()
            and _function_transform() is None
            and _jit_trace() is None
            and not _autocast()
            and forward_ad._current_level < 0
        ):
            tensors = self.tensors
            packed, colsum, scale, bias, more, native, features, rows = self._binding
            if (
                tensors["packed"].data_ptr() != packed
                or tensors["colsum"].data_ptr() != colsum
                or tensors["weight_scale"].data_ptr() != scale
                or (0 if (vector := tensors["bias"]) is None else vector.data_ptr()) != bias
                or (more is not None and more.stale(tensors))
            ):
                *_, native, features, rows = self._bind()
            code = _dtype_code(x.dtype)
            if native is not None and code is not None:
                shape = x.shape
                if shape and shape[-1] == features:
                    if not x.is_contiguous():
                        if x.layout is not _strided:
                            return self.call(x, tensors)
                        return run_native(native, x, features, rows, x.dtype)
                    if len(shape) == 2:
                        count = shape[0]
                        out = _new_empty(x, count, rows)
                    else:
                        count = x.numel() // features
                        out = _new_empty(x, *shape[:-1], rows)
                    if count:
                        native(x.data_ptr(), code, count, features, out.data_ptr(), code, rows, _num_threads())
                    return out
        return self.call(x, self.tensors)

    def call(self, x: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """Through ``torch.ops.qkernels.linear_w8a8``."""
        x = _autocast_input(x)
        check_input(x, self.in_features, self.device)
        get = tensors.get
        return torch.ops.qkernels.linear_w8a8(
            x,
            get("packed"),
            get("colsum"),
            get("weight_scale"),
            get("bias"),
            self.out_features,
            self.in_features,
            self.has_minus128,
            self.act_symmetric,
            get("act_scale"),
            get("act_zero_point"),
            get("inv_smooth"),
            None,
        )

    def weight_of(self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """Through ``torch.ops.qkernels.dequantize_w8``."""
        get = tensors.get
        return torch.ops.qkernels.dequantize_w8(
            get("packed"), get("weight_scale"), get("inv_smooth"), self.out_features, self.in_features, dtype
        )

    def canonical(self) -> dict[str, Tensor]:
        """Unpacks the weight; the small tensors are the resident ones."""
        tensors = self.resident()
        canonical = {"weight": unpack_w8(tensors.pop("packed"), self.out_features, self.in_features)}
        del tensors["colsum"]
        canonical.update(tensors)
        return canonical

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Packs into the resident memory."""
        with torch.no_grad():
            for name, tensor in canonical.items():
                if name != "weight":
                    self.tensors[name].copy_(tensor)
        if "weight" in canonical:
            weight = canonical["weight"].detach().to(_CPU).contiguous()
            self.has_minus128 = pack_w8(weight, self.tensors["packed"], self.tensors["colsum"])[2]
        self.moved()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


CANDIDATES: list[type[Prepared]] = [PreparedW8A8]
"""Kernels in order of preference; the reference stands behind them."""


def register(candidate: type[Prepared]) -> type[Prepared]:
    """Put a kernel in front of the others (usable as a decorator)."""
    CANDIDATES.insert(0, candidate)
    return candidate


def prepare(
    tensors: Mapping[str, Tensor],
    scheme: Scheme | str,
    in_features: int,
    device: torch.device | str | None = None,
) -> Prepared:
    """A quantized Linear ready to run.

    Args:
        tensors: the canonical tensors (names, shapes and dtypes in :mod:`qkernels.reference`).
        scheme: what they mean.
        in_features: K.
        device: where to run; None: where ``weight`` is.

    Returns:
        The layer, with ``.kernel``, ``.reason``, ``.tensors``, ``.run(x)`` and ``.canonical()``.

    Raises:
        ValueError, TypeError: naming the tensor; also where K is too large for exact int32 sums.
    """
    scheme = Scheme.resolve(scheme)
    weight = tensors.get("weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = "nothing" if weight is None else f"{type(weight).__name__} {list(getattr(weight, 'shape', []))}"
        raise ValueError(f"weight: expected a two-dimensional tensor, got {got}")
    if isinstance(in_features, bool) or not isinstance(in_features, int) or in_features < 0:
        raise ValueError(f"in_features: expected an int >= 0, got {in_features!r}")
    if not scheme.weight_only and in_features > MAX_INTEGER_K:
        raise ValueError(
            f"in_features: expected <= {MAX_INTEGER_K} for exact int32 sums (scheme {scheme.name}), got {in_features}"
        )
    checked = check_canonical(tensors, scheme, in_features, weight.shape[0])
    if device is not None:
        checked = {name: tensor.to(device) for name, tensor in checked.items()}
    where = checked["weight"].device
    objections = []
    for candidate in CANDIDATES:
        objection = candidate.objection(scheme, in_features, weight.shape[0], where)
        if not objection:
            return candidate.from_canonical(checked, scheme, in_features)
        if objection not in objections:
            objections.append(objection)
    return PreparedReference.from_canonical(checked, scheme, in_features, "; ".join(objections))
