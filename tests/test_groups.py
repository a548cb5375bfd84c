"""Linears over one input: which form a group, what they compute, and when each runs alone."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import helpers as H
import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.groups import readers
from qkernels.nn import QuantLinear


class Attention(nn.Module):
    """Three projections of one input, as in most transformers."""

    def __init__(self, n=(48, 24, 130), k=40) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(k, width) for width in n)

    def forward(self, x):
        q = self.q(x).relu()
        k = self.k(x)
        return torch.cat([q, k, self.v(x)], dim=-1)


class Gate(Attention):
    def forward(self, this):
        return torch.cat([self.q(this) * 2, self.v(this)], dim=-1)


class OtherName(Attention):
    def forward(me, x):
        a, b = me.q(x), me.k(x)
        return torch.cat([a, b], dim=-1)


class Reassigned(Attention):
    def forward(self, x):
        q = self.q(x)
        x = x * 2
        return torch.cat([q, self.k(x)], dim=-1)


class WrittenTo(Attention):
    def forward(self, x):
        q = self.q(x)
        x.mul_(2)
        return torch.cat([q, self.k(x)], dim=-1)


class HandedOn(Attention):
    def forward(self, x):
        q = self.q(x)
        torch.relu_(x)
        return torch.cat([q, self.k(x)], dim=-1)


class Augmented(Attention):
    def forward(self, x):
        q = self.q(x)
        x += 1
        return torch.cat([q, self.k(x)], dim=-1)


class Sometimes(Attention):
    def forward(self, x):
        q = self.q(x)
        k = self.k(x) if x.sum() > 0 else q[..., :24]
        return torch.cat([q, k], dim=-1)


class InBranches(Attention):
    def forward(self, x):
        q = self.q(x)
        if x.shape[0] > 100:
            q = torch.cat([q, self.k(x)], dim=-1)
        return q


class Twice(Attention):
    def forward(self, x):
        return torch.cat([self.q(x), self.q(x), self.k(x)], dim=-1)


class Expression(Attention):
    def forward(self, x):
        return torch.cat([self.q(x + 0), self.k(x + 0)], dim=-1)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Attention(), [["q", "k", "v"]]),
        (Gate(), [["q", "v"]]),
        (OtherName(), [["q", "k"]]),
        (Reassigned(), []),
        (WrittenTo(), []),
        (HandedOn(), []),
        (Augmented(), []),
        (Sometimes(), []),
        (InBranches(), []),
        (Twice(), []),
        (Expression(), []),
        (nn.Sequential(nn.Linear(4, 4)), []),
    ],
    ids=lambda m: type(m).__name__,
)
def test_readers_are_found_in_the_source(model, expected):
    assert readers(model, list(model._modules)) == expected


def test_readers_of_a_replaced_forward():
    model = Attention()
    model.forward = lambda x: x
    assert readers(model, ["q", "k", "v"]) == []


def pair(model: nn.Module, scheme="w8a8", **options) -> tuple[nn.Module, nn.Module]:
    """The model with groups and without."""
    alone = copy.deepcopy(model)
    qk.quantize_(alone, scheme, exclude=(), fuse=False, **options)
    qk.quantize_(model, scheme, exclude=(), **options)
    return model, alone


@pytest.mark.parametrize("symmetric", [True, False])
def test_grouped_equals_alone_to_the_bit(symmetric, isa, threads):
    grouped, alone = pair(Attention(), qk.Scheme(activation_symmetric=symmetric))
    assert grouped.q._group is not None
    for rows in (1, 2, 3, 7, 33, 200):
        for dtype in H.DTYPES:
            x = H.seeded(rows, 40, seed=rows).to(dtype)
            x[-1, 0] = float("nan")
            H.assert_bits_equal(grouped(x), alone(x))
    x = H.seeded(2, 3, 40)
    H.assert_bits_equal(grouped(x), alone(x))


def test_grouped_quantizes_once(monkeypatch):
    grouped, _ = pair(Attention())
    x, calls = H.seeded(64, 40), []
    for layer in (grouped.q, grouped.k, grouped.v):
        monkeypatch.setattr(layer._prepared, "run", lambda x: calls.append(1))
    with torch.no_grad():
        grouped(x)
    assert not calls


def test_static_and_smoothed_groups():
    for options in ({"scheme": "w8a8_static"}, {"scheme": "w8a8", "smooth": 0.5}):
        batches = [H.seeded(16, 40, seed=s) for s in range(3)]
        grouped, alone = pair(Attention(), calibration=batches, **options)
        assert grouped.q._group is not None
        H.assert_bits_equal(grouped(batches[0]), alone(batches[0]))


def test_layers_that_quantize_differently_stay_alone():
    model = Attention()
    qk.quantize_(model, exclude=(), overrides={"k": qk.Scheme(activation_symmetric=False)})
    assert model.q._group is None


def test_report_names_the_others():
    report = qk.quantize_(Attention(), exclude=())
    assert report["k"].reason == "runs with q and v"


def test_other_inputs_run_alone():
    grouped, alone = pair(Attention())
    x, other = H.seeded(64, 40), H.seeded(64, 40, seed=9)
    with torch.inference_mode():
        grouped.q(x)
        H.assert_bits_equal(grouped.k(other), alone.k(other))
        H.assert_bits_equal(grouped.v(x), alone.v(x))
        H.assert_bits_equal(grouped.k(x), alone.k(x))


def test_input_written_to_in_between_is_noticed():
    grouped, alone = pair(Attention())
    x = H.seeded(64, 40)
    grouped.q(x)
    x.mul_(3)
    H.assert_bits_equal(grouped.k(x), alone.k(x))


def test_second_call_gives_a_tensor_of_its_own():
    grouped, alone = pair(Attention())
    x = H.seeded(64, 40)
    with torch.inference_mode():
        for _ in range(2):
            grouped.q(x)
            grouped.k(x).zero_()
            H.assert_bits_equal(grouped.k(x), alone.k(x))
            H.assert_bits_equal(grouped.v(x), alone.v(x))
            H.assert_bits_equal(grouped.v(x), alone.v(x))


def test_weights_loaded_in_between_are_used():
    grouped, alone = pair(Attention())
    x = H.seeded(64, 40)
    state = {name: t.clone() for name, t in pair(Attention())[1].state_dict().items()}
    with torch.inference_mode():
        grouped.q(x)
        grouped.load_state_dict(state)
        alone.load_state_dict(state)
        H.assert_bits_equal(grouped.k(x), alone.k(x))
        grouped.q(x)
        grouped.k.bias = alone.k.bias = None
        H.assert_bits_equal(grouped.k(x), alone.k(x))


def test_gradients_autocast_views_and_empty_inputs():
    grouped, alone = pair(Attention())
    one, two = (H.seeded(4, 40).requires_grad_() for _ in range(2))
    grouped(one).sum().backward()
    alone(two).sum().backward()
    H.assert_bits_equal(one.grad, two.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        H.assert_bits_equal(grouped(one.detach()), alone(one.detach()))
    x = H.seeded(40, 6).T
    H.assert_bits_equal(grouped(x), alone(x))
    assert grouped(x[:0]).shape == (0, 202)
    with pytest.raises(ValueError, match="expected"):
        grouped(H.seeded(4, 41))


def test_new_weights_are_seen():
    grouped, alone = pair(Attention())
    x = H.seeded(64, 40)
    grouped(x)
    state = {name: t.clone() for name, t in pair(Attention())[1].state_dict().items()}
    for model in (grouped, alone):
        model.load_state_dict(state)
    H.assert_bits_equal(grouped(x), alone(x))
    grouped.k.bias = None
    alone.k.bias = None
    H.assert_bits_equal(grouped(x), alone(x))


def test_member_that_is_gone_leaves_the_others_working():
    grouped, alone = pair(Attention())
    x = H.seeded(64, 40)
    grouped.v = None
    gc.collect()
    H.assert_bits_equal(grouped.q(x), alone.q(x))
    H.assert_bits_equal(grouped.k(x), alone.k(x))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_form_groups_of_their_own(way):
    grouped, alone = pair(Attention())
    other = way(grouped)
    assert other.q._group[0] is other.k._group[0] is not grouped.q._group[0]
    x = H.seeded(64, 40)
    H.assert_bits_equal(other(x), alone(x))
    one = way(grouped.k)
    H.assert_bits_equal(one(x), alone.k(x))
    first = way(grouped.q)
    H.assert_bits_equal(first(x), alone.q(x))


def test_unfuse_and_dequantize_dissolve():
    grouped, _ = pair(Attention())
    qk.unfuse_(grouped)
    assert grouped.q._group is None
    assert qk.fuse_(grouped)["q"] == "runs with k and v"
    qk.dequantize_(grouped)
    assert type(grouped.q) is nn.Linear


def test_threads_do_not_meet():
    grouped, alone = pair(Attention())
    inputs = [H.seeded(64, 40, seed=s) for s in range(8)]
    expected = [alone(x) for x in inputs]
    failures = []

    def work(number: int) -> None:
        for _ in range(50):
            if not torch.equal(grouped(inputs[number]), expected[number]):
                failures.append(number)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_compiled_group():
    grouped, alone = pair(Attention())
    x = H.seeded(64, 40)
    H.assert_bits_equal(torch.compile(grouped, fullgraph=True)(x), alone(x))


def test_binding_refuses_members_that_differ():
    from qkernels import _C

    one, two = (QuantLinear.from_float(H.seeded(8, k)) for k in (16, 24))
    natives = [layer._prepared.native().__self__ for layer in (one, two)]
    with pytest.raises(ValueError, match="k"):
        _C.LinearW8A8Group(natives)
    with pytest.raises(ValueError):
        _C.LinearW8A8Group([])
