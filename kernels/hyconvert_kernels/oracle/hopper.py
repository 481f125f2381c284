"""Forward of oracle attention for Hopper, in Gluon: what it fills is what `forward` fills.

A warp fetches keys and values by bulk copies, and two warpgroups, of 64 rows of a tile each, multiply. Each keeps the
next step's logits and this step's output in flight across its softmax, and the two take turns, so that one multiplies
while the other exponentiates (the schedule of FlashAttention-3, arXiv 2407.08608). Steps run from the diagonal down, so
that the masked ones come first.

Gluon belongs to Triton and may change with it: `fits` says where this has been checked. Elsewhere `forward` runs its
own kernel.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..configs import HOPPER_CACHED, TILE_ROWS, hopper_maxima, hopper_tile, processors, strides
from ..hopper import barrier, barriers, bulk_strides, bulk_tiles, capable, fetch
from ..tiles import FAR, LN2
from .maxima import read


@gluon.jit
def _locate(i, pid, programs, tiles, total_tiles, G: gl.constexpr, EVEN: gl.constexpr):
    """The i-th tile of a program: the list (longest first) is dealt out there and back.

    With EVEN the list goes by length, so that all programs have as much to do; else by line (batch row and KV head), so
    that they read the same keys.
    """
    turn = gl.where(i % 2 == 0, pid, programs - 1 - pid)
    work = i * programs + turn
    if EVEN:
        lines = total_tiles // tiles
        tile, line = tiles - 1 - work // lines, work % lines
    else:
        tile, line = tiles - 1 - work % tiles, work // tiles
    return tile, line // G, line % G, work


@gluon.jit
def _extent(slots, starts, seg, window, BN: gl.constexpr):
    inside = starts == seg
    high = gl.max(gl.where(inside, slots, -1), 0) + 1
    low = gl.min(gl.where(inside, slots, FAR), 0)
    free = gl.maximum(low - window + 1 - seg, 0) // BN
    return high, free, gl.maximum((high - seg + BN - 1) // BN, 1)  # a tile of empty rows takes a step too


@gluon.jit
def _producer(
    k_desc, v_desc, kv, k_full, k_empty, v_full, v_empty, OFFSET, START, T, T0, T1, tiles, total_tiles, window,
    G: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    k_smem, v_smem = kv
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    pid, programs = gl.program_id(0), gl.num_programs(0)
    step = 0
    for i in range(0, (total_tiles + programs - 1) // programs):
        tile, row, group, work = _locate(i, pid, programs, tiles, total_tiles, G, EVEN)
        if work < total_tiles:
            t = T0 + tile * BQ + gl.arange(0, BQ, L)
            slots = gl.load(OFFSET + row).to(gl.int32) + t
            starts = gl.load(START + row.to(gl.int64) * T + t, mask=t < T1, other=FAR).to(gl.int32)
            seg = gl.min(starts, 0)
            while seg < FAR:
                _high, _free, steps = _extent(slots, starts, seg, window, BN)
                for j in range(0, steps):
                    n = seg + (steps - 1 - j) * BN
                    fetch(k_desc, row, group, n, k_full, k_empty, k_smem, step, STAGES)
                    fetch(v_desc, row, group, n, v_full, v_empty, v_smem, step, STAGES)
                    step += 1
                seg = gl.min(gl.where(starts > seg, starts, FAR), 0)


@gluon.jit
def _softmax(
    s, top, n, position, slots, high, raw, rows, inside, scale_log2, window,
    BM: gl.constexpr, BN: gl.constexpr, BLOCK: gl.constexpr, MASK: gl.constexpr, SCORE: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights, the new top and the decay of a step's raw logits; maxima of rows ``inside`` go to ``raw``, in log2."""
    parts: gl.constexpr = BN // BLOCK
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    keys = n + gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))
    if SCORE:
        seen = s
        if MASK:
            seen = gl.where(keys[None, :] <= slots[:, None] - window, s, float("-inf"))
        if parts == 1:
            block = gl.max(seen, 1)
            store = inside & (n <= high - 1 - window) if MASK else inside
            gl.store(raw + position * BM + rows, block * scale_log2, mask=store)
            best = block
        else:
            blocks = gl.max(seen.reshape([BM, parts, BLOCK]), 2)
            PART: gl.constexpr = gl.SliceLayout(0, blocks.type.layout)
            part = gl.arange(0, parts, PART)
            row = gl.arange(0, BM, gl.SliceLayout(1, blocks.type.layout))
            place = raw + (position + part)[None, :] * BM + row[:, None]
            store = gl.convert_layout(inside, row.type.layout, assert_trivial=True)[:, None]
            if MASK:
                store = store & ((n + part * BLOCK) <= high - 1 - window)[None, :]
            gl.store(place, blocks * scale_log2, mask=store)
            best = gl.convert_layout(gl.max(blocks, 1), ROW, assert_trivial=True)
    if MASK:
        s = gl.where(keys[None, :] <= slots[:, None], s, float("-inf"))
    if MASK or not SCORE:  # else the best key is the best block's
        best = gl.max(s, 1)
    new = gl.maximum(top, best * scale_log2)
    safe = new
    if MASK:
        safe = gl.where(new == float("-inf"), 0.0, new)
    weights = gl.exp2(s * scale_log2 - safe[:, None])
    return weights, new, gl.exp2(top - safe)


@gluon.jit
def _step(
    acc, top, total, p, n, step, seg, slots, high, raw, rows, inside, q_smem, k_smem, v_smem, k_full, k_empty, v_full,
    v_empty, mine, theirs, turn, scale_log2, window,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    SCORE: gl.constexpr, TURNS: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Logits of the keys from ``n`` on, while the weights ``p`` of the step before meet their values."""
    last = step % STAGES
    stage, phase = (step + 1) % STAGES, (step + 1) // STAGES & 1
    mbarrier.wait(k_full.index(stage), phase)
    if TURNS:
        mbarrier.wait(mine, turn & 1)
    zero = gl.zeros([BM, BN], gl.float32, S_LAYOUT)
    s = warpgroup_mma(
        q_smem, k_smem.index(stage).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    acc = warpgroup_mma(p, v_smem.index(last).reshape([BN, D]), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(theirs)
    s, acc = warpgroup_mma_wait(1, deps=[s, acc])
    mbarrier.arrive(k_empty.index(stage))
    weights, top, decay = _softmax(
        s, top, n, (n - seg) // BLOCK, slots, high, raw, rows, inside, scale_log2, window, BM, BN, BLOCK, MASK, SCORE,
        S_LAYOUT,
    )  # fmt: skip
    total = total * decay + gl.sum(weights, 1)
    after = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    # Needed by the next step only, but its loop keeps ptxas from waiting for the product before the weights.
    mbarrier.wait(v_full.index(stage), phase)
    acc, p, after = warpgroup_mma_wait(0, deps=[acc, p, after])
    mbarrier.arrive(v_empty.index(last))
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return acc, top, total, after


@gluon.jit
def _consumer(
    W: gl.constexpr, q_smem, kv, k_full, k_empty, v_full, v_empty, turns, cleaned,
    Q, OUT, LSE, MAXIMA, OFFSET, START, q_strides, o_strides,
    T, T0, T1, positions, tiles, total_tiles, scale_log2, window,
    G: gl.constexpr, R: gl.constexpr, RP: gl.constexpr, BQ: gl.constexpr, WQ: gl.constexpr, D: gl.constexpr,
    BN: gl.constexpr, BLOCK: gl.constexpr, SCORE: gl.constexpr, STAGES: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    k_smem, v_smem = kv
    BM: gl.constexpr = WQ * RP
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    MEM: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = Q.dtype.element_ty
    pid, programs = gl.program_id(0), gl.num_programs(0)
    rows = gl.arange(0, BM, ROW)
    step = 0
    turn = 0
    cleanings = 0
    mine, theirs = turns.index(W), turns.index(1 - W)
    for i in range(0, (total_tiles + programs - 1) // programs):
        tile, row, group, work = _locate(i, pid, programs, tiles, total_tiles, G, EVEN)
        if work < total_tiles:
            row64, group64 = row.to(gl.int64), group.to(gl.int64)
            offset = gl.load(OFFSET + row).to(gl.int32)
            t_all = T0 + tile * BQ + gl.arange(0, BQ, LINE)
            starts_all = gl.load(START + row64 * T + t_all, mask=t_all < T1, other=FAR).to(gl.int32)
            t_first = T0 + tile * BQ + W * WQ
            m_rows = gl.arange(0, BM, gl.SliceLayout(1, MEM))
            m_t = t_first + m_rows // RP
            m_columns = gl.arange(0, D, gl.SliceLayout(0, MEM))
            m_head = group64 * R + m_rows % RP
            q = gl.load(
                Q + row64 * q_strides[0] + (m_head * q_strides[1] + m_t.to(gl.int64) * q_strides[2])[:, None]
                + m_columns[None, :], mask=((m_t < T1) & (m_rows % RP < R))[:, None], other=0.0,
            )  # fmt: skip
            barrier()  # all have multiplied by the tile before
            q_smem.store(q)
            fence_async_shared()
            barrier()
            slots = offset + t_first + rows // RP
            raw = MAXIMA + (((row64 * G + group64) * tiles + tile) * 2 + W) * positions * BM
            starts = gl.load(START + row64 * T + slots - offset, mask=slots - offset < T1, other=FAR).to(
                gl.int32
            )
            seg = gl.min(starts_all, 0)
            while seg < FAR:
                inside = starts == seg
                high, free, steps = _extent(offset + t_all, starts_all, seg, window, BN)
                top = gl.full([BM], float("-inf"), gl.float32, ROW)
                acc = gl.zeros([BM, D], gl.float32, O_LAYOUT)
                zero = gl.zeros([BM, BN], gl.float32, S_LAYOUT)
                # Step 0, on the diagonal.
                stage, phase = step % STAGES, step // STAGES & 1
                mbarrier.wait(k_full.index(stage), phase)
                s = warpgroup_mma(
                    q_smem,
                    k_smem.index(stage).reshape([BN, D]).permute((1, 0)),
                    zero,
                    use_acc=False,
                    is_async=True,
                )
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(k_empty.index(stage))
                n = seg + (steps - 1) * BN
                weights, top, _decay = _softmax(
                    s, top, n, (n - seg) // BLOCK, slots, high, raw, rows, inside, scale_log2, window, BM, BN, BLOCK,
                    True, SCORE, S_LAYOUT,
                )  # fmt: skip
                total = gl.sum(weights, 1)
                p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
                mbarrier.wait(v_full.index(stage), phase)
                # Slots that no query of this batch row has reached may hold anything: their values count as zeros.
                if n + BN > offset + T:
                    if W == 0:
                        v_keys = n + gl.arange(0, BN, gl.SliceLayout(1, MEM))
                        values = v_smem.index(stage).reshape([BN, D])
                        clean = values.load(MEM)
                        clean = gl.where((v_keys < offset + T)[:, None], clean, gl.zeros([BN, D], dtype, MEM))
                        values.store(clean)
                        fence_async_shared()
                    mbarrier.arrive(cleaned)
                    mbarrier.wait(cleaned, cleanings & 1)
                    cleanings += 1
                # Both loops are one step after the other; the second takes turns with the other warpgroup.
                for _ in range(1, steps - free):
                    n -= BN
                    acc, top, total, p = _step(
                        acc, top, total, p, n, step, seg, slots, high, raw, rows, inside, q_smem, k_smem, v_smem,
                        k_full, k_empty, v_full, v_empty, mine, theirs, 0, scale_log2, window,
                        BM, BN, D, BLOCK, STAGES, True, SCORE, False, S_LAYOUT, O_LAYOUT,
                    )  # fmt: skip
                    step += 1
                for _ in range(0, gl.minimum(free, steps - 1)):
                    n -= BN
                    acc, top, total, p = _step(
                        acc, top, total, p, n, step, seg, slots, high, raw, rows, inside, q_smem, k_smem, v_smem,
                        k_full, k_empty, v_full, v_empty, mine, theirs, turn, scale_log2, window,
                        BM, BN, D, BLOCK, STAGES, False, SCORE, True, S_LAYOUT, O_LAYOUT,
                    )  # fmt: skip
                    step += 1
                    turn += 1
                stage = step % STAGES
                acc = warpgroup_mma(p, v_smem.index(stage).reshape([BN, D]), acc, is_async=True)
                acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                mbarrier.arrive(v_empty.index(stage))
                step += 1
                # Finish.
                empty = total == 0.0
                safe = gl.where(empty, 1.0, total)
                lse2 = gl.where(empty, float("-inf"), top + gl.log2(safe))
                out = acc / gl.convert_layout(safe, O_ROW)[:, None]
                o_rows = gl.arange(0, BM, O_ROW)
                o_t = t_first + o_rows // RP
                o_ok = (o_t < T1) & (o_rows % RP < R)
                o_start = gl.load(START + row64 * T + o_t, mask=o_t < T1, other=FAR).to(gl.int32)
                done = o_ok & (o_start == seg)
                o_head = group64 * R + o_rows % RP
                o_columns = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
                place = (
                    OUT
                    + row64 * o_strides[0]
                    + (o_head * o_strides[1] + o_t.to(gl.int64) * o_strides[2])[:, None]
                )
                gl.store(place + o_columns[None, :], out.to(dtype), mask=done[:, None])
                lse2_o = gl.convert_layout(lse2, O_ROW)
                gl.store(LSE + (row64 * G * R + o_head) * T + o_t, lse2_o * LN2, mask=done)
                seg = gl.min(gl.where(starts_all > seg, starts_all, FAR), 0)


@gluon.jit
def _hopper_forward(
    Q, k_desc, v_desc, OUT, LSE, MAXIMA, OFFSET, START,
    sqb, sqh, sqt, sob, soh, sot,
    T, T0, T1, positions, tiles, total_tiles, scale_log2, window,
    G: gl.constexpr, R: gl.constexpr, RP: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr,
    BN: gl.constexpr, BLOCK: gl.constexpr, SCORE: gl.constexpr, STAGES: gl.constexpr,
    EVEN: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    WQ: gl.constexpr = BQ // 2
    dtype: gl.constexpr = Q.dtype.element_ty
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WQ * RP, D], dtype)
    q0 = gl.allocate_shared_memory(dtype, [WQ * RP, D], Q_LAYOUT)
    q1 = gl.allocate_shared_memory(dtype, [WQ * RP, D], Q_LAYOUT)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    turns, cleaned = barriers(2, 1), barriers(1, 2).index(0)
    fence_async_shared()
    mbarrier.arrive(turns.index(0))
    kv = (k_smem, v_smem)
    qs, os = (sqb, sqh, sqt), (sob, soh, sot)
    gl.warp_specialize(
        [
            (_consumer, (
                0, q0, kv, k_full, k_empty, v_full, v_empty, turns, cleaned, Q, OUT, LSE, MAXIMA,
                OFFSET, START, qs, os, T, T0, T1, positions, tiles, total_tiles, scale_log2, window,
                G, R, RP, BQ, WQ, D, BN, BLOCK, SCORE, STAGES, EVEN,
            )),
            (_consumer, (
                1, q1, kv, k_full, k_empty, v_full, v_empty, turns, cleaned, Q, OUT, LSE, MAXIMA,
                OFFSET, START, qs, os, T, T0, T1, positions, tiles, total_tiles, scale_log2, window,
                G, R, RP, BQ, WQ, D, BN, BLOCK, SCORE, STAGES, EVEN,
            )),
            (_producer, (
                k_desc, v_desc, kv, k_full, k_empty, v_full, v_empty, OFFSET, START, T, T0, T1, tiles, total_tiles,
                window, G, BQ, BN, STAGES, EVEN,
            )),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
    """Whether `forward` can take these inputs, on this device and under this Triton."""
    return (
        capable(q.device)
        and q.dtype == torch.bfloat16  # float16 was compiled, and not checked
        and q.shape[3] in (64, 128)
        and bulk_strides(k) is not None
        and bulk_strides(v) is not None
        and scale > 0
    )


def forward(
    q, k, v, q_offset, start, out, lse, scores, indices=None, *, block_size, window, scale, first, end, by_length=None,
) -> None:  # fmt: skip
    """`forward.forward` of queries ``first`` to ``end``, for inputs that `fits` takes.

    ``indices``, int32 ``[B,G,T,topk]`` or None, takes the blocks of largest score, for which no ``scores`` are needed.
    With either, all T queries have their slots among those of ``k``: ``q_offset + T`` is at most their number.
    ``by_length`` says in which order tiles go, and is None for what suits the size; see `_locate`.
    """
    batch, heads, length, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    ratio, lines, device = heads // groups, batch * k.shape[1], q.device
    tile = hopper_tile(ratio)
    if by_length is None:
        by_length = k.nbytes + v.nbytes <= HOPPER_CACHED
    keys, values = bulk_tiles(k, tile.keys), bulk_tiles(v, tile.keys)
    scored = scores is not None or indices is not None
    parts = [Span(first, end, triton.cdiv(end - first, tile.queries), 0)]
    if scored:
        reach = slots - length - window  # query t wants keys up to slot t + reach at most
        most = hopper_maxima(q.numel(), end + reach)
        parts = list(spans(first, end, tile.queries, lines, reach, block_size, processors(device), most))
    size = max(part.tiles * part.positions for part in parts)
    maxima = torch.empty(max(1, lines * size * TILE_ROWS), dtype=torch.float32, device=device)
    for part in parts:
        total = lines * part.tiles
        _hopper_forward[(min(total, processors(device)),)](
            q, keys, values, out, lse, maxima, q_offset, start, *strides(q), *strides(out),
            length, part.begin, part.end, part.positions, part.tiles, total, scale * 1.4426950408889634, window,
            G=groups, R=ratio, RP=triton.next_power_of_2(ratio), BQ=tile.queries, D=dim, BN=tile.keys, BLOCK=block_size,
            SCORE=scored, STAGES=tile.stages, EVEN=by_length, REGS=tile.registers, num_warps=tile.warps,
        )  # fmt: skip
        read(
            maxima, lse, q_offset, start, scores, indices, first=first, begin=part.begin, end=part.end,
            tiles=part.tiles, positions=part.positions, queries=tile.queries, ratio=ratio, window=window,
            block_size=block_size,
        )  # fmt: skip


class Span(NamedTuple):
    """Queries ``begin`` to ``end`` in so many tiles per batch row and KV head, and the blocks that they may reach."""

    begin: int
    end: int
    tiles: int
    positions: int


def spans(
    first: int, end: int, queries: int, lines: int, reach: int, block_size: int, programs: int, most: int
) -> Iterator[Span]:
    """Queries whose maxima fit into memory at a time, the last ones first.

    Each but the very last, of the shortest tiles, has about as many tiles as programs take in whole rounds, and never
    fewer than for one: programs that wait would cost more than its memory.

    Args:
        first, end: queries.
        queries: per tile.
        lines: batch rows times KV heads.
        reach: query t sees keys up to slot t + reach.
        block_size: tokens per block.
        programs: that run side by side.
        most: maxima, but for a round.
    """
    while first < end:
        positions = max(1, triton.cdiv(end + reach, block_size))
        left = triton.cdiv(end - first, queries)
        room = max(most, programs * TILE_ROWS * positions)
        tiles = min(left, max(1, room // (lines * TILE_ROWS * positions)))
        if programs <= tiles * lines and tiles < left:
            tiles = max(1, tiles * lines // programs * programs // lines)
        begin = max(first, end - tiles * queries)
        yield Span(begin, end, tiles, positions)
        end = begin
