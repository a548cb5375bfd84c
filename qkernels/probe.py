"""Which Linears of a model read the same tensor, and whose output it is: found out by running the model.

No table of architectures.  A *group* is the set of Linear layers that are called with one and the same tensor.  Its
*producer* is a module whose output channels can be scaled so that exactly the features of that tensor are scaled,
nothing else: a norm with a gain per feature, or an earlier Linear whose output reaches the group through operations
that pass a positive factor on (ReLU, the value path of attention, the product with a gate, slices, repeated heads).

That is tested, not assumed.  In a probe the output of a candidate is replaced by random numbers, then by the same
numbers with each channel multiplied by a power of two that spells a digit of the channel's number.  If every feature
of the group's input is multiplied by exactly one of those powers, in all digits, the channel behind each feature is
known.  The group itself is handed its true input, so the rest of the model must compute what it always did; where
it does not, somebody else reads the candidate's output and it is no producer.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import first_input
from .gains import gain_kind, is_gain, out_features, same, shared_weights, tolerance
from .norms import NormForward
from .observe import Call, call_model, output_tensors, quiescent

__all__ = ["Group", "Producer", "find_groups", "trim"]

BASE = 8  # digits are spelled in powers of two down to 2**-7
MIN_ROWS = 8  # rows of a tensor below which a probe proves nothing
NEAR_CALLS = 4  # earlier Linear calls that are tried as producers
PROBE_ROWS = 64


@dataclass(frozen=True)
class Producer:
    """A module whose output channels scale the features of a group's input.

    Args:
        name: its qualified name; module: itself.
        kind: "gain" (a norm: y = x * weight + bias), "gain_plus_one" (y = x * (1 + weight)) or "linear".
        channel: int64 ``[K]``: the output channel behind each feature.
    """

    name: str
    module: nn.Module
    kind: str
    channel: Tensor


@dataclass
class Group:
    """Linear layers that read one tensor.

    Args:
        layers: name -> module, in the order of their calls.
        in_features: K.
        producer: where the tensor can be scaled at its source, or None.
        reason: why there is no producer.
    """

    layers: dict[str, nn.Module]
    in_features: int
    producer: Producer | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Candidate:
    name: str
    module: nn.Module
    kind: str
    first: int
    channels: int


@dataclass
class _Trace:
    """One run of the model: who was called, in which order, with what."""

    calls: list[tuple[str, Tensor]] = field(default_factory=list)
    made: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)

    def rows(self, group: Group) -> tuple[int, int]:
        """Shape of what a group reads, as rows ``[M, K]``."""
        x = next(x for name, x in self.calls if name in group.layers)
        return x.numel() // max(group.in_features, 1), group.in_features


def trim(batch: Any, rows: int, limit: int = PROBE_ROWS) -> Any:
    """A smaller batch of the same kind: fewer entries along the first dimension that all its tensors share.

    Args:
        batch: what the model is called with.
        rows: input rows that a Linear sees with the whole batch; ``limit`` is what is aimed at.
    """
    tensors: list[Tensor] = []

    def each(value: Any, change: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Mapping):
            return {key: each(v, change) for key, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(each(v, change) for v in value)
        if isinstance(value, Call):
            return Call(each(value.args, change), each(value.kwargs, change))
        return value

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    each(batch, note)
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if rows <= limit or len(sizes) != 1:
        return batch
    size = sizes.pop()
    kept = max(1, size * limit // rows)
    short = each(batch, lambda tensor: tensor[:kept]) if kept < size else batch
    left = rows * kept // max(size, 1)
    # Token ids, masks and the like, all [batch, tokens]: fewer tokens too.
    if left > limit and all(
        t.dim() == 2 and not t.is_floating_point() and t.shape == tensors[0].shape for t in tensors
    ):
        tokens = max(MIN_ROWS, limit // kept)
        return each(short, lambda tensor: tensor[:, :tokens])
    return short


def find_groups(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, *, producers: bool = True
) -> list[Group]:
    """The groups of ``layers`` (nn.Linear and Conv1D, by name), in the order of their first calls.

    Args:
        model: left as it was; its outputs must not depend on chance.
        layers: every layer that may be scaled.
        batch: one calibration batch.
        producers: also look for producers.

    Layers that the batch does not reach are in no group.
    """
    search = _Search(model, layers)
    with quiescent(model):
        trace = search.run(batch)
        rows = max((x.numel() // max(x.shape[-1], 1) for _, x in trace.calls), default=0)
        short = trim(batch, rows)
        if short is not batch:
            with contextlib.suppress(Exception):  # a model may insist on the shape it was given
                trace, batch = search.run(short), short
        groups = _group(trace, layers)
        if producers:
            search.find_producers(groups, trace, batch)
    return groups


def _key(x: Tensor) -> tuple[object, ...]:
    return (str(x.device), x.data_ptr(), x.numel(), x.shape[-1] if x.dim() else 0, x._version)


def _group(trace: _Trace, layers: Mapping[str, nn.Module]) -> list[Group]:
    """Calls with one tensor make a group; a layer called several times joins all its groups into one."""
    parent: dict[object, object] = {}

    def root(item: object) -> object:
        while parent.setdefault(item, item) != item:
            item = parent[item]
        return item

    for name, x in trace.calls:
        parent[root(("layer", name))] = root(("tensor", _key(x)))
    found: dict[object, Group] = {}
    for name, x in trace.calls:
        group = found.setdefault(root(("layer", name)), Group({}, x.shape[-1]))
        group.layers.setdefault(name, layers[name])
        if name in trace.repeated:
            group.reason = f"{name} is called several times"
    return list(found.values())


_PLAIN = (type(None), NormForward)
"""Of a ``forward`` of a module's own: none, or what its class computes."""


class _Search:
    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.layers = dict(layers)
        linears = {id(module) for module in self.layers.values()}
        self.gains = {
            name: module
            for name, module in model.named_modules()
            if id(module) not in linears and is_gain(module) and type(module.__dict__.get("forward")) in _PLAIN
        }
        self.shared = shared_weights(model)

    # -- running ----------------------------------------------------------------------------------------------

    def run(
        self,
        batch: Any,
        *,
        inputs: Mapping[str, Tensor] | None = None,
        outputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> _Trace:
        """Run the model once; ``inputs`` are handed to layers in place of theirs, ``outputs`` replace modules' own."""
        trace, handles = _Trace(), []
        called: set[str] = set()
        inputs, outputs = inputs or {}, outputs or {}

        def before(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                x = first_input(args, kwargs)
                if x is None or not x.dim():
                    return None
                if name in called:
                    trace.repeated.add(name)
                called.add(name)
                trace.calls.append((name, x))
                if name not in inputs or inputs[name].shape != x.shape:  # noise may lead tokens to other experts
                    return None
                if args:
                    return (inputs[name], *args[1:]), kwargs
                return args, {**kwargs, next(iter(kwargs)): inputs[name]}

            return hook

        def after(name: str, keep: bool) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                if keep and isinstance(output, Tensor):
                    if name in trace.made:
                        trace.repeated.add(name)
                    trace.made[name] = (args, kwargs, output)
                return outputs[name](output) if name in outputs else None

            return hook

        try:
            for name, module in self.layers.items():
                # First of all hooks: a layer smoothed at run time before multiplies behind this one.
                hook = before(name)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
                if name in outputs:
                    handles.append(module.register_forward_hook(after(name, False), with_kwargs=True))
            for name, module in self.gains.items():
                handles.append(module.register_forward_hook(after(name, True), with_kwargs=True))
            trace.outputs = output_tensors(call_model(self.model, batch))
        finally:
            for handle in handles:
                handle.remove()
        return trace

    # -- producers --------------------------------------------------------------------------------------------

    def find_producers(self, groups: list[Group], trace: _Trace, batch: Any) -> None:
        """Set ``producer`` or ``reason`` of every group."""
        queues: dict[int, list[_Candidate]] = {}
        for index, group in enumerate(groups):
            if self._scalable(group, trace):
                queues[index] = self._candidates(group, trace)
                group.reason = "its input is no module's output channels scaled"
        accepted: dict[int, tuple[_Candidate, Producer]] = {}
        disturbed = self._rounds(groups, queues, accepted, trace, batch)
        # Once more those whose tokens other candidates' noise had sent to other experts, now among themselves.
        self._rounds(groups, disturbed, accepted, trace, batch)
        confirmed = self._confirm(groups, accepted, trace, batch)
        for index, (candidate, _) in accepted.items():
            groups[index].producer = confirmed.get(index)
            groups[index].reason = "" if index in confirmed else f"others read the output of {candidate.name} too"

    def _rounds(
        self,
        groups: list[Group],
        queues: dict[int, list[_Candidate]],
        accepted: dict[int, tuple[_Candidate, Producer]],
        trace: _Trace,
        batch: Any,
    ) -> dict[int, list[_Candidate]]:
        """Try the candidates of all groups, one of each at a time; what could not be judged comes back."""
        disturbed: dict[int, list[_Candidate]] = {}
        while any(queues.values()):
            chosen: dict[int, _Candidate] = {}
            for index, queue in queues.items():
                if queue and all(queue[0].name != other.name for other in chosen.values()):
                    chosen[index] = queue.pop(0)
            found, unjudged = self._probe(groups, chosen, trace, batch)
            for index in unjudged:
                disturbed.setdefault(index, []).append(chosen[index])
            for index, producer in found.items():
                accepted[index] = chosen[index], producer
                queues[index] = []
        return {index: queue for index, queue in disturbed.items() if index not in accepted}

    def _scalable(self, group: Group, trace: _Trace) -> bool:
        if group.reason:
            return False
        x = next(x for name, x in trace.calls if name in group.layers)
        for name, module in group.layers.items():
            if id(module) in self.shared:
                group.reason = f"{name} shares its weight with another module"
                return False
        if x.numel() // max(x.shape[-1], 1) < MIN_ROWS:
            group.reason = f"the batch has fewer than {MIN_ROWS} rows"
            return False
        return True

    def _candidates(self, group: Group, trace: _Trace) -> list[_Candidate]:
        names = [name for name, _ in trace.calls]
        first = min(names.index(name) for name in group.layers)
        x, k = trace.calls[first][1], group.in_features
        found = []
        for name, (args, kwargs, output) in trace.made.items():
            module = self.gains[name]
            if _key(output) == _key(x) and name not in trace.repeated and id(module) not in self.shared:
                kind = gain_kind(module, args, kwargs, output)
                if kind is not None:
                    found.append(_Candidate(name, module, kind, 0, k))
        if found:
            return found
        for name, given in reversed(trace.calls[max(0, first - NEAR_CALLS) : first]):
            module = self.layers[name]
            if name in trace.repeated or id(module) in self.shared or name in group.layers:
                continue
            if given.numel() // max(given.shape[-1], 1) != x.numel() // max(k, 1):
                continue  # other tokens: those of another expert
            rows = out_features(module)
            if rows <= k and k % rows == 0:
                slices = [(0, rows)]
            else:
                slices = []
                if rows % k == 0 and rows // k <= 4:
                    slices = [(part * k, k) for part in reversed(range(rows // k))]
                if k < rows < 3 * k and (rows - k) % 2 == 0 and k % ((rows - k) // 2) == 0:
                    slices.append(((rows + k) // 2, (rows - k) // 2))  # queries, keys, values: fewer of the latter two
            found += [_Candidate(name, module, "linear", *piece) for piece in slices]
        return found

    def _probe(
        self, groups: list[Group], chosen: Mapping[int, _Candidate], trace: _Trace, batch: Any
    ) -> tuple[dict[int, Producer], set[int]]:
        """Which of the candidates scale their group's input, and how; and of which groups other tokens came in."""
        if not chosen:
            return {}, set()
        start = self._observe(groups, chosen, None, trace, batch)
        alive = {index: x for index, x in start.items() if len(x) and bool((x.abs().amax(0) > 0).all())}
        unjudged = {i for i in chosen if i not in start or start[i].shape != trace.rows(groups[i])}
        codes = {index: torch.zeros(x.shape[1], dtype=torch.int64) for index, x in alive.items()}
        for digit in range(max((_digits(c.channels + 1) for c in chosen.values()), default=0)):
            if not alive:
                break
            seen = self._observe(groups, chosen, digit, trace, batch)
            unjudged |= {i for i in alive if i not in seen or seen[i].shape != trace.rows(groups[i])}
            for index in list(alive):
                value = _read_digit(alive[index], seen[index]) if index in seen else None
                if value is None:
                    del alive[index]
                else:
                    codes[index] += value.cpu() * BASE**digit
        result = {}
        for index in alive:
            candidate, code = chosen[index], codes[index]
            whole = len(torch.unique(code)) == candidate.channels and int(code.min()) == 1
            if whole and int(code.max()) == candidate.channels:
                channel = torch.argsort(_permutation(candidate))[code - 1] + candidate.first
                result[index] = Producer(candidate.name, candidate.module, candidate.kind, channel)
        return result, unjudged

    def _confirm(
        self, groups: list[Group], accepted: Mapping[int, tuple[_Candidate, Producer]], trace: _Trace, batch: Any
    ) -> dict[int, Producer]:
        """Those whose output nobody else reads: the rest of the model must not notice that it is noise."""
        if not accepted:
            return {}
        chosen = {index: candidate for index, (candidate, _) in accepted.items()}
        mine = {name for index in chosen for name in groups[index].layers}
        probe = self.run(
            batch,
            inputs={name: x for name, x in trace.calls if name in mine},
            outputs={c.name: _Noise(c, None) for c in chosen.values()},
        )
        unmoved = (
            same(trace.outputs, probe.outputs)
            and same(
                [x for name, x in trace.calls if name not in mine], [x for name, x in probe.calls if name not in mine]
            )
            # Groups further on are handed their true inputs and would hide what a router or a residual made of noise;
            # the norms before them are not.
            and same(_entered(trace), _entered(probe))
        )
        if unmoved:
            again, _ = self._probe(groups, chosen, trace, batch)
            unmoved = all(
                index in again and torch.equal(again[index].channel, producer.channel)
                for index, (_, producer) in accepted.items()
            )
        if unmoved:
            return {index: producer for index, (_, producer) in accepted.items()}
        if len(accepted) == 1:
            return {}
        items = list(accepted.items())
        half = len(items) // 2
        first = self._confirm(groups, dict(items[:half]), trace, batch)
        return {**first, **self._confirm(groups, dict(items[half:]), trace, batch)}

    def _observe(
        self, groups: list[Group], chosen: Mapping[int, _Candidate], digit: int | None, trace: _Trace, batch: Any
    ) -> dict[int, Tensor]:
        """What every chosen group is called with, rows ``[M, K]``, while its candidate speaks ``digit``."""
        probe = self.run(
            batch,
            inputs={name: x for name, x in trace.calls if name not in trace.repeated},
            outputs={c.name: _Noise(c, digit) for c in chosen.values()},
        )
        seen = dict(reversed(probe.calls))
        return {
            index: seen[name].reshape(-1, groups[index].in_features).to(torch.float32)
            for index in chosen
            if (name := next(iter(groups[index].layers))) in seen
        }


def _entered(trace: _Trace) -> list[Tensor]:
    """What the modules with gains were called with."""
    inputs = [first_input(args, kwargs) for args, kwargs, _ in trace.made.values()]
    return [x for x in inputs if x is not None and x.is_floating_point()]


class _Noise:
    """Random numbers in place of a module's output channels, each channel times the power of two of its digit."""

    def __init__(self, candidate: _Candidate, digit: int | None) -> None:
        self._candidate = candidate
        self._digit = digit

    def __call__(self, output: Tensor) -> Tensor:
        c = self._candidate
        generator = torch.Generator().manual_seed(_seed(c))
        noise = torch.randn((*output.shape[:-1], c.channels), generator=generator)
        if self._digit is not None:
            digits = (_permutation(c) // BASE**self._digit) % BASE
            noise = noise * torch.exp2(-digits.to(torch.float32))
        changed = output.clone()
        changed[..., c.first : c.first + c.channels] = noise.to(output)
        return changed


def _seed(candidate: _Candidate) -> int:
    return zlib.crc32(candidate.name.encode())


def _permutation(candidate: _Candidate) -> Tensor:
    """The number of each channel, different for every candidate, so that products of two cannot pass for one.

    From 1 on: a feature that no channel reaches reads as 0.
    """
    generator = torch.Generator().manual_seed(_seed(candidate) + 1)
    return torch.randperm(candidate.channels, generator=generator) + 1


def _digits(channels: int) -> int:
    count = 1
    while BASE**count < channels:
        count += 1
    return count


def _read_digit(start: Tensor, seen: Tensor) -> Tensor | None:
    """The digit of every feature, int64 ``[K]``; None unless each is multiplied by one power of two everywhere."""
    if start.shape != seen.shape:
        return None
    ratio = (start.double() * seen.double()).sum(0) / start.double().square().sum(0)
    if not bool((ratio > 0).all()):
        return None
    digit = (-torch.log2(ratio)).round().clamp(0, BASE - 1)
    expected = start * torch.exp2(-digit).to(torch.float32)
    limit = start.abs().amax(0) * torch.exp2(-digit).to(torch.float32) * tolerance(start.dtype)
    return digit.to(torch.int64) if bool(((seen - expected).abs() <= limit).all()) else None
