"""Products large enough that threads take pieces of each other's shares (csrc/cpu/team.h): the same bits whoever did
what, in every tier and scheme.  That each piece is done once, and that a late thread is relieved, csrc/tests checks."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
from helpers import assert_bits_equal, assert_ran, seeded

from qkernels import cpu_attention, qtensor
from qkernels.nn import QuantLinear

OUT, IN = 1090, 2100

# Tests begin with one thread, and whatever they set is given back.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rows", [1, 3, 25, 200])
@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a8_intscale", "w8a16", "w4a16"])
def test_threads_that_take_over_change_no_bit(isa: str, preset: str, rows: int) -> None:
    layer = QuantLinear.from_float(seeded(OUT, IN), seeded(OUT), preset)
    x = seeded(rows, IN, seed=rows)
    expected = layer(x)
    if "a8" in preset:
        assert_ran(preset.removesuffix("_intscale"), isa, rows)
    for workers in (2, 3, 4):
        torch.set_num_threads(workers)
        for _ in range(3):
            assert_bits_equal(layer(x), expected, f"{workers} threads")


@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_chunks_of_rows_that_take_turns_in_two_places(isa: str, preset: str) -> None:
    # 4 MiB of codes are 63 rows of that many inputs, and a chunk is never of fewer than 96: three chunks.
    inputs, rows = 1 << 16, 200
    layer = QuantLinear.from_float(seeded(70, inputs), None, preset)
    x = seeded(rows, inputs, seed=1)
    expected = layer(x)
    assert_ran(preset, isa, rows)
    for workers in (8, 9):
        torch.set_num_threads(workers)
        for _ in range(3):
            assert_bits_equal(layer(x), expected, f"{workers} threads")


@pytest.mark.skipif(sys.platform != "linux", reason="where the kernel lists a process's threads in /proc")
def test_work_of_any_size_leaves_the_team_as_it_is(isa: str) -> None:
    """A team that shrinks ends threads, and beginning them anew takes longer than most products."""

    def running() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    def settled() -> set[str]:
        """Threads, when those that are about to end have ended."""
        threads = running()
        while True:
            time.sleep(0.05)
            before, threads = threads, running()
            if threads == before:
                return threads

    large = QuantLinear.from_float(seeded(OUT, IN), None, "w8a8")
    some = {preset: QuantLinear.from_float(seeded(512, 512), None, preset) for preset in ("w8a8", "w4a8", "w4a16")}
    torch.set_num_threads(6)
    large(seeded(64, IN))
    team = settled()
    assert len(team) >= 6
    for rows in (1, 2, 3, 5, 8):
        for preset, layer in some.items():
            layer(seeded(rows, 512))
            assert running() >= team, f"{preset}, {rows} rows"
    for size in (40_000, 70_000):
        qtensor.quantize(seeded(size // 100, 100))
        assert running() >= team, f"quantize {size}"
    q = seeded(1, 4, 33, 32)
    assert isa == "scalar" or cpu_attention.attention(q, q, q, None, 0.2) is not None
    assert running() >= team, "attention"
