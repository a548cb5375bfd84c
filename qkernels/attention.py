"""Attention blocks: what stands between their Linears by kernels, rotary embedding and attention, on a GPU a cache's
tokens too.

Between its Linears a decoder's attention block turns queries and keys by their positions and reads all keys and values
seen so far.  For one token these are some fifteen launches of a few microseconds each, which together take as long as
the block's products of quantized weights.  On a CPU attention is the largest part of an encoder's block beside its
quantized Linears, and a rotary embedding is ten operators.  The blocks of transformers look both steps up by name, in
their module:

    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, ...)

:class:`AttentionForward` runs the very code of the class with other things under these two names: a rotary embedding
that equals the block's own to the bit, and for ``sdpa`` a function that serves few queries on a GPU (at most
:data:`qkernels.cuda_attention.MOST_QUERIES` of one head of keys) and many on a CPU (see
:data:`qkernels.cpu_attention.FEWEST_QUERIES`).  A static cache is handed over as one that writes the keys and the
values of new tokens, and counts them, by one kernel.  Whatever the kernels do not serve, gradients and
``torch.compile`` among it, goes where it went.  Nothing else in the model changes, and :func:`qkernels.unfuse_` takes
it away.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import cpu_attention, cuda, cuda_attention, reference

__all__ = ["AttentionForward", "attends", "in_words"]

_ROTARY, _INTERFACES = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"
_CACHES = ("cache", "past_key_values")
"""What blocks of transformers call their cache, by its releases."""

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def attends(module: nn.Module) -> bool:
    """Whether a module's class turns its heads or chooses its attention as the module says, and the instance leaves
    that to the class."""
    return "forward" not in module.__dict__ and _rewired(type(module).forward) is not None


def in_words(module: nn.Module, device: torch.device) -> str:
    """What the report says of the attention of such a module, whose Linears are on a device; nothing where no kernel
    serves it."""
    if not cuda.unavailable(device):
        return "attention of few tokens by a kernel"
    if device.type != "cpu":
        return ""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    own = _replacements(type(module).forward)
    served = {
        "rotary embedding by a kernel": _ROTARY in own,
        "attention by a kernel": _INTERFACES in own and chosen == "sdpa" and cpu_attention.available(),
    }
    return "; ".join(words for words, serves in served.items() if serves)


class AttentionForward:
    """The ``forward`` of an attention block, whose class says :func:`attends`.

    Args:
        module: the block; it keeps this object in its ``__dict__``.
    """

    follows_class = True
    """For those who read a module's source: it is that of its class."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the class computes."""
        function: Any = type(self._module).forward
        own = None if _is_dynamo_compiling() else _rewired(function)
        if own is None:
            return function(self._module, *args, **kwargs)
        for name in _CACHES:
            if _is_static(kwargs.get(name)):
                kwargs[name] = _Cache(kwargs[name])
        return own(self._module, *args, **kwargs)


@functools.lru_cache(maxsize=64)
def _rewired(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """``function`` with a rotary embedding and an attention of ours under those names; None where it names neither, or
    means something else by them."""
    own = _replacements(function)
    return _with_names(function, own) if own else None


def _replacements(function: Callable[..., Any]) -> dict[str, Any]:
    """What of ours belongs under which global name of a function."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        return {}
    given, names = inner.__globals__, inner.__code__.co_names
    own: dict[str, Any] = {}
    turn, interfaces = given.get(_ROTARY), given.get(_INTERFACES)
    if _ROTARY in names and callable(turn) and _turns_halves(turn):
        own[_ROTARY] = _Rotary(turn)
    if _INTERFACES in names and interfaces is not None:
        own[_INTERFACES] = _Interfaces(interfaces)
    return own


def _with_names(function: Callable[..., Any], own: dict[str, Any]) -> Callable[..., Any] | None:
    """A copy of a function that finds other things under some global names; of decorators in front of it too, where
    they hold what they decorate in a closure."""
    if not isinstance(function, types.FunctionType):
        return None
    closure, scope = function.__closure__, function.__globals__
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        scope = {name: value for name, value in scope.items() if name != "__name__"} | own
    else:
        inner = _with_names(wrapped, own)
        held = [cell.cell_contents is wrapped for cell in closure or ()]
        if inner is None or sum(held) != 1:
            return None
        closure = tuple(types.CellType(inner) if it else cell for it, cell in zip(held, closure or (), strict=True))
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors to try other people's functions with, on the CPU whatever the default device is."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]


def _turns_halves(function: Callable[..., Any]) -> bool:
    """Whether a rotary embedding is :func:`qkernels.reference.rotary` of queries and of keys, to the bit."""
    q, k, cos, sin = _random((2, 4, 3, 16), (2, 2, 3, 16), (2, 3, 16), (2, 3, 16))
    try:
        turned = function(q, k, cos, sin)
        return all(torch.equal(y, reference.rotary(x, cos, sin)) for x, y in zip((q, k), turned, strict=True))
    except Exception:  # whatever it raises over such inputs: it is another kind of embedding
        return False


class _Rotary:
    """In place of a rotary embedding."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Turned queries and keys."""
        turned = None
        if not args and not kwargs:
            turned = cuda_attention.rotary(q, k, cos, sin) or cpu_attention.rotary(q, k, cos, sin)
        return self._original(q, k, cos, sin, *args, **kwargs) if turned is None else turned


def _is_static(cache: Any) -> bool:
    """Whether it is transformers' static cache, and no other that is built on it."""
    if cache is None:
        return False
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and type(cache) is getattr(module, "StaticCache", None)


class _Cache:
    """In place of a static cache: the same one, but for how new tokens come into it."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the new ones among them."""
        original = self._original
        if not original.offloading and layer_idx < len(original.layers):
            layer = original.layers[layer_idx]
            kind: Any = type(layer)
            if layer.is_initialized and _appends(kind):
                keys, values = layer.keys, layer.values
                if cuda_attention.append(keys, values, layer.cumulative_length, key, value):
                    return keys, values
        return cast("tuple[Tensor, Tensor]", original.update(key, value, layer_idx, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """Of the cache."""
        return getattr(self._original, name)


@functools.lru_cache(maxsize=16)
def _appends(layer_class: Any) -> bool:
    """Whether an update of such a layer is :func:`qkernels.reference.append`, and nothing else."""
    module = sys.modules.get("transformers.cache_utils")
    static = getattr(module, "StaticLayer", None)
    if static is None or layer_class is not static:
        return False
    new = _random((2, 3, 2, 4), (2, 3, 1, 4), (2, 3, 2, 4), (2, 3, 1, 4))
    keys, values = (torch.zeros(2, 3, 5, 4, device="cpu") for _ in range(2))
    length = torch.zeros((), dtype=torch.int64, device="cpu")
    try:
        layer = static(max_cache_len=5)
        for key, value in zip(new[:2], new[2:], strict=True):
            reference.append(keys, values, length, key, value)
            got = layer.update(key, value)
            if got[0] is not layer.keys or got[1] is not layer.values or not torch.equal(layer.keys, keys):
                return False
        return torch.equal(layer.values, values) and bool(layer.cumulative_length == length)
    except Exception:  # whatever it raises: a layer of another release
        return False


class _Interfaces:
    """In place of the table of attention functions: the same one, but for what it gives under ``sdpa``."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getitem__(self, name: str) -> Any:
        """The function of a name."""
        return _serving(self._original[name])

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        """The function of a name, or a default."""
        return _serving(self._original.get_interface(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """Of the table."""
        return getattr(self._original, name)


def _serving(function: Any) -> Any:
    """Ours before transformers' own for ``sdpa``; another function as it is."""
    module = sys.modules.get("transformers.integrations.sdpa_attention")
    if module is None or function is not getattr(module, "sdpa_attention_forward", None):
        return function
    return functools.partial(_attention, function)


def _attention(
    original: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Attention as transformers calls it: ``[B, heads, T, D]`` to ``[B, T, heads, D]`` and None."""
    usual = not dropout and kwargs.get("softcap") is None and kwargs.get("position_bias") is None
    if usual and not kwargs.get("output_attentions"):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        free = attention_mask is None and query.shape[2] > 1
        # Several queries without a mask may see only keys before them, which the GPU's kernel does not know.
        out = None if free else cuda_attention.attention(query, key, value, attention_mask, scale)
        if out is None and key.shape[1] * getattr(module, "num_key_value_groups", 1) == query.shape[1]:
            causal = free and _is_causal(module, kwargs.get("is_causal"))
            out = cpu_attention.attention(query, key, value, attention_mask, scale, causal=causal)
        if out is not None:
            return out, None
    return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    """Whether queries that no mask restricts see what is before them only, as transformers decides it."""
    return bool(getattr(module, "is_causal", True) if given is None else given)
