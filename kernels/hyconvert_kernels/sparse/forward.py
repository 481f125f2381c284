"""Triton forward of block-sparse attention: a merge of sorted selections builds each tile's union, a tile walks it."""

import triton
import triton.language as tl

from ..configs import FREE_ROWS, HOPPER_ROWS, Tile, sparse_tile, strides, takes_over_from
from ..dispatch import hopper_kernels
from ..tiles import FAR, finish, load_rows, softmax_step, store_rows
from .union import BlockUnion, union_queries


@triton.jit
def _build_union(
    INDICES, OFFSET, START, SLOTS, BITS, COUNTS, T, K, CAP, tiles, G, window,
    BLOCK: tl.constexpr, BQ: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Per step emit the lowest block not emitted yet, with the bitmap of the queries that hold it.

    Selections may be in any order, hold -1 anywhere and name a block twice. Blocks without a key outside the window
    are dropped, which bounds the union.
    """
    tile, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BQ)
    t = tile * BQ + i
    ok = t < T
    first = tl.load(START + (line // G) * T + t, mask=ok, other=0).to(tl.int32)
    limit = tl.load(OFFSET + line // G).to(tl.int32) + t - window
    j = tl.arange(0, KP)
    lists = INDICES + (line * T + t)[:, None] * K + j[None, :]
    block = tl.load(lists, mask=ok[:, None] & (j < K)[None, :], other=-1)
    inside = (block >= 0) & (block <= (limit - first)[:, None] // BLOCK) & (limit >= first)[:, None]
    slot = tl.where(inside, first[:, None] + block * BLOCK, FAR)
    out = (line * tiles + tile) * CAP
    one = tl.full([BQ], 1, BITS.dtype.element_ty)
    bit = one << i.to(BITS.dtype.element_ty)
    count = 0
    lowest = tl.min(tl.min(slot, 1), 0)
    while (lowest < FAR) & (count < CAP):
        held = tl.max((slot == lowest).to(tl.int32), 1) > 0
        tl.store(SLOTS + out + count, lowest)
        tl.store(BITS + out + count, tl.sum(tl.where(held, bit, 0), 0))
        count += 1
        slot = tl.where(slot == lowest, FAR, slot)
        lowest = tl.min(tl.min(slot, 1), 0)
    tl.store(COUNTS + line * tiles + tile, count)


@triton.jit
def union_keys(slots, bits, i, count, BN: tl.constexpr, BLOCK: tl.constexpr):
    """Key slots ``[BN]`` and their query bitmaps (0 past the end) of the ``i``-th step through a union."""
    n = tl.arange(0, BN)
    if BN <= BLOCK:
        parts: tl.constexpr = BLOCK // BN
        entry = i // parts
        wanted = tl.load(bits + entry) + tl.zeros([BN], bits.dtype.element_ty)
        return tl.load(slots + entry) + (i % parts) * BN + n, wanted
    else:
        entry = i * (BN // BLOCK) + n // BLOCK
        inside = entry < count
        key = tl.load(slots + entry, mask=inside, other=0) + n % BLOCK
        return key, tl.load(bits + entry, mask=inside, other=0)


@triton.jit
def load_at(base, stride, keys, ok, D: tl.constexpr, DP: tl.constexpr):
    """Load ``[BN, DP]`` from the slots ``keys [BN]``; zero where not ``ok``."""
    return load_rows(base, keys.to(tl.int64) * stride, ok, D, DP)


@triton.jit
def _sparse_forward(
    Q, K, V, OUT, LSE, SLOTS, BITS, COUNTS, OFFSET, START,
    sqb, sqh, sqt, skb, skg, sks, svb, svg, svs, sob, soh, sot,
    T, CAP, tiles, scale_log2, window,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = BQ * RP
    tile, line = tl.program_id(0), tl.program_id(1)
    tile = tiles - 1 - tile
    row64, group64 = (line // G).to(tl.int64), (line % G).to(tl.int64)
    rows = tl.arange(0, BM)
    r, i = rows % RP, rows // RP
    t = tile * BQ + i
    row_ok = (t < T) & (r < R)
    head = group64 * R + r
    q = load_rows(Q + row64 * sqb, head * sqh + t.to(tl.int64) * sqt, row_ok, D, DP)
    limit = tl.load(OFFSET + row64).to(tl.int32) + t - window
    last = tl.max(tl.where(row_ok, limit, -1))
    k_base = K + row64 * skb + group64 * skg
    v_base = V + row64 * svb + group64 * svg
    place = line.to(tl.int64) * tiles + tile
    count = tl.load(COUNTS + place)
    slots, bits = SLOTS + place * CAP, BITS + place * CAP
    steps = tl.cdiv(count * BLOCK, BN)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        keys, wanted = union_keys(slots, bits, step, count, BN, BLOCK)
        k = load_at(k_base, sks, keys, keys <= last, D, DP)
        logits = tl.dot(q, tl.trans(k), input_precision=PREC) * scale_log2
        ok = ((wanted[None, :] >> i[:, None].to(wanted.dtype)) & 1) != 0
        logits = tl.where(ok & (keys[None, :] <= limit[:, None]), logits, float("-inf"))
        v = load_at(v_base, svs, keys, keys <= last, D, DP)
        acc, top, total = softmax_step(logits, v, acc, top, total, True, PREC)
    out, lse = finish(acc, top, total)
    store_rows(OUT + row64 * sob, head * soh + t.to(tl.int64) * sot, out, row_ok, D, DP)
    tl.store(LSE + (row64 * G * R + head) * T + t, lse, mask=row_ok)


def build_union(
    indices, q_offset, start, union: BlockUnion, *, block_size: int, window: int, ratio: int
) -> None:
    """Fill ``union``, as `union.build_union` does."""
    batch, groups, length, topk = indices.shape
    queries, padded = union_queries(ratio), triton.next_power_of_2(topk)
    tiles, capacity = union.slots.shape[2:]
    _build_union[(tiles, batch * groups)](
        indices, q_offset, start, *union[:3], length, topk, capacity, tiles, groups, window,
        BLOCK=block_size, BQ=queries, KP=padded, num_warps=max(1, min(8, queries * padded // 1024)),
    )  # fmt: skip


def on_hopper(q, k, v, out, scale, block_size):
    """The module of the kernel for Hopper, if it takes over these."""
    many = q.shape[:3].numel() >= takes_over_from(HOPPER_ROWS, FREE_ROWS)
    return hopper_kernels("sparse.hopper", q, k, v, out, scale, block_size) if many else None


def forward(
    q, k, v, union: BlockUnion, q_offset, start, out, lse, *, block_size, window, scale, tile: Tile | None = None
):  # fmt: skip
    """Fill ``out`` and ``lse``."""
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    ratio = heads // groups
    if tile is None and (hopper := on_hopper(q, k, v, out, scale, block_size)):
        settings = {"block_size": block_size, "window": window, "scale": scale}
        return hopper.forward(q, k, v, union, q_offset, out, lse, **settings)
    tile = tile or sparse_tile(q.dtype, dim, ratio, block_size)
    tiles, capacity = union.slots.shape[2:]
    _sparse_forward[(tiles, batch * groups)](
        q, k, v, out, lse, *union[:3], q_offset, start, *strides(q), *strides(k), *strides(v), *strides(out),
        length, capacity, tiles, scale * 1.4426950408889634, window,
        G=groups, R=ratio, RP=triton.next_power_of_2(ratio), BQ=union_queries(ratio), D=dim,
        DP=triton.next_power_of_2(dim), BN=tile.keys, BLOCK=block_size, PREC=tile.precision, STAGES=tile.stages,
        **tile.launch(),
    )  # fmt: skip
