"""Which tile of an output a program owns."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["grouped_tile"]


@triton.jit
def grouped_tile(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):  # noqa: ANN201 (what Triton makes of it)
    """Tile (m, n): programs are ordered in groups of GROUP_M token tiles, so that those under way at one time share
    operands in the L2."""
    per_group = GROUP_M * tiles_n
    first = (program // per_group) * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first, GROUP_M)
    tile_m = first + (program % per_group) % rows_in_group
    tile_n = (program % per_group) // rows_in_group
    return tile_m, tile_n
