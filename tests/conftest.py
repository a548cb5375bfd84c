"""Fixtures of the whole suite: every tier of the CPU kernels, forced; every device there is."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from qkernels import _C

TIERS = ("scalar", "avx2", "avxvnni", "avx512vnni", "amx")


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled() -> None:
    """A file of tests begins without what ``torch.compile`` made in others: torch counts how often it compiled a
    function of its own anew, and stops at eight times a process, whichever models they were."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(params=TIERS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each tier in turn, forced for the test and given back after it; skipped, with the reason, where it cannot run."""
    tier, info = request.param, _C.info()
    if tier not in info["compiled"]:
        pytest.skip(f"tier {tier} is not in this build (compiled: {', '.join(info['compiled'])})")
    if tier not in info["usable"]:
        pytest.skip(f"this processor has no {tier} (usable: {', '.join(info['usable'])})")
    _C.set_isa(tier)
    try:
        yield tier
    finally:
        _C.set_isa(info["isa"])


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch.set_num_threads 1 and 2, given back after the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    try:
        yield request.param
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch's, given back after the test: for weights and models that are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=("cpu", "cuda"))
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and, where there is one, the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a torch built without CUDA")
    return torch.device(request.param)
