"""Linears that read one input run as one product: query, key and value; gate and up.

The first of a group to be called quantizes the input once, multiplies for all of them in one parallel region, or on a
GPU in one launch over weights that lie side by side (:mod:`qkernels.joint`), and keeps what belongs to the others until
they are called with the very same tensor.  Any other call runs alone.  Which layers form a group is read from the
source of their parent's ``forward`` (:func:`readers`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _C, cuda
from .checks import DTYPE_CODES
from .cpu_w8a8 import PreparedW8A8
from .deferred import Deferred, version
from .eager import is_plain
from .joint import Joinable, Joint, join, separate
from .scheme import Scheme

if TYPE_CHECKING:
    from .linear import QuantLinear

__all__ = [
    "NOT_ONCE",
    "InputGroup",
    "called_child",
    "compatible",
    "has_another_forward",
    "mentions",
    "parsed",
    "parsed_forward",
    "quantize_alike",
    "readers",
]

_new_empty = Tensor.new_empty
_num_threads = torch.get_num_threads
_dtype_code = DTYPE_CODES.get
_strided = torch.strided

_MIN_ROWS, _MIN_ROWS_OF_ONE_THREAD = 2, 32
"""Fewer rows gain nothing: what one quantization and one parallel region less save, the bookkeeping costs (measured at
384 to 4096 features with two threads, and with one, which has no region to save)."""


class InputGroup:
    """Layers over one input, in the order in which they are called.

    It refers to its members weakly, and a copy (or pickle) of it starts empty: copies of the members join it.

    Args:
        size: number of members.
    """

    def __init__(self, size: int) -> None:
        self._members: list[weakref.ref[QuantLinear] | None] = [None] * size
        self._natives: list[Any] = []
        self._rows: list[int] = []
        self._run: Any = None
        self._joint: Joint | None = None
        self._settled = 0  # how often: what was computed before is not taken up after
        self._waiting = threading.local()

    def __getstate__(self) -> int:
        """For copies and pickles: nothing but the size."""
        return len(self._members)

    def __setstate__(self, size: int) -> None:
        """Empty."""
        self.__init__(size)  # type: ignore[misc]

    def join(self, slot: int, layer: QuantLinear) -> None:
        """Make ``layer`` member number ``slot``."""
        self._members[slot] = weakref.ref(layer)

    @property
    def joined(self) -> bool:
        """Whether the weights of the members lie in one memory."""
        return self._joint is not None

    def leave(self, slot: int) -> None:
        """Let a member go, with memory of its own."""
        reference, self._members[slot], self._joint = self._members[slot], None, None
        layer = None if reference is None else reference()
        if layer is not None and isinstance(layer._prepared, Joinable):
            separate(layer._prepared)

    def settle(self) -> None:
        """To be called when members joined, moved or got other tensors: brings the weights of all into one memory,
        where all are on one GPU and its kernels serve that."""
        joint, self._joint = self._joint, None
        self._settled += 1
        members = self._present()
        if members is None or not isinstance(members[0]._prepared, Joinable) or members[0]._device().type == "meta":
            return
        prepared = [member._prepared for member in members]
        alike = all(compatible(members[0], member) for member in members[1:])
        held = joint is not None and joint.holds(prepared)
        if held and not alike:  # they were, until other values were loaded
            for each in prepared:
                if isinstance(each, Joinable):
                    separate(each)
        if not held or not alike:
            joint = join(prepared) if alike else None
        self._joint = joint

    def _present(self) -> list[QuantLinear] | None:
        """The members; None where one is missing."""
        found = [None if reference is None else reference() for reference in self._members]
        members = [member for member in found if member is not None]
        return members if len(members) == len(found) else None

    def _run_joint(self, joint: Joint, layer: QuantLinear, slot: int, x: Tensor) -> Tensor:
        """:meth:`run` over weights in one memory."""
        waiting, prepared = self._waiting, layer._prepared
        if slot:
            ahead = getattr(waiting, "ahead", None)
            if ahead is not None and ahead[0] is x and ahead[1] == (_state(x), self._settled, _place(x)):
                outputs = ahead[2]
                y, outputs[slot] = outputs[slot], None  # a second call is a product of its own
                if slot + 1 == len(self._members):
                    waiting.ahead = None
                if y is not None:
                    return prepared.finished(y)
            return prepared.run(x)
        waiting.ahead = None
        members = [m._prepared for ref in self._members if ref is not None and (m := ref()) is not None]
        if len(members) != len(self._members) or not joint.holds(members):
            self._joint = None
            return prepared.run(x)
        outputs = joint.run(x)
        if outputs is None:
            return prepared.run(x)
        waiting.ahead = (x, (_state(x), self._settled, _place(x)), [None, *outputs[1:]])
        return prepared.finished(outputs[0])

    def run(self, layer: QuantLinear, slot: int, x: Tensor) -> Tensor:
        """What ``layer(x)`` is."""
        joint = self._joint
        if joint is not None:
            return self._run_joint(joint, layer, slot, x)
        if type(layer._prepared) is not PreparedW8A8:
            return layer._prepared.run(x)
        # As in PreparedW8A8.run, every line here was timed: for one row it all costs as much as the product.
        waiting = self._waiting
        if slot:
            held, prepared = getattr(waiting, "held", None), layer._prepared
            if (
                held is not None
                and held[0] is x
                and held[1] == (-1 if x.is_inference() else x._version)
                and prepared.native() is held[2][slot]  # the weights are those that were multiplied with
            ):
                y = held[3][slot]
                if slot + 1 == len(self._members):
                    waiting.held = None
                else:
                    held[3][slot] = None  # a second call is a product of its own
                if y is not None:
                    return y  # type: ignore[no-any-return]
            return prepared.run(x)
        waiting.held = None
        if not is_plain(x) or not x.is_cpu or x.layout is not _strided or not x.is_contiguous():
            return layer._prepared.run(x)
        code, shape, features = _dtype_code(x.dtype), x.shape, layer.in_features
        threads = _num_threads()
        if x.numel() < features * (_MIN_ROWS if threads > 1 else _MIN_ROWS_OF_ONE_THREAD):
            return layer._prepared.run(x)
        natives = self._current()
        if natives is None or code is None or not shape or shape[-1] != features:
            return layer._prepared.run(x)
        if len(shape) == 2:
            count = shape[0]
            outputs = [_new_empty(x, count, n) for n in self._rows]
        else:
            count = x.numel() // features
            outputs = [_new_empty(x, *shape[:-1], n) for n in self._rows]
        addresses = [y.data_ptr() for y in outputs]
        self._run(x.data_ptr(), code, count, features, addresses, code, threads)
        first = outputs[0]
        waiting.held = (x, -1 if x.is_inference() else x._version, natives, outputs)
        outputs[0] = None  # type: ignore[call-overload]
        return first

    def _current(self) -> list[Any] | None:
        """The native calls of all members, which ``self._run`` joins; None where they cannot be joined."""
        members, natives = [], []
        for reference in self._members:
            member = None if reference is None else reference()
            prepared = None if member is None else member._prepared
            native = prepared.native() if type(prepared) is PreparedW8A8 else None
            if member is None or native is None:
                return None
            members.append(member)
            natives.append(native)
        if natives != self._natives:
            if not all(compatible(members[0], member) for member in members[1:]):
                return None
            self._run = _C.LinearW8A8Group([native.__self__ for native in natives]).run
            self._rows = [member.out_features for member in members]
            self._natives = natives
        return natives


def _state(x: Tensor) -> Any:
    """What changes when ``x`` is written to."""
    return x.untouched() if isinstance(x, Deferred) else version(x)


def _place(x: Tensor) -> int:
    """The stream that a product of ``x`` goes to: what another one computes may not be there yet."""
    device = x._like[2] if isinstance(x, Deferred) else x.device
    return cuda._stream(device) if device.type == "cuda" else 0


def compatible(one: QuantLinear, other: QuantLinear) -> bool:
    """Whether two layers are of one scheme and quantize an input to the same codes."""
    return one.scheme == other.scheme and quantize_alike(one, other)


def quantize_alike(one: QuantLinear, other: QuantLinear) -> bool:
    """Whether two layers quantize an input to the same codes: features, grid and smoothing.  Weights do not matter."""
    if one.in_features != other.in_features or _inputs(one.scheme) != _inputs(other.scheme):
        return False
    for name in ("act_scale", "act_zero_point", "inv_smooth"):
        a, b = one._buffers.get(name), other._buffers.get(name)
        if a is None or b is None:
            if a is not b:
                return False
        elif not torch.equal(a, b):
            return False
    return True


def _inputs(scheme: Scheme) -> tuple[Any, ...]:
    """How inputs are quantized."""
    return (
        scheme.activation_bits,
        scheme.activation_granularity,
        scheme.activation_dynamic,
        scheme.activation_symmetric,
    )


# -- reading the source -----------------------------------------------------------------------------------------------


def readers(parent: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Children that ``type(parent).forward`` calls with one and the same unchanged variable.

    Args:
        parent: whose ``forward`` is read.  One that was replaced on the instance, or has no source, has none.
        names: of the children that count.

    Returns:
        Groups of two or more names in the order of their calls.  Each child is called once in the whole function, the
        calls of a group stand in one block, and from the first to the last of them the variable is only looked at.
    """
    function = parsed_forward(parent) if len(names) > 1 else None
    if function is None or not function.args.args:
        return []
    own = function.args.args[0].arg
    calls = [called_child(node, own) for node in ast.walk(function)]
    counts = [call[0] for call in calls if call is not None]
    once = {name for name in names if counts.count(name) == 1 and mentions(function, name) == 1}
    groups = []
    for block in _blocks(function):
        found: dict[str, list[tuple[int, str]]] = {}
        for index, statement in enumerate(block):
            if any(isinstance(node, NOT_ONCE) for node in _below(statement)):
                continue  # what stands in an inner block belongs to that one
            for node in _below(statement):
                call = called_child(node, own)
                if call is not None and call[0] in once and call[1] is not None:
                    found.setdefault(call[1], []).append((index, call[0]))
        for variable, members in found.items():
            first, last = members[0][0], members[-1][0]
            if len(members) > 1 and _only_read(block[first : last + 1], variable, own):
                groups.append([name for _, name in members])
    return groups


def parsed_forward(module: nn.Module) -> ast.FunctionDef | None:
    """The source of ``type(module).forward``; None where there is none, or where the instance has another one."""
    return None if has_another_forward(module) else parsed(type(module).forward)


def has_another_forward(module: nn.Module) -> bool:
    """Whether the ``forward`` of an instance is not the code of its class."""
    forward = module.__dict__.get("forward")
    return forward is not None and not getattr(forward, "follows_class", False)


@functools.lru_cache(maxsize=256)
def parsed(function: Any) -> ast.FunctionDef | None:
    """Its source as a tree, read once for all the layers of a model; None where there is no such source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


NOT_ONCE = (
    ast.stmt,
    ast.Lambda,
    ast.IfExp,
    ast.BoolOp,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
"""What may run its parts never, or several times."""


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def _below(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement but itself, in the order in which they are evaluated."""
    pending = list(ast.iter_child_nodes(statement))
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        pending = [statement.value] if statement.value is not None else []
    while pending:
        node = pending.pop(0)
        yield node
        pending[:0] = list(ast.iter_child_nodes(node))


def called_child(node: ast.AST, own: str) -> tuple[str, str | None] | None:
    """``own.child(variable)`` as (child, variable); the variable is None where it is anything else."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return None
    owner = node.func.value
    if not (isinstance(owner, ast.Name) and owner.id == own):
        return None
    plain = len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Name)
    return node.func.attr, node.args[0].id if plain else None  # type: ignore[attr-defined]


def mentions(tree: ast.AST, name: str) -> int:
    """How often an attribute of that name stands in a tree."""
    return sum(isinstance(node, ast.Attribute) and node.attr == name for node in ast.walk(tree))


def _only_read(statements: Sequence[ast.stmt], variable: str, own: str) -> bool:
    """Whether ``variable`` is only handed to children or asked for its attributes there.  The last statement may give
    the name to something else, since that happens after its calls."""
    for number, statement in enumerate(statements):
        harmless: set[ast.AST] = set()
        for node in ast.walk(statement):
            if called_child(node, own) is not None:
                harmless.update(node.args)  # type: ignore[attr-defined]
            if isinstance(node, ast.Attribute) and not node.attr.endswith("_"):
                harmless.add(node.value)
        last = number + 1 == len(statements)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == variable and node not in harmless:
                stored = isinstance(node.ctx, ast.Store) and isinstance(statement, ast.Assign)
                if not (last and stored):
                    return False
    return True
