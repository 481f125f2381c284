"""Forward of block-sparse attention for Hopper, in Gluon: what it fills is what `forward` fills.

A tile is the union's: 128 rows, of which each of two warpgroups has 64, half of the queries with all heads, heads
outermost. A warp takes tiles from a counter, fetches the next tile's queries while this one's are in use, walks the
tile's list from its end, and fetches blocks in boxes of 64 keys by bulk copies, along with where each box begins and
which queries want it. The first steps, whose keys may lie inside some query's window, are masked key by key; in all
others a query wants all keys of a box or none. Within a tile the schedule is `oracle.hopper`'s. Outputs leave by bulk
copies from where the queries were.

Gluon belongs to Triton and may change with it: `fits` says where this has been checked. Elsewhere `forward` runs its
own kernel.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..configs import hopper_sparse_tile, processors
from ..hopper import barrier, barriers, bulk_load, bulk_store, bulk_strides, bulk_tiles, capable
from ..tiles import FAR, LN2
from .union import BlockUnion, union_queries

BOX = gl.constexpr(64)
"""Keys that are fetched together, and columns of one bulk copy."""
BUFFERS = gl.constexpr(2)
"""Tiles whose queries are at hand."""


@gluon.jit
def _place(work, tiles):
    """Where a tile's list lies: lines one after the other, their last tiles first."""
    return (work // tiles).to(gl.int64) * tiles + (tiles - 1 - work % tiles)


@gluon.jit
def _words(slots, bits, box, boxes, PARTS: gl.constexpr):
    """Which queries want boxes, and where these begin; none and far away where there is none."""
    real = (box >= 0) & (box < boxes)
    wanted = gl.load(bits + box // PARTS, mask=real, other=0)
    begin = gl.load(slots + box // PARTS, mask=real, other=0)
    return wanted, gl.where(real, begin + box % PARTS * BOX, FAR)


@gluon.jit
def _edges(slots, count, offset, tile, window, EDGE: gl.constexpr, BQ: gl.constexpr, BLOCK: gl.constexpr):
    """How many blocks of a tile have keys inside the window of its first query.

    They come last in the list. As they differ, and as each begins before some query's window, they are fewer than a
    block's keys and a tile's queries together; EDGE is no less.
    """
    entry = count - 1 - gl.arange(0, EDGE, gl.BlockedLayout([1], [32], [1], [0]))
    begins = gl.load(slots + entry, mask=entry >= 0, other=0)
    inside = (entry >= 0) & (begins + BLOCK - 1 > offset + tile * BQ - window)
    return gl.sum(inside.to(gl.int32), 0)


@gluon.jit
def _fetch_boxes(desc, row, group, begin, full, boxes, stage, D: gl.constexpr, BN: gl.constexpr):
    """Bring a step's boxes, which ``begin`` at these slots, column by column of boxes."""
    NB: gl.constexpr = BN // BOX
    PANELS: gl.constexpr = D // BOX
    part = gl.arange(0, NB, begin.type.layout)
    mbarrier.expect(full, BN * D * 2)
    for h in gl.static_range(NB):
        n = gl.max(gl.where(part == h, begin, 0), 0)
        for p in gl.static_range(PANELS):
            to = boxes.index((stage * PANELS + p) * NB + h)
            bulk_load(desc, [row, group, n, p * BOX], full, to)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_smem, kv, tile_smem, words, q_bars, kv_bars, SLOTS, BITS, COUNTS, OFFSET, COUNTER,
    T, S, CAP, tiles, total_tiles, window,
    G: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, BLOCK: gl.constexpr, EDGE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    q0_smem, q1_smem = q_smem
    k_smem, v_smem = kv
    slot_smem, bits_smem = words
    q_full, q_empty = q_bars
    k_full, k_empty, v_full, v_empty = kv_bars
    NB: gl.constexpr = BN // BOX
    PARTS: gl.constexpr = BLOCK // BOX
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    k_boxes = k_smem._reinterpret(k_smem.dtype, [STAGES * D // BOX * NB, 1, 1, BOX, BOX], k_desc.layout)
    v_boxes = v_smem._reinterpret(v_smem.dtype, [STAGES * D // BOX * NB, 1, 1, BOX, BOX], v_desc.layout)
    programs = gl.num_programs(0)
    part = gl.arange(0, NB, L)
    work = gl.program_id(0)
    count = gl.load(COUNTS + _place(work, tiles))
    i = 0
    step = 0
    while work < total_tiles:
        place = _place(work, tiles)
        line = work // tiles
        tile = tiles - 1 - work % tiles
        row, group = line // G, line % G
        slots, bits = SLOTS + place * CAP, BITS + place * CAP
        boxes = count * PARTS
        steps = gl.maximum((boxes + NB - 1) // NB, 1)  # a tile without blocks takes a step too
        spare = steps * NB - boxes
        wanted, begin = _words(slots, bits, boxes - 1 + spare - part, boxes, PARTS)
        offset = gl.load(OFFSET + row).to(gl.int32)
        edges = _edges(slots, count, offset, tile, window, EDGE, BQ, BLOCK) * PARTS
        edge_steps = gl.maximum((edges + spare + NB - 1) // NB, 1)
        buf, phase = i % BUFFERS, i // BUFFERS & 1
        mbarrier.wait(q_empty.index(buf), phase ^ 1)
        tile_smem.index(buf * 4).store(gl.full([1], work, gl.int32, L))
        tile_smem.index(buf * 4 + 1).store(gl.full([1], steps, gl.int32, L))
        tile_smem.index(buf * 4 + 2).store(gl.full([1], edge_steps, gl.int32, L))
        tile_smem.index(buf * 4 + 3).store(gl.full([1], offset, gl.int32, L))
        mbarrier.expect(q_full.index(buf), 2 * q_desc.block_type.nbytes)
        bulk_load(q_desc, [row, group, 0, tile * BQ, 0], q_full.index(buf), q0_smem.index(buf))
        bulk_load(q_desc, [row, group, 0, tile * BQ + BQ // 2, 0], q_full.index(buf), q1_smem.index(buf))
        following = work + programs
        for j in range(0, steps):
            stage, phase = step % STAGES, step // STAGES & 1
            # The spare ones come first, and those without a key that a query of this batch row has reached: for them
            # zeros come, from behind the last slot.
            begin = gl.where(begin < offset + T, begin, S)
            box = boxes - 1 + spare - (j + 1) * NB - part
            next_wanted, next_begin = _words(slots, bits, box, boxes, PARTS)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            slot_smem.index(stage).store(begin)
            bits_smem.index(stage).store(wanted)
            _fetch_boxes(k_desc, row, group, begin, k_full.index(stage), k_boxes, stage, D, BN)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            _fetch_boxes(v_desc, row, group, begin, v_full.index(stage), v_boxes, stage, D, BN)
            wanted, begin = next_wanted, next_begin
            step += 1
            if j == 0:  # early, so that the next tile need not wait for it
                following = programs + gl.atomic_add(COUNTER, 1, sem="relaxed")
                count = gl.load(COUNTS + _place(following, tiles), mask=following < total_tiles, other=0)
        work = following
        i += 1
    buf, phase = i % BUFFERS, i // BUFFERS & 1
    mbarrier.wait(q_empty.index(buf), phase ^ 1)
    tile_smem.index(buf * 4).store(gl.full([1], -1, gl.int32, L))
    mbarrier.arrive(q_full.index(buf))


@gluon.jit
def _softmax(
    s, top, limit, stage, words, k_empty, scale_log2,
    W: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, MASK: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Weights, the new top, the decay (of the first step none), and every thread's part of the weights' sums."""
    slot_smem, bits_smem = words
    NB: gl.constexpr = BN // BOX
    QW: gl.constexpr = BQ // 2
    s = s.reshape([64, NB, BOX])
    L3: gl.constexpr = s.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L3))
    WORD: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, L3))
    i = W * QW + gl.arange(0, 64, ROW) % QW
    bits = bits_smem.index(stage).load(WORD)
    if MASK:
        begin = slot_smem.index(stage).load(WORD)
    mbarrier.arrive(k_empty.index(stage))  # the keys and the words have been read
    wanted = ((bits[None, :] >> i[:, None].to(bits.dtype)) & 1) != 0
    if MASK:
        n = gl.arange(0, BOX, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
        seen = begin[None, :, None] + n[None, None, :] <= (limit + i)[:, None, None]
        s = gl.where(wanted[:, :, None] & seen, s, float("-inf"))
        best = gl.max(gl.max(s, 2), 1) * scale_log2
    else:
        best = gl.max(gl.where(wanted, gl.max(s, 2), float("-inf")), 1) * scale_log2
    new = best if FIRST else gl.maximum(top, best)
    safe = gl.where(new == float("-inf"), 0.0, new)
    if MASK:
        weights = gl.exp2(s * scale_log2 - safe[:, None, None])
    else:
        bound = gl.where(wanted, safe[:, None], float("inf"))
        weights = gl.exp2(s * scale_log2 - bound[:, :, None])
    decay = safe if FIRST else gl.exp2(top - safe)
    sums = gl.sum(gl.sum(weights.reshape([64, BN // 8, 4, 2]), 3), 1)  # without other threads' help
    return weights.reshape([64, BN]), new, decay, sums


@gluon.jit
def _clean(
    W: gl.constexpr, stage, begin, written, v_smem, cleaned, cleanings, D: gl.constexpr, BN: gl.constexpr
):
    """Slots that no query of this batch row has reached may hold anything: their values count as zeros."""
    NB: gl.constexpr = BN // BOX
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dirty = gl.max(((begin < written) & (begin + BOX > written)).to(gl.int32), 0)
    if dirty > 0:
        if W == 0:
            MEM: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
            for h in gl.static_range(NB):
                rows = v_smem.index(stage).slice(h * BOX, BOX, 0)
                n = gl.arange(0, BOX, gl.SliceLayout(1, MEM))
                one = gl.max(gl.where(gl.arange(0, NB, FLAT) == h, begin, -1), 0)
                clean = rows.load(MEM)
                clean = gl.where((one + n < written)[:, None], clean, gl.zeros([BOX, D], v_smem.dtype, MEM))
                rows.store(clean)
            fence_async_shared()
            barrier()
        mbarrier.arrive(cleaned)
        mbarrier.wait(cleaned, cleanings & 1)
        cleanings += 1
    return cleanings


@gluon.jit
def _step(
    acc, top, total, p, limit, written, step, q, kv, words, kv_bars, mine, theirs, turn, cleaned, cleanings, scale_log2,
    W: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Logits of the next boxes, while the weights ``p`` of the step before meet their values.

    Steps without MASK take turns with the other warpgroup's.
    """
    k_smem, v_smem = kv
    k_full, k_empty, v_full, v_empty = kv_bars
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    last = step % STAGES
    stage, phase = (step + 1) % STAGES, (step + 1) // STAGES & 1
    mbarrier.wait(k_full.index(stage), phase)
    if not MASK:
        mbarrier.wait(mine, turn & 1)
    zero = gl.zeros([64, BN], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
    if not MASK:
        mbarrier.arrive(theirs)
    s, acc = warpgroup_mma_wait(1, deps=[s, acc])
    if MASK:
        begin = words[0].index(stage).load(FLAT)
    weights, top, decay, sums = _softmax(
        s, top, limit, stage, words, k_empty, scale_log2, W, BQ, BN, MASK, False
    )
    total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None] + sums
    after = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    # Needed by the next step only, but its loop keeps ptxas from waiting for the product before the weights.
    mbarrier.wait(v_full.index(stage), phase)
    acc, p, after = warpgroup_mma_wait(0, deps=[acc, p, after])
    if MASK:
        cleanings = _clean(W, stage, begin, written, v_smem, cleaned, cleanings, D, BN)
    mbarrier.arrive(v_empty.index(last))
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return acc, top, total, after, cleanings


@gluon.jit
def _consumer(
    W: gl.constexpr, q_smem, kv, tile_smem, words, q_bars, kv_bars, turns, cleaned, o_desc, LSE,
    T, tiles, scale_log2, window,
    G: gl.constexpr, R: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_smem, v_smem = kv
    q_full, q_empty = q_bars
    k_full, k_empty, v_full, v_empty = kv_bars
    QW: gl.constexpr = BQ // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = q_smem.dtype
    mine, theirs = turns.index(W), turns.index(1 - W)
    i = 0
    step = 0
    turn = 0
    cleanings = 0
    mbarrier.wait(q_full.index(0), 0)
    work = gl.max(tile_smem.index(0).load(FLAT), 0)
    while work >= 0:
        buf = i % BUFFERS
        steps = gl.max(tile_smem.index(buf * 4 + 1).load(FLAT), 0)
        edge = gl.max(tile_smem.index(buf * 4 + 2).load(FLAT), 0)
        offset = gl.max(tile_smem.index(buf * 4 + 3).load(FLAT), 0)
        line = work // tiles
        first = (tiles - 1 - work % tiles) * BQ
        limit, written = offset + first - window, offset + T
        q = q_smem.index(buf).reshape([64, D])
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        zero = gl.zeros([64, BN], gl.float32, S_LAYOUT)
        stage, phase = step % STAGES, step // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        tma.store_wait(0)  # the output before has left its buffer long ago
        begin = words[0].index(stage).load(FLAT)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(q_empty.index((i + BUFFERS - 1) % BUFFERS), pred=i > 0)
        weights, top, _decay, total = _softmax(
            s, 0.0, limit, stage, words, k_empty, scale_log2, W, BQ, BN, True, True
        )
        p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        mbarrier.wait(v_full.index(stage), phase)
        cleanings = _clean(W, stage, begin, written, v_smem, cleaned, cleanings, D, BN)
        # Both loops are one step after the other; the second takes turns with the other warpgroup.
        for _ in range(1, edge):
            acc, top, total, p, cleanings = _step(
                acc, top, total, p, limit, written, step, q, kv, words, kv_bars, mine, theirs, 0, cleaned, cleanings,
                scale_log2, W, BQ, D, BN, STAGES, True, S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
            step += 1
        for _ in range(edge, steps):
            acc, top, total, p, cleanings = _step(
                acc, top, total, p, limit, written, step, q, kv, words, kv_bars, mine, theirs, turn, cleaned, cleanings,
                scale_log2, W, BQ, D, BN, STAGES, False, S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
            step += 1
            turn += 1
        stage = step % STAGES
        acc = warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(stage))
        step += 1
        sums = gl.sum(total, 1)
        SUM: gl.constexpr = sums.type.layout
        empty = sums == 0.0
        safe = gl.where(empty, 1.0, sums)
        out = acc * gl.convert_layout(1.0 / safe, O_ROW)[:, None]
        q.store(out.to(dtype))
        fence_async_shared()
        barrier()
        row, group = line // G, line % G
        bulk_store(o_desc, [row, group, 0, first + W * QW, 0], q_smem.index(buf))
        rows = gl.arange(0, 64, SUM)
        t, head = first + W * QW + rows % QW, rows // QW
        lse = gl.where(empty, float("-inf"), (gl.convert_layout(top, SUM) + gl.log2(safe)) * LN2)
        gl.store(LSE + (line.to(gl.int64) * R + head) * T + t, lse, mask=(t < T) & (head < R))
        i += 1
        mbarrier.wait(q_full.index(i % BUFFERS), i // BUFFERS & 1)
        work = gl.max(tile_smem.index(i % BUFFERS * 4).load(FLAT), 0)
    tma.store_wait(0)


@gluon.jit
def _hopper_sparse(
    q_desc, k_desc, v_desc, o_desc, LSE, SLOTS, BITS, COUNTS, OFFSET, COUNTER,
    T, S, CAP, tiles, total_tiles, scale_log2, window,
    G: gl.constexpr, R: gl.constexpr, RP: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    BLOCK: gl.constexpr, EDGE: gl.constexpr, STAGES: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    NB: gl.constexpr = BN // BOX
    dtype: gl.constexpr = q_desc.dtype
    KV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q0 = gl.allocate_shared_memory(dtype, [BUFFERS, 1, 1, RP, BQ // 2, D], q_desc.layout)
    q1 = gl.allocate_shared_memory(dtype, [BUFFERS, 1, 1, RP, BQ // 2, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], KV)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], KV)
    # Of a tile: its place, its steps, the masked ones, its row's offset.
    tile_smem = gl.allocate_shared_memory(gl.int32, [BUFFERS * 4, 1], WORDS)
    slot_smem = gl.allocate_shared_memory(gl.int32, [STAGES, NB], WORDS)
    bits_smem = gl.allocate_shared_memory(BITS.dtype.element_ty, [STAGES, NB], WORDS)
    q_full, q_empty = barriers(BUFFERS, 1), barriers(BUFFERS, 2)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    turns, cleaned = barriers(2, 1), barriers(1, 2).index(0)
    fence_async_shared()
    mbarrier.arrive(turns.index(0))
    kv, words = (k_smem, v_smem), (slot_smem, bits_smem)
    q_bars, kv_bars = (q_full, q_empty), (k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_consumer, (
                0, q0, kv, tile_smem, words, q_bars, kv_bars, turns, cleaned, o_desc, LSE, T, tiles, scale_log2, window,
                G, R, BQ, D, BN, STAGES,
            )),
            (_consumer, (
                1, q1, kv, tile_smem, words, q_bars, kv_bars, turns, cleaned, o_desc, LSE, T, tiles, scale_log2, window,
                G, R, BQ, D, BN, STAGES,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, (q0, q1), kv, tile_smem, words, q_bars, kv_bars, SLOTS, BITS, COUNTS, OFFSET,
                COUNTER, T, S, CAP, tiles, total_tiles, window, G, BQ, D, BN, BLOCK, EDGE, STAGES,
            )),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip


def fits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float, block_size: int
) -> bool:
    """Whether `forward` can take these, on this device and under this Triton.

    With one query head per KV head a tile has fewer rows, with more than 64 no query for the second warpgroup.
    """
    ratio = q.shape[1] // k.shape[1]
    return (
        capable(q.device)
        and q.dtype == torch.bfloat16
        and q.shape[3] in (64, 128)
        and block_size % BOX.value == 0
        and 2 <= ratio <= 64
        and all(bulk_strides(x) is not None for x in (q, k, v, out))
        and scale > 0
    )


def _by_group(x: torch.Tensor, groups: int, padded: int, queries: int) -> TensorDescriptor:
    """Tiles of ``queries`` queries of ``x [B,H,T,d]`` with all heads of a KV head, for bulk copies."""
    batch, heads, length, dim = x.shape
    b, h, t = bulk_strides(x)
    ratio, block = heads // groups, [1, 1, padded, queries, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, [batch, groups, ratio, length, dim], [b, h * ratio, h, t, 1], block, layout)


def edge_entries(block_size: int, queries: int) -> int:
    """Entries among which `_edges` looks."""
    return max(32, triton.next_power_of_2(block_size + queries))


def forward(q, k, v, union: BlockUnion, q_offset, out, lse, *, block_size, window, scale) -> None:
    """`forward.forward` of tensors that `fits` takes."""
    batch, heads, length, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    ratio = heads // groups
    padded, queries = triton.next_power_of_2(ratio), union_queries(ratio)
    tile = hopper_sparse_tile()
    tiles, capacity = union.slots.shape[2:]
    total = tiles * batch * groups
    programs = min(total, processors(q.device))
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _hopper_sparse[(programs,)](
        _by_group(q, groups, padded, queries // 2), bulk_tiles(k, BOX.value, BOX.value),
        bulk_tiles(v, BOX.value, BOX.value), _by_group(out, groups, padded, queries // 2), lse, *union[:3], q_offset,
        counter, length, slots, capacity, tiles, total, scale * 1.4426950408889634, window,
        G=groups, R=ratio, RP=padded, BQ=queries, D=dim, BN=tile.keys, BLOCK=block_size,
        EDGE=edge_entries(block_size, queries), STAGES=tile.stages, REGS=tile.registers, num_warps=tile.warps,
    )  # fmt: skip
