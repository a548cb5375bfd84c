"""4-bit weights, and 8-bit weights under floating-point activations, on the CPU's native kernels.

One class serves the three kernels, since they differ only in the object of the binding:

    w4a8    4-bit weights, 8-bit activations quantized on the way in    _C.LinearW4A8
    w4a16   4-bit weights, floating-point activations                   _C.LinearW4A16
    w8a16   8-bit weights per channel, floating-point activations       _C.LinearW8A16
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from . import _C
from ._library import register_rules, vmap_rows
from .checks import DTYPE_CODES, check_features, check_input, check_out_dtype, check_residual, check_static
from .eager import is_plain
from .epilogues import epilogue_code
from .native import ALIGNMENT, empty_packed, pack_w8, run_native, run_native_plus, unpack_w8
from .packed import GROUPED, PackedLayer, check_multiplier, check_sum, codebook_tensor, group_count
from .prepared import effective_weight, input_gradient, scheme_from_key
from .scheme import MAX_INTEGER_K, Scheme

__all__ = ["PreparedPacked", "register_operators"]

_CPU = torch.device("cpu")
_num_threads = torch.get_num_threads
_new_empty = Tensor.new_empty
_dtype_code = DTYPE_CODES.get
_strided = torch.strided


def _of_channels(name: str, scheme: Scheme) -> bool:
    """Whether a resident tensor belongs to channels as a whole though the scheme has groups: scales beside multipliers
    do."""
    return name == "packed_scale" and scheme.group_scales == "int"


def _groups_of(name: str, scheme: Scheme, features: int) -> int:
    """Values of a row that a resident tensor holds."""
    return 1 if _of_channels(name, scheme) else group_count(scheme, features)


def _op(scheme: Scheme) -> str:
    return f"w{scheme.weight_bits}a{scheme.activation_bits or 16}"


# -- packing --------------------------------------------------------------------------------------------------------


def _pack(canonical: Mapping[str, Tensor], scheme: Scheme, features: int) -> dict[str, Tensor]:
    """The resident form of canonical tensors on the CPU, or their shapes on the meta device."""
    weight = canonical["weight"]
    rows = weight.shape[0]
    meta = weight.device.type == "meta"
    packed: dict[str, Tensor] = {}
    if scheme.weight_bits == 8:
        if meta:
            packed["packed"] = torch.empty(_C.packed_w8_bytes(rows, features), dtype=torch.int8, device="meta")
        else:
            packed["packed"] = pack_w8(weight.contiguous())[0]
    else:
        count = _C.packed_w4_bytes(rows, features)
        if meta:
            packed["packed"] = torch.empty(count, dtype=torch.uint8, device="meta")
        else:
            packed["packed"] = empty_packed(count, torch.uint8)
            address = packed["packed"].data_ptr()
            _C.pack_w4(weight.contiguous().data_ptr(), rows, features, address, _num_threads())
    for name, own in GROUPED.items():
        tensor = canonical.get(name)
        if tensor is None:
            continue
        if scheme.weight_bits == 8:
            packed[own] = tensor
            continue
        groups = _groups_of(own, scheme, features)
        elements = _C.packed_group_elements(rows, groups)
        packed[own] = torch.empty(elements, dtype=tensor.dtype, device=weight.device)
        if not meta:
            source = tensor.contiguous()
            _C.pack_groups(source.data_ptr(), tensor.element_size(), rows, groups, packed[own].data_ptr())
    return packed


def _unpack(packed: Mapping[str, Tensor | None], scheme: Scheme, rows: int, features: int) -> dict[str, Tensor]:
    """The canonical weight tensors that :func:`_pack` packed, without loss."""
    codes = cast(Tensor, packed["packed"])
    device = codes.device
    canonical: dict[str, Tensor] = {}
    if scheme.weight_bits == 8:
        canonical["weight"] = unpack_w8(codes, rows, features)
    else:
        canonical["weight"] = torch.empty((rows, -(-features // 2)), dtype=torch.uint8, device=device)
        if device.type == "cpu":
            target = canonical["weight"].data_ptr()
            _C.unpack_w4(codes.data_ptr(), rows, features, target, _num_threads())
    for name, own in GROUPED.items():
        tensor = packed.get(own)
        if tensor is None:
            continue
        if scheme.weight_bits == 8:
            canonical[name] = tensor
            continue
        groups = _groups_of(own, scheme, features)
        single = scheme.weight_granularity == "per_channel" or _of_channels(own, scheme)
        shape = (rows,) if single else (rows, groups)
        canonical[name] = torch.empty(shape, dtype=tensor.dtype, device=device)
        if device.type == "cpu":
            target = canonical[name].data_ptr()
            _C.unpack_groups(tensor.data_ptr(), tensor.element_size(), rows, groups, target)
    return canonical


# -- the binding ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _native(
    addresses: tuple[int, ...],
    scale_code: int,
    act: tuple[float, int],
    function: int,
    scheme: Scheme,
    rows: int,
    features: int,
) -> Any:
    """The binding's object for these addresses (0: absent), in the order of ``PreparedPacked.names``."""
    packed, scale, zero_point, low, multiplier, _, bias, _, _, smooth = addresses
    group = scheme.resolve_group_size(features)
    if scheme.activation_bits:
        return _C.LinearW4A8(
            packed,
            scale,
            zero_point,
            low,
            multiplier,
            scale_code,
            bias,
            rows,
            features,
            group,
            scheme.activation_symmetric,
            *act,
            smooth,
            function,
        )
    if scheme.weight_bits == 8:
        return _C.LinearW8A16(packed, scale, bias, rows, features, smooth, function)
    book = 0 if scheme.codebook is None else codebook_tensor(scheme.codebook, _CPU).data_ptr()
    return _C.LinearW4A16(
        packed, scale, zero_point, low, scale_code, book, bias, rows, features, group, smooth, function
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class PreparedPacked(PackedLayer):
    """A layer whose weights lie in the packed layout of the CPU kernels; see the head of this file."""

    fuses = True

    @classmethod
    def objection(cls, scheme: Scheme, in_features: int, out_features: int, device: torch.device) -> str:
        """What keeps these kernels from a layer."""
        known = scheme.weight_bits == 4 or (scheme.weight_bits == 8 and scheme.weight_only)
        if not known or (scheme.codebook is not None and not scheme.weight_only):
            return f"no native kernel for scheme {scheme.name}"
        if scheme.weight_bits == 8 and scheme.weight_granularity != "per_channel":
            return f"no native kernel for group-wise 8-bit weights (scheme {scheme.name})"
        if device.type not in ("cpu", "meta"):
            return f"no native kernel for device {device.type}"
        if in_features == 0 or out_features == 0:
            return f"no native kernel for an empty weight [{out_features}, {in_features}]"
        return ""

    @classmethod
    def pack(cls, canonical: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> dict[str, Tensor]:
        """See the base class."""
        return _pack(canonical, scheme, in_features)

    def unpack(self) -> dict[str, Tensor]:
        """See the base class."""
        return _unpack(self.tensors, self.scheme, self.out_features, self.in_features)

    def __init__(
        self, tensors: Mapping[str, Any], scheme: Scheme, in_features: int, out_features: int, reason: str = ""
    ) -> None:
        super().__init__(tensors, scheme, in_features, out_features, reason)
        self.moved()

    @property
    def kernel(self) -> str:
        """The operation and the tier of instructions in use: ``"w4a8.avx2"``."""
        return f"{_op(self.scheme)}.{_C.info()['isa']}"

    def moved(self) -> None:
        """Forget the object that borrows addresses."""
        self._bound: tuple[Any, ...] = ()
        self._run: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: addresses mean nothing elsewhere."""
        return {**self.__dict__, "_bound": (), "_run": None}

    def _bind(self, now: tuple[Any, ...]) -> None:
        """An object for the addresses ``now``, where every tensor is what a kernel can read; else none."""
        self._bound, self._run = now, None
        resident = self.resident()
        packed = resident["packed"]
        plain = all(type(t) is Tensor and t.is_cpu and t.is_contiguous() for t in resident.values())
        if (
            not plain
            or packed.data_ptr() % ALIGNMENT
            or not _sizes_fit(resident, self.scheme, self.out_features, self.in_features)
        ):
            return  # the operator copies, or says what is wrong
        function = epilogue_code(self.epilogue)
        self._run = _bound_native(self.tensors, self.scheme, self.out_features, self.in_features, function).run

    def run(self, x: Tensor) -> Tensor:
        """See :meth:`Prepared.run`.  Plain eager calls go straight to the binding."""
        if is_plain(x) and x.is_cpu:
            # Written out, in the order of ``names``: this is a good part of what a call costs beside its kernel.
            tensors = self.tensors
            get = tensors.get
            static = get("act_scale")  # its value is part of the object, so it is looked at afresh
            now = (
                tensors["packed"].data_ptr(),
                tensors["packed_scale"].data_ptr(),
                0 if (t := get("packed_zero_point")) is None else t.data_ptr(),
                0 if (t := get("packed_min")) is None else t.data_ptr(),
                0 if (t := get("packed_multiplier")) is None else t.data_ptr(),
                0 if (t := get("bias")) is None else t.data_ptr(),
                0 if static is None else float(static),
                0 if (t := get("act_zero_point")) is None else int(t),
                0 if (t := get("inv_smooth")) is None else t.data_ptr(),
            )
            if now != self._bound:
                self._bind(now)
            code, shape, features, rows = _dtype_code(x.dtype), x.shape, self.in_features, self.out_features
            native = self._run
            if native is not None and code is not None and shape and shape[-1] == features and x.layout is _strided:
                if not x.is_contiguous():
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
            resident = self.resident()
            plain = all(type(t) is Tensor and t.is_cpu and t.is_contiguous() for t in resident.values())
            if plain and resident["packed"].data_ptr() % ALIGNMENT == 0:
                rows, features = self.out_features, self.in_features
                check_input(x, features, self.device)
                check_residual(residual, x, rows, x.dtype)
                native = _bound_native(self.tensors, self.scheme, rows, features, epilogue_code(self.epilogue))
                return run_native_plus(native, x, features, rows, x.dtype, residual)
        return self.around(x, residual)

    def load(self, canonical: Mapping[str, Tensor]) -> None:
        """Packs into the resident memory."""
        merged = {name: tensor.detach().to(self.device) for name, tensor in {**self.canonical(), **canonical}.items()}
        fresh = {**merged, **_pack(merged, self.scheme, self.in_features)}
        with torch.no_grad():
            for name, tensor in self.resident().items():
                tensor.copy_(fresh[name])
        self.moved()


def _sizes_fit(resident: Mapping[str, Tensor], scheme: Scheme, rows: int, features: int) -> bool:
    codes = _C.packed_w8_bytes(rows, features) if scheme.weight_bits == 8 else _C.packed_w4_bytes(rows, features)
    sizes = {"packed": codes, "bias": rows, "inv_smooth": features, "act_scale": 1, "act_zero_point": 1}
    if scheme.weight_bits == 8:
        sizes["packed_scale"] = rows
    else:
        sizes |= {own: _C.packed_group_elements(rows, _groups_of(own, scheme, features)) for own in GROUPED.values()}
    return all(tensor.numel() == sizes[name] for name, tensor in resident.items())


def _bound_native(
    tensors: Mapping[str, Tensor | None], scheme: Scheme, rows: int, features: int, function: int = 0
) -> Any:
    get = tensors.get
    scale, zero_point, codes = get("act_scale"), get("act_zero_point"), get("packed_scale")
    check_static(scale, zero_point)
    act = (0.0 if scale is None else float(scale), 0 if zero_point is None else int(zero_point))
    addresses = tuple(_address(get(name)) for name in PreparedPacked.names)
    code = 0 if codes is None else DTYPE_CODES[codes.dtype]
    return _native(addresses, code, act, function, scheme, rows, features)


# -- operators ------------------------------------------------------------------------------------------------------


def _linear_packed(
    x: Tensor,
    packed: Tensor,
    packed_scale: Tensor,
    packed_zero_point: Tensor | None,
    packed_min: Tensor | None,
    packed_multiplier: Tensor | None,
    packed_sum: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    inv_smooth: Tensor | None,
    scheme: str,
    N: int,
    K: int,
    out_dtype: torch.dtype | None,
    residual: Tensor | None = None,
) -> Tensor:
    check_input(x, K, packed.device, "x")
    check_out_dtype(out_dtype)
    rule = scheme_from_key(scheme)
    if N < 1 or K < 1 or (not rule.weight_only and K > MAX_INTEGER_K):
        raise ValueError(
            f"N, K: expected N >= 1, K >= 1 and, with int8 activations, K <= {MAX_INTEGER_K}, got {N}, {K}"
        )
    given = dict(
        zip(
            PreparedPacked.names,
            (
                packed,
                packed_scale,
                packed_zero_point,
                packed_min,
                packed_multiplier,
                packed_sum,
                bias,
                act_scale,
                act_zero_point,
                inv_smooth,
            ),
            strict=True,
        )
    )
    tensors = {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_multiplier(present, rule, torch.uint8)
    check_sum(present, rule, False)  # the kernels work them out
    if not _sizes_fit(present, rule, N, K):
        sizes = ", ".join(f"{name} {tensor.numel()}" for name, tensor in present.items())
        raise ValueError(f"packed: expected tensors of a [{N}, {K}] layer of scheme {rule.name}, got elements {sizes}")
    if present["packed"].data_ptr() % ALIGNMENT:
        tensors["packed"] = present["packed"].clone()
    native = _bound_native(tensors, rule, N, K)
    if residual is None:
        return run_native(native.run, x, K, N, out_dtype or x.dtype)
    check_residual(residual, x, N, out_dtype or x.dtype)
    return run_native_plus(native, x, K, N, out_dtype or x.dtype, residual)


def _linear_packed_fake(x: Tensor, *rest: Any) -> Tensor:
    N, K, out_dtype = rest[11:14]
    check_features(x, K, "x")
    check_out_dtype(out_dtype)
    if len(rest) > 14 and rest[14] is not None:
        check_residual(rest[14], x, N, out_dtype or x.dtype)
    return x.new_empty((*x.shape[:-1], N), dtype=out_dtype or x.dtype)


def _dequantize_packed(
    packed: Tensor,
    packed_scale: Tensor,
    packed_zero_point: Tensor | None,
    packed_min: Tensor | None,
    packed_multiplier: Tensor | None,
    inv_smooth: Tensor | None,
    scheme: str,
    N: int,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    rule = scheme_from_key(scheme)
    given = (packed, packed_scale, packed_zero_point, packed_min, packed_multiplier)
    tensors = _unpack(dict(zip(PreparedPacked.names, given, strict=False)), rule, N, K)
    if inv_smooth is not None:
        tensors["inv_smooth"] = inv_smooth
    return effective_weight(tensors, rule, K, dtype).contiguous()


def _dequantize_packed_fake(packed: Tensor, *rest: Any) -> Tensor:
    N, K, dtype = rest[-3:]
    return packed.new_empty((N, K), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero_point, low, multiplier, *_, smooth, scheme, rows, features, _, residual = inputs
    ctx.save_for_backward(packed, scale, zero_point, low, multiplier, smooth)
    ctx.layer, ctx.dtype, ctx.has_residual = (scheme, rows, features), x.dtype, residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.qkernels.dequantize_packed(*ctx.saved_tensors, *ctx.layer, torch.float32)
    return (input_gradient(grad, weight, ctx.dtype), *(None,) * 14, grad if ctx.has_residual else None)


def register_operators(library: torch.library.Library) -> None:
    """Define ``torch.ops.qkernels.linear_packed`` and ``dequantize_packed``."""
    packed = (
        "Tensor packed, Tensor packed_scale, Tensor? packed_zero_point, Tensor? packed_min, Tensor? packed_multiplier"
    )
    library.define(
        f"linear_packed(Tensor x, {packed}, Tensor? packed_sum, Tensor? bias, Tensor? act_scale, "
        "Tensor? act_zero_point, Tensor? inv_smooth, str scheme, int N, int K, ScalarType? out_dtype, "
        "Tensor? residual=None) -> Tensor"
    )
    library.define(
        f"dequantize_packed({packed}, Tensor? inv_smooth, str scheme, int N, int K, ScalarType dtype) -> Tensor"
    )
    library.impl("linear_packed", _linear_packed, "CPU")
    library.impl("dequantize_packed", _dequantize_packed, "CPU")
    torch.library.register_fake("qkernels::linear_packed", _linear_packed_fake, lib=library)
    torch.library.register_fake("qkernels::dequantize_packed", _dequantize_packed_fake, lib=library)
    register_rules(library, "linear_packed", backward=_backward, setup=_setup, vmap=vmap_rows("linear_packed"))
