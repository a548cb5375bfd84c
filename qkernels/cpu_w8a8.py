"""8-bit weights and activations on the CPU: from a layer's tensors straight to the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C
from .checks import DTYPE_CODES, check_input, check_residual, check_static
from .eager import autocast, dispatch_modes, is_plain, jit_trace
from .epilogues import epilogue_code
from .native import ALIGNMENT, native_linear_w8a8, pack_w8, run_native, run_native_plus, unpack_w8
from .packed import PackedW8A8
from .prepared import function_transform
from .scheme import Scheme

__all__ = ["PreparedW8A8"]

_CPU = torch.device("cpu")

_strided = torch.strided
_dtype_code = DTYPE_CODES.get
_num_threads = torch.get_num_threads
_new_empty = Tensor.new_empty

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


class PreparedW8A8(PackedW8A8):
    """8-bit weights per output channel and 8-bit activations on the CPU, by the native kernels.

    Resident: ``packed`` and ``colsum`` (see :func:`pack_w8`) and the small canonical tensors.  The binding's object
    borrows their addresses; each call compares the addresses first and asks for another object when one has moved.
    """

    fuses = True

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
        # Which tensor has_minus128 speaks of, and where it was when last seen (0: not seen yet).
        self._known_packed = (id(self.tensors["packed"]), 0)
        self._binding = _UNBOUND

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: addresses mean nothing elsewhere."""
        return {**self.__dict__, "_binding": _UNBOUND}

    def _know(self, packed: Tensor) -> None:
        """Make ``has_minus128`` speak of ``packed``, which may have been put there by somebody else."""
        place = packed.data_ptr()
        if self._known_packed not in ((id(packed), 0), (id(packed), place)):
            self.has_minus128 = bool((packed == -128).any())
        self._known_packed = (id(packed), place)

    def around(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See :meth:`Prepared.around`."""
        packed = self.tensors["packed"]
        if type(packed) is Tensor and packed.device.type == "cpu":
            self._know(packed)
        return super().around(x, residual)

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
        self._know(packed)
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
            epilogue_code(self.epilogue),
        )
        more = None if scale is None and smooth is None else _Extras(scale, zero_point, smooth)
        a, b, c, d = addresses
        self._binding = (a, b, c, d, more, native.run, features, rows)
        return self._binding

    def native(self) -> Any:
        """The native call for what is resident now, a bound method of ``_C.LinearW8A8``; None where there is none."""
        # Written out in `run` once more: this call would cost it 0.2 of its 2.9 microseconds.
        tensors = self.tensors
        packed, colsum, scale, bias, more, native, *_ = self._binding
        if (
            tensors["packed"].data_ptr() != packed
            or tensors["colsum"].data_ptr() != colsum
            or tensors["weight_scale"].data_ptr() != scale
            or _address(tensors["bias"]) != bias
            or (more is not None and more.stale(tensors))
        ):
            native = self._bind()[5]
        return native

    def run(self, x: Tensor) -> Tensor:
        """See :meth:`Prepared.run`.  Plain eager calls go straight to the binding."""
        # What follows costs as much as a small product, so is_plain is written out and every line was timed.
        if (
            type(x) is Tensor
            and x.is_cpu
            and not x.requires_grad
            and not dispatch_modes()
            and function_transform() is None
            and jit_trace() is None
            and not autocast()
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
                            return self.around(x)
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
        return self.around(x)

    def run_plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """See :meth:`Prepared.run_plus`."""
        if is_plain(x) and x.is_cpu and type(residual) is Tensor and not residual.requires_grad:
            native, code, shape = self.native(), _dtype_code(x.dtype), x.shape
            features, rows = self.in_features, self.out_features
            if native is not None:
                if not (
                    code is not None
                    and residual.dtype == x.dtype
                    and residual.is_cpu
                    and shape
                    and shape[-1] == features
                    and residual.shape == (*shape[:-1], rows)
                    and x.layout is _strided
                    and residual.layout is _strided
                ):
                    check_input(x, features, self.device)
                    check_residual(residual, x, rows, x.dtype)
                return run_native_plus(native.__self__, x, features, rows, x.dtype, residual)
        return self.around(x, residual)

    @staticmethod
    def unpack(packed: Tensor, rows: int, features: int) -> Tensor:
        """See the base class."""
        return unpack_w8(packed, rows, features)

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
