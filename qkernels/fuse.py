"""Fewer passes over memory, chosen from how modules call their children, and reversible.

Activation modules are applied inside the Linear before them; Linears that read one input run as one product (see
:mod:`qkernels.groups`); residuals are added inside the Linear (see :mod:`qkernels.residuals`); on a GPU, norms and
activations quantize their output in the pass that computes it, where Linears of 8-bit inputs alone read it, norms and
gated activations are one kernel, where weight-only Linears do (:mod:`qkernels.norms`, :mod:`qkernels.deferred`), and so
are rotary embeddings and attention of few queries; on a CPU every norm is one kernel, and attention another
(:mod:`qkernels.attention`).

An activation is fused where the parent's own ``forward``, traced with every child as a leaf, calls the quantized Linear
once, hands its output to the activation and to nothing else, and calls the activation once.  The Linear gets the
epilogue and the activation becomes a :class:`Passed`, which returns its input.  Left alone are children that sit in
several places, children with hooks, which could see the difference, and parents whose ``forward`` cannot be traced.  An
``nn.Sequential`` is only trusted where those around it call it as a whole.  Nothing in a state dict changes.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .attention import AttentionForward, attends, in_words
from .cpu_packed import PreparedPacked
from .cpu_w8a8 import PreparedW8A8
from .deferred import Handoff
from .epilogues import epilogue_of
from .flow import linears_behind
from .groups import InputGroup, compatible, has_another_forward, quantize_alike, readers
from .joint import Joinable
from .linear import QuantLinear
from .norms import Norm, NormForward, NormHandoff, norm_of
from .prepared import Prepared
from .residuals import TRANSPARENT, Sum, add_inside, add_outside, adds_inside, sum_of
from .sums import linear_added_before

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
    """``activation`` follows ``linear``; ``reader``, if any, reads what it gives (``gated``: times something else)."""

    parent: nn.Module
    linear: str
    activation: str
    reader: str | None = None
    gated: bool = False


class _Read(NamedTuple):
    """A norm, and the Linears that alone read its output."""

    module: nn.Module
    norm: Norm
    readers: list[QuantLinear]
    added: QuantLinear | None = None  # what it reads is the sum of this one's output and something else


def fuse_(model: nn.Module, *, on_failure: OnFailure | None = None) -> dict[str, str]:
    """Apply activations and add residuals in the quantized Linears before them, join Linears that read one input, let
    norms and activations hand integers, or what one kernel computes, to the Linears behind them on a GPU, and norms and
    attention blocks call kernels; in place.

    Args:
        model: looked through as a whole.
        on_failure: is handed, before anything is changed, a function that undoes it.

    Returns:
        Name of each Linear and norm that changed -> what it does now, in words.
    """
    family = _Family(model)
    pairs = [pair for parent in model.modules() for pair in family.pairs(parent)]
    groups = [group for parent in model.modules() for group in family.groups(parent)]
    grouped = [layer for group in groups for layer in group if type(layer._prepared) is PreparedW8A8]
    reads = [read for parent in model.modules() for read in family.reads(parent)]
    sums = [(parent, form) for parent in model.modules() if (form := family.sum(parent, grouped)) is not None]
    blocks = [module for module in model.modules() if family.children_of(module) and attends(module)]
    norms = family.norms_on_cpus()
    if on_failure is not None:
        forwards = [*(read.module for read in reads), *(module for module, _ in norms), *blocks]
        on_failure(_restorer(model, pairs, forwards, [parent for parent, _ in sums]))
    done: dict[str, str] = {}

    def note(layer: nn.Module, words: str) -> None:
        name = family.names[id(layer)]
        if words:
            done[name] = "; ".join(filter(None, (done.get(name), words)))

    for parent, linear, activation, _, _ in pairs:
        layer, function = parent._modules[linear], parent._modules[activation]
        if isinstance(layer, QuantLinear) and function is not None:
            layer.epilogue = epilogue_of(function)
            parent._modules[activation] = Passed(function, linear).train(function.training)
            note(layer, f"applies {activation}")
    for parent, form in sums:
        layer = parent._modules[form.linear]
        if layer is not None:
            note(layer, f"adds {form.arguments[form.residual]}")
        add_inside(parent, form)
    for members in groups:
        names = [family.names[id(layer)] for layer in members]
        shared = InputGroup(len(members))
        for slot, layer in enumerate(members):
            layer.beside((shared, slot))
        shared.settle()
        for layer, name in zip(members, names, strict=True):
            others = " and ".join(other.rpartition(".")[2] for other in names if other != name)
            note(layer, f"runs with {others}" if shared.joined or type(layer._prepared) is PreparedW8A8 else "")
    for parent, linear, activation, name, gated in pairs:
        layer, reader = parent._modules[linear], parent._modules.get(name or "")
        if not isinstance(layer, QuantLinear) or not isinstance(reader, QuantLinear):
            continue
        if family.takes_codes(reader) or (gated and family.takes_floats(reader)):
            layer.feed((_join(reader), gated))
            note(reader, _words(reader, activation, "product"))
    for module, norm, layers, added in reads:
        if layers[0]._reads is None:
            module.__dict__["forward"] = NormHandoff(module, norm, _join(layers[0]))
            adds = added is not None and added._adds is None
            for layer in layers:
                source = family.names[id(module)].rpartition(".")[2]
                note(layer, _words(layer, source, "residual" if adds else ""))
            if added is not None and adds:
                added._adds = layers[0]._reads
                if _words(layers[0], ""):
                    note(added, f"added by {family.names[id(module)]}")
    for module, norm in norms:
        if "forward" not in module.__dict__:
            module.__dict__["forward"] = NormForward(module, norm)
        note(module, "a norm, by a kernel")
    for module in blocks:
        module.__dict__["forward"] = AttentionForward(module)
        first = family.children_of(module)[0]
        note(first, in_words(module, first._device()))
    return done


def _words(reader: QuantLinear, source: str, beside: str = "") -> str:
    """What the report says of a Linear whose input comes from a kernel, which takes ``beside`` into ``source``; nothing
    where no kernel makes it."""
    if reader.scheme.weight_only:
        pass_of = f"{source} and {beside}" if beside else source
        return f"{pass_of} in one pass" if reader._prepared.takes_floats() else ""
    return f"reads {source} as integers" if reader._device().type == "cuda" else ""


def _join(reader: QuantLinear) -> Handoff:
    reader._reads = Handoff()
    reader._reads.join(reader)
    return reader._reads


def unfuse_(model: nn.Module, *, on_failure: OnFailure | None = None) -> None:
    """Put back every activation and sum that :func:`fuse_` took, and let every Linear and every norm run by itself.

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
    handing = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), (NormForward, AttentionForward))]
    sums = [module for module in model.modules() if adds_inside(module)]
    if on_failure is not None:
        on_failure(_restorer(model, pairs, handing, sums))
    for parent in sums:
        add_outside(parent)
    for member in _linears(model):
        member.beside(None)
        member.feed(None)
        member._adds = None
        if member._reads is not None:
            member._reads.leave()
            member._reads = None
    for module in handing:
        del module.__dict__["forward"]
    for parent, linear, name, _, _ in pairs:
        layer, passed = parent._modules.get(linear), parent._modules[name]
        if isinstance(layer, QuantLinear):
            layer.epilogue = None
        if isinstance(passed, Passed):
            parent._modules[name] = passed.__dict__["original"].train(passed.training)


def _linears(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def _restorer(
    model: nn.Module, pairs: list[_Pair], handing: list[nn.Module], sums: list[nn.Module]
) -> Callable[[], None]:
    """A function that makes both halves of each pair, every Linear, the ``forward`` of those that hand something on and
    where modules add what they are now."""
    layers = [(x, x.epilogue, x._group, x._reads, x._feeds, x._adds) for x in _linears(model)]
    activations = [(pair, pair.parent._modules.get(pair.activation)) for pair in pairs]
    forwards = [(module, module.__dict__.get("forward")) for module in handing]
    inside = [(module, module.__dict__.get("_residual_sum")) for module in sums]

    def restore() -> None:
        for layer, epilogue, group, reads, feeds, adds in layers:
            layer.epilogue, layer._reads, layer._adds = epilogue, reads, adds
            layer.feed(feeds)
            layer.beside(group)
            if reads is not None:
                reads.join(layer)
        for shared in {layer._group[0] for layer, *_ in layers if layer._group is not None}:
            shared.settle()
        for pair, activation in activations:
            pair.parent._modules[pair.activation] = activation
        for module, forward in forwards:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        for parent, form in inside:
            if adds_inside(parent):
                add_outside(parent)
            if form is not None:
                add_inside(parent, form)

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
        self._norms: dict[int, Norm | None] = {}

    def pairs(self, parent: nn.Module) -> list[_Pair]:
        """The children of ``parent`` that can be fused."""
        own = {name: child for name, child in parent._modules.items() if child is not None and self._separable(child)}
        linears = [name for name, child in own.items() if isinstance(child, QuantLinear) and not child.epilogue]
        activations = [name for name, child in own.items() if epilogue_of(child) is not None]
        if not linears or not activations or not self._called_as_a_whole(parent):
            return []
        graphs = self._traced(parent)
        return [
            _Pair(parent, linear, activation, *_reader(graphs, activation))
            for linear in linears
            for activation in activations
            if graphs and all(_feeds(graph, linear, activation) for graph in graphs)
        ]

    @staticmethod
    def children_of(parent: nn.Module) -> list[QuantLinear]:
        """The quantized Linears among the children of ``parent``."""
        return [child for child in parent._modules.values() if isinstance(child, QuantLinear)]

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
            if _groupable(members[0]._prepared) and all(compatible(members[0], m) for m in members[1:])
        ]

    def reads(self, parent: nn.Module) -> list[_Read]:
        """The norms among the children of ``parent`` whose output quantized Linears alone read."""
        found = []
        for name, child in parent._modules.items():
            if child is None or not self._separable(child) or not self._called_as_a_whole(parent):
                continue
            norm = self._norm(child)
            readers = None if norm is None else linears_behind(parent, name, lambda m: isinstance(m, QuantLinear))
            layers = [m for m in readers or () if isinstance(m, QuantLinear)]
            if norm is None or not layers:
                continue
            alike = all(map(self.takes_codes, layers)) and all(quantize_alike(layers[0], m) for m in layers[1:])
            if alike or all(map(self.takes_floats, layers)):
                added = linear_added_before(parent, name, self._before(parent), lambda m: isinstance(m, QuantLinear))
                if not isinstance(added, QuantLinear) or type(added) is not QuantLinear or not self._separable(added):
                    added = None
                found.append(_Read(child, norm, layers, added))
        return found

    def norms_on_cpus(self) -> list[tuple[nn.Module, Norm]]:
        """The norms of a model with quantized Linears that no kernel computes yet, without those of weights
        elsewhere."""
        if not _linears(self._model):
            return []
        found = []
        for module in self._model.modules():
            norm = None if "forward" in module.__dict__ else self._norm(module)
            if norm is not None and all(parameter.is_cpu for parameter in module.parameters()):
                found.append((module, norm))
        return found

    def _norm(self, module: nn.Module) -> Norm | None:
        """:func:`norm_of`, once for all that ask: some are tried on rows."""
        if id(module) not in self._norms:
            self._norms[id(module)] = norm_of(module)
        return self._norms[id(module)]

    def _before(self, block: nn.Module) -> nn.Module | None:
        """What stands before a block in a list of blocks, each of which is called with what the one before it returns:
        so it is taken to be, since only time is lost where it is not."""
        for container, name in self._parents.get(id(block), []):
            children = list(container._modules.values())
            index = list(container._modules).index(name)
            if isinstance(container, (nn.ModuleList, nn.Sequential)) and index:
                return children[index - 1]
        return None

    def takes_codes(self, child: QuantLinear) -> bool:
        """Whether a Linear multiplies 8-bit inputs by weights that the CUDA kernels serve, and nothing hands it
        integers yet."""
        return child.scheme.activation_bits == 8 and self._takes_rows(child)

    def takes_floats(self, child: QuantLinear) -> bool:
        """Whether a Linear multiplies floats by weights that the CUDA kernels serve, and no kernel was chosen for its
        input yet."""
        return child.scheme.weight_only and self._takes_rows(child)

    def _takes_rows(self, child: QuantLinear) -> bool:
        """Whether a Linear has 4-bit weights, or 8-bit ones per channel, and its input is nobody's business yet."""
        scheme = child.scheme
        weights = scheme.weight_bits == 4 or (scheme.weight_bits, scheme.weight_granularity) == (8, "per_channel")
        return weights and type(child) is QuantLinear and child._reads is None and self._in_one_place(child)

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


def _groupable(prepared: Prepared) -> bool:
    """Whether layers of a kind run as one: here, or once they are on a GPU."""
    scheme, packed = prepared.scheme, isinstance(prepared, PreparedPacked)
    joined_there = packed and (scheme.weight_bits == 4 or scheme.weight_granularity == "per_channel")
    return joined_there or type(prepared) is PreparedW8A8 or isinstance(prepared, Joinable)


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
    if has_another_forward(module):  # somebody else's wrapper, which a trace of the class would not see
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


def _reader(graphs: list[fx.Graph], activation: str) -> tuple[str | None, bool]:
    """The child that alone reads the output of ``activation``, and whether it reads its product with something."""
    found = {_reader_in(graph, activation) for graph in graphs}
    return found.pop() if len(found) == 1 else (None, False)


def _reader_in(graph: fx.Graph, activation: str) -> tuple[str | None, bool]:
    (node,) = (n for n in graph.nodes if n.op == "call_module" and n.target == activation)
    gated = False
    if len(node.users) == 1:
        (user,) = node.users
        product = user.op in ("call_function", "call_method") and user.target in (operator.mul, torch.mul, "mul")
        if product and len(user.args) == 2 and not user.kwargs and len(user.users) == 1:
            node, gated = user, user.args[0] is not user.args[1]
            (user,) = user.users
            if not gated:
                return None, False
        if user.op == "call_module" and user.args == (node,) and not user.kwargs:
            return str(user.target), gated
    return None, False


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
