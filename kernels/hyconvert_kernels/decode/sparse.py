"""Triton decode of a sparse layer: split window and blocks, then one launch joins the splits, maps values and merges.

A launch that does both, its last program joining what the others left, waits for that program's value maps, one head
after the other. The second launch spreads them over heads, columns and rows, and has its matrix in registers before
the first has ended. A short window alone needs no second launch.
"""

import triton
import triton.language as tl

from ..configs import Tile, early_start, sparse_decode_splits, sparse_decode_tile, strides
from ..tiles import FP8_LARGEST, LN2, await_inputs, finish, load_rows, softmax_step, store_rows
from .full import empty_like_parts, scale_arguments


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
def _sparse_split(
    Q, KW, VW, QS, K, V, INDICES, OUT, PART, PART_LSE, OFFSET, START, W_OFFSET, W_START,
    sqb, sqh, swkb, swkg, swks, swvb, swvg, swvs, spb, sph, skb, skg, sks, svb, svg, svs,
    TOPK, ring, window, scale_log2,
    G: tl.constexpr, R: tl.constexpr, RM: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, W_SPLITS: tl.constexpr, S_SPLITS: tl.constexpr, RING: tl.constexpr,
    DIRECT: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    K_SCALE=None, V_SCALE=None, SLOTS=None, W_K_SCALE=None, W_V_SCALE=None,
):  # fmt: skip
    await_inputs(EARLY)
    # The splits of the window are short and come last, so that the GPU is busy to the end.
    line, split = tl.program_id(0), (tl.program_id(1) + W_SPLITS) % (W_SPLITS + S_SPLITS)
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
    if DIRECT:
        store_rows(OUT, (row64 * G * R + head) * D, out, row_ok, D, DP)
    else:
        place = (line.to(tl.int64) * (W_SPLITS + S_SPLITS) + split) * RP + r
        store_rows(PART, place * D, out, row_ok, D, DP)
        tl.store(PART_LSE + place, lse / LN2, mask=row_ok)


@triton.jit
def _join_row(PART, PART_LSE, first, count, RP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SP: tl.constexpr,
              column):  # fmt: skip
    """``count`` splits of one row, ``RP`` apart from ``first`` on: output ``[WIDTH]`` and log2-sum-exp2."""
    split = tl.arange(0, SP)
    place = first + split * RP
    lse = tl.load(PART_LSE + place, mask=split < count, other=float("-inf"))
    inside = (split < count)[:, None] & (column < D)[None, :]
    part = tl.load(PART + place[:, None] * D + column[None, :], mask=inside, other=0.0)
    top = tl.max(lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - safe)
    total = tl.sum(weight)
    some = tl.where(total == 0.0, 1.0, total)
    return tl.sum(part * weight[:, None], 0) / some, tl.where(
        total == 0.0, float("-inf"), safe + tl.log2(some)
    )


@triton.jit
def _join_rows(PART, PART_LSE, first, ok, count: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
               BR: tl.constexpr, column):  # fmt: skip
    """The same of ``BR`` rows: output ``[BR, WIDTH]`` and log2-sum-exp2 ``[BR]``."""
    acc = tl.zeros([BR, WIDTH], tl.float32)
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    inside = ok[:, None] & (column < D)[None, :]
    for split in tl.range(0, count, loop_unroll_factor=4):
        place = first + split * RP
        lse = tl.load(PART_LSE + place, mask=ok, other=float("-inf"))
        part = tl.load(PART + place[:, None] * D + column[None, :], mask=inside, other=0.0)
        new = tl.maximum(top, lse)
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight, decay = tl.exp2(lse - safe), tl.exp2(top - safe)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        top = new
    some = tl.where(total == 0.0, 1.0, total)
    return acc / some[:, None], tl.where(total == 0.0, float("-inf"), top + tl.log2(some))


@triton.jit
def _share(lse_sparse, lse_window, gate):
    """Weight of the sparse branch, of log2-sum-exp2; 0 where that is empty."""
    empty = lse_sparse == float("-inf")
    return tl.where(empty, 0.0, tl.sigmoid((tl.where(empty, 0.0, lse_sparse) - lse_window) * LN2 + gate))


@triton.jit
def _sparse_join(
    PART, PART_LSE, GATE, MAP, OUT, rows, sgb, sgh,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DC: tl.constexpr,
    W_SPLITS: tl.constexpr, S_SPLITS: tl.constexpr, WP: tl.constexpr, SP: tl.constexpr, MAPPED: tl.constexpr,
    MERGE: tl.constexpr, BR: tl.constexpr, PREC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Columns ``DC`` of one head: of one row with ``BR`` 1, its map multiplied out, else of as many rows by a dot."""
    chunks: tl.constexpr = (D + DC - 1) // DC
    head, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    full = tl.arange(0, DP)
    column = chunk * DC + tl.arange(0, DC)
    splits: tl.constexpr = W_SPLITS + S_SPLITS
    if MAPPED:
        inside = (column < D)[:, None] & (full < D)[None, :]
        weight = tl.load(
            MAP + head * D * D + column.to(tl.int64)[:, None] * D + full[None, :], mask=inside, other=0.0
        )
    await_inputs(EARLY)
    group, r = head // R, head % R
    if BR == 1:
        row = tl.program_id(1).to(tl.int64)
        base = (row * G + group) * splits * RP + r
        out, lse_w = _join_row(PART, PART_LSE, base, W_SPLITS, RP, D, DC, WP, column)
        if MERGE:
            gate = tl.load(GATE + row * sgb + head * sgh).to(tl.float32)
            base += W_SPLITS * RP
            if MAPPED:
                x, lse_s = _join_row(PART, PART_LSE, base, S_SPLITS, RP, D, DP, SP, full)
                x = x.to(OUT.dtype.element_ty).to(tl.float32)
                far = tl.sum(weight.to(tl.float32) * x[None, :], 1)
            else:
                far, lse_s = _join_row(PART, PART_LSE, base, S_SPLITS, RP, D, DC, SP, column)
            share = _share(lse_s, lse_w, gate)
            out = share * far + (1.0 - share) * out
        tl.store(OUT + (row * G * R + head) * D + column, out.to(OUT.dtype.element_ty), mask=column < D)
    else:
        row = (tl.program_id(1) * BR + tl.arange(0, BR)).to(tl.int64)
        ok = row < rows
        base = (row * G + group) * splits * RP + r
        near, lse_w = _join_rows(PART, PART_LSE, base, ok, W_SPLITS, RP, D, DC, BR, column)
        x, lse_s = _join_rows(PART, PART_LSE, base + W_SPLITS * RP, ok, S_SPLITS, RP, D, DP, BR, full)
        far = tl.dot(x.to(OUT.dtype.element_ty), tl.trans(weight), input_precision=PREC)
        gate = tl.load(GATE + row * sgb + head * sgh, mask=ok, other=0.0).to(tl.float32)
        share = _share(lse_s, lse_w, gate)
        out = share[:, None] * far + (1.0 - share)[:, None] * near
        place = OUT + (row * G * R + head)[:, None] * D + column[None, :]
        tl.store(place, out.to(OUT.dtype.element_ty), mask=ok[:, None] & (column < D)[None, :])


def sparse_decode(
    q, k_window, v_window, q_sparse, k, v, indices, q_offset, start, gate, out, *, block_size, window, scale,
    value_map=None, window_offset=None, window_start=None, scales=None, window_scales=None, tile: Tile | None = None,
    splits=None, rows_per_program=None,
):  # fmt: skip
    """Fill contiguous ``out [B,H,1,d]``; ``gate`` is ``[B,H,1]`` (any strides), ``value_map`` contiguous.

    Without ``indices`` there is the window branch alone. ``scales`` and ``window_scales`` are contiguous. ``splits``
    are those of the window and of the blocks; ``rows_per_program`` is 1 or 16, of the launch that applies the map.
    """
    batch, heads, _, dim = q.shape
    groups = k_window.shape[1]
    ratio = heads // groups
    lines = batch * groups
    merge = indices is not None
    if indices is None:
        q_sparse, k, v, indices, gate, topk = q, k_window, v_window, q_offset, q, 0
    else:
        topk = indices.shape[3]
    tile = tile or sparse_decode_tile(q.dtype, dim, lines * (window + topk * block_size), q.device)
    w_steps, s_steps = triton.cdiv(window, tile.keys), triton.cdiv(topk * block_size, tile.keys)
    splits = splits or sparse_decode_splits(w_steps, s_steps, lines, q.device)
    count = sum(splits)
    direct = count == 1
    padded_ratio = triton.next_power_of_2(ratio)
    part, part_lse = empty_like_parts(q, 0 if direct else lines * count * padded_ratio, dim)
    ring = window_offset is None
    padded = triton.next_power_of_2(dim)
    early = early_start(q.device, let_next=False)  # slower with, at two rows and more
    window_arguments = dict(zip(("W_K_SCALE", "W_V_SCALE"), window_scales or (None, None), strict=True))
    _sparse_split[(lines, count)](
        q, k_window, v_window, q_sparse, k, v, indices, out, part, part_lse,
        q_offset, start, q_offset if ring else window_offset, start if ring else window_start,
        q.stride(0), q.stride(1), *strides(k_window), *strides(v_window), q_sparse.stride(0), q_sparse.stride(1),
        *strides(k), *strides(v), topk, k_window.shape[2], window, scale * 1.4426950408889634,
        G=groups, R=ratio, RM=max(16, padded_ratio), RP=padded_ratio, D=dim, DP=padded, BN=tile.keys, BLOCK=block_size,
        W_SPLITS=splits[0], S_SPLITS=splits[1], RING=ring, DIRECT=direct, PREC=tile.precision, STAGES=tile.stages,
        **scale_arguments(scales), **window_arguments, **tile.launch(), **early,
    )  # fmt: skip
    if direct:
        return
    mapped = value_map is not None
    # A program's columns: few where few programs are there, all where many would read the same parts, if the map fits.
    whole = not mapped or (batch >= 32 and padded**2 * q.element_size() <= 1 << 15)
    width = padded if whole else min(padded, 32)
    per = (rows_per_program or (16 if batch >= 8 else 1)) if mapped else 1
    _sparse_join[(heads * triton.cdiv(dim, width), triton.cdiv(batch, per))](
        part, part_lse, gate, value_map if mapped else q, out, batch, gate.stride(0), gate.stride(1),
        G=groups, R=ratio, RP=padded_ratio, D=dim, DP=padded, DC=width, W_SPLITS=splits[0], S_SPLITS=splits[1],
        WP=triton.next_power_of_2(splits[0]), SP=triton.next_power_of_2(max(1, splits[1])), MAPPED=mapped, MERGE=merge,
        BR=per, PREC=tile.precision, num_warps=4, **early,
    )  # fmt: skip
