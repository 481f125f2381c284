"""Triton forward of window attention; optionally it merges the sparse branch in before it stores."""

import triton
import triton.language as tl

from ..configs import Tile, strides, window_tile
from ..tiles import FAR, finish, load_keys, load_rows, softmax_step, store_rows


@triton.jit
def _window_forward(
    Q, K, V, OUT, LSE, OFFSET, START, OUT_S, LSE_S, GATE,
    sqb, sqh, sqt, skb, skg, sks, svb, svg, svs, sob, soh, sot, spb, sph, spt, sgb, sgh, sgt,
    T, tiles, scale_log2, window,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, MERGE: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = BQ * RP
    tile, line = tl.program_id(0), tl.program_id(1)
    row64, group64 = (line // G).to(tl.int64), (line % G).to(tl.int64)
    rows = tl.arange(0, BM)
    r = rows % RP
    t = tile * BQ + rows // RP
    row_ok = (t < T) & (r < R)
    head = group64 * R + r
    q = load_rows(Q + row64 * sqb, head * sqh + t.to(tl.int64) * sqt, row_ok, D, DP)
    slots = tl.load(OFFSET + row64).to(tl.int32) + t
    first = tl.load(START + row64 * T + t, mask=t < T, other=0).to(tl.int32)
    first = tl.maximum(first, slots - window + 1)
    low = tl.min(tl.where(t < T, first, FAR))
    high = tl.max(tl.where(t < T, slots, -1)) + 1
    k_base = K + row64 * skb + group64 * skg
    v_base = V + row64 * svb + group64 * svg
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for n in tl.range(low, high, BN, num_stages=STAGES):
        k = load_keys(k_base, sks, n, high, BN, D, DP, True)
        keys = n + tl.arange(0, BN)[None, :]
        logits = tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2
        logits = tl.where((keys <= slots[:, None]) & (keys >= first[:, None]), logits, float("-inf"))
        v = load_keys(v_base, svs, n, high, BN, D, DP, True)
        acc, top, total = softmax_step(logits, v, acc, top, total, True, PREC)
    out, lse = finish(acc, top, total)
    t64 = t.to(tl.int64)
    if MERGE:
        lse_s = tl.load(LSE_S + (row64 * G * R + head) * T + t, mask=row_ok, other=float("-inf"))
        gate = tl.load(GATE + row64 * sgb + head * sgh + t64 * sgt, mask=row_ok, other=0.0).to(tl.float32)
        empty = lse_s == float("-inf")
        share = tl.where(empty, 0.0, tl.sigmoid(tl.where(empty, 0.0, lse_s) - lse + gate))
        out_s = load_rows(OUT_S + row64 * spb, head * sph + t64 * spt, row_ok, D, DP).to(tl.float32)
        out = share[:, None] * out_s + (1.0 - share)[:, None] * out
    store_rows(OUT + row64 * sob, head * soh + t64 * sot, out, row_ok, D, DP)
    if not MERGE:
        tl.store(LSE + (row64 * G * R + head) * T + t, lse, mask=row_ok)


def forward(q, k, v, q_offset, start, out, lse, *, window, scale, merge=None, tile: Tile | None = None):
    """Fill ``out`` and ``lse``, or with ``merge = (out_s, lse_s, gate [B,H,T])`` the merged ``out`` alone."""
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    ratio = heads // groups
    tile = tile or window_tile(q.dtype, dim, ratio)
    tiles = triton.cdiv(length, tile.queries)
    out_s, lse_s, gate = merge or (q, q, q)
    _window_forward[(tiles, batch * groups)](
        q, k, v, out, lse if lse is not None else out, q_offset, start, out_s, lse_s, gate,
        *strides(q), *strides(k), *strides(v), *strides(out), *strides(out_s), *gate.stride()[:3],
        length, tiles, scale * 1.4426950408889634, window,
        G=groups, R=ratio, RP=triton.next_power_of_2(ratio), BQ=tile.queries, D=dim, DP=triton.next_power_of_2(dim),
        BN=tile.keys, MERGE=merge is not None, PREC=tile.precision, STAGES=tile.stages, **tile.launch(),
    )  # fmt: skip
