"""The weight half of the reference: grids for weights, rounding to them, and back.

Algorithms that choose better integers (or better grids) build on the same three steps: :func:`weight_grid`
measures, :func:`round_to_grid` rounds, :func:`weight_codes` stores; :func:`quantize_weight` is all three.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels import _rounding as rounding
from qkernels.scheme import Scheme


@torch.no_grad()
def quantize_weight(w: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Round-to-nearest quantization of a weight.

    Args:
        w: float32, bfloat16 or float16 ``[N, K]``.
        scheme: bits, granularity and kind of grid; its activation fields do not matter here.

    Returns:
        ``weight``, ``weight_scale`` and, for asymmetric schemes, ``weight_zero_point`` or ``weight_min``: contiguous,
        in the canonical layout.  Group scales are float32 where float16 would overflow or go subnormal.

    Raises:
        TypeError: not a floating-point tensor of those dtypes.
        ValueError: not two-dimensional, or a NaN or Inf in it.
    """
    wide = _check_float_weight(w)
    if scheme.weight_bits == 8 and scheme.weight_granularity == "per_channel":
        # The one grid whose factor is 127 / absmax, not the reciprocal of the stored scale.
        grid = rounding.symmetric_grid(wide, bits=8)
        return {
            "weight": rounding.to_integers(wide, grid, low=-127, high=127).to(torch.int8),
            "weight_scale": grid.scale,
        }
    tensors = weight_grid(wide, scheme)
    return {"weight": weight_codes(round_to_grid(wide, tensors, scheme), scheme), **tensors}


@torch.no_grad()
def weight_grid(w: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The grid of a weight ``[N, K]``: ``weight_scale`` and, where the scheme has one, ``weight_zero_point`` or
    ``weight_min``, in their storage dtypes.

    With hi and lo the bounds of a group, absmax its largest magnitude, each rounded to the storage dtype before
    anything is computed from it:

        symmetric           scale = absmax / 127, / 7, / 3, / 1 for 8, 4, 3, 2 bits
        code book           scale = absmax / max|codebook|
        integer zero point  zero inside the range; scale = (hi - lo) / top; zero_point = clamp(rne(-lo / scale), 0, top)
        float minimum       scale = (hi - lo) / top; minimum = lo

    with top = 15, 7, 3 for 4, 3, 2 bits.  With ``group_scales="int"`` these scales become multiples of one per channel
    (:func:`integer_scales`), of which zero points are computed (:func:`centred_zero`), and ``weight_multiplier`` uint8
    ``[N, G]`` comes too.

    A symmetric group with absmax < 2**-100, or another one whose 1 / scale is not finite, gets scale 1.

    Raises:
        TypeError, ValueError: as :func:`quantize_weight`; ValueError also if hi - lo overflows float32.
    """
    wide = _check_float_weight(w)
    group_size = scheme.resolve_group_size(wide.shape[1])
    per_channel = scheme.weight_granularity == "per_channel"

    def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
        return (values.squeeze(1) if per_channel else values).to(dtype).contiguous()

    requested = torch.float32 if scheme.scale_dtype is None else scheme.scale_dtype
    if scheme.weight_symmetric:
        groups = _groups(wide, scheme, group_size)
        if scheme.codebook is None:
            measured = rounding.symmetric_grid(groups, bits=scheme.weight_bits)
            if scheme.group_scales == "int":
                return integer_scales(measured.scale, measured.live, scheme)
            scale = measured.scale
        else:
            absmax = groups.abs().amax(-1) if groups.shape[-1] else groups.new_zeros(groups.shape[:-1])
            largest = max(abs(value) for value in scheme.codebook)
            scale = torch.where(absmax < rounding.TINY, torch.ones_like(absmax), rounding.divide(absmax, largest))
            _check_overflow(scale)
        return {"weight_scale": stored(scale, rounding.storage_dtype(requested, scale))}

    groups = _groups(wide, scheme, group_size, replicate=scheme.weight_zero == "float")
    if groups.shape[-1]:
        hi, lo = groups.amax(-1), groups.amin(-1)
    else:
        hi = lo = groups.new_zeros(groups.shape[:-1])
    if scheme.weight_zero == "int":
        hi, lo = hi.clamp(min=0.0), lo.clamp(max=0.0)
    scale = rounding.asymmetric_scale(hi, lo, bits=scheme.weight_bits)
    _check_overflow(scale)
    live = torch.isfinite(rounding.quotient(1.0, scale))
    if scheme.group_scales == "int":
        tensors = integer_scales(scale, live, scheme)
        return {**tensors, "weight_zero_point": centred_zero(hi, lo, group_scale(tensors), scheme)}
    scale = torch.where(live, scale, torch.ones_like(scale))
    if scheme.weight_zero == "float":
        dtype = rounding.storage_dtype(requested, scale, lo)
        return {"weight_scale": stored(scale, dtype), "weight_min": stored(lo, dtype)}
    dtype = rounding.storage_dtype(requested, scale)
    grid = rounding.asymmetric_grid(groups, bits=scheme.weight_bits, measured=scale.to(dtype).to(torch.float32))
    zeros = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point
    return {"weight_scale": stored(scale, dtype), "weight_zero_point": stored(zeros, torch.uint8)}


@torch.no_grad()
def integer_scales(
    scale: Tensor, live: Tensor, scheme: Scheme, channel_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Scales of groups as whole multiples of one scale per channel.

        weight_scale = max over groups of scale / top
        weight_multiplier = clamp(rne(scale / weight_scale), 1, top)

    with top = ``scheme.largest_multiplier``; each quotient rounded once.  Groups that are not live (all zeros) count
    for nothing and get 1; a channel of such groups has scale 1.

    Args:
        scale: float32 ``[N, G]``, positive where live. live: bool ``[N, G]``.
        channel_scale: ``weight_scale [N]``, where it is given already.

    Returns:
        ``weight_scale`` float32 ``[N]`` and ``weight_multiplier`` uint8 ``[N, G]``.
    """
    top = scheme.largest_multiplier
    wide = torch.where(live, scale.to(torch.float32), torch.zeros_like(scale, dtype=torch.float32))
    if channel_scale is None:
        largest = wide.amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
        base = rounding.divide(largest, float(top))
        # As small as that only where the weights are: nothing is left of a quotient by it.
        base = torch.where(torch.isfinite(rounding.quotient(1.0, base)), base, torch.ones_like(base))
    else:
        base = channel_scale
    multiplier = torch.round(wide / base.unsqueeze(1)).clamp(1.0, float(top))
    return {"weight_scale": base.contiguous(), "weight_multiplier": multiplier.to(torch.uint8).contiguous()}


@torch.no_grad()
def integer_grid(
    w: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme, channel_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """A grid of ``w [N, K]`` whose groups have float scales, with scales that are whole multiples of their channel's.

    Zero points are chosen again, for the range that the float grid covers.

    Args:
        tensors: ``weight_scale`` float ``[N, G]``, and ``weight_zero_point`` of an asymmetric grid.
        scheme: one of ``group_scales="int"``. channel_scale: as for :func:`integer_scales`.

    Returns:
        What :func:`weight_grid` returns.
    """
    groups = rounding.split_groups(rounding.widen(w, "w"), scheme.resolve_group_size(w.shape[1]))
    measured = rounding.symmetric_grid if scheme.weight_symmetric else rounding.asymmetric_grid
    before = tensors["weight_scale"].to(torch.float32)
    made = integer_scales(before, measured(groups, bits=scheme.weight_bits).live, scheme, channel_scale)
    if "weight_zero_point" in tensors:
        zero, top = tensors["weight_zero_point"].to(torch.float32), scheme.code_range[1]
        made["weight_zero_point"] = centred_zero((top - zero) * before, -zero * before, group_scale(made), scheme)
    return made


def centred_zero(hi: Tensor, lo: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Zero points that put the middle of the codes next to the middle of a range, uint8, shaped as ``hi``.

        clamp(rne(top / 2 - (hi + lo) / 2 / scale), 0, top)        with top = 15

    each step rounded once.  Where scale is ``(hi - lo) / top`` that is ``-lo / scale``; a multiple of the channel's
    scale is a little wider or narrower, and what it covers too much or too little is shared out between both ends.
    """
    top = float(scheme.code_range[1])
    return torch.round(top / 2 - (hi + lo) / 2 / scale).clamp(0.0, top).to(torch.uint8).contiguous()


def group_scale(tensors: Mapping[str, Tensor]) -> Tensor:
    """The scales that weights are rounded with, in float32: ``[N]``, or ``[N, G]`` where groups have their own."""
    scale, multiplier = tensors["weight_scale"].to(torch.float32), tensors.get("weight_multiplier")
    return scale if multiplier is None else scale.unsqueeze(1) * multiplier.to(torch.float32)


@torch.no_grad()
def round_to_grid(w: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The codes of ``w [N, K]`` on a grid that :func:`weight_grid` (or anybody) made: int32 ``[N, K]``.

    symmetric      q = clamp(rne(w * inv) + zero)      with inv = 1 / group_scale, zero = scheme.zero_code
    zero point     q = clamp(rne(w * inv) + weight_zero_point)
    float minimum  q = clamp(rne((w - weight_min) * inv))
    code book      q = the entry nearest to w * inv, the first of equals
    """
    wide = rounding.widen(w, "w")
    scale = group_scale(tensors)
    group_size = scheme.resolve_group_size(wide.shape[1]) if scale.dim() == 2 else None
    groups = widen_groups(wide, scale, group_size)

    def column(name: str) -> Tensor:
        return tensors[name].to(torch.float32).reshape(*groups.shape[:2], 1)

    inv = rounding.quotient(1.0, scale.reshape(*groups.shape[:2], 1))
    low, high = scheme.code_range
    if scheme.codebook is not None:
        codes = _nearest(groups * inv, scheme.codebook)
    elif scheme.weight_symmetric:
        codes = (torch.round(groups * inv) + scheme.zero_code).clamp(low, high)
    elif scheme.weight_zero == "int":
        codes = (torch.round(groups * inv) + column("weight_zero_point")).clamp(low, high)
    else:
        codes = torch.round((groups - column("weight_min")) * inv).clamp(low, high)
    return rounding.join_groups(codes, wide.shape[1]).to(torch.int32)


def weight_codes(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes ``[N, K]`` as ``weight`` stores them: int8, or uint8 with two, 8/3 or four per byte."""
    if scheme.weight_bits == 8:
        return codes.to(torch.int8).contiguous()
    return rounding.pack_codes(codes.to(torch.uint8), scheme.weight_bits).contiguous()


@torch.no_grad()
def dequantize_weight(
    tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight ``[N, in_features]`` that a quantized Linear stands for.

    ``scale * (q - zero_point)`` (zero_point 0, 8, 4, 2 for symmetric 8, 4, 3, 2 bits), ``scale * q + minimum``
    (product rounded, then sum) or ``scale * codebook[q]``, in float32, then one cast; with ``group_scales="int"``
    ``scale * (multiplier * (q - zero_point))``, of which the part in brackets is a whole number.

    Raises:
        TypeError: ``dtype`` is not float32, bfloat16 or float16.
        ValueError: shapes that do not fit ``in_features``.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    width = scheme.code_bytes(in_features)
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight: expected shape [N, {width}], got {list(weight.shape)}")
    if scheme.group_scales == "int":
        values = multiplied_codes(tensors, scheme, in_features).to(torch.float32) * scale.to(torch.float32).unsqueeze(1)
        return values.to(rounding.check_dtype(dtype, "dtype")).contiguous()
    codes = weight if scheme.weight_bits == 8 else rounding.unpack_codes(weight, scheme.weight_bits, in_features)
    group_size = scheme.resolve_group_size(in_features) if scale.dim() == 2 else None
    groups = widen_groups(codes.to(torch.int32), scale, group_size)

    def column(name: str) -> Tensor:
        return tensors[name].to(groups.device).reshape(*groups.shape[:2], 1)

    wide_scale = column("weight_scale").to(torch.float32)
    if scheme.codebook is not None:
        table = torch.tensor(scheme.codebook, dtype=torch.float32, device=weight.device)
        values = table[groups] * wide_scale
    elif scheme.weight_symmetric:
        values = (groups - scheme.zero_code).to(torch.float32) * wide_scale
    elif scheme.weight_zero == "int":
        values = (groups - column("weight_zero_point").to(torch.int32)).to(torch.float32) * wide_scale
    else:
        values = groups.to(torch.float32) * wide_scale + column("weight_min").to(torch.float32)
    return rounding.join_groups(values, in_features).to(rounding.check_dtype(dtype, "dtype")).contiguous()


def multiplied_codes(tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> Tensor:
    """``multiplier * (q - zero_point)``, int8 ``[N, in_features]``: weights of ``group_scales="int"`` as 8-bit ones."""
    multiplier, zero = tensors["weight_multiplier"], tensors.get("weight_zero_point")
    codes = rounding.unpack_codes(tensors["weight"], scheme.weight_bits, in_features).to(torch.int16)
    groups = widen_groups(codes, multiplier, scheme.resolve_group_size(in_features))
    groups = groups - (scheme.zero_code if zero is None else zero.to(torch.int16).unsqueeze(-1))
    return rounding.join_groups(groups * multiplier.to(torch.int16).unsqueeze(-1), in_features).to(torch.int8)


def widen_groups(x: Tensor, weight_scale: Tensor, group_size: int | None) -> Tensor:
    """``[..., K] -> [..., G, group]`` as ``weight_scale`` has it: ``[N]`` is one group of all, ``[N, G]`` needs a size.

    Raises:
        ValueError: ``group_size`` missing, or G does not fit.
    """
    if weight_scale.dim() == 1:
        return x.unsqueeze(-2)
    if weight_scale.dim() != 2:
        raise ValueError(f"weight_scale: expected shape [N] or [N, G], got {list(weight_scale.shape)}")
    if group_size is None or group_size < 1:
        raise ValueError(f"group_size: expected >= 1 with weight_scale {list(weight_scale.shape)}, got {group_size}")
    groups = rounding.split_groups(x, group_size)
    if groups.shape[-2] != weight_scale.shape[1]:
        expected = f"[N, {groups.shape[-2]}] for {x.shape[-1]} features in groups of {group_size}"
        raise ValueError(f"weight_scale: expected shape {expected}, got {list(weight_scale.shape)}")
    return groups


def _groups(w: Tensor, scheme: Scheme, group_size: int, *, replicate: bool = False) -> Tensor:
    if scheme.weight_granularity == "per_channel":
        return w.unsqueeze(1)
    return rounding.split_groups(w, group_size, replicate=replicate)


def _nearest(values: Tensor, codebook: tuple[float, ...]) -> Tensor:
    best = torch.zeros_like(values)
    distance = torch.full_like(values, torch.inf)
    for index, entry in enumerate(codebook):
        candidate = (values - entry).abs()
        closer = candidate < distance
        distance = torch.where(closer, candidate, distance)
        best = torch.where(closer, torch.full_like(best, index), best)
    return best


def _check_float_weight(w: Tensor) -> Tensor:
    wide = rounding.widen(w, "weight")
    if wide.dim() != 2:
        raise ValueError(f"weight: expected two dimensions [N, K], got shape {list(wide.shape)}")
    if not rounding.all_finite(wide):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    return wide


def _check_overflow(scale: Tensor) -> None:
    if not rounding.all_finite(scale):
        raise ValueError("weight: expected a range (max - min) below the float32 maximum, got one that overflows")
