"""Which values of a tensor share a scale, and which integers they become: the geometry of ``qk.quantize``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels._rounding import pack_nibbles, unpack_nibbles

GRANULARITIES = ("tensor", "channel", "token", "group")


@dataclass(frozen=True)
class Layout:
    """How a tensor of ``shape`` is quantized.  Validated; ``axis`` is stored counted from the front.

    granularity    values that share one scale                      shape of scale and zero_point
    "tensor"       all                                              []
    "channel"      one index of ``axis``                            [shape[axis]]
    "token"        one line along ``axis``                          shape without ``axis``
    "group"        ``group_size`` neighbours along ``axis``         shape, ceil(shape[axis] / group_size) at ``axis``

    bits  signed  symmetric   stored as            codes            zero is
    8     yes     yes         int8                 -127..127        0
    8     no      yes         uint8                1..255           128
    8     yes     no          int8                 -128..127        zero_point
    8     no      no          uint8                0..255           zero_point
    4     -       yes         uint8, two a byte    0..15            8
    4     -       no          uint8, two a byte    0..15            zero_point

    4-bit codes are packed along the last dimension, low nibble first; ``signed`` does not apply to them and is
    stored as False.
    """

    shape: tuple[int, ...]
    bits: int = 8
    signed: bool = True
    granularity: str = "token"
    axis: int | None = -1
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (8, 4):
            raise ValueError(f"bits: expected 8 or 4, got {self.bits!r}")
        for name in ("signed", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {self.granularity!r}")
        if self.bits == 4:
            object.__setattr__(self, "signed", False)
        object.__setattr__(self, "shape", tuple(self.shape))
        self._check_axis()
        self._check_group_size()

    def _check_axis(self) -> None:
        if self.granularity == "tensor":
            object.__setattr__(self, "axis", None)
            return
        axis, dims = self.axis, len(self.shape)
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"axis: expected an int, got {axis!r}")
        if not dims:
            raise ValueError(
                f"granularity: expected 'tensor' for a tensor without dimensions, got {self.granularity!r}"
            )
        if not -dims <= axis < dims:
            raise ValueError(f"axis: expected {-dims}..{dims - 1} for shape {list(self.shape)}, got {axis}")
        object.__setattr__(self, "axis", axis % dims)

    def _check_group_size(self) -> None:
        size = self.group_size
        if self.granularity != "group":
            if size is not None:
                raise ValueError(f"group_size: expected None with granularity={self.granularity!r}, got {size!r}")
            return
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"group_size: expected an int with granularity='group', got {size!r}")
        if size < 1:
            raise ValueError(f"group_size: expected >= 1, got {size}")

    # -- integers ---------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored codes."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of the stored codes; 4 bits halve the last dimension, rounded up."""
        if self.bits == 8:
            return self.shape
        return (*self.shape[:-1], (self.shape[-1] + 1) // 2) if self.shape else (1,)

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self.bits == 4:
            return 0, 15
        if self.symmetric:
            return (-127, 127) if self.signed else (1, 255)
        return (-128, 127) if self.signed else (0, 255)

    @property
    def zero(self) -> int:
        """The code of zero in a symmetric layout."""
        return 8 if self.bits == 4 else 0 if self.signed else 128

    def store(self, codes: Tensor) -> Tensor:
        """Codes (any integer dtype, shape ``shape``) as they are kept."""
        codes = codes.to(self.dtype)
        if self.bits == 8:
            return codes
        return pack_nibbles(codes if self.shape else codes.reshape(1))

    def load(self, data: Tensor) -> Tensor:
        """Inverse of :meth:`store`: codes in int32, shape ``shape``."""
        if self.bits == 4:
            data = unpack_nibbles(data, self.shape[-1] if self.shape else 1)
        return data.reshape(self.shape).to(torch.int32)

    # -- granules ---------------------------------------------------------------------------------------------

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of scale and zero_point."""
        if self.axis is None:
            return ()
        if self.granularity == "channel":
            return (self.shape[self.axis],)
        before, size, after = self.shape[: self.axis], self.shape[self.axis], self.shape[self.axis + 1 :]
        if self.granularity == "token":
            return (*before, *after)
        return (*before, -(-size // self._group), *after)

    @property
    def _group(self) -> int:
        return self.group_size or 1

    def split(self, x: Tensor) -> Tensor:
        """``x`` of shape ``shape`` -> ``[..., n]``, one granule per line; a short last group is filled with 0."""
        if self.axis is None:
            return x.reshape(math.prod(self.shape))
        size = self.shape[self.axis]
        if self.granularity == "channel":
            return x.movedim(self.axis, 0).reshape(size, math.prod(self.shape) // size if size else 0)
        x = x.movedim(self.axis, -1)
        if self.granularity == "token":
            return x
        groups = -(-size // self._group)
        x = torch.nn.functional.pad(x, (0, groups * self._group - size))
        return x.reshape(*x.shape[:-1], groups, self._group)

    def join(self, lines: Tensor) -> Tensor:
        """Inverse of :meth:`split`."""
        if self.axis is None:
            return lines.reshape(self.shape)
        if self.granularity == "channel":
            size = self.shape[self.axis]
            rest = (*self.shape[: self.axis], *self.shape[self.axis + 1 :])
            return lines.reshape(size, *rest).movedim(0, self.axis)
        if self.granularity == "group":
            lines = lines.flatten(-2)[..., : self.shape[self.axis]]
        return lines.movedim(-1, self.axis)

    def scale_to_lines(self, scale: Tensor) -> Tensor:
        """Scale or zero point of shape ``scale_shape`` -> one value per line of :meth:`split`."""
        return scale.movedim(self.axis, -1) if self.granularity == "group" and self.axis is not None else scale

    def scale_from_lines(self, scale: Tensor) -> Tensor:
        """Inverse of :meth:`scale_to_lines`."""
        return scale.movedim(-1, self.axis) if self.granularity == "group" and self.axis is not None else scale

    # -- given scales -----------------------------------------------------------------------------------------

    def check_scale(self, scale: Tensor | float, device: torch.device) -> Tensor:
        """A given scale as float32 of shape ``scale_shape``: a number serves every granule."""
        if isinstance(scale, bool) or not isinstance(scale, (Tensor, float, int)):
            raise TypeError(f"scale: expected a tensor or a number, got {scale!r}")
        if isinstance(scale, Tensor) and not scale.dtype.is_floating_point:
            raise TypeError(f"scale: expected a floating-point tensor, got {scale.dtype}")
        given = torch.as_tensor(scale, device=device).detach().to(torch.float32)
        check_positive("scale", given)
        return self._expand("scale", given)

    def check_zero_point(self, zero_point: Tensor | int, device: torch.device) -> Tensor:
        """A given zero point as int32 of shape ``scale_shape``: a number serves every granule."""
        if isinstance(zero_point, bool) or not isinstance(zero_point, (Tensor, int)):
            raise TypeError(f"zero_point: expected a tensor or an int, got {type(zero_point).__name__}")
        if isinstance(zero_point, Tensor) and (zero_point.dtype.is_floating_point or zero_point.dtype == torch.bool):
            raise TypeError(f"zero_point: expected an integer tensor, got {zero_point.dtype}")
        given = torch.as_tensor(zero_point, device=device).to(torch.int64)
        low, high = self.bounds
        outside = (given < low) | (given > high)
        if bool(outside.any()):
            raise ValueError(f"zero_point: expected values in {low}..{high}, got {given[outside][0].item()}")
        return self._expand("zero_point", given.to(torch.int32))

    def _expand(self, name: str, given: Tensor) -> Tensor:
        if given.dim() and tuple(given.shape) != self.scale_shape:
            expected = list(self.scale_shape)
            raise ValueError(
                f"{name}: expected a number or shape {expected} for granularity={self.granularity!r} of "
                f"{list(self.shape)}, got shape {list(given.shape)}"
            )
        return given.expand(self.scale_shape).clone()


def check_positive(name: str, scale: Tensor) -> None:
    """ValueError unless every value is finite, > 0 and has a finite float32 reciprocal."""
    good = torch.isfinite(scale) & (scale > 0) & torch.isfinite(torch.ones_like(scale) / scale)
    if not bool(good.all()):
        got = scale[~good][0].item()
        raise ValueError(f"{name}: expected finite values > 0 whose reciprocal is finite, got {got}")
