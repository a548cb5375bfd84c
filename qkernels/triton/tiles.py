"""Launch shapes of the GEMMs, and what of a device's shared memory they may take."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

__all__ = ["ENOUGH_INT8_PROGRAMS", "PORTABLE_BYTES", "Tile", "shared_bytes", "short_rows"]

PORTABLE_BYTES = 99 << 10
"""Shared memory that a program may have on every GPU since compute capability 8.0; 8.6 and 8.9 have no more."""

ENOUGH_INT8_PROGRAMS = 132
"""More of int8 products keep a large GPU busy; of fewer, narrower tiles are better (measured on an H200)."""

LONGEST_ROW = 1 << 22
"""Elements from row to row: 256 rows of them are counted in 32 bits."""


@dataclass(frozen=True)
class Tile:
    """Launch shape of a kernel: tokens, channels and k of a block, warps, pipeline stages; token tiles of a group;
    programs that share the k of a block."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    splits: int = 1

    def programs(self, rows: int, channels: int) -> int:
        """Blocks of the output, each a program's."""
        return int(triton.cdiv(rows, self.m) * triton.cdiv(channels, self.n))

    def sharing(self, rows: int, channels: int, features: int, *, most: int, programs: int) -> Tile:
        """The tile whose blocks are shared by as many programs as do not leave a large GPU idle.

        Args:
            most: of them, a power of two; that many where each is left 1024 of ``features`` or more.
            programs: as many in all, at most, unless there are more blocks.
        """
        splits = min(most, features // 1024, programs // self.programs(rows, channels))
        return replace(self, splits=1 << max(0, splits.bit_length() - 1))

    def depth(self, stage_bytes: int, available: int) -> int:
        """Stages of ``stage_bytes`` that fit into ``available`` bytes of shared memory: up to :attr:`stages`."""
        return max(1, min(self.stages, available // stage_bytes))


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program on ``device`` may have; :data:`PORTABLE_BYTES` for a device that has no driver."""
    if device.type != "cuda":
        return PORTABLE_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return int(properties["max_shared_mem"])


def short_rows(x: Tensor) -> Tensor:
    """``x [M, K]`` with contiguous rows that are at most :data:`LONGEST_ROW` apart: itself, or a copy."""
    return (
        x
        if x.stride(1) == 1 and (x.stride(0) <= LONGEST_ROW or x.shape[0] == 1)
        else x.clone(memory_format=torch.contiguous_format)
    )
