"""Sums with a residual inside the Linear before them, where the source of a module leaves no other reading.

A module whose whole ``forward`` is

    sum = dropout(linear(a)) + b        any number of dropouts, or none; the sides of the sum in either order
    return norm(sum)                    any modules called on the sum, or none

(the output blocks of BERT and its relatives) can hand ``b`` to the Linear instead.  Such a module becomes an instance
of a subclass of its own class that does so; attributes, children, hooks and state dict stay what they are.  Whenever
the Linear cannot add (dropout is active, somebody's hook waits for what lies between, dtypes differ, autocast), the
class's own ``forward`` runs.  In float32 both give the same bits; in bfloat16 and float16 one rounding falls away.

Residuals that are added in another module than the one that calls the Linear (decoders add them two levels above) are
not found: no module sees both.  ``QuantLinear.forward`` takes them by hand.
"""

from __future__ import annotations

import ast
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .groups import parsed_forward
from .linear import QuantLinear

__all__ = ["TRANSPARENT", "Sum", "add_inside", "add_outside", "adds_inside", "sum_of"]

TRANSPARENT = (nn.Dropout, nn.Identity)
"""What returns its input, unless it is a dropout in training mode."""


class Sum(NamedTuple):
    """A ``forward`` of the form above.

    Attributes:
        linear: name of the child that is added to.
        between, after: names of the children called on its output and on the sum, in order.
        input, residual: numbers of the arguments ``a`` and ``b``.
        arguments: names of all arguments.
    """

    linear: str
    between: tuple[str, ...]
    after: tuple[str, ...]
    input: int
    residual: int
    arguments: tuple[str, ...]


# -- reading the source -----------------------------------------------------------------------------------------------

# What an expression is: the argument of that number, the child of that name called on a value, or a sum of two.
_Value = tuple[Any, ...]


def sum_of(module: nn.Module) -> Sum | None:
    """How ``type(module).forward`` adds a residual; None where it is anything else than the form above."""
    function = parsed_forward(module)
    if function is None or function.decorator_list or not _plain(function.args):
        return None
    own, *arguments = (argument.arg for argument in function.args.args)
    reader = _Reader(own, arguments)
    value = reader.returned(function.body)
    after, value = _calls(value)
    if value is None or value[0] != "sum":
        return None
    for side, other in (value[1:], value[:0:-1]):
        between, start = _calls(side)
        if between and start is not None and start[0] == other[0] == "argument":
            linear, *rest = between
            if reader.calls != len(between) + len(after):
                return None  # something is called whose result nobody uses
            return Sum(linear, tuple(rest), tuple(after), start[1], other[1], tuple(arguments))
    return None


def _plain(arguments: ast.arguments) -> bool:
    """Positional arguments alone, all of them required."""
    others = (arguments.posonlyargs, arguments.vararg, arguments.kwonlyargs, arguments.kwarg, arguments.defaults)
    return len(arguments.args) > 1 and not any(others)


def _calls(value: _Value | None) -> tuple[list[str], _Value | None]:
    """The children called on one another at the end of a value, the first to be called first, and what is below."""
    names: list[str] = []
    while value is not None and value[0] == "child":
        names.insert(0, value[1])
        value = value[2]
    return names, value


class _Reader:
    def __init__(self, own: str, arguments: list[str]) -> None:
        self._own = own
        self._values: dict[str, _Value] = {name: ("argument", number) for number, name in enumerate(arguments)}
        self.calls = 0

    def returned(self, body: list[ast.stmt]) -> _Value | None:
        """What assignments, one after the other, and one return at their end come to."""
        *statements, last = body
        for statement in statements:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                return None
            (target,), value = statement.targets, self._value(statement.value)
            if not isinstance(target, ast.Name) or value is None:
                return None
            self._values[target.id] = value
        return self._value(last.value) if isinstance(last, ast.Return) and last.value is not None else None

    def _value(self, node: ast.expr) -> _Value | None:
        if isinstance(node, ast.Name):
            return self._values.get(node.id)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._value(node.left), self._value(node.right)
            return None if left is None or right is None else ("sum", left, right)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1):
            return None
        owner = node.func.value
        if node.keywords or not (isinstance(owner, ast.Name) and owner.id == self._own):
            return None
        self.calls += 1
        value = self._value(node.args[0])
        return None if value is None else ("child", node.func.attr, value)


# -- the subclass -----------------------------------------------------------------------------------------------------


class _AddsInside:
    """Put in front of a class: its ``forward``, with the residual added inside the Linear."""

    _modules: dict[str, Any]
    _residual_sum: Sum

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        form = self._residual_sum
        given = args
        if kwargs:
            given += tuple(kwargs[name] for name in form.arguments[len(args) :] if name in kwargs)
        if len(args) + len(kwargs) == len(given) == len(form.arguments):
            children, x, residual = self._modules, given[form.input], given[form.residual]
            if _can_add(children[form.linear], x, residual) and all(_passes(children[name]) for name in form.between):
                y = children[form.linear](x, residual=residual)
                for name in form.after:
                    y = children[name](y)
                return y
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: the class of somebody else, which can be imported."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return (_blank, (type(self).__mro__[2],), *reduced[2:])


def _can_add(linear: object, x: object, residual: object) -> bool:
    return (
        type(linear) is QuantLinear
        and linear._prepared.fuses
        and not linear._forward_hooks
        and isinstance(x, Tensor)
        and isinstance(residual, Tensor)
        and x.dtype == residual.dtype
        and x.device == residual.device
        and residual.shape == (*x.shape[:-1], linear.out_features)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _passes(child: object) -> bool:
    """Whether it returns its input, and nobody listens."""
    if not isinstance(child, TRANSPARENT) or child._forward_hooks or child._forward_pre_hooks:
        return False
    return not (isinstance(child, nn.Dropout) and child.training and child.p > 0)


@functools.cache
def _subclass(base: Any) -> Any:
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (_AddsInside, base), names)


def _blank(base: Any) -> Any:
    kind = _subclass(base)
    return kind.__new__(kind)


def adds_inside(module: nn.Module) -> bool:
    """Whether :func:`add_inside` was applied."""
    return isinstance(module, _AddsInside)


def add_inside(module: nn.Module, form: Sum) -> None:
    """Make a module of that form add inside its Linear."""
    module.__dict__["_residual_sum"] = form
    kind: Any = type(module)
    module.__class__ = _subclass(kind)


def add_outside(module: nn.Module) -> Sum:
    """The way back; returns the form."""
    module.__class__ = type(module).__mro__[2]
    return module.__dict__.pop("_residual_sum")  # type: ignore[no-any-return]
