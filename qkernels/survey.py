"""The walk over a model: which layers there are, where they sit, and which of them stay as they are and why."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .journal import Site
from .nn import QuantEmbedding, QuantLinear
from .parents import reads_weight
from .scheme import MAX_INTEGER_K, Scheme
from .smoothed import forget_hook

__all__ = [
    "Layer",
    "carry",
    "conv1d_class",
    "dress",
    "finite",
    "interchangeable",
    "is_conv1d",
    "is_quantized",
    "module_note",
    "origin",
    "scheme_obstacle",
    "storage_key",
    "survey",
    "type_name",
    "undress",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FRESH = frozenset(nn.Module().__dict__)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D itself: a Linear whose weight is `[in_features, out_features]`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is one of our layers."""
    return isinstance(module, (QuantLinear, QuantEmbedding))


def type_name(module: nn.Module) -> str:
    """The class's name, with the module it comes from unless that is torch.nn or this package."""
    cls = type(module)
    home = cls.__module__
    return cls.__name__ if home.startswith(("torch.nn.", "qkernels.", "__main__")) else f"{home}.{cls.__name__}"


def storage_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same numbers in the same memory."""
    try:
        storage: object = tensor.untyped_storage()._cdata
    except RuntimeError:  # sparse tensors and subclasses have none
        return ("opaque", id(tensor))
    return (str(tensor.device), storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@dataclass
class Layer:
    """One layer of the model: an nn.Linear, a Conv1D, an embedding, something derived from those, or one of ours.

    Args:
        module: the layer.
        names: its qualified names; a layer that sits in several places has several. The first is the one reports use.
        sites: the parents and keys that hold it.
        kind: "linear", "conv1d", "embedding", or "other" for what can never be replaced.
        reason: why it stays as it is, or None while nothing speaks against replacing it.
        scheme: what it becomes; None while undecided or left.
        table: the embedding whose int8 table it shares (an output head tied to it).
        same_as: an earlier layer with the same weight.
    """

    module: nn.Module
    names: list[str]
    sites: list[Site]
    kind: str
    reason: str | None = None
    scheme: Scheme | None = None
    table: Layer | None = None
    same_as: Layer | None = None
    note: str | None = None
    _shape: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def selected(self) -> bool:
        """Whether it is going to be replaced."""
        return self.reason is None and (self.scheme is not None or self.kind == "embedding")

    @property
    def weight(self) -> torch.Tensor:
        """Its weight, detached, as `[out_features, in_features]` (a view)."""
        weight = self.module._parameters["weight"]
        if weight is None:
            raise ValueError(f"{self.name}: expected a layer with a weight")
        return weight.detach().t() if self.kind == "conv1d" else weight.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, or `(num_embeddings, embedding_dim)`."""
        if self._shape is None:
            rows, columns = self.weight.shape
            self._shape = (rows, columns)
        return self._shape

    def leave(self, reason: str) -> None:
        """Decide that it stays as it is."""
        if self.reason is None:
            self.reason = reason


def survey(model: nn.Module) -> list[Layer]:
    """Every layer of `model` in the order of `named_modules`, each once, with what speaks against replacing it."""
    layers: dict[int, Layer] = {}
    for name, parent, key, module, adapter in _walk(model):
        kind = _kind(module)
        if kind is None:
            continue
        layer = layers.get(id(module))
        if layer is None:
            layer = layers[id(module)] = Layer(module, [], [], kind)
            reason = _obstacle(module, kind)
            if reason is None and adapter is not None:
                reason = (
                    f"inside {adapter}, which reads the weight when it merges; quantize before adapters are attached"
                )
            if reason is not None:
                layer.leave(reason)
        layer.names.append(name)
        if parent is not None:
            if not any(p is parent and k == key for p, k in layer.sites):
                layer.sites.append((parent, key))
            reads = reads_weight(parent, key)
            if reads is not None:
                layer.leave(reads)
    return list(layers.values())


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, str, nn.Module, str | None]]:
    """`(name, parent, key, module, adapter)` for every path to every module; a module is entered once on each path."""

    def visit(
        prefix: str, parent: nn.Module | None, key: str, module: nn.Module, adapter: str | None, path: frozenset[int]
    ) -> Iterator[tuple[str, nn.Module | None, str, nn.Module, str | None]]:
        yield prefix, parent, key, module, adapter
        if id(module) in path:  # a cycle
            return
        if type(module).__module__.startswith("peft.tuners.") and "base_layer" in module._modules:
            adapter = type_name(module)
        for name, child in module._modules.items():
            if child is not None:
                where = f"{prefix}.{name}" if prefix else name
                yield from visit(where, module, name, child, adapter, path | {id(module)})

    return visit("", None, "", model, None, frozenset())


def _kind(module: nn.Module) -> str | None:
    """The kind of layer, or None for a module that is none."""
    if type(module) is nn.Linear:
        return "linear"
    if is_conv1d(module):
        return "conv1d"
    if type(module) is nn.Embedding:
        return "embedding"
    if is_quantized(module) or isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
        return "other"
    return None


def _obstacle(module: nn.Module, kind: str) -> str | None:
    """Why this very module cannot be replaced, whatever the scheme."""
    if is_quantized(module):
        return "quantized already"
    if hasattr(module, "parametrizations"):
        return (
            "parametrized: its weight is computed in every call "
            "(torch.nn.utils.parametrize.remove_parametrizations first)"
        )
    if kind == "other":
        base = next(b.__name__ for b in (nn.Linear, nn.Embedding, nn.EmbeddingBag) if isinstance(module, b))
        if type(module) is nn.EmbeddingBag:
            return "nn.EmbeddingBag is not supported"
        return f"{type_name(module)} is not nn.{base} itself but derived from it"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter of its own (pruned or weight-normalised layers: make it permanent first)"
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return (
            f"its weight is a {type(weight.data if type(weight) is nn.Parameter else weight).__name__}, not a "
            "plain tensor"
        )
    if weight.layout != torch.strided:
        return f"its weight has layout {weight.layout}"
    if weight.dtype not in _FLOATS:
        return f"its weight has dtype {weight.dtype}; float32, bfloat16 and float16 are supported"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if module._state_dict_hooks or module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
        return "it has state_dict hooks of its own"
    if kind == "embedding" and getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites its rows in every call"
    return None


def scheme_obstacle(layer: Layer, scheme: Scheme) -> str | None:
    """Why `layer` cannot run in `scheme`, or None."""
    columns = layer.shape[1]
    if scheme.activation_bits is not None and columns > MAX_INTEGER_K:
        return (
            f"in_features {columns} exceeds {MAX_INTEGER_K}, up to which int32 sums are exact (weight-only "
            "schemes work)"
        )
    return None


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_ORIGIN = "_qkernels_origin"


def dress(new: nn.Module, layer: Layer) -> None:
    """Give the replacement of `layer` its mode, its hooks (still removable by their handles) and its extra attributes.

    What it replaces is noted on it too, for the way back: see `origin`.
    """
    old = layer.module
    standard = {*_FRESH, "in_features", "out_features", "nf", "nx", "num_embeddings", "embedding_dim"}
    extras = [k for k in old.__dict__ if k not in standard and k not in new.__dict__ and not hasattr(type(new), k)]
    carry(old, new, extras)
    forget_hook(new)  # the factor is a tensor of the quantized layer
    new.__dict__[_ORIGIN] = {"kind": layer.kind, "extras": extras}


def interchangeable(layer: nn.Module, table: nn.Module) -> bool:
    """Whether an nn.Embedding with the weight of another one can become the very module that the other became."""
    standard = {*nn.Embedding(1, 1).__dict__, "_is_hf_initialized"}
    hooked = any(layer.__dict__.get(name) for name in _HOOKS)
    return (
        isinstance(table, QuantEmbedding)
        and not hooked
        and set(layer.__dict__) <= standard
        and layer.training == table.training
        and getattr(layer, "padding_idx", None) == table.padding_idx
    )


def origin(module: nn.Module) -> dict[str, Any]:
    """What a quantized layer replaced: {"kind", "extras"}; defaults for one that was made by hand."""
    default: dict[str, Any] = {"kind": "embedding" if isinstance(module, QuantEmbedding) else "linear", "extras": []}
    found = module.__dict__.get(_ORIGIN)
    return {**default, **found} if isinstance(found, dict) else default


def undress(old: nn.Module, new: nn.Module) -> None:
    """Give a float layer made from a quantized one what `dress` carried over."""
    carry(old, new, [k for k in origin(old)["extras"] if k in old.__dict__])


def carry(old: nn.Module, new: nn.Module, extras: Iterable[str] = ()) -> None:
    """Give what stands in a module's place its mode, its hooks (the very tables) and some attributes."""
    new.training = old.training
    for name in _HOOKS:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]
    for name in extras:
        new.__dict__[name] = old.__dict__[name]


def module_note(module: nn.Module) -> str:
    """Why a module that owns tensors but is no layer stays as it is."""
    own = [(n, p) for n, p in module._parameters.items() if p is not None]
    stacked = [n for n, p in own if not nn.parameter.is_lazy(p) and p.dim() == 3 and len(p) > 1]
    if not own:
        return "buffers only"
    if isinstance(module, nn.MultiheadAttention):
        return "its in_proj weight is read by the attention function, there is no Linear to replace"
    if isinstance(module, nn.RNNBase):
        return "recurrent layers are not supported"
    if stacked and not isinstance(module, nn.modules.conv._ConvNd):
        return f"weights of several experts in 3-D parameters ({', '.join(stacked)}), there is no Linear to replace"
    if hasattr(module, "parametrizations") or type(module).__name__ == "ParametrizationList":
        return "part of a parametrized layer"
    return "not an nn.Linear or nn.Embedding"


def conv1d_class() -> type[nn.Module] | None:
    """transformers' Conv1D, or None where transformers is missing."""
    try:
        return importlib.import_module("transformers.pytorch_utils").Conv1D  # type: ignore[no-any-return]
    except ImportError:
        return None


def finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite; takes no memory worth mentioning."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(float(low)) and math.isfinite(float(high))
