"""A model run block by block over calibration data, so that each block sees what quantized earlier blocks give it.

The blocks are the children of the model's ModuleLists.  One run of the float model per batch records how each block
is called; the hidden states that one block hands to the next are not kept but made again, by blocks whose weights
stand for quantized ones.  So the memory needed is that of one block's statistics and one set of hidden states, and
the model itself is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .calibrate import first_input, widths_checked
from .hooks import Target
from .observe import call_model, quiescent
from .progress import Progress, tracking

__all__ = ["Inputs", "Visit", "run_by_blocks"]

HESSIAN_BYTES = 1 << 30  # of statistics gathered at once for layers outside of blocks
STAGES = 16  # runs of a block that comparing may take; more would be experts, each with an input of its own


@dataclass
class Inputs:
    """Second moments of what entered one layer, of rows ``x`` of the model as it is quantized so far.

    Args:
        moments: sum of ``x x^T``, float32 ``[K, K]``.
        sums: of ``x``, float64 ``[K]``.
        cross: sum of ``x' x^T`` with the rows ``x'`` of the float model; None where they were not compared.
        float_sums: of ``x'``, float64 ``[K]``, or None.
        rows: how many rows, by weight.
    """

    moments: Tensor
    sums: Tensor
    cross: Tensor | None = None
    float_sums: Tensor | None = None
    rows: float = 0.0

    def means(self) -> tuple[Tensor, Tensor]:
        """Of ``x``, and of ``x'`` where it is known (else of ``x`` again), float32 ``[K]``."""
        mean = (self.sums / self.rows).to(torch.float32)
        return mean, mean if self.float_sums is None else (self.float_sums / self.rows).to(torch.float32)

    @classmethod
    def empty(cls, size: int, device: torch.device, *, compare: bool) -> Inputs:
        """Nothing seen yet."""

        def zeros() -> tuple[Tensor, Tensor]:
            return torch.zeros(size, size, device=device), torch.zeros(size, dtype=torch.float64, device=device)

        return cls(*zeros(), *(zeros() if compare else ()))

    def update(self, x: Tensor, weights: Tensor | None, expected: Tensor | None = None) -> None:
        """Add one more input ``[..., K]``.

        Args:
            weights: one per row; None: all alike.
            expected: what entered the float model there. One that is missing or of another shape (tokens chose other
                experts) ends the comparison.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        wanted = None
        if expected is not None and expected.shape == x.shape:
            wanted = expected.detach().reshape(rows.shape).to(torch.float32)
        else:
            self.cross = self.float_sums = None
        if weights is not None:
            share = weights.to(rows).reshape(-1)
            live = share > 0
            rows, share = rows[live], share[live].unsqueeze(1)
            wanted = None if wanted is None else wanted[live]
        else:
            share = rows.new_ones(1).expand(len(rows), 1)
        weighted = rows * share
        self.moments.addmm_(weighted.t(), rows)
        self.sums += weighted.sum(0, dtype=torch.float64)
        self.rows += float(share.sum())
        if wanted is not None and self.cross is not None and self.float_sums is not None:
            self.cross.addmm_(wanted.t(), weighted)
            self.float_sums += (wanted * share).sum(0, dtype=torch.float64)


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
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Any],
    visit: Visit,
    *,
    by_sequence: bool = False,
    compare: bool = False,
    progress: Progress = None,
) -> None:
    """Call ``visit`` for every target, block by block in the order of the model, with the moments of its input.

    Args:
        model, targets, batches: see :class:`qkernels.hooks.Algorithm`.
        visit: see :data:`Visit`.
        by_sequence: all tokens of a sequence together count as much as those of any other; else tokens count alike.
            Tokens that an ``attention_mask [sequences, tokens]`` of the batch hides never count.
        compare: run the float blocks beside the quantized ones and gather ``Inputs.cross``; layers then see quantized
            layers before them in the same block, too, which takes two runs per block for each tensor that enters
            layers. Blocks that more than 16 tensors enter (experts) are not compared.
        progress: as in ``quantize_``.

    Raises:
        ValueError: a target that no batch reaches, or that NaN or Inf enters; the message names it.
    """
    blocks, rest = _find_blocks(model, targets)
    weigh = _Weigher([_mask(batch) for batch in batches], by_sequence)
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
            wanted: list[list[Any]] = hidden
            for index, block in enumerate(blocks):
                run = _Run(block, [_resolve(call, old) for call, old in zip(block.calls, hidden, strict=True)])
                truth = _Run(block, [_resolve(call, old) for call, old in zip(block.calls, wanted, strict=True)])
                block.calls.clear()
                stages, once, outputs = _stages(truth) if compare else ([block.targets], False, [])
                few = len(stages) <= STAGES
                for stage in stages if few else [block.targets]:
                    found = _watch(stage, run, weigh, truth if compare and few else None, once=once)
                    run.weights.update(each(found, stage))
                if index + 1 < len(blocks) and blocks[index + 1].linked:
                    hidden = [tree_flatten(run(i))[0] for i in range(len(batches))]
                    wanted = outputs if compare else hidden
        for part in _parts(rest):
            each(_watch(part, lambda i: call_model(model, batches[i]), weigh, None), part)


class _Run:
    """A block and its calls, one per batch; layers that are quantized stand for their new weights."""

    def __init__(self, block: _Block, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.block, self.calls = block, calls
        self.weights: dict[str, Tensor] = {}

    def __call__(self, number: int) -> Any:
        args, kwargs = self.calls[number]
        if not self.weights:
            return self.block.module(*args, **kwargs)
        return torch.func.functional_call(self.block.module, _parameters(self.block, self.weights), args, kwargs)


class _EnoughError(Exception):
    """Ends a run in which all that was waited for has been seen."""


def _stages(run: _Run) -> tuple[list[list[Target]], bool, list[list[Any]]]:
    """The block's targets in the order of their calls, those that one tensor enters together.

    And whether every batch calls each of them once: a run that waits for some of them may then end with the last.
    And what the block gave for every batch.
    """
    stages: list[list[Target]] = []
    outputs: list[list[Any]] = []
    left = {target.name: target for target in run.block.targets}
    once = True
    for number in range(len(run.calls)):
        entered: list[tuple[Tensor, list[Target]]] = []
        calls: list[str] = []

        def see(
            name: str,
            x: Tensor,
            entered: list[tuple[Tensor, list[Target]]] = entered,
            calls: list[str] = calls,
        ) -> None:
            calls.append(name)
            stage = next((stage for tensor, stage in entered if tensor is x), None)
            target = left.pop(name, None)
            if target is None:
                return
            if stage is None:
                stage = []
                stages.append(stage)
                entered.append((x, stage))
            stage.append(target)

        with _observed(run.block.targets, see):
            outputs.append(tree_flatten(run(number))[0])
        once &= sorted(calls) == sorted(target.name for target in run.block.targets)
    return [*stages, *([list(left.values())] if left else [])], once, outputs


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


@dataclass(frozen=True)
class _Weigher:
    """How much each row of a layer's input counts."""

    masks: Sequence[Tensor | None]
    by_sequence: bool

    def __call__(self, number: int, x: Tensor) -> Tensor | None:
        """Weights, one per row of ``x [..., K]`` in batch ``number``; None: all alike."""
        mask = self.masks[number]
        shape = x.shape[:-1]
        if mask is not None and (mask.shape == shape or (len(shape) == 1 and mask.numel() == shape[0])):
            weights = mask.to(torch.float32)
        elif self.by_sequence and len(shape) == 2:
            weights = torch.ones(shape, device=x.device)
        else:
            return None
        return weights / weights.sum(1, keepdim=True).clamp_min(1.0) if self.by_sequence else weights


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
        left = {block.name for block in blocks}

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

        def after(block: _Block, last: list[Any] = last, left: set[str] = left) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                last[:] = tree_flatten(output)[0]
                left.discard(block.name)
                if not left:
                    raise _EnoughError  # what comes after the blocks, such as an output head, is of no use here

            return hook

        try:
            for block in blocks:
                handles.append(block.module.register_forward_pre_hook(before(block), with_kwargs=True))
                handles.append(block.module.register_forward_hook(after(block)))
            call_model(model, batch)
        except _EnoughError:
            pass
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


def _watch(
    targets: Sequence[Target],
    run: Callable[[int], Any],
    weigh: _Weigher,
    truth: Callable[[int], Any] | None,
    *,
    once: bool = False,
) -> dict[str, Inputs]:
    """What enters the targets while ``run(batch number)`` runs; layers called with one tensor share one object.

    ``truth(batch number)`` is what it is compared with: the same calls in the float model.  ``once``: each target is
    called once in a run, and what the rest of the run computes is of no use.
    """
    found: dict[str, Inputs] = {}
    for number in range(len(weigh.masks)):
        expected: dict[str, list[Tensor]] = {}
        if truth is not None:
            with _observed(targets, lambda name, x, e=expected: e.setdefault(name, []).append(x), once=once):  # type: ignore[misc]
                truth(number)
        held: list[tuple[Tensor, Inputs]] = []

        def watch(
            name: str,
            x: Tensor,
            number: int = number,
            expected: dict[str, list[Tensor]] = expected,
            held: list[tuple[Tensor, Inputs]] = held,
        ) -> None:
            wanted = expected[name].pop(0) if expected.get(name) else None
            for tensor, inputs in held:
                if tensor is x and name not in found:
                    found[name] = inputs
                if tensor is x and found[name] is inputs:
                    return
            known = found.get(name)
            if known is None:
                known = found[name] = Inputs.empty(x.shape[-1], x.device, compare=truth is not None)
            known.update(x, weigh(number, x), wanted)
            held.append((x, known))
            del held[:-4]

        with _observed(targets, watch, once=once):
            run(number)
    return found


@contextmanager
def _observed(targets: Sequence[Target], see: Callable[[str, Tensor], Any], *, once: bool = False) -> Iterator[None]:
    """Inside, ``see(name, input)`` is called for every call of a target; ``once``: all called once, the block ends."""
    left = {target.name for target in targets}

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            if x is not None:
                see(name, x)
            left.discard(name)
            if once and not left:
                raise _EnoughError

        return before

    handles = [target.module.register_forward_pre_hook(hook(target.name), with_kwargs=True) for target in targets]
    try:
        yield
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _check(target: Target, inputs: Inputs | None) -> None:
    if inputs is None or not inputs.rows:
        raise ValueError(f"calibration: no batch reached {target.name!r}; give data that does, or exclude the layer")
    if not bool(torch.isfinite(inputs.moments).all()):
        raise ValueError(f"calibration: NaN or infinite values entered {target.name!r}")


def _parameters(block: _Block, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = {}
    for target in block.targets:
        if target.name not in weights:
            continue
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
