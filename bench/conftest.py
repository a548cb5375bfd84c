"""Microbenchmarks: `pytest bench`. Each is checked against the reference before it is timed.

What they add to `qkernels bench`: pytest-benchmark's statistics, and its comparison with saved runs
(`pytest bench --benchmark-autosave`, then `--benchmark-compare`).
"""

import pytest
import torch

from qkernels import _C


@pytest.fixture(params=_C.info()["usable"])
def isa(request: pytest.FixtureRequest) -> str:
    """Every tier of this machine in turn, forced; the one that was in use comes back afterwards."""
    before = _C.info()["isa"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def inference() -> None:
    with torch.inference_mode():
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_group_by = "group"
