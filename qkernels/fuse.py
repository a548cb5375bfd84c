"""Fewer passes over memory, chosen from how modules call their children, and reversible.

Activation modules are applied inside the Linear before them; Linears that read one input run as one product (see
:mod:`qkernels.groups`); residuals are added inside the Linear (see :mod:`qkernels.residuals`).

An activation is fused where the parent's own ``forward``, traced with every child as a leaf, calls the quantized Linear
once, hands its output to the activation and to nothing else, and calls the activation once.  The Linear gets the
epilogue and the activation becomes a :class:`Passed`, which returns its input.  Left alone are children that sit in
several places, children with hooks, which could see the difference, and parents whose ``forward`` cannot be traced.  An
``nn.Sequential`` is only trusted where those around it call it as a whole.  Nothing in a state dict changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .cpu_w8a8 import PreparedW8A8
from .epilogues import epilogue_of
from .groups import InputGroup, compatible, readers
from .linear import QuantLinear
from .residuals import TRANSPARENT, Sum, add_inside, add_outside, adds_inside, sum_of

__all__ = ["Passed", "fuse_", "unfuse_"]

OnFailure = Callable[[Callable[[], None]], None]


class Passed(nn.Module):
    """Stands where an activation stood that the Linear before it applies now.

    Args:
        original: the activation module, which comes back with :func:`unfuse_`.
        linear: name of the Linear in the same parent.
    """

    def __init__(self, original: nn.Module, linear: str) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not as a child: names of modules stay what they were
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        """The input."""
        return input

    def extra_repr(self) -> str:
        """What was there, and who does it now."""
        return f"{self.__dict__['original']}, applied by {self.linear}"


class _Pair(NamedTuple):
    parent: nn.Module
    linear: str
    activation: str


def fuse_(model: nn.Module, *, on_failure: OnFailure | None = None) -> dict[str, str]:
    """Apply activations and add residuals in the quantized Linears before them, and join Linears that read one input;
    in place.

    Args:
        model: looked through as a whole.
        on_failure: is handed, before anything is changed, a function that undoes it.

    Returns:
        Name of each Linear that changed -> what it does now, in words.
    """
    family = _Family(model)
    pairs = [pair for parent in model.modules() for pair in family.pairs(parent)]
    groups = [group for parent in model.modules() for group in family.groups(parent)]
    grouped = [layer for group in groups for layer in group]
    sums = [(parent, form) for parent in model.modules() if (form := family.sum(parent, grouped)) is not None]
    if on_failure is not None:
        on_failure(_restorer(pairs, grouped, [parent for parent, _ in sums]))
    done: dict[str, str] = {}
    for parent, linear, activation in pairs:
        layer, function = parent._modules[linear], parent._modules[activation]
        if isinstance(layer, QuantLinear) and function is not None:
            layer.epilogue = epilogue_of(function)
            parent._modules[activation] = Passed(function, linear).train(function.training)
            done[family.names[id(layer)]] = f"applies {activation}"
    for parent, form in sums:
        name = family.names[id(parent._modules[form.linear])]
        done[name] = "; ".join([*([done[name]] if name in done else []), f"adds {form.arguments[form.residual]}"])
        add_inside(parent, form)
    for members in groups:
        names = [family.names[id(layer)] for layer in members]
        shared = InputGroup(len(members))
        for slot, (layer, name) in enumerate(zip(members, names, strict=True)):
            layer._group = (shared, slot)
            shared.join(slot, layer)
            others = " and ".join(other.rpartition(".")[2] for other in names if other != name)
            done[name] = "; ".join([*([done[name]] if name in done else []), f"runs with {others}"])
    return done


def unfuse_(model: nn.Module, *, on_failure: OnFailure | None = None) -> None:
    """Put back every activation and sum that :func:`fuse_` took, and let every Linear run by itself.

    Args:
        model: looked through as a whole.
        on_failure: is handed, before anything is changed, a function that undoes it.
    """
    pairs = [
        _Pair(parent, child.linear, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, Passed)
    ]
    grouped = [m for m in model.modules() if isinstance(m, QuantLinear) and m._group is not None]
    sums = [module for module in model.modules() if adds_inside(module)]
    if on_failure is not None:
        on_failure(_restorer(pairs, grouped, sums))
    for parent in sums:
        add_outside(parent)
    for member in grouped:
        member._group = None
    for parent, linear, name in pairs:
        layer, passed = parent._modules.get(linear), parent._modules[name]
        if isinstance(layer, QuantLinear):
            layer.epilogue = None
        if isinstance(passed, Passed):
            parent._modules[name] = passed.__dict__["original"].train(passed.training)


def _restorer(pairs: list[_Pair], grouped: list[QuantLinear], sums: list[nn.Module]) -> Callable[[], None]:
    """A function that makes both halves of each pair, the group of each layer and where modules add what they are
    now."""
    inside = [(module, module.__dict__.get("_residual_sum")) for module in sums]
    groups = [layer._group for layer in grouped]
    now = [(p, p.parent._modules.get(p.linear), p.parent._modules.get(p.activation)) for p in pairs]
    epilogues = [layer.epilogue if isinstance(layer, QuantLinear) else None for _, layer, _ in now]

    def restore() -> None:
        for (pair, layer, activation), epilogue in zip(now, epilogues, strict=True):
            if isinstance(layer, QuantLinear):
                layer.epilogue = epilogue
            pair.parent._modules[pair.activation] = activation
        for layer, group in zip(grouped, groups, strict=True):
            layer._group = group
        for module, form in inside:
            if adds_inside(module):
                add_outside(module)
            if form is not None:
                add_inside(module, form)

    return restore


class _Family:
    """Who is whose child in a model, and how parents call their children."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self._parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                self._parents.setdefault(id(child), []).append((parent, name))
        self._model = model
        self._graphs: dict[int, list[fx.Graph]] = {}

    def pairs(self, parent: nn.Module) -> list[_Pair]:
        """The children of ``parent`` that can be fused."""
        own = {name: child for name, child in parent._modules.items() if child is not None and self._separable(child)}
        linears = [name for name, child in own.items() if isinstance(child, QuantLinear) and not child.epilogue]
        activations = [name for name, child in own.items() if epilogue_of(child) is not None]
        if not linears or not activations or not self._called_as_a_whole(parent):
            return []
        graphs = self._traced(parent)
        return [
            _Pair(parent, linear, activation)
            for linear in linears
            for activation in activations
            if graphs and all(_feeds(graph, linear, activation) for graph in graphs)
        ]

    def groups(self, parent: nn.Module) -> list[list[QuantLinear]]:
        """The children of ``parent`` that read one input and quantize it alike."""
        own = {
            name: child
            for name, child in parent._modules.items()
            if type(child) is QuantLinear and child._group is None and self._in_one_place(child)
        }
        groups = [[own[name] for name in names] for names in readers(parent, list(own))]
        return [
            members
            for members in groups
            if type(members[0]._prepared) is PreparedW8A8 and all(compatible(members[0], m) for m in members[1:])
        ]

    def sum(self, parent: nn.Module, grouped: list[QuantLinear]) -> Sum | None:
        """How ``parent`` adds a residual to the output of a child that can add it itself."""
        form = sum_of(parent) if _replaceable(type(parent)) else None
        if form is None:
            return None
        names = (form.linear, *form.between, *form.after)
        if any(hasattr(type(parent), name) or parent._modules.get(name) is None for name in names):
            return None
        linear = parent._modules[form.linear]
        able = type(linear) is QuantLinear and linear._prepared.fuses and linear._group is None
        able = able and all(linear is not member for member in grouped)
        passing = all(type(parent._modules[name]) in TRANSPARENT for name in form.between)
        quiet = all(self._separable(parent.get_submodule(name)) for name in (form.linear, *form.between))
        return form if able and passing and quiet else None

    def _in_one_place(self, child: nn.Module) -> bool:
        return len(self._parents[id(child)]) == 1

    def _separable(self, child: nn.Module) -> bool:
        hooked = any((child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks))
        return not hooked and self._in_one_place(child)

    def _traced(self, module: nn.Module) -> list[fx.Graph]:
        """:func:`_traces`, once for all that ask: a container may be the parent of many."""
        if id(module) not in self._graphs:
            self._graphs[id(module)] = _traces(module)
        return self._graphs[id(module)]

    def _called_as_a_whole(self, module: nn.Module) -> bool:
        """Whether nobody calls the children of a container past its ``forward``."""
        if module is self._model or not isinstance(module, nn.Sequential):
            return not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        for parent, name in self._parents[id(module)]:
            graphs = self._traced(parent)
            targets = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
            if not graphs or any(target.startswith(f"{name}.") for target in targets):
                return False
            if not self._called_as_a_whole(parent):
                return False
        return True


def _replaceable(kind: type) -> bool:
    """Whether instances of a class may become instances of a subclass, and are copied and pickled as usual."""
    own = ("__slots__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__")
    return type(kind) is type and not any(name in vars(base) for base in kind.__mro__[:-1] for name in own)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Children are called, never entered."""
        return True


def _traces(module: nn.Module) -> list[fx.Graph]:
    """How ``forward`` calls the children: with its optional arguments given, and without them.  Empty where either
    cannot be traced."""
    if "forward" in module.__dict__:  # somebody else's wrapper, which a trace of the class would not see
        return []
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return [_trace(module, {}), *([_trace(module, defaults)] if defaults else [])]
    except Exception:  # whatever a forward raises over placeholders: it cannot be traced
        return []


def _trace(module: nn.Module, defaults: Mapping[str, Any]) -> fx.Graph:
    """Traced over a copy, so that what ``forward`` may assign does not stay."""
    double = type(module).__new__(type(module))
    double.__dict__.update(module.__dict__)
    for own in ("_modules", "_parameters", "_buffers"):
        double.__dict__[own] = dict(module.__dict__[own])
    with torch.random.fork_rng(devices=[]):  # what it may draw is drawn for real
        return _Tracer().trace(double, dict(defaults))


def _feeds(graph: fx.Graph, linear: str, activation: str) -> bool:
    """Whether one call of ``linear`` feeds the one call of ``activation``, and nothing else sees its output."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    producers = [node for node in calls if node.target == linear]
    consumers = [node for node in calls if node.target == activation]
    return (
        len(producers) == len(consumers) == 1
        and consumers[0].args == (producers[0],)
        and not consumers[0].kwargs
        and list(producers[0].users) == consumers
    )
