"""Triton backward of causal attention, whole or limited to a window: the oracle's and the window branch's.

FlashAttention's split (arXiv 2307.08691): one kernel per query tile for dQ, one per key tile for dK and dV, which sums
over the heads of the KV group. Nothing is added to memory that another program writes, so the sums have one order and
two runs agree bit for bit. With P the probabilities and dP = dO V', dS = P (dP - delta), delta = rowsum(dO O) - dlse.
Both kernels walk a masked stretch (the diagonal, the window's edge, document boundaries) and a free one between.
"""

import torch
import triton
import triton.language as tl

from ..configs import HOPPER_SLOTS, Tile, causal_grad_kv_tile, causal_grad_q_tile, strides
from ..dispatch import dense_rows, hopper_kernels
from ..tiles import FAR, grad_rows, load_keys, load_rows, store_rows

EVERYTHING = 1 << 30
"""A window that no sequence fills."""


@triton.jit
def _q_step(
    q, grad, lse2, delta, acc, k_base, v_base, sks, svs, n, high, slots, first, scale_log2,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add the keys ``n .. n + BN`` to dQ."""
    k = load_keys(k_base, sks, n, high, BN, D, DP, MASK)
    v = load_keys(v_base, svs, n, high, BN, D, DP, MASK)
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2 - lse2[:, None])
    if MASK:
        keys = n + tl.arange(0, BN)
        seen = (keys[None, :] <= slots[:, None]) & (keys[None, :] >= first[:, None])
        weights = tl.where(seen, weights, 0.0)
    slope = weights * (tl.dot(grad, tl.trans(v), input_precision=PREC) - delta[:, None])
    return tl.dot(slope.to(k.dtype), k, acc, input_precision=PREC)


@triton.jit
def _causal_grad_q(
    Q, K, V, OUT, GRAD, LSE, GRAD_LSE, GRAD_Q, LSE2, DELTA, OFFSET, START,
    sqb, sqh, sqt, skb, skg, sks, svb, svg, svs, sob, soh, sot, sgb, sgh, sgt, sdb, sdh, sdt,
    T, tiles, scale, window,
    G: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    WITH_LSE: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of one head's queries; leaves LSE2 and DELTA for the key kernel."""
    pid = tl.program_id(0)
    tile = tiles - 1 - pid // R % tiles  # longest first, and a group's heads side by side: they share keys
    line = pid // R // tiles
    row64, group64 = (line // G).to(tl.int64), (line % G).to(tl.int64)
    head = group64 * R + pid % R
    t = tile * BM + tl.arange(0, BM)
    ok = t < T
    t64 = t.to(tl.int64)
    q = load_rows(Q + row64 * sqb + head * sqh, t64 * sqt, ok, D, DP)
    grad = load_rows(GRAD + row64 * sgb + head * sgh, t64 * sgt, ok, D, DP)
    out = load_rows(OUT + row64 * sob + head * soh, t64 * sot, ok, D, DP)
    at = (row64 * G * R + head) * T + t
    lse2, delta = grad_rows(grad, out, LSE, GRAD_LSE, at, ok, WITH_LSE)
    tl.store(LSE2 + at, lse2, mask=ok)
    tl.store(DELTA + at, delta, mask=ok)
    slots = tl.load(OFFSET + row64).to(tl.int32) + t
    first = tl.load(START + row64 * T + t, mask=ok, other=0).to(tl.int32)
    first = tl.maximum(first, slots - window + 1)
    low = tl.min(tl.where(ok, first, FAR))
    high = tl.max(tl.where(ok, slots, -1)) + 1
    begin = tl.cdiv(tl.max(tl.where(ok, first, 0)) - low, BN)  # steps before every query sees every key
    free = tl.maximum(tl.min(tl.where(ok, slots, FAR)) + 1 - low - begin * BN, 0) // BN
    masked = begin + tl.cdiv(tl.maximum(high - low - (begin + free) * BN, 0), BN)
    k_base = K + row64 * skb + group64 * skg
    v_base = V + row64 * svb + group64 * svg
    scale_log2 = scale * 1.4426950408889634
    acc = tl.zeros([BM, DP], tl.float32)
    for i in tl.range(0, masked, num_stages=STAGES):
        n = low + tl.where(i < begin, i, i + free) * BN
        acc = _q_step(
            q, grad, lse2, delta, acc, k_base, v_base, sks, svs, n, high, slots, first, scale_log2, BN, D, DP, True,
            PREC,
        )  # fmt: skip
    for i in tl.range(begin, begin + free, num_stages=STAGES):
        acc = _q_step(
            q, grad, lse2, delta, acc, k_base, v_base, sks, svs, low + i * BN, high, slots, first, scale_log2, BN, D,
            DP, False, PREC,
        )  # fmt: skip
    store_rows(GRAD_Q + row64 * sdb + head * sdh, t64 * sdt, acc * scale, ok, D, DP)


@triton.jit
def _kv_step(
    k, v, acc_k, acc_v, q_base, g_base, lse2_base, delta_base, start_base, sqt, sgt, t0, end, keys, offset, window,
    scale_log2,
    BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add the queries ``t0 .. t0 + BM`` of one head to dK and dV."""
    t = t0 + tl.arange(0, BM)
    q = load_keys(q_base, sqt, t0, end, BM, D, DP, MASK)
    grad = load_keys(g_base, sgt, t0, end, BM, D, DP, MASK)
    if MASK:
        lse2 = tl.load(lse2_base + t, mask=t < end, other=float("inf"))
        delta = tl.load(delta_base + t, mask=t < end, other=0.0)
    else:
        lse2 = tl.load(lse2_base + t)
        delta = tl.load(delta_base + t)
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2 - lse2[:, None])
    if MASK:
        slots = offset + t
        first = tl.load(start_base + t, mask=t < end, other=FAR).to(tl.int32)
        first = tl.maximum(first, slots - window + 1)
        seen = (keys[None, :] <= slots[:, None]) & (keys[None, :] >= first[:, None])
        weights = tl.where(seen, weights, 0.0)
    acc_v = tl.dot(tl.trans(weights.to(grad.dtype)), grad, acc_v, input_precision=PREC)
    slope = weights * (tl.dot(grad, tl.trans(v), input_precision=PREC) - delta[:, None])
    acc_k = tl.dot(tl.trans(slope.to(q.dtype)), q, acc_k, input_precision=PREC)
    return acc_k, acc_v


@triton.jit
def _causal_grad_kv(
    Q, K, V, GRAD, LSE2, DELTA, GRAD_K, GRAD_V, OFFSET, START,
    sqb, sqh, sqt, skb, skg, sks, svb, svg, svs, sgb, sgh, sgt, sdb, sdg, sds,
    T, S, tiles, scale, window,
    G: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, over all queries and heads that may see one of them."""
    SCAN: tl.constexpr = 1024
    tile, line = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row64, group64 = (line // G).to(tl.int64), (line % G).to(tl.int64)
    offset = tl.load(OFFSET + row64).to(tl.int32)
    start_base = START + row64 * T
    n0 = tile * BN
    keys = n0 + tl.arange(0, BN)
    written = keys < tl.minimum(S, offset + T)  # a static cache may hold anything behind the last query
    k = load_rows(K + row64 * skb + group64 * skg, keys.to(tl.int64) * sks, written, D, DP)
    v = load_rows(V + row64 * svb + group64 * svg, keys.to(tl.int64) * svs, written, D, DP)
    # Queries [begin, end) may see the tile, by causality, window and documents; [.., whole) see its first key.
    begin = tl.maximum(n0 - offset, 0)
    end = tl.minimum(T, n0 + BN - 1 + window - offset)
    last = tl.full([SCAN], -1, tl.int32)
    whole = tl.full([SCAN], FAR, tl.int32)
    for m in range(begin, end, SCAN):
        t = m + tl.arange(0, SCAN)
        first = tl.load(start_base + t, mask=t < end, other=FAR).to(tl.int32)
        last = tl.maximum(last, tl.where(first < n0 + BN, t, -1))
        whole = tl.minimum(whole, tl.where(first > n0, t, FAR))
    end = tl.minimum(end, tl.max(last) + 1)
    bound = tl.minimum(tl.minimum(end, tl.min(whole)), n0 + window - offset)
    steps = tl.cdiv(tl.maximum(end - begin, 0), BM)
    before = tl.minimum(tl.cdiv(tl.maximum(n0 + BN - 1 - offset - begin, 0), BM), steps)
    free = tl.maximum(bound - begin - before * BM, 0) // BM
    masked = steps - free
    scale_log2 = scale * 1.4426950408889634
    acc_k = tl.zeros([BN, DP], tl.float32)
    acc_v = tl.zeros([BN, DP], tl.float32)
    q_base = Q + row64 * sqb + group64 * R * sqh
    g_base = GRAD + row64 * sgb + group64 * R * sgh
    at = (row64 * G + group64) * R * T
    # A pipelined loop computes its first addresses even if it has no step: a divisor of 0 would be undefined there, and
    # the compiler could drop the predicate of those loads.
    per_head, free_per_head = tl.maximum(masked, 1), tl.maximum(free, 1)
    for i in tl.range(0, R * masked, num_stages=STAGES):
        r, j = (i // per_head).to(tl.int64), i % per_head
        t0 = begin + tl.where(j < before, j, j + free) * BM
        acc_k, acc_v = _kv_step(
            k, v, acc_k, acc_v, q_base + r * sqh, g_base + r * sgh, LSE2 + at + r * T, DELTA + at + r * T, start_base,
            sqt, sgt, t0, end, keys, offset, window, scale_log2, BM, D, DP, True, PREC,
        )  # fmt: skip
    for i in tl.range(0, R * free, num_stages=STAGES):
        r = (i // free_per_head).to(tl.int64)
        t0 = begin + (before + i % free_per_head) * BM
        acc_k, acc_v = _kv_step(
            k, v, acc_k, acc_v, q_base + r * sqh, g_base + r * sgh, LSE2 + at + r * T, DELTA + at + r * T, start_base,
            sqt, sgt, t0, end, keys, offset, window, scale_log2, BM, D, DP, False, PREC,
        )  # fmt: skip
    place = row64 * sdb + group64 * sdg
    store_rows(GRAD_K + place, keys.to(tl.int64) * sds, acc_k * scale, keys < S, D, DP)
    store_rows(GRAD_V + place, keys.to(tl.int64) * sds, acc_v, keys < S, D, DP)


def on_hopper(q, k):
    """The module of the kernels for Hopper, if they take over these."""
    return hopper_kernels("oracle.hopper_backward", q, k) if k.shape[2] >= HOPPER_SLOTS else None


def backward(
    q, k, v, q_offset, start, out, lse, grad, grad_lse, grad_q, grad_k, grad_v, *, scale, window=EVERYTHING,
    q_tile: Tile | None = None, kv_tile: Tile | None = None,
):  # fmt: skip
    """Fill ``grad_q``, ``grad_k`` and ``grad_v`` (the latter two of one layout).

    Args:
        q, k, v, q_offset, start: of the forward, as it took them.
        out, lse: what the forward returned.
        grad: gradient of ``out``, any strides.
        grad_lse: gradient of ``lse`` or None.
        grad_q, grad_k, grad_v: outputs.
        scale: factor of the logits.
        window: keys per query; without it all.
    """
    batch, heads, length, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    ratio, padded = heads // groups, triton.next_power_of_2(dim)
    pinned = q_tile or kv_tile or window < EVERYTHING
    if not pinned and (hopper := on_hopper(q, k)):
        grads = grad_q, grad_k, grad_v
        return hopper.backward(
            q, k, v, q_offset, start, out, lse, grad, grad_lse, *grads, scale=scale, window=window
        )
    grad = dense_rows(grad)
    lse2, delta = torch.empty(2, *lse.shape, dtype=torch.float32, device=q.device)
    shared = {"G": groups, "R": ratio, "D": dim, "DP": padded}
    if q.numel():
        tile = q_tile or causal_grad_q_tile(q.dtype, dim)
        tiles = triton.cdiv(length, tile.queries)
        _causal_grad_q[(tiles * batch * heads,)](
            q, k, v, out, grad, lse, grad_lse.contiguous() if grad_lse is not None else lse, grad_q, lse2, delta,
            q_offset, start, *strides(q), *strides(k), *strides(v), *strides(out), *strides(grad), *strides(grad_q),
            length, tiles, scale, window, BM=tile.queries, BN=tile.keys, WITH_LSE=grad_lse is not None,
            PREC=tile.precision, STAGES=tile.stages, **shared, **tile.launch(),
        )  # fmt: skip
    if k.numel():
        tile = kv_tile or causal_grad_kv_tile(q.dtype, dim)
        tiles = triton.cdiv(slots, tile.keys)
        _causal_grad_kv[(tiles * batch * groups,)](
            q, k, v, grad, lse2, delta, grad_k, grad_v, q_offset, start,
            *strides(q), *strides(k), *strides(v), *strides(grad), *strides(grad_k),
            length, slots, tiles, scale, window, BM=tile.queries, BN=tile.keys, PREC=tile.precision,
            STAGES=tile.stages, **shared, **tile.launch(),
        )  # fmt: skip
