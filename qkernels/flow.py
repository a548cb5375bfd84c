"""Which Linears read what a child computes, from the source of the parent's ``forward`` and of those it calls.

As in :mod:`qkernels.groups`, code is only read, never run, and whatever is not plain counts as unknown.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from torch import nn

from .groups import NOT_ONCE, called_child, mentions, parsed

__all__ = ["linears_behind"]

_MOST_DEPTH = 4
_ASKED = frozenset({"shape", "dtype", "device", "ndim", "is_cuda"})
"""Attributes that do not look at values."""


def linears_behind(parent: nn.Module, name: str, is_linear: Callable[[nn.Module], bool]) -> list[nn.Module] | None:
    """The Linears that read the output of ``parent.name``, if nothing else does.

    Args:
        parent: calls ``name`` once, in the straight part of its ``forward``.
        is_linear: which modules end the search.

    Returns:
        In the order of their calls, at least one; None where something else may see the output.
    """
    function = None if "forward" in parent.__dict__ else parsed(type(parent).forward)
    if function is None or not function.args.args or mentions(function, name) != 1:
        return None
    own = function.args.args[0].arg
    for index, statement in enumerate(function.body):
        for call in _calls(statement, own):
            inner = [argument for argument in _arguments(call) if _is_call_of(argument[1], name, own)]
            if inner:  # self.mlp(self.norm(x))
                return _through(parent, [(call, inner[0][0])], is_linear, 0)
        if isinstance(statement, ast.Assign) and _is_call_of(statement.value, name, own):
            target = statement.targets[0]
            if len(statement.targets) != 1 or not isinstance(target, ast.Name):
                return None
            reads = _reads(function.body[index + 1 :], target.id, own)
            return None if reads is None else _through(parent, reads, is_linear, 0)
    return None


Place = int | str
"""Of an argument: its position, or its keyword."""


def _reads(statements: list[ast.stmt], variable: str, own: str) -> list[tuple[ast.Call, Place]] | None:
    """The calls of children that are handed ``variable`` before it gets another value; None for any other use."""
    found: list[tuple[ast.Call, Place]] = []
    for statement in statements:
        uses = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == variable]
        if not uses:
            continue
        if not isinstance(statement, (ast.Assign, ast.Expr, ast.Return)):
            return None
        if any(isinstance(node, NOT_ONCE) for node in ast.walk(statement) if node is not statement):
            return None
        harmless: set[ast.AST] = set()
        for call in _calls(statement, own):
            for place, argument in _arguments(call):
                if isinstance(argument, ast.Name) and argument.id == variable:
                    found.append((call, place))
                    harmless.add(argument)
        harmless.update(_asked(statement))
        if any(isinstance(use.ctx, ast.Load) and use not in harmless for use in uses):
            return None
        if any(isinstance(use.ctx, ast.Del) for use in uses):
            return None
        if any(isinstance(use.ctx, ast.Store) for use in uses):
            break
    return found


def _through(
    parent: nn.Module, reads: list[tuple[ast.Call, Place]], is_linear: Callable[[nn.Module], bool], depth: int
) -> list[nn.Module] | None:
    """The Linears behind calls of children of ``parent``."""
    linears: list[nn.Module] = []
    for call, place in reads:
        child = parent._modules.get(call.func.attr)  # type: ignore[attr-defined]
        if child is None:
            return None
        if is_linear(child):
            if place != 0 or len(_arguments(call)) != 1:
                return None
            linears.append(child)
            continue
        inner = _behind_parameter(child, place, is_linear, depth + 1)
        if inner is None:
            return None
        linears += inner
    return linears or None


def _behind_parameter(
    module: nn.Module, place: Place, is_linear: Callable[[nn.Module], bool], depth: int
) -> list[nn.Module] | None:
    function = None if depth > _MOST_DEPTH or "forward" in module.__dict__ else parsed(type(module).forward)
    if function is None or len(function.args.args) < 2:
        return None
    own, *names = (argument.arg for argument in function.args.args)
    if isinstance(place, int):
        if place >= len(names):
            return None
        place = names[place]
    elif place not in names:
        return None
    nested = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    if any(_names(n, place) for n in ast.walk(function) if isinstance(n, nested) and n is not function):
        return None
    reads = _reads(function.body, place, own)
    if reads is None or any(mentions(function, call.func.attr) != 1 for call, _ in reads):  # type: ignore[attr-defined]
        return None
    return _through(module, reads, is_linear, depth)


def _names(tree: ast.AST, variable: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == variable for node in ast.walk(tree))


def _calls(tree: ast.AST, own: str) -> Iterator[ast.Call]:
    """``own.child(...)`` anywhere in a statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called_child(node, own) is not None:
            yield node


def _is_call_of(node: ast.AST, name: str, own: str) -> bool:
    called = called_child(node, own)
    return called is not None and called[0] == name


def _arguments(call: ast.Call) -> list[tuple[Place, ast.expr]]:
    named: list[tuple[Place, ast.expr]] = [(k.arg, k.value) for k in call.keywords if k.arg is not None]
    return [*enumerate(call.args), *named]


def _asked(tree: ast.AST) -> Iterator[ast.AST]:
    """What is only asked for its attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _ASKED:
            yield node.value
