"""Sums that end in a norm: which Linear gives a term of them, from the source of a block's ``forward``.

In a pre-norm decoder a block adds what its attention gives to the residual stream, and the next norm reads the sum:

    hidden, _ = self.attention(self.first(hidden))      attention returns self.out(...)
    hidden = residual + hidden
    hidden = self.mlp(self.second(hidden))              second reads the sum

So does the norm at the beginning of the block behind it, with what the MLP gives.  As in :mod:`qkernels.groups`, code
is only read, never run, and whatever is not plain counts as unknown.  Where a reading is wrong after all, nothing is
lost but the fusion: a sum that waits (:class:`qkernels.deferred.PendingSum`) is formed by whoever reads it first.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from .groups import called_child, mentions, parsed_forward

__all__ = ["linear_added_before"]

_MOST_DEPTH = 4

IsLinear = Callable[[nn.Module], bool]


def linear_added_before(
    parent: nn.Module, norm: str, before: nn.Module | None, is_linear: IsLinear
) -> nn.Module | None:
    """The Linear whose output, added to something, is what ``parent.norm`` reads.

    Args:
        parent: calls ``norm`` once.
        before: what is called before ``parent`` on the same stream, such as the block in front of it in a list.
        is_linear: which modules end the search.
    """
    function = parsed_forward(parent)
    if function is None or len(function.args.args) < 2 or mentions(function, norm) != 1:
        return None
    own, first = (argument.arg for argument in function.args.args[:2])
    for index, statement in enumerate(function.body):
        for node in ast.walk(statement):
            called = called_child(node, own)
            if called is None or called[0] != norm:
                continue
            if called[1] is None:
                return None
            child, entry = _term(function.body[:index], ast.Name(called[1], ast.Load()), own)
            if child is not None:
                return _last_linear(parent._modules.get(child), is_linear, 0)
            return _left_by(before, is_linear) if entry == first else None
    return None


def _left_by(block: nn.Module | None, is_linear: IsLinear) -> nn.Module | None:
    """The Linear whose output, added to something, is what a block returns."""
    function = None if block is None else parsed_forward(block)
    if block is None or function is None or not function.args.args:
        return None
    returned = _returned(function)
    if returned is None:
        return None
    child, _ = _term(function.body[:-1], returned, function.args.args[0].arg)
    return None if child is None else _last_linear(block._modules.get(child), is_linear, 0)


def _returned(function: ast.FunctionDef) -> ast.expr | None:
    """What the only ``return``, at the end, gives alone or first."""
    last = function.body[-1]
    if not isinstance(last, ast.Return) or sum(isinstance(node, ast.Return) for node in ast.walk(function)) != 1:
        return None
    return last.value.elts[0] if isinstance(last.value, ast.Tuple) and last.value.elts else last.value


def _term(statements: Sequence[ast.stmt], node: ast.expr, own: str) -> tuple[str | None, str | None]:
    """Of the sum that an expression is behind ``statements``: the child that gives a term.

    Returns:
        (child, None); (None, variable) for a variable that has not got a value there; (None, None) for anything else.
    """
    if isinstance(node, ast.Name):
        for index, value in _values_of(statements, node.id):
            quiet = value is not None and all(_gives_a_name(statement) for statement in statements[index + 1 :])
            return _term(statements[:index], value, own) if value is not None and quiet else (None, None)
        return None, node.id if all(_gives_a_name(statement) for statement in statements) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for side in (node.right, node.left):
            child = _child_behind(statements, side, own)
            if child is not None:
                return child, None
    return None, None


def _gives_a_name(statement: ast.stmt) -> bool:
    """Whether a statement only calls a variable by another name: what lies between a sum and its norm must not write to
    its terms, which torch does not count in inference mode."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
        return False
    return all(isinstance(target, ast.Name) for target in statement.targets)


def _child_behind(statements: Sequence[ast.stmt], node: ast.expr, own: str) -> str | None:
    """The child whose output an expression is, whole or the first of several."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == 0:
        node = node.value
    called = called_child(node, own)
    if called is not None:
        return called[0]
    if not isinstance(node, ast.Name):
        return None
    for index, value in _values_of(statements, node.id):
        return None if value is None else _child_behind(statements[:index], value, own)
    return None


def _values_of(statements: Sequence[ast.stmt], variable: str) -> Iterator[tuple[int, ast.expr | None]]:
    """What gives ``variable`` its value, the last first: number of the statement, and value; None if not plain."""
    for index in range(len(statements) - 1, -1, -1):
        statement = statements[index]
        stores = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == variable]
        if all(isinstance(name.ctx, ast.Load) for name in stores):
            continue
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            yield index, None
            continue
        target = statement.targets[0]
        if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Call):
            target = target.elts[0]
        plain = isinstance(target, ast.Name) and target.id == variable
        yield index, statement.value if plain else None


def _last_linear(module: nn.Module | None, is_linear: IsLinear, depth: int) -> nn.Module | None:
    """The Linear whose output a module returns, whole or first of several."""
    if module is None or is_linear(module):
        return module
    function = None if depth > _MOST_DEPTH else parsed_forward(module)
    if function is None or not function.args.args:
        return None
    returned = _returned(function)
    child = None if returned is None else _child_behind(function.body[:-1], returned, function.args.args[0].arg)
    if child is None or mentions(function, child) != 1:
        return None
    return _last_linear(module._modules.get(child), is_linear, depth + 1)
