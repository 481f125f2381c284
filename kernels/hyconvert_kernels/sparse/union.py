"""The union of the blocks that a tile of neighbouring queries selected.

Neighbouring queries select mostly the same blocks, so a tile that walks the union once, under a bitmap of which query
wants which block, moves far fewer bytes than gathering per query, and is exact. A union is built once per full layer
and serves all of its sparse layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..configs import queries_per_tile

UNION_ROWS = 128


class BlockUnion(NamedTuple):
    """What `build_union` returns; pass it on to `block_sparse_attention` as ``union``.

    Attributes:
        slots: int32 ``[B,G,NT,CAP]``, first slot of each block of the tile's union, ascending; entries from the tile's
            count on are undefined.
        bits: int32 or int64 ``[B,G,NT,CAP]``; bit i says that query i of the tile selected the block.
        counts: int32 ``[B,G,NT]``.
        ends: int32 ``[B,G,ceil(S / block size)]`` or None. The transposed list, which the backward needs: of the
            entries whose blocks begin in cell c, the first key slots c * block size and on, this is the end.
        entries: int32 ``[B,G,NT * CAP]`` or None; tile * CAP + entry, cell by cell, and ascending within a cell.
    """

    slots: Tensor
    bits: Tensor
    counts: Tensor
    ends: Tensor | None = None
    entries: Tensor | None = None


def union_queries(ratio: int) -> int:
    """Queries per tile for ``ratio`` query heads per KV head."""
    return queries_per_tile(UNION_ROWS, ratio)


def union_capacity(queries: int, topk: int, slots: int, block_size: int) -> int:
    """Entries a tile can need at most: every selection distinct, or every block (once more per document) present."""
    return min(queries * topk, -(-slots // block_size) + queries)


def build_union(
    indices: Tensor, q_offset: Tensor, start: Tensor, *, slots: int, block_size: int, window: int, ratio: int
) -> BlockUnion:
    """Union of the selected blocks per tile, in plain PyTorch; the kernel's truth.

    Args:
        indices: int32 ``[B,G,T,K]``, -1 for none, in any order.
        q_offset: int ``[B]``.
        start: int ``[B,T]``.
        slots: slots S of the source's keys.
        block_size: keys per block.
        window: blocks without a key outside the window are left out.
        ratio: query heads per KV head.
    """
    batch, groups, length, topk = indices.shape
    queries = union_queries(ratio)
    tiles = -(-length // queries)
    capacity = union_capacity(queries, topk, slots, block_size)
    wide = torch.int64 if queries > 32 else torch.int32
    union = BlockUnion(
        indices.new_zeros(batch, groups, tiles, capacity),
        indices.new_zeros(batch, groups, tiles, capacity, dtype=wide),
        indices.new_zeros(batch, groups, tiles),
    )
    for b in range(batch):
        for g in range(groups):
            for tile in range(tiles):
                members: dict[int, int] = {}
                for i, t in enumerate(range(tile * queries, min(length, (tile + 1) * queries))):
                    for block in indices[b, g, t].tolist():
                        slot = int(start[b, t]) + block * block_size
                        if block >= 0 and slot <= int(q_offset[b]) + t - window:
                            members[slot] = members.get(slot, 0) | 1 << i
                for at, slot in enumerate(sorted(members)):
                    bits = members[slot]
                    if wide is torch.int32 and bits >= 1 << 31:
                        bits -= 1 << 32
                    if wide is torch.int64 and bits >= 1 << 63:
                        bits -= 1 << 64
                    union.slots[b, g, tile, at], union.bits[b, g, tile, at] = slot, bits
                union.counts[b, g, tile] = len(members)
    return union


def transpose_union(union: BlockUnion, *, slots: int, block_size: int) -> tuple[Tensor, Tensor]:
    """``ends`` and ``entries`` of a union, in plain PyTorch; the kernel's truth. Entries from the last end on are 0."""
    batch, groups, tiles, capacity = union.slots.shape
    cells = -(-slots // block_size)
    ends = union.counts.new_zeros(batch, groups, cells)
    entries = union.counts.new_zeros(batch, groups, tiles * capacity)
    for b in range(batch):
        for g in range(groups):
            listed: list[list[int]] = [[] for _ in range(cells)]
            for tile in range(tiles):
                for at in range(int(union.counts[b, g, tile])):
                    listed[int(union.slots[b, g, tile, at]) // block_size].append(tile * capacity + at)
            flat = [entry for cell in listed for entry in cell]
            entries[b, g, : len(flat)] = torch.tensor(flat, dtype=torch.int32)
            ends[b, g] = torch.tensor([len(cell) for cell in listed]).cumsum(0)
    return ends, entries
