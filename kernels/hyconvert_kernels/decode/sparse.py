"""Triton decode of a sparse layer in one launch: window, selected blocks, value map and merge.

Programs share a (row, KV group) by splitting its window and its blocks; the last of them to finish (an integer counter
says which) joins the parts in a fixed order, so the result does not depend on who comes last.
"""

import functools

import torch
import triton
import triton.language as tl

from ..configs import Tile, map_by_dots, processors, sparse_decode_tile, strides
from ..tiles import FP8_LARGEST, LN2, finish, load_rows, softmax_step, store_rows
from .full import scale_arguments


@triton.jit
def _attend(
    q, k_base, v_base, k_stride, v_stride, keys, ok, acc, top, total, scale_log2,
    D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr, k_scale=None, v_scale=None,
):  # fmt: skip
    k = load_rows(k_base, keys.to(tl.int64) * k_stride, ok, D, DP)
    v = load_rows(v_base, keys.to(tl.int64) * v_stride, ok, D, DP)
    if k_scale is not None:
        k, v = k.to(q.dtype), v.to(q.dtype)
    logits = tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2
    if k_scale is not None:
        logits *= tl.load(k_scale + keys, mask=ok, other=0.0)[None, :]
    logits = tl.where(ok[None, :], logits, float("-inf"))
    if v_scale is not None:
        values = tl.load(v_scale + keys, mask=ok, other=0.0) * FP8_LARGEST
        return softmax_step(logits, v, acc, top, total, True, PREC, values)
    else:
        return softmax_step(logits, v, acc, top, total, True, PREC)


@triton.jit
def _join_branch(
    part, part_lse, first: tl.constexpr, end: tl.constexpr, R: tl.constexpr, RM: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Join splits ``first .. end`` of one branch: output ``[RM, DP]`` and log2-sum-exp2 ``[RM]``."""
    r = tl.arange(0, RM)
    column = tl.arange(0, DP)
    acc = tl.zeros([RM, DP], tl.float32)
    top = tl.full([RM], float("-inf"), tl.float32)
    total = tl.zeros([RM], tl.float32)
    for at in range(first, end, CHUNK):
        split = at + tl.arange(0, CHUNK)
        there = (split < end)[:, None] & (r < R)[None, :]
        place = split[:, None] * RM + r[None, :]
        lse = tl.load(part_lse + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        out = tl.load(
            part + place[:, :, None] * D + column[None, None, :],
            mask=there[:, :, None] & (column < D)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(lse - safe[None, :])
        decay = tl.exp2(top - safe)
        acc = acc * decay[:, None] + tl.sum(out * weight[:, :, None], 0)
        total = total * decay + tl.sum(weight, 0)
        top = new
    out, lse = finish(acc, top, total)
    return out, lse


@triton.jit
def _sparse_decode(
    Q, KW, VW, QS, K, V, INDICES, GATE, MAP, OUT, PART, PART_LSE, COUNTER, OFFSET, START, W_OFFSET, W_START,
    sqb, sqh, swkb, swkg, swks, swvb, swvg, swvs, spb, sph, skb, skg, sks, svb, svg, svs, sgb, sgh,
    TOPK, ring, window, scale_log2,
    G: tl.constexpr, R: tl.constexpr, RM: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, W_SPLITS: tl.constexpr, S_SPLITS: tl.constexpr, RING: tl.constexpr,
    MAPPED: tl.constexpr, MAP_STAGES: tl.constexpr, CHUNK: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    K_SCALE=None, V_SCALE=None, SLOTS=None, W_K_SCALE=None, W_V_SCALE=None,
):  # fmt: skip
    split, line = tl.program_id(0), tl.program_id(1)
    row64, group64 = (line // G).to(tl.int64), (line % G).to(tl.int64)
    r = tl.arange(0, RM)
    row_ok = r < R
    n = tl.arange(0, BN)
    head = group64 * R + r
    top = tl.full([RM], float("-inf"), tl.float32)
    total = tl.zeros([RM], tl.float32)
    acc = tl.zeros([RM, DP], tl.float32)
    slot = tl.load(OFFSET + row64).to(tl.int32)
    start = tl.load(START + row64).to(tl.int32)
    if split < W_SPLITS:
        q = load_rows(Q + row64 * sqb, head * sqh, row_ok, D, DP)
        if not RING:
            slot = tl.load(W_OFFSET + row64).to(tl.int32)
            start = tl.load(W_START + row64).to(tl.int32)
        steps = tl.cdiv(tl.cdiv(window, BN), W_SPLITS)
        for step in tl.range(split * steps, split * steps + steps, num_stages=STAGES):
            keys = slot - window + 1 + step * BN + n
            ok = (keys >= tl.maximum(start, 0)) & (keys <= slot)
            if RING:
                keys = tl.where(ok, keys, 0) % ring
            acc, top, total = _attend(
                q, KW + row64 * swkb + group64 * swkg, VW + row64 * swvb + group64 * swvg, swks, swvs, keys, ok,
                acc, top, total, scale_log2, D, DP, PREC,
                W_K_SCALE + line.to(tl.int64) * ring if W_K_SCALE is not None else None,
                W_V_SCALE + line.to(tl.int64) * ring if W_V_SCALE is not None else None,
            )  # fmt: skip
        if W_V_SCALE is not None:
            acc = acc * (1.0 / FP8_LARGEST)
    elif S_SPLITS > 0:
        q = load_rows(QS + row64 * spb, head * sph, row_ok, D, DP)
        parts: tl.constexpr = S_SPLITS if S_SPLITS > 0 else 1
        steps = tl.cdiv(tl.cdiv(TOPK * BLOCK, BN), parts)
        begin = (split - W_SPLITS) * steps
        for step in tl.range(begin, begin + steps, num_stages=STAGES):
            entry = (step * BN + n) // BLOCK
            block = tl.load(INDICES + line.to(tl.int64) * TOPK + entry, mask=entry < TOPK, other=-1)
            keys = start + block * BLOCK + (step * BN + n) % BLOCK
            acc, top, total = _attend(
                q, K + row64 * skb + group64 * skg, V + row64 * svb + group64 * svg, sks, svs, keys,
                (block >= 0) & (keys <= slot - window), acc, top, total, scale_log2, D, DP, PREC,
                K_SCALE + line.to(tl.int64) * SLOTS if K_SCALE is not None else None,
                V_SCALE + line.to(tl.int64) * SLOTS if V_SCALE is not None else None,
            )  # fmt: skip
        if V_SCALE is not None:
            acc = acc * (1.0 / FP8_LARGEST)
    out, lse = finish(acc, top, total)
    splits: tl.constexpr = W_SPLITS + S_SPLITS
    base = line.to(tl.int64) * splits * RP
    place = base + split * RP + r
    store_rows(PART, place * D, out, row_ok, D, DP)
    tl.store(PART_LSE + place, lse / LN2, mask=row_ok)
    tl.debug_barrier()
    if tl.atomic_add(COUNTER + line, 1) == splits - 1:
        tl.store(COUNTER + line, 0)
        part, part_lse = PART + base * D, PART_LSE + base
        out_w, lse_w = _join_branch(part, part_lse, 0, W_SPLITS, R, RP, D, DP, CHUNK)
        out_s, lse_s = _join_branch(part, part_lse, W_SPLITS, splits, R, RP, D, DP, CHUNK)
        rp = tl.arange(0, RP)
        column = tl.arange(0, DP)
        if MAPPED == 2:
            rows = tl.arange(0, RM)
            same = (rows[:, None] == rp[None, :])[:, :, None]
            wide = tl.sum(tl.where(same, out_s[None, :, :], 0.0), 1).to(OUT.dtype.element_ty)
            mapped = tl.zeros([RM, DP], tl.float32)
            for h in tl.range(
                0, R, num_stages=MAP_STAGES
            ):  # one head's row at a time; the next matrix is on its way
                weight = load_rows(
                    MAP + (group64 * R + h) * D * D, column.to(tl.int64) * D, column < D, D, DP
                )
                one = tl.where((rows == h)[:, None], wide, tl.zeros_like(wide))
                mapped = tl.dot(one, tl.trans(weight), mapped, input_precision=PREC)
            out_s = tl.sum(tl.where(same, mapped[:, None, :], 0.0), 0)
        elif MAPPED == 1:
            mapped = tl.zeros([RP, DP], tl.float32)
            for h in range(R):
                x = tl.sum(tl.where((rp == h)[:, None], out_s, 0.0), 0)
                x = x.to(OUT.dtype.element_ty).to(tl.float32)
                weight = load_rows(
                    MAP + (group64 * R + h) * D * D, column.to(tl.int64) * D, column < D, D, DP
                )
                y = tl.sum(weight.to(tl.float32) * x[None, :], 1)
                mapped = tl.where((rp == h)[:, None], y[None, :], mapped)
            out_s = mapped
        ok = rp < R
        gate = tl.load(GATE + row64 * sgb + (group64 * R + rp) * sgh, mask=ok, other=0.0).to(tl.float32)
        empty = lse_s == float("-inf")
        share = tl.where(empty, 0.0, tl.sigmoid(tl.where(empty, 0.0, lse_s) - lse_w + gate))
        merged = share[:, None] * out_s + (1.0 - share)[:, None] * out_w
        store_rows(OUT, (row64 * G * R + group64 * R + rp) * D, merged, ok, D, DP)


@functools.cache
def _counters(device: torch.device, stream: int, size: int) -> torch.Tensor:
    """Zeroed counters that every launch leaves zeroed; one set per stream, whose launches do not overlap."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def sparse_decode(
    q, k_window, v_window, q_sparse, k, v, indices, q_offset, start, gate, out, *, block_size, window, scale,
    value_map=None, window_offset=None, window_start=None, scales=None, window_scales=None, counter=None,
    tile: Tile | None = None, splits=None, by_dots=None,
):  # fmt: skip
    """Fill contiguous ``out [B,H,1,d]``; ``gate`` is ``[B,H,1]`` (any strides), ``value_map`` contiguous.

    Without ``indices`` there is the window branch alone. ``scales`` and ``window_scales`` are contiguous. ``counter``
    int32 ``[B G]``, or longer, is zeros that launches on one stream may share; each leaves them zeros. ``by_dots`` says
    how the value map is applied, by default as `map_by_dots` has it.
    """
    batch, heads, _, dim = q.shape
    groups = k_window.shape[1]
    ratio = heads // groups
    lines = batch * groups
    tile = tile or sparse_decode_tile(q.dtype, dim)
    if indices is None:
        q_sparse, k, v, indices, gate, topk = q, k_window, v_window, q_offset, q, 0
    else:
        topk = indices.shape[3]
    w_steps, s_steps = triton.cdiv(window, tile.keys), triton.cdiv(topk * block_size, tile.keys)
    if splits is None:  # about three programs per multiprocessor, every split at least one step
        want = max(2, 3 * processors(q.device) // lines)
        per = triton.cdiv(w_steps + s_steps, want)
        splits = triton.cdiv(w_steps, per), triton.cdiv(s_steps, per)
    count = sum(splits)
    padded_ratio = triton.next_power_of_2(ratio)
    part = torch.empty(lines * count * padded_ratio * dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(lines * count * padded_ratio, dtype=torch.float32, device=q.device)
    slots = max(1024, triton.next_power_of_2(lines))
    if counter is not None:
        pass
    elif q.is_cuda and torch.cuda.is_current_stream_capturing():
        counter = torch.zeros(
            slots, dtype=torch.int32, device=q.device
        )  # of the graph's own pool, zeroed at replay
    else:
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
        counter = _counters(q.device, stream, slots)
    ring = window_offset is None
    padded = triton.next_power_of_2(dim)
    if by_dots is None:
        by_dots = map_by_dots(q.dtype, dim, lines * count, q.device)
    mapped = 0 if value_map is None else 2 if by_dots else 1
    window_arguments = dict(zip(("W_K_SCALE", "W_V_SCALE"), window_scales or (None, None), strict=True))
    _sparse_decode[(count, lines)](
        q, k_window, v_window, q_sparse, k, v, indices, gate, value_map if value_map is not None else q, out,
        part, part_lse, counter, q_offset, start, q_offset if ring else window_offset, start if ring else window_start,
        q.stride(0), q.stride(1), *strides(k_window), *strides(v_window), q_sparse.stride(0), q_sparse.stride(1),
        *strides(k), *strides(v), gate.stride(0), gate.stride(1), topk, k_window.shape[2], window,
        scale * 1.4426950408889634,
        G=groups, R=ratio, RM=max(16, padded_ratio), RP=padded_ratio, D=dim, DP=padded, BN=tile.keys, BLOCK=block_size,
        W_SPLITS=splits[0], S_SPLITS=splits[1], RING=ring, MAPPED=mapped,
        MAP_STAGES=3,
        CHUNK=max(1, min(triton.next_power_of_2(max(splits)), 4096 // (padded_ratio * padded))), PREC=tile.precision,
        STAGES=tile.stages, **scale_arguments(scales), **window_arguments, **tile.launch(),
    )  # fmt: skip
