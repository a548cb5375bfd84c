"""Attention blocks that generate tokens: rotary embedding and attention over a cache as one kernel each on a GPU.

Between its Linears a decoder's attention block turns queries and keys by their positions and reads all keys and values
seen so far.  For one token these are some fifteen launches of a few microseconds each, which together take as long as
the block's products of quantized weights.  The blocks of transformers look both steps up by name, in their module:

    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, ...)

:class:`AttentionForward` runs the very code of the class with other things under these two names: a rotary embedding
that equals the block's own to the bit, and for ``sdpa`` a function that serves few queries (at most
:data:`qkernels.cuda_attention.MOST_QUERIES` of one head of keys).  Whatever the kernels do not serve, other devices,
gradients, long prompts and ``torch.compile`` among it, goes where it went.  Nothing else in the model changes, and
:func:`qkernels.unfuse_` takes it away.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import cuda_attention, reference

__all__ = ["AttentionForward", "attends"]

_ROTARY, _INTERFACES = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def attends(module: nn.Module) -> bool:
    """Whether a module's class turns its heads or chooses its attention as the module says, and the instance leaves
    that to the class."""
    return "forward" not in module.__dict__ and _rewired(type(module).forward) is not None


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
        return (own or function)(self._module, *args, **kwargs)


@functools.lru_cache(maxsize=64)
def _rewired(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """``function`` with a rotary embedding and an attention of ours under those names; None where it names neither, or
    means something else by them."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        return None
    given, names = inner.__globals__, inner.__code__.co_names
    own: dict[str, Any] = {}
    turn, interfaces = given.get(_ROTARY), given.get(_INTERFACES)
    if _ROTARY in names and callable(turn) and _turns_halves(turn):
        own[_ROTARY] = _Rotary(turn)
    if _INTERFACES in names and interfaces is not None:
        own[_INTERFACES] = _Interfaces(interfaces)
    return _with_names(function, own) if own else None


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


def _turns_halves(function: Callable[..., Any]) -> bool:
    """Whether a rotary embedding is :func:`qkernels.reference.rotary` of queries and of keys, to the bit."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 3, 16), (2, 2, 3, 16), (2, 3, 16), (2, 3, 16))
    )
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
        turned = None if args or kwargs else cuda_attention.rotary(q, k, cos, sin)
        return self._original(q, k, cos, sin, *args, **kwargs) if turned is None else turned


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
    usual = usual and not kwargs.get("output_attentions")
    # several queries without a mask see only keys before them
    few = attention_mask is not None or query.shape[2] == 1
    if usual and few:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = cuda_attention.attention(query, key, value, attention_mask, scale)
        if out is not None:
            return out, None
    return original(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
