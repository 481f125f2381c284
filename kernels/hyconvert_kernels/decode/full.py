"""Triton decode of a full layer: split keys, then one launch joins the splits and selects the blocks."""

import torch
import triton
import triton.language as tl

from ..configs import Tile, decode_splits, decode_tile, early_start, strides
from ..tiles import FP8_LARGEST, LN2, await_inputs, finish, load_keys, load_rows, softmax_step, store_rows
from ..topk.forward import select_blocks


@triton.jit
def _split(
    Q, K, V, PART, PART_LSE, RAW, OFFSET, START, sqb, sqh, skb, skg, sks, svb, svg, svs, NB, SPLITS, scale_log2, window,
    G: tl.constexpr, R: tl.constexpr, RM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr, SCORE: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, K_SCALE=None, V_SCALE=None, SLOTS=None,
):  # fmt: skip
    await_inputs(EARLY)
    split, line = tl.program_id(0), tl.program_id(1)
    row64, group64 = (line // G).to(tl.int64), (line % G).to(tl.int64)
    r = tl.arange(0, RM)
    row_ok = r < R
    q = load_rows(Q + row64 * sqb, (group64 * R + r) * sqh, row_ok, D, DP)
    slot = tl.load(OFFSET + row64).to(tl.int32)
    start = tl.load(START + row64).to(tl.int32)
    per = tl.cdiv(tl.cdiv(slot + 1 - start, BN), SPLITS) * BN
    begin = start + split * per
    end = tl.minimum(begin + per, slot + 1)
    free = begin + tl.maximum(tl.minimum(end, slot - window + 1) - begin, 0) // BN * BN
    k_base = K + row64 * skb + group64 * skg
    v_base = V + row64 * svb + group64 * svg
    raw = RAW + (line.to(tl.int64) * R + r) * NB
    if K_SCALE is not None:
        scales_at = line.to(tl.int64) * SLOTS
    top = tl.full([RM], float("-inf"), tl.float32)
    total = tl.zeros([RM], tl.float32)
    acc = tl.zeros([RM, DP], tl.float32)
    parts: tl.constexpr = BN // BLOCK
    for n in tl.range(begin, free, BN, num_stages=STAGES):
        k = load_keys(k_base, sks, n, end, BN, D, DP, False)
        if K_SCALE is not None:
            k = k.to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2
        if K_SCALE is not None:
            logits *= tl.load(K_SCALE + scales_at + n + tl.arange(0, BN))[None, :]
        if SCORE:
            best = tl.max(tl.reshape(logits, [RM, parts, BLOCK]), 2)
            at = (n - start) // BLOCK + tl.arange(0, parts)
            tl.store(raw[:, None] + at[None, :], best, mask=row_ok[:, None])
        v = load_keys(v_base, svs, n, end, BN, D, DP, False)
        if V_SCALE is not None:
            v_scale = tl.load(V_SCALE + scales_at + n + tl.arange(0, BN)) * FP8_LARGEST
            acc, top, total = softmax_step(logits, v.to(q.dtype), acc, top, total, False, PREC, v_scale)
        else:
            acc, top, total = softmax_step(logits, v, acc, top, total, False, PREC)
    for n in tl.range(free, end, BN, num_stages=1):
        k = load_keys(k_base, sks, n, end, BN, D, DP, True)
        if K_SCALE is not None:
            k = k.to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2
        keys = n + tl.arange(0, BN)[None, :]
        if K_SCALE is not None:
            logits *= tl.load(K_SCALE + scales_at + keys, mask=keys < end, other=0.0)
        if SCORE:
            outside = tl.where(keys <= slot - window, logits, float("-inf"))
            best = tl.max(tl.reshape(outside, [RM, parts, BLOCK]), 2)
            at = (n - start) // BLOCK + tl.arange(0, parts)
            tl.store(raw[:, None] + at[None, :], best, mask=row_ok[:, None] & (at < NB)[None, :])
        logits = tl.where(keys < end, logits, float("-inf"))
        v = load_keys(v_base, svs, n, end, BN, D, DP, True)
        if V_SCALE is not None:
            key = n + tl.arange(0, BN)
            v_scale = tl.load(V_SCALE + scales_at + key, mask=key < end, other=0.0) * FP8_LARGEST
            acc, top, total = softmax_step(logits, v.to(q.dtype), acc, top, total, True, PREC, v_scale)
        else:
            acc, top, total = softmax_step(logits, v, acc, top, total, True, PREC)
    if V_SCALE is not None:  # weights times 448 scales stay within float16
        acc = acc * (1.0 / FP8_LARGEST)
    out, lse = finish(acc, top, total)
    place = (line.to(tl.int64) * R + r) * SPLITS + split
    store_rows(PART, place * D, out, row_ok, D, DP)
    tl.store(PART_LSE + place, lse / LN2, mask=row_ok)


@triton.jit
def join_lse(part_lse, splits, SP: tl.constexpr):
    """Log2-sum-exp2 over ``splits`` and each split's share ``[SP]``; no keys at all: -inf and zeros."""
    split = tl.arange(0, SP)
    lse = tl.load(part_lse + split, mask=split < splits, other=float("-inf"))
    top = tl.max(lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - safe)
    total = tl.sum(weight)
    return tl.where(total == 0.0, float("-inf"), safe + tl.log2(total)), weight / tl.where(
        total == 0.0, 1.0, total
    )


@triton.jit
def _join(
    PART, PART_LSE, RAW, OUT, LSE, INDICES, OFFSET, START, NB, window, TOPK, SPLITS,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    SP: tl.constexpr, KP: tl.constexpr, N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_inputs(EARLY)
    job, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if job < R:
        place = (line * R + job) * SPLITS
        lse, share = join_lse(PART_LSE + place, SPLITS, SP)
        split = tl.arange(0, SP)
        part = load_rows(PART, (place + split) * D, split < SPLITS, D, DP)
        out = tl.sum(part * share[:, None], 0)
        column = tl.arange(0, DP)
        tl.store(OUT + (line * R + job) * D + column, out.to(OUT.dtype.element_ty), mask=column < D)
        tl.store(LSE + line * R + job, lse * LN2)
    else:
        last = tl.load(OFFSET + line // G).to(tl.int32) - window - tl.load(START + line // G).to(tl.int32)
        blocks = tl.where(last < 0, 0, last // BLOCK + 1)
        block = tl.arange(0, N)
        r, split = tl.arange(0, RP), tl.arange(0, SP)
        every = tl.load(
            PART_LSE + (line * R + r)[:, None] * SPLITS + split[None, :],
            mask=(r < R)[:, None] & (split < SPLITS)[None, :], other=float("-inf"),
        )  # fmt: skip
        top = tl.max(every, 1)
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(every - safe[:, None]), 1)  # 0 without keys, and then there are no blocks
        lses = safe + tl.log2(tl.where(total == 0.0, 1.0, total))
        best = tl.full([N], -1.0, tl.float32)
        for head in tl.range(0, R, loop_unroll_factor=4):
            value = tl.load(RAW + (line * R + head) * NB + block, mask=block < blocks, other=float("-inf"))
            best = tl.maximum(best, tl.exp2(value - tl.sum(tl.where(r == head, lses, 0.0))))
        win, rank = select_blocks(best, block < blocks, TOPK, 30, True)
        count = tl.sum(win.to(tl.int32))
        tl.store(INDICES + line * TOPK + rank, block, mask=win)
        pad = tl.arange(0, KP)
        tl.store(INDICES + line * TOPK + pad, tl.full([KP], -1, tl.int32), mask=(pad >= count) & (pad < TOPK))


def empty_like_parts(q, rows, dim):
    """Room for the outputs and log-sum-exps of ``rows`` splits."""
    return (torch.empty(size, dtype=torch.float32, device=q.device) for size in (rows * dim, rows))


def scale_arguments(scales):
    """A decode kernel's scales of keys and values, and how many slots they count; None compiles them away."""
    keys, values = scales or (None, None)
    return {"K_SCALE": keys, "V_SCALE": values, "SLOTS": None if keys is None else keys.shape[2]}


def oracle_decode(
    q, k, v, q_offset, start, out, lse, indices, *, block_size, window, scale, scales=None,
    tile: Tile | None = None,
):  # fmt: skip
    """Fill ``out``, ``lse`` and, unless it is None, ``indices``; all contiguous, and so are ``scales``."""
    batch, heads, _, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    ratio = heads // groups
    tile = tile or decode_tile(q.dtype, dim, batch * groups, q.device)
    scored = indices is not None
    keys = max(tile.keys, block_size) if scored else tile.keys
    block_size = block_size if scored else keys
    splits = decode_splits(batch * groups, triton.cdiv(slots, keys), q.device)
    blocks = triton.cdiv(slots, block_size)
    part, part_lse = empty_like_parts(q, batch * heads * splits, dim)
    raw = torch.empty(batch * heads * blocks if scored else 1, dtype=torch.float32, device=q.device)
    padded = triton.next_power_of_2(dim)
    early = early_start(q.device)
    _split[(splits, batch * groups)](
        q, k, v, part, part_lse, raw, q_offset, start, q.stride(0), q.stride(1), *strides(k), *strides(v),
        blocks, splits, scale * 1.4426950408889634, window,
        G=groups, R=ratio, RM=max(16, triton.next_power_of_2(ratio)), D=dim, DP=padded, BN=keys, BLOCK=block_size,
        SCORE=scored, PREC=tile.precision, STAGES=tile.stages, **scale_arguments(scales), **tile.launch(),
        **early,
    )  # fmt: skip
    size = max(32, triton.next_power_of_2(blocks)) if scored else 32
    topk = indices.shape[3] if scored else 1
    _join[(ratio + scored, batch * groups)](
        part, part_lse, raw, out, lse, indices if scored else lse, q_offset, start, blocks, window, topk, splits,
        G=groups, R=ratio, RP=triton.next_power_of_2(ratio), D=dim, DP=padded, BLOCK=block_size,
        SP=triton.next_power_of_2(splits), KP=triton.next_power_of_2(topk), N=size,
        num_warps=max(4, min(16, size // 512)), **early,
    )  # fmt: skip
