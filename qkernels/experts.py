"""Mixtures of experts that hold their weights in 3-D parameters: taken apart into Linears, and put together again.

Since release 5, transformers keeps the experts of Mixtral, Qwen-MoE, GPT-OSS and their like in one module with stacked
parameters, ``gate_up_proj [E, 2 I, H]`` and ``down_proj [E, H, I]``, and no Linear.  Here such a module is exchanged
for a :class:`SplitExperts`, which holds an ``nn.Linear`` per expert and projection and computes the same function:

    model.layers.0.mlp.experts        ->  model.layers.0.mlp.experts.0.gate_up_proj, experts.0.down_proj, experts.1. ...

From there on every part of this package sees ordinary layers: schemes and overrides per layer, calibration, smoothing,
GPTQ, saving.  The Linears are views of the stacked parameters, so nothing is copied.  That both modules compute the
same is not assumed: a few random tokens go through both, and where the outputs differ, the module is left alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from .differences import difference_of, limit_of
from .journal import Site
from .observe import evaluating
from .survey import carry

__all__ = [
    "SplitExperts",
    "experts_apart",
    "holds_experts",
    "join_experts_",
    "split_experts_",
    "take_apart",
    "with_experts_apart",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
"""What transformers' `use_experts_implementation` says of a class; with `_apply_gate` it defines the function."""

PROBE_TOKENS = 8

P = ParamSpec("P")
R = TypeVar("R")


class SplitExperts(nn.Module):
    """Experts of which each is a pair of Linears; called as the module it stands for.

    Children ``"0"``, ``"1"``, ... hold the Linears of an expert under the names of the stacked parameters; ``stacked``
    is the original module without those parameters: it still says what the activation between the two Linears is.
    """

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        weights = _stacks(stacked)
        up, down = _projections(stacked)
        count = len(weights[up])
        for index in range(count):
            layers = {name: _linear(stacked, weights, name, index) for name in (up, down)}
            self.add_module(str(index), nn.ModuleDict(layers))
        self.add_module("stacked", stacked)
        self.training = stacked.training

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self._modules) - 1

    def layers(self, name: str) -> list[nn.Module]:
        """The layers of all experts under one name."""
        return [cast(nn.ModuleDict, self._modules[str(index)])[name] for index in range(self.count)]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum over the chosen experts of every token.

        Args:
            hidden_states: ``[tokens, H]``.
            top_k_index: int ``[tokens, k]``; the number of experts stands for none.
            top_k_weights: ``[tokens, k]``.

        Returns:
            ``[tokens, H]`` in the dtype of ``hidden_states``.
        """
        stacked: Any = self._modules["stacked"]
        if kwargs:
            args = inspect.signature(type(stacked).forward).bind(stacked, *args, **kwargs).args[1:]
        hidden, index, weights = args
        tokens, chosen = index.shape
        order = torch.argsort(index.reshape(-1), stable=True)
        rows = hidden[order // chosen]  # the tokens of expert 0, then those of expert 1, ...
        counts = torch.bincount(index.reshape(-1), minlength=self.count + 1).tolist()
        up, down = _projections(stacked)
        gate = stacked._apply_gate if stacked.has_gate else stacked.act_fn
        parts, first = [], 0
        for number, count in enumerate(counts[: self.count]):
            if count:
                expert: Any = self._modules[str(number)]
                parts.append(expert[down](gate(expert[up](rows[first : first + count]))))
                first += count
        if parts and stacked.has_post_expert_norm:
            parts = [stacked.post_expert_norm(torch.cat(parts))]
        y = torch.cat([*parts, rows.new_zeros(len(rows) - first, rows.shape[1])])
        y = y[torch.argsort(order)].view(tokens, chosen, hidden.shape[1])
        return (y * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)

    def extra_repr(self) -> str:
        """How many."""
        return f"{self.count} experts"


def _projections(stacked: Any) -> tuple[str, str]:
    return "gate_up_proj" if stacked.has_gate else "up_proj", "down_proj"


def _stacks(stacked: Any) -> dict[str, nn.Parameter]:
    """The stacked parameters, by name."""
    names = list(_projections(stacked))
    if stacked.has_bias:
        names += [f"{name}_bias" for name in names]
    return {name: stacked._parameters[name] for name in names}


def _linear(stacked: Any, stacks: dict[str, nn.Parameter], name: str, index: int) -> nn.Linear:
    """One projection of one expert, over the memory of the stack."""
    weight = stacks[name].data[index]
    weight = weight.t() if stacked.is_transposed else weight
    bias = stacks.get(f"{name}_bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=stacks[name].requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.data[index], requires_grad=bias.requires_grad)
    return linear.train(stacked.training)


# -- which modules can be taken apart ----------------------------------------------------------------------------------


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the form that transformers' `use_experts_implementation` describes."""
    return (
        all(isinstance(module.__dict__.get(flag), bool) for flag in _FLAGS)
        and module._parameters.get("down_proj") is not None
        and callable(getattr(module, "_apply_gate", None))
    )


def _obstacle(module: Any, shared: Collection[int]) -> str:
    """Why a module with 3-D parameters cannot be taken apart, as far as looking at it tells; "" if it can."""
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several processes"
    if hasattr(module, "parametrizations") or "forward" in module.__dict__:
        return "its forward or its parameters were replaced on the instance"
    if module._state_dict_hooks or module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
        return "it has state_dict hooks of its own"
    own = {name: p for name, p in module._parameters.items() if p is not None}
    expected = {*_projections(module), *(f"{n}_bias" for n in _projections(module) if module.has_bias)}
    if set(own) != expected:
        return f"expected the parameters {', '.join(sorted(expected))}, got {', '.join(sorted(own))}"
    for name, parameter in own.items():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor or parameter.is_sparse:
            return f"its {name} is not a plain parameter"
        if parameter.dtype not in _FLOATS:
            return f"its {name} has dtype {parameter.dtype}; float32, bfloat16 and float16 are supported"
        if id(parameter) in shared:
            return f"its {name} is shared with another module"
        if parameter.dim() != (2 if name.endswith("_bias") else 3) or not parameter.shape[0]:
            return f"its {name} has shape {list(parameter.shape)}"
    if len({len(parameter) for parameter in own.values()}) != 1:
        return "its parameters hold different numbers of experts"
    return ""


def _difference(stacked: nn.Module, split: SplitExperts) -> float:
    """How far random tokens tell the two apart: norm of the difference over the norm."""
    some = next(iter(split.parameters()))
    first: Any = split.layers(_projections(stacked)[0])[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PROBE_TOKENS, first.in_features, generator=generator).to(some)
    chosen = min(2, split.count)
    scores = torch.rand(PROBE_TOKENS, split.count, generator=generator).to(some.device)
    weights, index = scores.topk(chosen)
    weights = weights.to(some.dtype)
    with evaluating(stacked):
        before = stacked(hidden.clone(), index, weights)
    _empty(stacked)
    with evaluating(split):
        return difference_of([before], [split(hidden, index, weights)])


def _empty(stacked: nn.Module) -> None:
    for name in _stacks(stacked):
        stacked._parameters[name] = None


# -- taking apart and putting together ---------------------------------------------------------------------------------


@dataclass
class _Stack:
    """What is left of a stacked parameter: enough to make it again, and itself while somebody holds it."""

    reference: weakref.ref[nn.Parameter]
    attributes: dict[str, Any]
    held: nn.Parameter | None


@dataclass
class Apart:
    """Modules of a model that were taken apart; leaving it as a context by an exception puts them back.

    Args:
        modules: name -> what stands there now.
        sites: name -> the places that hold it.
        reasons: name -> why a module of experts was left as it is.
    """

    modules: dict[str, SplitExperts] = field(default_factory=dict)
    sites: dict[str, list[Site]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    _stacks: dict[str, dict[str, _Stack]] = field(default_factory=dict, repr=False)

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self.undo()

    def undo(self) -> None:
        """Put every original module back; a parameter that nobody kept is made again, with the same bits."""
        for name in list(self.modules):
            self.put_back(name)

    def put_back(self, name: str) -> None:
        """Put one original module back."""
        split = self.modules.pop(name)
        stacked = cast(nn.Module, split._modules["stacked"])
        for key, stack in self._stacks.pop(name).items():
            parameter = stack.reference()
            if parameter is None:
                parameter = _stack_of(split, key)
                parameter.__dict__.update(stack.attributes)
            stacked._parameters[key] = parameter
        carry(split, stacked)
        for parent, key in self.sites.pop(name):
            parent._modules[key] = stacked

    def release(self) -> None:
        """Let the stacked parameters go, so that their memory goes with the layers; undoing makes them again."""
        for stacks in self._stacks.values():
            for stack in stacks.values():
                stack.held = None

    def keep(self, wanted: Callable[[str], bool], why: Callable[[str], str]) -> None:
        """Put back the modules none of whose layers is ``wanted``, with ``why`` of them as the reason."""
        for name in list(self.modules):
            layers = [f"{name}.{key}" for key, m in self.modules[name].named_modules() if isinstance(m, nn.Linear)]
            if any(wanted(layer) for layer in layers):
                continue
            self.reasons[name] = "; ".join(dict.fromkeys(why(layer) for layer in layers))
            self.put_back(name)


def take_apart(model: nn.Module, *, chosen: Callable[[str], bool] | None = None) -> Apart:
    """Exchange the modules of experts in `model` for :class:`SplitExperts`, in place.

    Args:
        model: a float model; a module of experts that is `model` itself stays.
        chosen: by name, which modules to take apart; None: all that can be.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    apart = Apart()
    found: dict[int, tuple[str, nn.Module]] = {}
    sites: dict[int, list[Site]] = {}
    owners: dict[int, int] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        if module is not model and holds_experts(module):
            found[id(module)] = name, module
        for key, child in module._modules.items():
            if child is not None:
                sites.setdefault(id(child), []).append((module, key))
    shared = {key for key, count in owners.items() if count > 1}
    for key, (name, module) in found.items():
        if chosen is not None and not chosen(name):
            continue
        why = _obstacle(module, shared) or _exchange(apart, name, module, sites[key])
        if why:
            apart.reasons[name] = f"weights of several experts in 3-D parameters, left as they are: {why}"
    return apart


def _exchange(apart: Apart, name: str, module: nn.Module, sites: list[Site]) -> str:
    """Take one module apart; why not, where that fails: the module is as it was then."""
    stacks = _stacks(module)
    split = SplitExperts(module)
    try:
        if any(parameter.is_meta for parameter in stacks.values()):
            _empty(module)
        else:
            difference = _difference(module, split)
            if not difference <= limit_of(split):
                raise ValueError(f"taken apart they compute something else (outputs move by {difference:.1e})")
    except Exception as error:
        module._parameters.update(stacks)
        return str(error)
    carry(module, split)
    apart.modules[name] = split
    apart.sites[name] = sites
    apart._stacks[name] = {n: _Stack(weakref.ref(p), dict(p.__dict__), p) for n, p in stacks.items()}
    for parent, key in sites:
        parent._modules[key] = split
    return ""


def _stack_of(split: SplitExperts, name: str) -> nn.Parameter:
    """A stacked parameter made of the experts' own."""
    stacked: Any = split._modules["stacked"]
    layer, kind = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
    own = [cast(nn.Parameter, module._parameters[kind]) for module in split.layers(layer)]
    parts = [p.data.t() if stacked.is_transposed and kind == "weight" else p.data for p in own]
    return nn.Parameter(torch.stack(parts), requires_grad=own[0].requires_grad)


def split_experts_(model: nn.Module) -> list[str]:
    """Give every expert of a mixture Linears of its own, in place, so that what works on layers works on experts.

    `quantize_`, `load`, `calibrate`, `sensitivity` and `plan` do so themselves; call it before `smooth_` and before
    training.  The model computes what it did.

    Returns:
        The names of the modules that were taken apart; others with 3-D parameters are left.

    Raises:
        TypeError: `model` is not a module.
    """
    return list(take_apart(model).modules)


def join_experts_(model: nn.Module, *, on_failure: Callable[[Callable[[], None]], None] | None = None) -> list[str]:
    """Put experts back into 3-D parameters, in place: where all their layers are plain Linears again.

    Args:
        model: the model.
        on_failure: is handed, after each module, a function that takes them apart again.

    Returns:
        The names of the modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    joined = []
    for name, split in list(model.named_modules()):
        if not isinstance(split, SplitExperts) or not _is_plain(split):
            continue
        stacked = cast(nn.Module, split._modules["stacked"])
        sites = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is split]
        names = [*_projections(stacked), *(f"{n}_bias" for n in _projections(stacked) if stacked.has_bias)]
        made = {key: _stack_of(split, key) for key in names}
        if on_failure is not None:
            on_failure(lambda split=split, stacked=stacked, sites=sites: _again(split, stacked, sites))  # type: ignore[misc]
        stacked._parameters.update(made)
        carry(split, stacked)
        for parent, key in sites:
            parent._modules[key] = stacked
        joined.append(name)
    return joined


def _again(split: SplitExperts, stacked: nn.Module, sites: list[Site]) -> None:
    _empty(stacked)
    for parent, key in sites:
        parent._modules[key] = split


def _is_plain(split: SplitExperts) -> bool:
    """Whether nothing would be lost by stacking: Linears of one dtype each, without hooks or buffers."""
    for name in _projections(split._modules["stacked"]):
        layers: Any = split.layers(name)
        if not all(type(m) is nn.Linear and not m._buffers and not m._forward_pre_hooks for m in layers):
            return False
        if len({m.weight.dtype for m in layers}) != 1:
            return False
    return True


@contextlib.contextmanager
def experts_apart(model: nn.Module) -> Iterator[Apart]:
    """Experts as Linears inside, as they were at the end: the very same modules and parameters."""
    apart = take_apart(model)
    try:
        yield apart
    finally:
        apart.undo()


def with_experts_apart(function: Callable[Concatenate[nn.Module, P], R]) -> Callable[Concatenate[nn.Module, P], R]:
    """Runs `function(model, ...)` while the experts of its model are apart."""

    @functools.wraps(function)
    def wrapped(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        with experts_apart(model):
            return function(model, *args, **kwargs)

    return wrapped
