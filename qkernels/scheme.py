"""What a quantized Linear looks like: one frozen, validated description.

A :class:`Scheme` says how the weight is stored (bits, granularity, group size, symmetric or not, dtype of
the scales, code book) and how the activations enter the product (8 bits or left in floating point, per token
or per tensor, dynamic or static).  The short names (``"w8a8"``, ``"w4a16"`` and the others of :data:`PRESETS`) are
presets of it; there is no other configuration object.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["MAX_INTEGER_K", "PRESETS", "Scheme"]

MAX_INTEGER_K = 65_536
"""Largest K whose int32 accumulation is exact: 65,536 * 255 * 128 < 2**31."""

AUTO_GROUP_SIZES = (128, 64, 32)
"""``group_size="auto"`` is the first of these that divides K, else the first with a short last group."""

_SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


@dataclass(frozen=True)
class Scheme:
    """How one Linear is quantized.  Frozen and hashable; two schemes that mean the same compare equal.

    Fields:
        weight_bits: 8 (int8, -127..127), 4 (0..15, two per byte), 3 (0..7, eight in three bytes) or 2 (0..3, four
            per byte).  No kernel serves 3 and 2 bits: the pure-torch reference does.
        weight_granularity: "per_channel" (one scale per output row) or "per_group" (one per ``group_size``
            consecutive input features of a row).
        group_size: per_group only.  A positive multiple of 8, or "auto" (also what None becomes): the largest
            of 128, 64, 32 that divides K, else 128 with a short last group.
        weight_symmetric: False needs weights of 4 bits or fewer; zero is then inside the range of every group for
            ``weight_zero="int"``.
        weight_zero: "int" (``w ~ scale * (q - zero_point)``) or "float" (``w ~ scale * q + minimum``).
        scale_dtype: dtype the scales are stored in.  None becomes float32 per channel, float16 per group.
            A layer whose group scales would overflow or go subnormal in float16 stores float32 instead.
        codebook: 16 finite values: ``w ~ scale * codebook[q]`` (4 bits, symmetric, weight only).
        group_scales: "float", or "int": the scale of a group is a whole multiple of its channel's, ``weight_scale *
            weight_multiplier``, so that the products of all groups add up as integers, as those of 8-bit weights do
            (4 bits, per_group, integer zero points, 8-bit activations).
        activation_bits: 8, or None for weight-only quantization.
        activation_granularity: "per_token" (dynamic) or "per_tensor" (static).
        activation_dynamic: True: ranges are measured in every call; False: given once, by calibration.
        activation_symmetric: int8 around zero, or uint8 with a zero point.

    Raises:
        ValueError: a value, or a combination of values, that has no meaning; the message names the field.
        TypeError: a field of the wrong type.
    """

    weight_bits: int = 8
    weight_granularity: str = "per_channel"
    group_size: int | str | None = None
    weight_symmetric: bool = True
    weight_zero: str = "int"
    scale_dtype: torch.dtype | None = None
    codebook: tuple[float, ...] | None = None
    group_scales: str = "float"
    activation_bits: int | None = 8
    activation_granularity: str = "per_token"
    activation_dynamic: bool = True
    activation_symmetric: bool = True

    def __post_init__(self) -> None:
        _check_choice("weight_bits", self.weight_bits, (8, 4, 3, 2))
        _check_choice("weight_granularity", self.weight_granularity, ("per_channel", "per_group"))
        _check_choice("weight_zero", self.weight_zero, ("int", "float"))
        _check_choice("group_scales", self.group_scales, ("float", "int"))
        _check_choice("activation_bits", self.activation_bits, (8, None))
        _check_choice("activation_granularity", self.activation_granularity, ("per_token", "per_tensor"))
        for name in ("weight_symmetric", "activation_dynamic", "activation_symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        self._check_group_size()
        self._check_scale_dtype()
        self._check_codebook()
        self._check_combination()

    def _check_group_size(self) -> None:
        size = self.group_size
        if self.weight_granularity == "per_channel":
            if size is not None:
                raise ValueError(f"group_size: expected None with weight_granularity='per_channel', got {size!r}")
            return
        if size is None:
            object.__setattr__(self, "group_size", "auto")
            return
        if isinstance(size, str):
            if size != "auto":
                raise ValueError(f"group_size: expected a positive multiple of 8 or 'auto', got {size!r}")
            return
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"group_size: expected an int, 'auto' or None, got {size!r}")
        if size < 8 or size % 8:
            raise ValueError(f"group_size: expected a positive multiple of 8 or 'auto', got {size}")

    def _check_scale_dtype(self) -> None:
        of_groups = self.weight_granularity == "per_group" and self.group_scales == "float"
        if self.scale_dtype is None:
            object.__setattr__(self, "scale_dtype", torch.float16 if of_groups else torch.float32)
            return
        if not isinstance(self.scale_dtype, torch.dtype):
            raise TypeError(f"scale_dtype: expected a torch.dtype, got {self.scale_dtype!r}")
        allowed = (torch.float16, torch.float32) if of_groups else (torch.float32,)
        if self.scale_dtype not in allowed:
            listed = " or ".join(str(dtype) for dtype in allowed)
            kind = self.weight_granularity if self.group_scales == "float" else "group_scales='int'"
            raise ValueError(f"scale_dtype: expected {listed} with {kind}, got {self.scale_dtype}")

    def _check_codebook(self) -> None:
        if self.codebook is None:
            return
        if isinstance(self.codebook, (str, bytes)):
            raise TypeError(f"codebook: expected 16 numbers, got {self.codebook!r}")
        try:
            entries = tuple(float(value) for value in self.codebook)
        except (TypeError, ValueError) as error:
            raise TypeError(f"codebook: expected 16 numbers, got {self.codebook!r}") from error
        if len(entries) != 16:
            raise ValueError(f"codebook: expected 16 entries, got {len(entries)}")
        if not all(math.isfinite(value) for value in entries) or not any(entries):
            raise ValueError(f"codebook: expected finite entries, not all zero, got {entries}")
        object.__setattr__(self, "codebook", entries)
        if self.weight_bits != 4 or not self.weight_symmetric or self.activation_bits is not None:
            raise ValueError(
                "codebook: expected weight_bits=4, weight_symmetric=True and activation_bits=None with it, got "
                f"weight_bits={self.weight_bits}, weight_symmetric={self.weight_symmetric}, "
                f"activation_bits={self.activation_bits}"
            )

    def _check_combination(self) -> None:
        if self.weight_bits == 8 and not self.weight_symmetric:
            raise ValueError("weight_symmetric: expected True with weight_bits=8, got False")
        if self.weight_symmetric and self.weight_zero != "int":
            raise ValueError(f"weight_zero: expected 'int' with weight_symmetric=True, got {self.weight_zero!r}")
        if self.group_scales == "int":
            for name, wanted in (
                ("weight_bits", 4),
                ("weight_granularity", "per_group"),
                ("weight_zero", "int"),
                ("codebook", None),
                ("activation_bits", 8),
            ):
                if getattr(self, name) != wanted:
                    raise ValueError(
                        f"{name}: expected {wanted!r} with group_scales='int', got {getattr(self, name)!r}"
                    )
        if self.activation_bits is None:
            for name, default in (
                ("activation_granularity", "per_token"),
                ("activation_dynamic", True),
                ("activation_symmetric", True),
            ):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: has no meaning with activation_bits=None, got {getattr(self, name)!r}")
        elif self.activation_dynamic != (self.activation_granularity == "per_token"):
            raise ValueError(
                "activation_granularity: expected 'per_token' with activation_dynamic=True or 'per_tensor' with "
                f"activation_dynamic=False, got {self.activation_granularity!r} with {self.activation_dynamic}"
            )

    # -- names ------------------------------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str) -> Scheme:
        """The scheme a short name stands for.

        Raises:
            TypeError: ``name`` is not a string.
            ValueError: no such preset; the message lists them.
        """
        if not isinstance(name, str):
            raise TypeError(f"scheme: expected the name of a preset, got {type(name).__name__}")
        if name not in PRESETS:
            raise ValueError(f"scheme: expected one of {', '.join(sorted(PRESETS))}, got {name!r}")
        return PRESETS[name]

    @classmethod
    def resolve(cls, scheme: str | Scheme) -> Scheme:
        """A preset's name or a Scheme, as a Scheme.  Raises as :meth:`from_preset` does."""
        if isinstance(scheme, Scheme):
            return scheme
        if not isinstance(scheme, str):
            raise TypeError(f"scheme: expected a Scheme or the name of a preset, got {type(scheme).__name__}")
        return cls.from_preset(scheme)

    @property
    def name(self) -> str:
        """The preset's name where one matches, else its name with what differs appended: "w4a16_g64_asym"."""
        for preset, scheme in PRESETS.items():
            if scheme == self:
                return preset
        parts = [f"w{self.weight_bits}a{16 if self.activation_bits is None else self.activation_bits}"]
        if not self.activation_dynamic:
            parts.append("static")
        if not self.activation_symmetric:
            parts.append("asymact")
        if self.weight_granularity == "per_group":
            parts.append("gauto" if self.group_size == "auto" else f"g{self.group_size}")
            if self.group_scales == "int":
                parts.append("intscale")
            elif self.scale_dtype == torch.float32:
                parts.append("fp32scale")
        elif self.weight_bits < 8:
            parts.append("perchannel")
        if not self.weight_symmetric:
            parts.append("asym" if self.weight_zero == "int" else "min")
        if self.codebook is not None:
            parts.append("codebook")
        return "_".join(parts)

    # -- what follows from the fields -------------------------------------------------------------------------

    @property
    def weight_only(self) -> bool:
        """True where activations stay in floating point."""
        return self.activation_bits is None

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code that rounding a weight gives."""
        return (-127, 127) if self.weight_bits == 8 else (0, 2**self.weight_bits - 1)

    @property
    def zero_code(self) -> int:
        """The code of zero in a grid around zero: 0 for 8 bits, else the middle of the codes, rounded up."""
        return 0 if self.weight_bits == 8 else 2 ** (self.weight_bits - 1)

    @property
    def largest_multiplier(self) -> int:
        """The largest multiplier of ``group_scales="int"``: times any code less its zero point it is a signed byte."""
        return 127 // (self.zero_code if self.weight_symmetric else self.code_range[1])

    @property
    def searched(self) -> Scheme:
        """The scheme in which scales are searched for: group_scales="int" comes out of float scales."""
        return self if self.group_scales == "float" else self.replace(group_scales="float", scale_dtype=torch.float32)

    def code_bytes(self, in_features: int) -> int:
        """Bytes of the codes of one row of ``in_features`` weights, as they are stored."""
        return -(-in_features * self.weight_bits // 8)

    def resolve_group_size(self, in_features: int) -> int:
        """Input features that share one scale, for a layer of ``in_features`` (per channel: all, at least 1).

        Raises:
            ValueError: ``in_features`` is negative.
        """
        if in_features < 0:
            raise ValueError(f"in_features: expected >= 0, got {in_features}")
        if self.weight_granularity == "per_channel":
            return max(in_features, 1)
        if isinstance(self.group_size, int):
            return self.group_size
        return next((size for size in AUTO_GROUP_SIZES if in_features % size == 0), AUTO_GROUP_SIZES[0])

    def replace(self, **changes: Any) -> Scheme:
        """A copy with some fields changed, validated again (``dataclasses.replace``)."""
        return dataclasses.replace(self, **changes)

    # -- JSON -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; :meth:`from_dict` gives back an equal scheme."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["scale_dtype"] = str(self.scale_dtype).removeprefix("torch.")
        values["codebook"] = None if self.codebook is None else list(self.codebook)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scheme:
        """The scheme :meth:`to_dict` described; keys that are left out keep their defaults.

        Raises:
            TypeError: ``values`` is not a mapping, or a value has the wrong type.
            ValueError: an unknown key or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"scheme: expected a mapping, got {type(values).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in values if key not in names)
        if unknown:
            raise ValueError(f"scheme: unknown keys {', '.join(unknown)}; expected some of {', '.join(names)}")
        arguments = dict(values)
        dtype = arguments.get("scale_dtype")
        if isinstance(dtype, str):
            if dtype not in _SCALE_DTYPES:
                raise ValueError(f"scale_dtype: expected one of {', '.join(_SCALE_DTYPES)}, got {dtype!r}")
            arguments["scale_dtype"] = _SCALE_DTYPES[dtype]
        codebook = arguments.get("codebook")
        if isinstance(codebook, list):
            arguments["codebook"] = tuple(codebook)
        return cls(**arguments)


PRESETS: dict[str, Scheme] = {
    "w8a8": Scheme(),
    "w8a8_static": Scheme(activation_granularity="per_tensor", activation_dynamic=False),
    "w8a16": Scheme(activation_bits=None),
    "w4a8": Scheme(weight_bits=4, weight_granularity="per_group", group_size="auto"),
    "w4a8_intscale": Scheme(weight_bits=4, weight_granularity="per_group", group_size="auto", group_scales="int"),
    "w4a16": Scheme(weight_bits=4, weight_granularity="per_group", group_size="auto", activation_bits=None),
    "w3a16": Scheme(weight_bits=3, weight_granularity="per_group", group_size="auto", activation_bits=None),
    "w2a16": Scheme(weight_bits=2, weight_granularity="per_group", group_size="auto", activation_bits=None),
}
"""Short names.  Every one of them is an ordinary Scheme."""
