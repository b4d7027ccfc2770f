"""Tile sizes of the fused PLADIS kernel, and why a call site has none."""

from typing import NamedTuple

import torch

HEAD_DIMS = (40, 64, 72, 80, 96, 112, 128, 160)
KEY_TILES = (64, 128, 256, 512)
SPILLS = {
    (40, 512)
    # (head size, key tile) that spill registers in one of their binaries (16 bytes on sm_90); torch
    # runs there
}


class Plan(NamedTuple):
    """Tile sizes of one launch: padded head size and keys, query rows per program, warps, and the
    shared memory it needs in KB."""

    head_tile: int
    key_tile: int
    rows: int
    warps: int
    shared_kb: int


# (head tile, key tile): (query rows, warps, shared KB). Every entry is compiled ahead of time in
# the tests: no spills, this much memory.
TILES = {
    (64, 64): (64, 4, 16),
    (64, 128): (32, 4, 26),
    (64, 256): (32, 8, 52),
    (64, 512): (16, 8, 82),
    (128, 64): (64, 4, 32),
    (128, 128): (32, 4, 42),
    (128, 256): (32, 8, 84),
    (128, 512): (16, 8, 148),
    (256, 64): (32, 4, 40),
    (256, 128): (32, 8, 76),
}


def plan(head_dim: int, keys: int) -> Plan | None:
    """Tile sizes for ``head_dim`` and ``keys``, None if the table has no such tile."""
    if head_dim not in HEAD_DIMS or not 0 < keys <= KEY_TILES[-1]:
        return None
    head_tile = max(64, 1 << (head_dim - 1).bit_length())
    key_tile = next(tile for tile in KEY_TILES if keys <= tile)
    tile = None if (head_dim, key_tile) in SPILLS else TILES.get((head_tile, key_tile))
    return None if tile is None else Plan(head_tile, key_tile, *tile)


def refusal(dtype: torch.dtype, head_dim: int, keys: int, shared_kb: int) -> str | None:
    """None if the kernel takes this site on a device with ``shared_kb`` KB of shared memory per
    block, else the reason."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} is not a 16-bit dtype"
    tiles = plan(head_dim, keys)
    if tiles is None:
        return f"no tile for head size {head_dim} with {keys} keys"
    if tiles.shared_kb > shared_kb:
        return f"the tile needs {tiles.shared_kb} KB of shared memory, the device has {shared_kb}"
    return None
