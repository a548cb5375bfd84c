"""All or nothing: a conversion that fails leaves the model as it was, and takes the memory of one layer."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from helpers import assert_bits_equal, seeded
from torch import nn
from toys import assert_unchanged, snapshot, toy

import qkernels as qk
from qkernels import journal


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("keep", [journal.KEEP_BYTES, 0])
def test_quantize_failure_in_the_middle_puts_everything_back(error, keep, monkeypatch):
    monkeypatch.setattr(journal.Journal.__init__, "__kwdefaults__", {"keep": keep})
    model = toy(tied=True)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    whole = nn.ModuleDict({"toy": model, "encoder": layer})
    before = snapshot(whole)
    flag = layer.activation_relu_or_gelu

    def stop(done, total, name):
        if done == total:
            raise error

    with pytest.raises(error):
        qk.quantize_(whole, embeddings=True, progress=stop)
    assert_unchanged(whole, before)
    assert whole["toy"].lm_head.weight is whole["toy"].embed.weight
    assert layer.activation_relu_or_gelu == flag


def test_quantize_failure_restores_values_nobody_kept(monkeypatch):
    """Spilled weights come back from the file, bit by bit, ties and attributes included."""
    monkeypatch.setattr(journal.Journal.__init__, "__kwdefaults__", {"keep": 0})
    model = toy(tied=True)
    model.blocks[0]["up"].weight.requires_grad_(False)
    model.blocks[0]["up"].weight.tag = "x"
    values = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    gone = weakref.ref(model.blocks[0]["up"].weight)
    seen = []

    def stop(done, total, name):
        if done == total:
            gc.collect()
            seen.append(gone() is None)
            raise Boom

    with pytest.raises(Boom):
        qk.quantize_(model, embeddings=True, progress=stop)
    assert seen == [True]  # it was released during the conversion
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert_bits_equal(parameter.detach(), values[name], name)
    assert model.lm_head.weight is model.embed.weight
    assert not model.blocks[0]["up"].weight.requires_grad
    assert model.blocks[0]["up"].weight.tag == "x"
    assert model.blocks[0]["down"].weight.requires_grad
    assert list(model.blocks[0]["up"].state_dict()) == ["weight", "bias"]


def test_quantize_without_room_on_the_disk_keeps_originals_in_memory(monkeypatch):
    monkeypatch.setattr(journal.Journal.__init__, "__kwdefaults__", {"keep": 0})
    monkeypatch.setattr(journal.shutil, "disk_usage", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    model = toy()
    before = snapshot(model)

    def stop(done, total, name):
        if done == total:
            raise Boom

    with pytest.raises(Boom):
        qk.quantize_(model, progress=stop)
    assert_unchanged(model, before)
    qk.quantize_(model)


def test_quantize_originals_held_elsewhere_are_not_touched(monkeypatch):
    monkeypatch.setattr(journal.Journal.__init__, "__kwdefaults__", {"keep": 0})
    model = toy()
    layer, weight = model.blocks[0]["up"], model.blocks[0]["down"].weight
    x, copied = seeded(2, 24), weight.detach().clone()
    y = layer(x)
    qk.quantize_(model)
    assert_bits_equal(layer(x), y)
    assert_bits_equal(weight.detach(), copied)


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread alone"
)
def test_quantize_real_interrupt_leaves_the_model():
    model = toy()
    before = snapshot(model)

    def interrupt(done, total, name):
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        qk.quantize_(model, progress=interrupt)
    assert_unchanged(model, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


MEMORY = """
import gc, resource, sys, torch
from torch import nn
import qkernels as qk
torch.set_num_threads(1)
qk.quantize_(nn.Sequential(nn.Linear(64, 64)))
layers = 24
model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(layers)))
gc.disable()
before = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
open('/proc/self/clear_refs', 'w').write('5')
qk.quantize_(model, sys.argv[1])
peak = next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))
print((peak - before) / (2048 * 2048 * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_quantize_peak_memory_is_about_one_layer(scheme):
    """The model has 24 layers of 16 MiB; keeping the originals would add 24, an extra int8 model 6.

    16 MiB of originals (one layer) stay in memory by design, which were there before; the rest is the layer at hand and
    the holes in malloc's heap. The garbage collector is off.
    """
    done = subprocess.run([sys.executable, "-c", MEMORY, scheme], capture_output=True, text=True, check=False)
    if "clear_refs" in done.stderr:
        pytest.skip("the peak cannot be reset here")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "w4a16"},
        {"scheme": "w8a8_static", "calibrated": True},
        {"scheme": "w4a16", "algorithm": "gptq", "calibrated": True},
        {"scheme": "w4a16", "algorithm": "hqq"},
        {"smooth": 0.5, "calibrated": True},
    ],
    ids=str,
)
def test_quantize_releases_each_original_without_the_garbage_collector(options, monkeypatch):
    monkeypatch.setattr(journal.Journal.__init__, "__kwdefaults__", {"keep": 0})
    options = dict(options)
    if options.pop("calibrated", False):
        options["calibration"] = [seeded(16, 64)]
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    held = [weakref.ref(x) for layer in model for x in (layer, layer.weight)]
    alive = []
    gc.disable()
    try:
        qk.quantize_(model, progress=lambda *_: alive.append(sum(x() is not None for x in held)), **options)
    finally:
        gc.enable()
    assert alive[-5:] == [8, 6, 4, 2, 0]


def test_quantize_failure_of_one_restoration_does_not_stop_the_others(monkeypatch):
    model = toy()
    first, last = model.blocks[0]["up"], model.blocks[1]["down"]
    real = journal._Record.restore

    def restore(record):
        if record._module is last:
            raise OSError("unreadable")
        real(record)

    monkeypatch.setattr(journal._Record, "restore", restore)

    def stop(done, total, name):
        if done == total:
            raise Boom

    with pytest.raises(OSError, match="unreadable"):
        qk.quantize_(model, progress=stop)
    assert model.blocks[0]["up"] is first


def test_quantize_releases_a_bias_that_is_a_view_of_a_checkpoint():
    flat = torch.zeros(1 << 16)
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].bias = nn.Parameter(flat[:8])
    qk.quantize_(model)
    assert model[0].bias.untyped_storage().nbytes() == 32
