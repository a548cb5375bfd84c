"""`quantize_dynamic` as torch had it: the same call, our kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .convert import quantize_
from .survey import Layer, survey

__all__ = ["quantize_dynamic"]

_RECURRENT = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Mapping[Any, Any] | Iterable[Any] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[Any, Any] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """The call of `torch.ao.quantization.quantize_dynamic`, for the Linear layers of a model, in the scheme "w8a8".

    Differences from torch, all to the better: activations are quantized per token instead of per tensor, weights per
    output channel, and nothing saturates. `qkernels.quantize_` says more and can do more.

    Args:
        model: a float model. It is put into eval mode, as torch does.
        qconfig_spec: None for every Linear; or a set of classes and names of submodules (a container stands for the
            layers in it); or a mapping of them to QConfig objects with qint8 weights, or to None to leave a part out.
        dtype: torch.qint8.
        mapping: None.
        inplace: convert `model` itself instead of a copy.

    Returns:
        The converted model.

    Raises:
        TypeError, ValueError: something this package does not offer (float16, embeddings by quint8, recurrent layers
            by name, custom mappings).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if mapping is not None:
        raise ValueError("mapping: expected None; Linear layers become qkernels.nn.QuantLinear")
    spec = _parse_spec(qconfig_spec, dtype)
    chosen = [layer for layer in survey(model) if layer.kind in ("linear", "conv1d") and _wanted(model, layer, spec)]
    recurrent = sorted({type(m).__name__ for m in model.modules() if isinstance(m, _RECURRENT)})
    if recurrent and qconfig_spec is None:
        warnings.warn(f"quantize_dynamic: {', '.join(recurrent)} layers are left in floating point", stacklevel=2)
    converted = model if inplace else copy.deepcopy(model)
    names = [layer.name for layer in chosen if layer.reason is None]
    if names:
        quantize_(converted, "w8a8", include=[f"re:{_literal(name)}" for name in names], exclude=())
    else:
        warnings.warn("quantize_dynamic: no Linear layer to quantize, the model is returned as it is", stacklevel=2)
    converted.eval()
    return converted


def _literal(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else f"\\{c}" for c in name)


def _parse_spec(spec: Mapping[Any, Any] | Iterable[Any] | None, dtype: torch.dtype) -> dict[Any, bool]:
    """Class or name -> whether the layers below it are converted."""
    if isinstance(spec, Mapping):  # torch ignores dtype then
        return {_key(key): _accepts(key, qconfig) for key, qconfig in spec.items()}
    if dtype is not torch.qint8:
        raise ValueError(f"dtype: expected torch.qint8, got {dtype}")
    if spec is None:
        return {nn.Linear: True}
    if isinstance(spec, (str, bytes, type)) or not isinstance(spec, Iterable):
        raise TypeError(f"qconfig_spec: expected None, a set of classes and names, or a mapping of them, got {spec!r}")
    return {_key(key): True for key in spec}


def _key(key: object) -> object:
    if isinstance(key, str):
        return key
    if not isinstance(key, type) or not issubclass(key, nn.Module):
        raise TypeError(f"qconfig_spec: expected module classes and names of submodules, got {key!r}")
    if issubclass(key, (*_RECURRENT, nn.Embedding, nn.EmbeddingBag)):
        raise ValueError(
            f"qconfig_spec: {key.__name__} is not supported, only Linear layers are (embeddings: qkernels.quantize_)"
        )
    return key


def _accepts(key: object, qconfig: Any) -> bool:
    """Whether a QConfig asks for int8 weights; None asks for nothing."""
    if qconfig is None:
        return False
    try:
        dtype = qconfig.weight().dtype
    except (AttributeError, TypeError) as error:
        raise TypeError(f"qconfig_spec[{key!r}]: expected a QConfig or None, got {qconfig!r}") from error
    if dtype is not torch.qint8:
        raise ValueError(f"qconfig_spec[{key!r}]: expected a QConfig with qint8 weights, got {dtype}")
    return True


def _wanted(model: nn.Module, layer: Layer, spec: Mapping[Any, bool]) -> bool:
    """torch's rule: the innermost of the modules around the layer that the spec names decides, a name before a
    class."""
    for name in layer.names:
        answer = spec.get(type(model), False)
        module: nn.Module = model
        path = ""
        answer = spec.get("", answer)
        for part in name.split("."):
            child = module._modules[part]
            if child is None:
                break
            module = child
            path = f"{path}.{part}" if path else part
            answer = spec.get(path, spec.get(type(module), answer))
        if answer:
            return True
    return False
