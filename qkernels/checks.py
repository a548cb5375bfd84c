"""What is asked of tensors before a kernel sees their addresses.

Nothing is computed here.  Every function raises ``TypeError`` or ``ValueError`` naming the argument, what was
expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ._granules import check_positive
from .scheme import Scheme

__all__ = [
    "DTYPE_CODES",
    "TensorSpec",
    "canonical_specs",
    "check_canonical",
    "check_features",
    "check_input",
    "check_out_dtype",
    "check_residual",
    "check_static",
    "check_values",
    "check_vector",
    "row_stride",
]

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The codes by which the binding knows floating-point dtypes."""


def check_input(x: object, in_features: int, device: torch.device, name: str = "input") -> None:
    """The input of a Linear: ``[..., in_features]``, float32, bfloat16 or float16, where the weights are.

    A meta input is accepted for weights anywhere (shape inference); meta weights take a meta input only.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: expected dtype float32, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {x.layout}")
    check_features(x, in_features, name)
    if x.device.type != "meta" and x.device != device:
        hint = " (the layer holds no data yet: load a state dict into it)" if device.type == "meta" else ""
        raise ValueError(f"{name}: expected device {device}, where the weights are, got {x.device}{hint}")


def check_features(x: Tensor, in_features: int, name: str = "input") -> None:
    """The last dimension of ``x`` has ``in_features`` entries.

    Raises:
        ValueError: it has another size, or ``x`` has no dimension.
    """
    if x.dim() == 0:
        raise ValueError(f"{name}: expected at least 1 dimension, got a scalar tensor")
    if x.shape[-1] != in_features:
        raise ValueError(
            f"{name}: expected {in_features} features in the last dimension, got {x.shape[-1]} (shape {tuple(x.shape)})"
        )


def check_residual(residual: object, x: Tensor, out_features: int, dtype: torch.dtype) -> None:
    """What is added to the output of a Linear: ``[..., out_features]`` beside an input ``x [..., in_features]``, of the
    output's dtype and on the input's device.

    Raises:
        TypeError, ValueError: naming ``residual``.
    """
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a torch.Tensor or None, got {type(residual).__name__}")
    if residual.dtype != dtype:
        raise TypeError(f"residual: expected dtype {dtype}, that of the output, got {residual.dtype}")
    if residual.layout != torch.strided:
        raise TypeError(f"residual: expected a dense (strided) tensor, got layout {residual.layout}")
    expected = (*x.shape[:-1], out_features)
    if residual.shape != expected:
        raise ValueError(f"residual: expected shape {tuple(expected)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected device {x.device}, that of the input, got {residual.device}")


def check_vector(name: str, vector: Tensor, size: int) -> None:
    """One value per feature or channel.

    Raises:
        ValueError: another shape than ``[size]``.
    """
    if tuple(vector.shape) != (size,):
        raise ValueError(f"{name}: expected shape [{size}], got {list(vector.shape)}")


def check_out_dtype(dtype: torch.dtype | None, name: str = "out_dtype") -> None:
    """``dtype`` is one a kernel can write, or None.

    Raises:
        TypeError: it is another one.
    """
    if dtype is not None and dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or None, got {dtype}")


def row_stride(x: Tensor) -> int | None:
    """Elements between the rows of ``x [..., K]`` seen as ``[M, K]``, or None where only a copy has such rows.

    Rows must lie in steps of one size that is at least K, and the K values of a row side by side.
    """
    shape, strides = x.shape, x.stride()
    features = shape[-1]
    if strides[-1] != 1 and features != 1:
        return None
    step: int | None = None  # elements between rows, once a dimension has more than one of them
    expected = 0
    for dim in range(len(shape) - 2, -1, -1):
        if shape[dim] == 1:
            continue
        if step is None:
            step = strides[dim]
        elif strides[dim] != expected:
            return None
        expected = strides[dim] * shape[dim]
    if step is None:
        return features
    return step if step >= features else None


@dataclass(frozen=True)
class TensorSpec:
    """What one canonical tensor of a quantized Linear has to be.

    Attributes:
        shape: sizes.
        dtypes: what it may come as; the first is what it is stored as.
        required: False where the layer may do without it.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    required: bool = True

    def complaint(self, name: str, tensor: object) -> Exception | None:
        """What is wrong with ``tensor``, or None."""
        if not isinstance(tensor, Tensor):
            return TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in self.dtypes:
            listed = " or ".join(str(dtype) for dtype in self.dtypes)
            return TypeError(f"{name}: expected dtype {listed}, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            return TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")
        if tuple(tensor.shape) != self.shape:
            return ValueError(f"{name}: expected shape {self.shape}, got {tuple(tensor.shape)}")
        return None


def canonical_specs(scheme: Scheme, in_features: int, out_features: int) -> dict[str, TensorSpec]:
    """The canonical tensors of a Linear ``[N = out_features, K = in_features]`` under ``scheme``, by name."""
    rows: tuple[int, ...] = (out_features,)
    if scheme.weight_bits == 8:
        specs = {"weight": TensorSpec((out_features, in_features), (torch.int8,))}
    else:
        specs = {"weight": TensorSpec((out_features, scheme.code_bytes(in_features)), (torch.uint8,))}
    if scheme.weight_granularity == "per_channel":
        scales = rows
        scale_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    else:
        size = scheme.resolve_group_size(in_features)
        scales = (out_features, -(-in_features // size))
        # float16 becomes float32 for the layers whose scales would not survive it.
        scale_dtypes = (torch.float32, torch.float16)
    if scheme.group_scales == "int":
        specs["weight_scale"] = TensorSpec(rows, (torch.float32,))
        specs["weight_multiplier"] = TensorSpec(scales, (torch.uint8,))
    else:
        specs["weight_scale"] = TensorSpec(scales, scale_dtypes)
    if not scheme.weight_symmetric:
        if scheme.weight_zero == "int":
            specs["weight_zero_point"] = TensorSpec(scales, (torch.uint8,))
        else:
            specs["weight_min"] = TensorSpec(scales, scale_dtypes)
    floats = (torch.float32, torch.bfloat16, torch.float16)
    specs["bias"] = TensorSpec(rows, floats, required=False)
    if scheme.activation_bits is not None and not scheme.activation_dynamic:
        specs["act_scale"] = TensorSpec((), (torch.float32,))
        if not scheme.activation_symmetric:
            specs["act_zero_point"] = TensorSpec((), (torch.int32,))
    specs["inv_smooth"] = TensorSpec((in_features,), (torch.float32,), required=False)
    return specs


def check_canonical(
    tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int, out_features: int
) -> dict[str, Tensor]:
    """The canonical tensors, checked, detached and contiguous, in their order; a None counts as absent.

    Raises:
        ValueError: one is missing, unknown, of the wrong shape or on another device than ``weight``; a static
            scale is not a positive finite number; a multiplier or a zero point beside one takes weights out of the
            range of signed bytes (values on an accelerator are not read).
        TypeError: one is of the wrong dtype.
    """
    specs = canonical_specs(scheme, in_features, out_features)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    unknown = sorted(set(given) - set(specs))
    if unknown:
        raise ValueError(
            f"tensors: {', '.join(unknown)} not known to scheme {scheme.name}; expected some of {', '.join(specs)}"
        )
    missing = [name for name, spec in specs.items() if spec.required and name not in given]
    if missing:
        raise ValueError(f"tensors: scheme {scheme.name} needs {', '.join(missing)}; got {', '.join(sorted(given))}")
    checked: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if name not in given:
            continue
        tensor = given[name]
        complaint = spec.complaint(name, tensor)
        if complaint is not None:
            raise complaint
        if tensor.device != given["weight"].device:
            raise ValueError(f"{name}: expected device {given['weight'].device}, as the weight's, got {tensor.device}")
        stored = tensor.detach()
        if name == "bias":
            stored = stored.to(torch.float32)
        checked[name] = stored.contiguous()
    check_static(checked.get("act_scale"), checked.get("act_zero_point"))
    if scheme.group_scales == "int" and checked["weight"].device.type == "cpu":
        for name in ("weight_multiplier", "weight_zero_point"):
            if name in checked:
                check_values(name, checked[name], scheme)
    return checked


def check_values(name: str, tensor: Tensor, scheme: Scheme, prefix: str = "") -> None:
    """What stored values have to be, whatever file or state dict they come from.

    Scales are positive and finite (that of static activations with a finite reciprocal), minima and smoothing factors
    finite, zero points codes of the scheme (0..255 for activations), multipliers such that weights stay signed bytes.
    Codes, biases and tensors on the meta device are not read; reading others waits for their device.

    Args:
        name: of a canonical tensor; ``prefix`` stands before it in messages.

    Raises:
        ValueError: they are others.
    """
    if name in ("weight", "bias") or tensor.numel() == 0 or tensor.device.type == "meta":
        return
    if name == "act_scale":
        check_positive(prefix + name, tensor)
        return
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    if tensor.is_floating_point():
        least, kind = (0.0, "positive finite") if name == "weight_scale" else (-math.inf, "finite")
        good, words = least < low <= high < math.inf, f"{kind} values"
    else:
        least, most = _integer_range(name, scheme)
        good, words = least <= low <= high <= most, f"values from {least} to {most}"
    if not good:
        raise ValueError(f"{prefix}{name}: expected {words}, got {low} to {high}")


def _integer_range(name: str, scheme: Scheme) -> tuple[int, int]:
    """Least and largest value of a canonical tensor of integers that belong to groups or to activations."""
    if name == "weight_multiplier":
        return 1, scheme.largest_multiplier
    return scheme.code_range if name == "weight_zero_point" else (0, 255)


def check_static(act_scale: Tensor | None, act_zero_point: Tensor | None) -> None:
    """A static activation grid: a positive finite scale with a finite reciprocal, a zero point of 0..255.

    Values on an accelerator or the meta device are not read.

    Raises:
        ValueError: it is another one.
    """
    if act_scale is not None and act_scale.device.type == "cpu":
        check_positive("act_scale", act_scale)
    if act_zero_point is not None and act_zero_point.device.type == "cpu" and not 0 <= int(act_zero_point) <= 255:
        raise ValueError(f"act_zero_point: expected 0..255, got {int(act_zero_point)}")
