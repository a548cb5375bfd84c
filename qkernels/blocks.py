"""A model run block by block over calibration data, so that each block sees what quantized earlier blocks give it.

The blocks are the children of the model's ModuleLists.  One run of the float model per batch records how each block
is called; the hidden states that one block hands to the next are not kept but made again, by blocks whose weights
stand for quantized ones.  So the memory needed is that of one block's statistics and one set of hidden states, and
the model itself is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .calibrate import first_input, widths_checked
from .hooks import Target
from .observe import call_model
from .probe import quiescent
from .progress import Progress, tracking

__all__ = ["Inputs", "Visit", "run_by_blocks"]

HESSIAN_BYTES = 1 << 30  # of statistics gathered at once for layers outside of blocks


@dataclass
class Inputs:
    """Second moments of what entered one layer.

    Args:
        moments: sum of ``x x^T``, float32 ``[K, K]``.
        sums: float64 ``[K]``.
        rows: how many rows.
    """

    moments: Tensor
    sums: Tensor
    rows: int = 0

    def update(self, x: Tensor) -> None:
        """Add one more input ``[..., K]``."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self.moments.addmm_(rows.t(), rows)
        self.sums += rows.sum(0, dtype=torch.float64)
        self.rows += len(rows)


Visit = Callable[[Target, Inputs], Tensor]
"""Quantizes one layer, given what enters it; returns the weight ``[N, K]`` it stands for from then on."""


@dataclass(frozen=True)
class _Link:
    """In recorded arguments: here goes the output of the previous block, the tensor with this number in it."""

    index: int


@dataclass
class _Block:
    name: str
    module: nn.Module
    targets: list[Target]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    linked: bool = False


def run_by_blocks(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Any], visit: Visit, *, progress: Progress = None
) -> None:
    """Call ``visit`` for every target, block by block in the order of the model, with the moments of its input.

    Raises:
        ValueError: a target that no batch reaches, or that NaN or Inf enters; the message names it.
    """
    blocks, rest = _find_blocks(model, targets)
    done = 0
    with (
        quiescent(model),
        widths_checked({t.name: t.module for t in targets}),
        tracking(progress, total=len(targets), what="rounding weights") as step,
    ):

        def each(found: Mapping[str, Inputs], chosen: Sequence[Target]) -> dict[str, Tensor]:
            nonlocal done
            weights = {}
            for target in chosen:
                _check(target, found.get(target.name))
                weights[target.name] = visit(target, found[target.name])
                done += 1
                step(done, len(targets), target.name)
            return weights

        if blocks:
            _record(model, blocks, batches)
            hidden: list[list[Any]] = [[] for _ in batches]
            for index, block in enumerate(blocks):
                calls = [_resolve(call, old) for call, old in zip(block.calls, hidden, strict=True)]
                block.calls.clear()
                found = _watch(block.targets, lambda b=block, c=calls: [b.module(*a, **k) for a, k in c])  # type: ignore[misc]
                weights = each(found, block.targets)
                if index + 1 < len(blocks) and blocks[index + 1].linked:
                    given = _parameters(block, weights)
                    hidden = [tree_flatten(torch.func.functional_call(block.module, given, a, k))[0] for a, k in calls]
        for part in _parts(rest):
            each(_watch(part, lambda: [call_model(model, batch) for batch in batches]), part)


def _find_blocks(model: nn.Module, targets: Sequence[Target]) -> tuple[list[_Block], list[Target]]:
    blocks: list[_Block] = []
    taken: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(b.name + ".") for b in blocks):
            continue
        for key, child in module.named_children():
            prefix = f"{name}.{key}" if name else key
            inside = [t for t in targets if t.name.startswith(prefix + ".") and t.name not in taken]
            taken |= {t.name for t in inside}
            if inside:
                blocks.append(_Block(prefix, child, inside))
    return blocks, [target for target in targets if target.name not in taken]


def _record(model: nn.Module, blocks: list[_Block], batches: Sequence[Any]) -> None:
    """Note how every block is called in each batch; what it gets from the block before becomes a link."""
    for number, batch in enumerate(batches):
        last: list[Any] = []
        handles = []

        def before(block: _Block, number: int = number, last: list[Any] = last) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                def keep(leaf: Any) -> Any:
                    for index, made in enumerate(last):
                        if isinstance(leaf, Tensor) and leaf is made:
                            block.linked = True
                            return _Link(index)
                    return leaf

                if len(block.calls) == number:  # a block that is called again keeps its first call
                    block.calls.append((tree_map(keep, args), tree_map(keep, kwargs)))

            return hook

        def after(module: nn.Module, args: Any, output: Any, last: list[Any] = last) -> None:
            last[:] = tree_flatten(output)[0]

        try:
            for block in blocks:
                handles.append(block.module.register_forward_pre_hook(before(block), with_kwargs=True))
                handles.append(block.module.register_forward_hook(after))
            call_model(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        for block in blocks:
            if len(block.calls) != number + 1:
                raise ValueError(f"calibration: batch {number} does not reach {block.name!r}")


def _resolve(call: tuple[tuple[Any, ...], dict[str, Any]], hidden: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def fill(leaf: Any) -> Any:
        return hidden[leaf.index] if isinstance(leaf, _Link) else leaf

    def is_leaf(value: Any) -> bool:
        return isinstance(value, _Link)

    args, kwargs = call
    return tree_map(fill, args, is_leaf=is_leaf), tree_map(fill, kwargs, is_leaf=is_leaf)


def _watch(targets: Sequence[Target], run: Callable[[], Any]) -> dict[str, Inputs]:
    """What enters the targets while ``run`` runs; layers that are called with one tensor share one object."""
    found: dict[str, Inputs] = {}
    held: list[tuple[Tensor, Inputs]] = []
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            if x is None:
                return
            for tensor, inputs in held:
                if tensor is x and name not in found:
                    found[name] = inputs
                if tensor is x and found[name] is inputs:
                    return
            known = found.get(name)
            if known is None:
                size, device = x.shape[-1], x.device
                known = found[name] = Inputs(
                    torch.zeros(size, size, device=device), torch.zeros(size, dtype=torch.float64, device=device)
                )
            known.update(x)
            held.append((x, known))
            del held[:-4]

        return hook

    try:
        for target in targets:
            handles.append(target.module.register_forward_pre_hook(watch(target.name), with_kwargs=True))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _check(target: Target, inputs: Inputs | None) -> None:
    if inputs is None or not inputs.rows:
        raise ValueError(f"calibration: no batch reached {target.name!r}; give data that does, or exclude the layer")
    if not bool(torch.isfinite(inputs.moments).all()):
        raise ValueError(f"calibration: NaN or infinite values entered {target.name!r}")


def _parameters(block: _Block, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = {}
    for target in block.targets:
        weight = weights[target.name].to(target.weight().dtype)
        given[f"{target.name[len(block.name) + 1 :]}.weight"] = weight.t() if target.transposed else weight
    return given


def _parts(targets: Sequence[Target]) -> list[list[Target]]:
    """Targets in groups whose moments fit into memory together."""
    parts: list[list[Target]] = []
    room = 0
    for target in targets:
        size = 4 * target.weight().shape[1] ** 2
        if not parts or size > room:
            parts.append([])
            room = HESSIAN_BYTES
        parts[-1].append(target)
        room -= size
    return parts
