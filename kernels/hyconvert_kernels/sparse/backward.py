"""Triton backward of block-sparse attention.

dQ walks a tile's union as the forward does. dK and dV go block by block over the transposed union, the list of the
tiles that want a block; the list ascends, so the sums have one order. The log-sum-exp's gradient enters through delta,
see `oracle.backward`.
"""

import torch
import triton
import triton.language as tl

from ..configs import Tile, sparse_grad_kv_tile, sparse_grad_q_tile, strides
from ..dispatch import dense_rows
from ..tiles import FAR, grad_rows, load_rows, store_rows
from .forward import load_at, union_keys
from .union import BlockUnion, union_queries


@triton.jit
def _sparse_grad_q(
    Q, K, V, OUT, GRAD, LSE, GRAD_LSE, GRAD_Q, LSE2, DELTA, SLOTS, BITS, COUNTS, OFFSET, START,
    sqb, sqh, sqt, skb, skg, sks, svb, svg, svs, sob, soh, sot, sgb, sgh, sgt, sdb, sdh, sdt,
    T, CAP, tiles, scale, window,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, WITH_LSE: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of one of the PARTS of a union's tile; leaves LSE2 and DELTA for the key kernel."""
    BM: tl.constexpr = BQ // PARTS * RP
    pid, line = tl.program_id(0), tl.program_id(1)
    tile, part = tiles - 1 - pid // PARTS, pid % PARTS
    row64, group64 = (line // G).to(tl.int64), (line % G).to(tl.int64)
    rows = tl.arange(0, BM)
    r, i = rows % RP, part * (BQ // PARTS) + rows // RP
    t = tile * BQ + i
    ok = (t < T) & (r < R)
    head, t64 = group64 * R + r, t.to(tl.int64)
    q = load_rows(Q + row64 * sqb, head * sqh + t64 * sqt, ok, D, DP)
    grad = load_rows(GRAD + row64 * sgb, head * sgh + t64 * sgt, ok, D, DP)
    out = load_rows(OUT + row64 * sob, head * soh + t64 * sot, ok, D, DP)
    at = (row64 * G * R + head) * T + t
    lse2, delta = grad_rows(grad, out, LSE, GRAD_LSE, at, ok, WITH_LSE)
    tl.store(LSE2 + at, lse2, mask=ok)
    tl.store(DELTA + at, delta, mask=ok)
    limit = tl.load(OFFSET + row64).to(tl.int32) + t - window
    last = tl.max(tl.where(ok, limit, -1))
    k_base = K + row64 * skb + group64 * skg
    v_base = V + row64 * svb + group64 * svg
    place = line.to(tl.int64) * tiles + tile
    count = tl.load(COUNTS + place)
    slots, bits = SLOTS + place * CAP, BITS + place * CAP
    scale_log2 = scale * 1.4426950408889634
    acc = tl.zeros([BM, DP], tl.float32)
    for step in tl.range(0, tl.cdiv(count * BLOCK, BN), num_stages=STAGES):
        keys, wanted = union_keys(slots, bits, step, count, BN, BLOCK)
        k = load_at(k_base, sks, keys, keys <= last, D, DP)
        v = load_at(v_base, svs, keys, keys <= last, D, DP)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2 - lse2[:, None])
        seen = ((wanted[None, :] >> i[:, None].to(wanted.dtype)) & 1) != 0
        weights = tl.where(seen & (keys[None, :] <= limit[:, None]), weights, 0.0)
        slope = weights * (tl.dot(grad, tl.trans(v), input_precision=PREC) - delta[:, None])
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PREC)
    store_rows(GRAD_Q + row64 * sdb, head * sdh + t64 * sdt, acc * scale, ok, D, DP)


@triton.jit
def _next_block(slots, entries, begin, end, after):
    """Lowest block start above ``after`` among the entries; a cell holds several where documents meet."""
    C: tl.constexpr = 128
    lowest = tl.full([C], FAR, tl.int32)
    for at in range(begin, end, C):
        e = at + tl.arange(0, C)
        here = tl.load(slots + tl.load(entries + e, mask=e < end, other=0), mask=e < end, other=FAR)
        lowest = tl.minimum(lowest, tl.where(here > after, here, FAR))
    return tl.min(lowest)


@triton.jit
def _sparse_grad_kv(
    Q, K, V, GRAD, LSE2, DELTA, GRAD_K, GRAD_V, SLOTS, BITS, ENDS, ENTRIES, OFFSET, START,
    sqb, sqh, sqt, skb, skg, sks, svb, svg, svs, sgb, sgh, sgt, sdb, sdg, sds,
    T, S, CAP, tiles, cells, scale, window,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of each block that begins in one cell (one block, but where documents meet)."""
    BM: tl.constexpr = BQ // PARTS * RP
    pieces: tl.constexpr = BLOCK // BN
    cell, piece, line = tl.program_id(0) // pieces, tl.program_id(0) % pieces, tl.program_id(1)
    row64, group64 = (line // G).to(tl.int64), (line % G).to(tl.int64)
    ends = ENDS + line.to(tl.int64) * cells + cell
    begin, end = tl.load(ends - 1, mask=cell > 0, other=0), tl.load(ends)
    union = line.to(tl.int64) * tiles * CAP
    slots, bits, entries = SLOTS + union, BITS + union, ENTRIES + union
    offset = tl.load(OFFSET + row64).to(tl.int32)
    rows = tl.arange(0, BM)
    r = rows % RP
    head = group64 * R + r
    scale_log2 = scale * 1.4426950408889634
    block = _next_block(slots, entries, begin, end, -1)
    while block < FAR:
        keys = block + piece * BN + tl.arange(0, BN)
        # The block's keys end where the next document begins; those behind belong to another block.
        t_key = keys - offset
        first = tl.load(START + row64 * T + t_key, mask=(t_key >= 0) & (t_key < T), other=0).to(tl.int32)
        mine = (keys < S) & (t_key < T) & ((t_key < 0) | (first <= block))
        k = load_rows(K + row64 * skb + group64 * skg, keys.to(tl.int64) * sks, mine, D, DP)
        v = load_rows(V + row64 * svb + group64 * svg, keys.to(tl.int64) * svs, mine, D, DP)
        acc_k = tl.zeros([BN, DP], tl.float32)
        acc_v = tl.zeros([BN, DP], tl.float32)
        for step in tl.range(begin * PARTS, end * PARTS, num_stages=STAGES):
            entry = tl.load(entries + step // PARTS)
            i = step % PARTS * (BQ // PARTS) + rows // RP
            t = entry // CAP * BQ + i
            ok = (t < T) & (r < R)
            q = load_rows(Q + row64 * sqb, head * sqh + t.to(tl.int64) * sqt, ok, D, DP)
            grad = load_rows(GRAD + row64 * sgb, head * sgh + t.to(tl.int64) * sgt, ok, D, DP)
            at = (row64 * G * R + head) * T + t
            lse2 = tl.load(LSE2 + at, mask=ok, other=float("inf"))
            delta = tl.load(DELTA + at, mask=ok, other=0.0)
            wanted = tl.load(bits + entry)
            seen = (((wanted >> i.to(wanted.dtype)) & 1) != 0) & (tl.load(slots + entry) == block)
            limit = tl.where(seen, offset + t - window, -1)
            weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2 - lse2[:, None])
            weights = tl.where(keys[None, :] <= limit[:, None], weights, 0.0)
            acc_v = tl.dot(tl.trans(weights.to(grad.dtype)), grad, acc_v, input_precision=PREC)
            slope = weights * (tl.dot(grad, tl.trans(v), input_precision=PREC) - delta[:, None])
            acc_k = tl.dot(tl.trans(slope.to(q.dtype)), q, acc_k, input_precision=PREC)
        place = row64 * sdb + group64 * sdg
        store_rows(GRAD_K + place, keys.to(tl.int64) * sds, acc_k * scale, mine, D, DP)
        store_rows(GRAD_V + place, keys.to(tl.int64) * sds, acc_v, mine, D, DP)
        block = _next_block(slots, entries, begin, end, block)


@triton.jit
def _lower_bound(lists, count, target, rounds):
    """Per list the number of its ascending entries that are below ``target``, by bisection."""
    low = tl.zeros_like(count)
    high = count
    for _ in range(rounds):
        open_ = low < high
        middle = (low + high) // 2
        below = tl.load(lists + middle, mask=open_, other=FAR) < target
        high = tl.where(open_ & (below == 0), middle, high)
        low = tl.where(open_ & below, middle + 1, low)
    return low


@triton.jit
def _transpose_union(
    SLOTS, COUNTS, OFFSET, ENDS, ENTRIES, CAP, tiles, cells, rounds, G, window,
    BLOCK: tl.constexpr, BQ: tl.constexpr, CELLS: tl.constexpr, C: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Count, or with FILL list, the union entries whose block begins in each of CELLS cells, tile by tile."""
    part, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cell = part * CELLS + tl.arange(0, CELLS)
    target = (cell * BLOCK)[:, None]
    ends = ENDS + line * cells + cell
    total = tl.zeros([CELLS], tl.int32)
    if FILL:
        total = tl.load(ends - 1, mask=(cell > 0) & (cell < cells), other=0)
    offset = tl.load(OFFSET + line // G).to(tl.int32)
    earliest = tl.maximum(part * CELLS * BLOCK + window - offset, 0) // BQ
    for at in range(earliest, tiles, C):
        tile = at + tl.arange(0, C)
        count = tl.load(COUNTS + line * tiles + tile, mask=tile < tiles, other=0)
        count = tl.broadcast_to(count[None, :], [CELLS, C])
        lists = tl.broadcast_to((SLOTS + (line * tiles + tile) * CAP)[None, :], [CELLS, C])
        low = _lower_bound(lists, count, target, rounds)
        found = _lower_bound(lists, count, target + BLOCK, rounds) - low
        found = tl.where((cell < cells)[:, None], found, 0)
        if FILL:
            out = total[:, None] + tl.cumsum(found, 1) - found
            for j in range(tl.max(tl.max(found, 1), 0)):
                entry = tile[None, :] * CAP + low + j
                tl.store(ENTRIES + line * tiles * CAP + out + j, entry, mask=j < found)
        total += tl.sum(found, 1)
    if not FILL:
        tl.store(ends, total, mask=cell < cells)


def transpose_union(union: BlockUnion, q_offset, *, slots: int, block_size: int, window: int, ratio: int):
    """`union.transpose_union` on the GPU."""
    batch, groups, tiles, capacity = union.slots.shape
    cells = triton.cdiv(slots, block_size)
    counts = torch.empty(batch, groups, cells, dtype=torch.int32, device=q_offset.device)
    entries = torch.empty(batch, groups, tiles * capacity, dtype=torch.int32, device=q_offset.device)
    if not counts.numel() or not entries.numel():
        return counts.zero_(), entries

    def launch(ends, fill):
        _transpose_union[(triton.cdiv(cells, 8), batch * groups)](
            union.slots, union.counts, q_offset, ends, entries, capacity, tiles, cells, capacity.bit_length(), groups,
            window, BLOCK=block_size, BQ=union_queries(ratio), CELLS=8, C=128, FILL=fill, num_warps=4,
        )  # fmt: skip

    launch(counts, False)
    ends = counts.cumsum(-1, dtype=torch.int32)
    launch(ends, True)
    return ends, entries


def backward(
    q, k, v, union: BlockUnion, q_offset, start, out, lse, grad, grad_lse, grad_q, grad_k, grad_v, *, block_size,
    window, scale, q_tile: Tile | None = None, kv_tile: Tile | None = None,
):  # fmt: skip
    """Fill ``grad_q``; ``grad_k`` and ``grad_v`` must be zero and are filled where a block was selected.

    Arguments as in `oracle.backward.backward`; ``union`` must hold its transposed list.
    """
    batch, heads, length, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    ratio = heads // groups
    grad = dense_rows(grad)
    tiles, capacity = union.slots.shape[2:]
    if not q.numel() or not k.numel():
        grad_q.zero_()
        return
    lse2, delta = torch.empty(2, *lse.shape, dtype=torch.float32, device=q.device)
    queries, padded = union_queries(ratio), triton.next_power_of_2(ratio)
    shared = {
        "G": groups, "R": ratio, "RP": padded, "BQ": queries, "D": dim, "DP": triton.next_power_of_2(dim),
        "BLOCK": block_size,
    }  # fmt: skip
    tile = q_tile or sparse_grad_q_tile(q.dtype, dim, block_size)
    parts = max(1, queries * padded // tile.queries)
    _sparse_grad_q[(tiles * parts, batch * groups)](
        q, k, v, out, grad, lse, grad_lse.contiguous() if grad_lse is not None else lse, grad_q, lse2, delta,
        union.slots, union.bits, union.counts, q_offset, start,
        *strides(q), *strides(k), *strides(v), *strides(out), *strides(grad), *strides(grad_q),
        length, capacity, tiles, scale, window, PARTS=parts, BN=tile.keys, WITH_LSE=grad_lse is not None,
        PREC=tile.precision, STAGES=tile.stages, **shared, **tile.launch(),
    )  # fmt: skip
    tile = kv_tile or sparse_grad_kv_tile(q.dtype, dim, block_size)
    parts = max(1, queries * padded // tile.queries)
    cells = union.ends.shape[2]
    _sparse_grad_kv[(cells * (block_size // tile.keys), batch * groups)](
        q, k, v, grad, lse2, delta, grad_k, grad_v, union.slots, union.bits, union.ends, union.entries, q_offset,
        start, *strides(q), *strides(k), *strides(v), *strides(grad), *strides(grad_k),
        length, slots, capacity, tiles, cells, scale, window, PARTS=parts, BN=tile.keys, PREC=tile.precision,
        STAGES=tile.stages, **shared, **tile.launch(),
    )  # fmt: skip
