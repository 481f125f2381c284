"""Triton forward of oracle attention.

Persistent programs fetch tiles from a counter, longest first. Block scores need the final log-sum-exp, which is known
only when a tile is done: the raw block maxima (by-products of the online softmax) go to a per-program scratch, and the
tile's epilogue normalises them, takes the maximum over the group's heads and writes ``[B,G,T,NB]``.
A tile that spans several packed documents is walked once per document, so that blocks always begin at ``start``.
"""

import torch
import triton
import triton.language as tl

from ..configs import FREE_SLOTS, HOPPER_SLOTS, Tile, oracle_tile, strides, takes_over_from
from ..dispatch import hopper_kernels
from ..tiles import FAR, LOG2E, finish, load_keys, load_rows, softmax_step, store_rows


@triton.jit
def _store_raw(raw, position, logits, BM: tl.constexpr, BN: tl.constexpr, SUB: tl.constexpr):
    rows = tl.arange(0, BM)
    if SUB == BN:
        tl.store(raw + position * BM + rows, tl.max(logits, 1))
    else:
        parts: tl.constexpr = BN // SUB
        best = tl.max(tl.reshape(logits, [BM, parts, SUB]), 2)
        tl.store(raw + (position + tl.arange(0, parts))[None, :] * BM + rows[:, None], best)


@triton.jit
def _write_scores(
    raw, scores, lse2, slots, row_ok, in_seg, t, seg, window, NB,
    BM: tl.constexpr, BQ: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Scores of this tile's rows whose sequence begins at ``seg``; ``scores`` is its batch row's and group's."""
    parts: tl.constexpr = BLOCK // SUB
    rows = tl.arange(0, BM)
    slot_q = tl.max(tl.reshape(slots, [BQ, RP]), 1)
    ok_q = tl.max(tl.reshape((row_ok & in_seg).to(tl.int32), [BQ, RP]), 1) > 0
    t_q = tl.max(tl.reshape(t, [BQ, RP]), 1)
    last = tl.max(tl.where(ok_q, slot_q, -1)) - window
    for c in range(0, NB, C):
        block = c + tl.arange(0, C)
        begin = seg + block * BLOCK
        best = tl.full([C, BQ], float("-inf"), tl.float32)
        for part in tl.static_range(parts):
            position = block * parts + part
            seen = (seg + position * SUB <= last)[:, None] & row_ok[None, :]
            value = tl.load(raw + position[:, None] * BM + rows[None, :], mask=seen, other=float("-inf"))
            best = tl.maximum(best, tl.max(tl.reshape(tl.exp2(value - lse2[None, :]), [C, BQ, RP]), 2))
        best = tl.where(begin[:, None] <= slot_q[None, :] - window, best, float("-inf"))
        pointers = scores + t_q.to(tl.int64)[None, :] * NB + block[:, None]
        tl.store(pointers, best, mask=(block < NB)[:, None] & ok_q[None, :])


@triton.jit
def _oracle_forward(
    Q, K, V, OUT, LSE, RAW, SCORES, OFFSET, START, COUNTER,
    sqb, sqh, sqt, skb, skg, sks, svb, svg, svs, sob, soh, sot,
    T, T0, T1, NB, RAW_ROWS, tiles, total_tiles, scale_log2, window,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, SCORE: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = BQ * RP
    rows = tl.arange(0, BM)
    r = rows % RP
    raw = RAW + tl.program_id(0).to(tl.int64) * RAW_ROWS * BM
    work = tl.atomic_add(COUNTER, 1)
    while work < total_tiles:
        tile = tiles - 1 - work % tiles
        row, group = (work // tiles) // G, (work // tiles) % G
        row64, group64 = row.to(tl.int64), group.to(tl.int64)
        t = T0 + tile * BQ + rows // RP
        row_ok = (t < T1) & (r < R)
        head = group64 * R + r
        q = load_rows(Q + row64 * sqb, head * sqh + t.to(tl.int64) * sqt, row_ok, D, DP)
        k_base = K + row64 * skb + group64 * skg
        v_base = V + row64 * svb + group64 * svg
        slots = tl.load(OFFSET + row).to(tl.int32) + t
        starts = tl.load(START + row64 * T + t, mask=t < T1, other=FAR).to(tl.int32)
        seg = tl.min(starts)
        while seg < FAR:
            in_seg = starts == seg
            high = tl.max(tl.where(in_seg, slots, -1)) + 1
            low = tl.min(tl.where(in_seg, slots, FAR))
            free = seg + tl.maximum(low - window + 1 - seg, 0) // BN * BN
            top = tl.full([BM], float("-inf"), tl.float32)
            total = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, DP], tl.float32)
            for n in tl.range(seg, free, BN, num_stages=STAGES):
                k = load_keys(k_base, sks, n, high, BN, D, DP, False)
                logits = tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2
                if SCORE:
                    _store_raw(raw, (n - seg) // SUB, logits, BM, BN, SUB)
                v = load_keys(v_base, svs, n, high, BN, D, DP, False)
                acc, top, total = softmax_step(logits, v, acc, top, total, False, PREC)
            for n in tl.range(free, high, BN, num_stages=1):
                k = load_keys(k_base, sks, n, high, BN, D, DP, True)
                keys = n + tl.arange(0, BN)
                logits = tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2
                if SCORE:
                    outside = keys[None, :] <= slots[:, None] - window
                    if n <= high - 1 - window:
                        _store_raw(
                            raw, (n - seg) // SUB, tl.where(outside, logits, float("-inf")), BM, BN, SUB
                        )
                logits = tl.where(keys[None, :] <= slots[:, None], logits, float("-inf"))
                v = load_keys(v_base, svs, n, high, BN, D, DP, True)
                acc, top, total = softmax_step(logits, v, acc, top, total, True, PREC)
            out, lse = finish(acc, top, total)
            done = row_ok & in_seg
            store_rows(OUT + row64 * sob, head * soh + t.to(tl.int64) * sot, out, done, D, DP)
            tl.store(LSE + (row64 * G * R + head) * T + t, lse, mask=done)
            if SCORE:
                tl.debug_barrier()
                base = SCORES + (row64 * G + group64) * (T1 - T0) * NB
                _write_scores(
                    raw,
                    base,
                    lse * LOG2E,
                    slots,
                    row_ok,
                    in_seg,
                    t - T0,
                    seg,
                    window,
                    NB,
                    BM,
                    BQ,
                    RP,
                    BLOCK,
                    SUB,
                    32,
                )
                tl.debug_barrier()
            seg = tl.min(tl.where(starts > seg, starts, FAR))
        work = tl.atomic_add(COUNTER, 1)


def on_hopper(q, k, v, scale):
    """The module of the kernel for Hopper, if it takes over these."""
    long = k.shape[2] >= takes_over_from(HOPPER_SLOTS, FREE_SLOTS)
    return hopper_kernels("oracle.hopper", q, k, v, scale) if long else None


def forward(
    q,
    k,
    v,
    q_offset,
    start,
    out,
    lse,
    scores,
    *,
    block_size,
    window,
    scale,
    span=None,
    tile: Tile | None = None,
):
    """Fill ``out``, ``lse`` and, unless it is None, ``scores`` for queries ``span = (first, end)`` (all by default).

    ``scores`` is float32 ``[B,G,end - first,NB]``.
    """
    batch, heads, length, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    ratio = heads // groups
    first, end = span or (0, length)
    if tile is None and (hopper := on_hopper(q, k, v, scale)):
        settings = {"block_size": block_size, "window": window, "scale": scale, "first": first, "end": end}
        return hopper.forward(q, k, v, q_offset, start, out, lse, scores, **settings)
    tile = tile or oracle_tile(q.dtype, dim, ratio)
    tiles = triton.cdiv(end - first, tile.queries)
    total = tiles * batch * groups
    programs = min(total, tile.programs(q.device))
    rows = tile.queries * triton.next_power_of_2(ratio)
    raw_rows = triton.cdiv(slots, min(block_size, tile.keys)) + tile.keys // 16
    raw = torch.empty(
        programs * raw_rows * rows if scores is not None else 1, dtype=torch.float32, device=q.device
    )
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _oracle_forward[(programs,)](
        q, k, v, out, lse, raw, scores if scores is not None else raw, q_offset, start, counter,
        *strides(q), *strides(k), *strides(v), *strides(out),
        length, first, end, triton.cdiv(slots, block_size), raw_rows, tiles, total,
        scale * 1.4426950408889634, window,
        G=groups, R=ratio, RP=triton.next_power_of_2(ratio), BQ=tile.queries, D=dim, DP=triton.next_power_of_2(dim),
        BN=tile.keys, BLOCK=block_size, SUB=min(block_size, tile.keys), SCORE=scores is not None,
        PREC=tile.precision, STAGES=tile.stages, **tile.launch(),
    )  # fmt: skip
