"""From the block maxima that Hopper's attention leaves to scores, or to the blocks of largest score.

Attention knows a row's log-sum-exp only at its end, so it leaves the maxima of its raw logits, in log2 units, as they
come: float32 ``[tile, position, row]``, where a tile holds the rows of one warpgroup, query by query with its heads
side by side, and a position is a block counted from the start of the row's sequence. Here each program takes one query,
normalises, and takes the maximum over the group's heads.
"""

import torch
import triton
import triton.language as tl

from ..configs import select_warps
from ..tiles import LOG2E
from ..topk.forward import select_blocks


@triton.jit
def _place(OFFSET, START, T, T0, T1, tiles, window, G: tl.constexpr, WQ: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile, batch row, KV head, query and the number of its eligible blocks, 0 beyond the last query."""
    tile = (tl.program_id(0) // WQ).to(tl.int64)
    line, t = tile // (2 * tiles), T0 + tile % (2 * tiles) * WQ + tl.program_id(0) % WQ
    row = line // G
    rest = tl.load(OFFSET + row) + t - window - tl.load(START + row * T + t, mask=t < T1, other=0)
    return tile, row, line % G, t, tl.where((t < T1) & (rest >= 0), rest // BLOCK + 1, 0).to(tl.int32)


@triton.jit
def _group_scores(
    MAXIMA, LSE, tile, row, group, t, block, eligible, T, positions,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WQ: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Scores of some blocks ``[N]`` for a query, in [0, 1] even if its logits are not numbers; -inf if not eligible."""
    lses = LSE + (row * G + group) * R * T + t
    place = MAXIMA + (tile * positions + block) * (WQ * RP) + tl.program_id(0) % WQ * RP
    if N * RP <= 16384:
        head = tl.arange(0, RP)
        real = (head < R) & (eligible > 0)
        lse = tl.load(lses + head * T, mask=real, other=float("inf"))
        seen = (block < eligible)[:, None] & real[None, :]
        logits = tl.load(place[:, None] + head[None, :], mask=seen, other=float("-inf"))
        best = tl.max(logits - (lse * LOG2E)[None, :], 1)
    else:  # more than registers take
        best = tl.full([N], float("-inf"), tl.float32)
        for head in tl.range(0, R):
            lse = tl.load(lses + head * T, mask=eligible > 0, other=float("inf"))
            logits = tl.load(place + head, mask=block < eligible, other=float("-inf"))
            best = tl.maximum(best, logits - lse * LOG2E)
    return tl.where(block < eligible, tl.minimum(tl.maximum(tl.exp2(best), 0.0), 1.0), float("-inf"))


@triton.jit
def _scores(
    MAXIMA, LSE, OFFSET, START, SCORES, T, T0, T1, FIRST, SPAN, tiles, positions, window, NB,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WQ: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, row, group, t, eligible = _place(OFFSET, START, T, T0, T1, tiles, window, G, WQ, BLOCK)
    out = SCORES + ((row * G + group) * SPAN + t - FIRST) * NB
    for c in range(0, NB, N):
        block = c + tl.arange(0, N)
        found = _group_scores(
            MAXIMA, LSE, tile, row, group, t, block, eligible, T, positions, G, R, RP, WQ, N
        )
        tl.store(out + block, found, mask=(block < NB) & (t < T1))


@triton.jit
def _select(
    MAXIMA, LSE, OFFSET, START, INDICES, T, T0, T1, tiles, positions, window, K,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, WQ: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    tile, row, group, t, eligible = _place(OFFSET, START, T, T0, T1, tiles, window, G, WQ, BLOCK)
    block = tl.arange(0, N)
    found = _group_scores(MAXIMA, LSE, tile, row, group, t, block, eligible, T, positions, G, R, RP, WQ, N)
    win, place = select_blocks(found, block < eligible, K, 30)
    out = INDICES + ((row * G + group) * T + t) * K
    tl.store(out + place, block, mask=win)
    slot = tl.arange(0, KP)
    rest = (slot >= eligible) & (slot < K) & (t < T1)
    tl.store(out + slot, tl.full([KP], -1, tl.int32), mask=rest)


def read(
    maxima: torch.Tensor, lse, q_offset, start, scores, indices, *, first, begin, end, tiles, positions, queries,
    ratio, window, block_size,
) -> None:  # fmt: skip
    """Fill scores and chosen blocks of queries ``begin`` to ``end``, each unless it is None.

    Args:
        maxima: float32, tile by tile of ``queries``, the two warpgroups of each side by side.
        lse: float32 ``[B,H,T]``, natural logarithms.
        q_offset, start: as for attention, contiguous.
        scores: float32 ``[B,G,end of all - first,NB]``.
        indices: int32 ``[B,G,T,topk]``.
        first: the query that ``scores`` begins with.
        begin, end: queries of these maxima.
        tiles: of each batch row and KV head.
        positions: of each tile.
        queries: per tile.
        ratio: query heads per KV head.
        window, block_size: as for attention.
    """
    groups, length = lse.shape[1] // ratio, lse.shape[2]
    grid = (lse.shape[0] * groups * tiles * queries,)
    shape = {
        "G": groups, "R": ratio, "RP": triton.next_power_of_2(ratio), "WQ": queries // 2, "BLOCK": block_size,
    }  # fmt: skip
    place = (maxima, lse, q_offset, start)
    if scores is not None:
        span, blocks = scores.shape[2:]
        _scores[grid](
            *place, scores, length, begin, end, first, span, tiles, positions, window, blocks,
            N=min(512, triton.next_power_of_2(blocks)), **shape,
        )  # fmt: skip
    if indices is not None:
        topk = indices.shape[3]
        size = max(128, triton.next_power_of_2(positions))  # not for every size that a long prompt comes by
        _select[grid](
            *place, indices, length, begin, end, tiles, positions, window, topk,
            N=size, KP=triton.next_power_of_2(topk), num_warps=select_warps(size), **shape,
        )  # fmt: skip
