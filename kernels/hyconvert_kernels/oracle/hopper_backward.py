"""Backward of causal attention for Hopper, in Gluon: what it fills is what `backward.backward` fills.

As there, one kernel fills dQ and one dK and dV. A warp fetches what changes from step to step by bulk copies, and two
warpgroups, of 64 queries or keys each, multiply. For dK and dV logits and slopes are transposed (keys by queries), so
that both go from registers into the products that follow. Nothing is added to memory that another program writes: two
runs agree bit for bit.

Gluon belongs to Triton and may change with it: `fits` says where this has been checked.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..configs import hopper_grad_kv_tile, hopper_grad_q_tile, strides
from ..dispatch import dense_rows
from ..hopper import barrier, barriers, bulk_load, bulk_tiles, capable, fetch
from ..tiles import FAR, LOG2E


@gluon.jit
def _kv_item(step, extent, R: gl.constexpr, BM: gl.constexpr):
    """Head within its group and first query of a step: the masked steps of all heads come first, then the free ones.

    Those go from the last query down: programs that run side by side begin with the same ones.
    """
    begin, before, masked, free = extent
    i = step - R * masked
    per_head, free_per_head = gl.maximum(masked, 1), gl.maximum(free, 1)
    j = step % per_head
    r = gl.where(i < 0, step // per_head, i // free_per_head)
    tile = gl.where(i < 0, gl.where(j < before, j, j + free), before + free - 1 - i % free_per_head)
    return r, begin + tile * BM


@gluon.jit
def _kv_producer(
    q_desc, g_desc, tiles_smem, stats_smem, q_full, g_full, empty, LSE2, DELTA, row, group, T, extent,
    G: gl.constexpr, R: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_smem, g_smem = tiles_smem
    lse_smem, delta_smem = stats_smem
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for step in range(0, R * (extent[2] + extent[3])):
        r, t0 = _kv_item(step, extent, R, BM)
        head = group * R + r
        stage, phase = step % STAGES, step // STAGES & 1
        t = t0 + gl.arange(0, BM, L)
        at = (row.to(gl.int64) * G * R + head) * T
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
        bulk_load(q_desc, [row, head, t0, 0], q_full.index(stage), q_smem.index(stage))
        async_copy.async_copy_global_to_shared(lse_smem.index(stage), LSE2 + at + t, mask=t < T)
        async_copy.mbarrier_arrive(q_full.index(stage), increment_count=False)
        mbarrier.expect(g_full.index(stage), g_desc.block_type.nbytes)
        bulk_load(g_desc, [row, head, t0, 0], g_full.index(stage), g_smem.index(stage))
        async_copy.async_copy_global_to_shared(delta_smem.index(stage), DELTA + at + t, mask=t < T)
        async_copy.mbarrier_arrive(g_full.index(stage), increment_count=False)


@gluon.jit
def _ask(a_smem, b_smem, full, stage, phase, BM: gl.constexpr, D: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Start a step's logits (of keys and queries) or its weights' gradients (of values and output gradients)."""
    mbarrier.wait(full.index(stage), phase)
    zero = gl.zeros([64, BM], gl.float32, S_LAYOUT)
    b = b_smem.index(stage).reshape([BM, D]).permute((1, 0))
    return warpgroup_mma(a_smem, b, zero, use_acc=False, is_async=True)


@gluon.jit
def _kv_step(
    acc_k, acc_v, step, keys, t0, T, offset, window, starts, scale_log2, k_smem, v_smem, tiles_smem, stats_smem,
    q_full, g_full, empty,
    BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add the queries of a step to dK and dV."""
    q_smem, g_smem = tiles_smem
    lse_smem, delta_smem = stats_smem
    dtype: gl.constexpr = k_smem.dtype
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    stage, phase = step % STAGES, step // STAGES & 1
    s = _ask(k_smem, q_smem, q_full, stage, phase, BM, D, S_LAYOUT)
    dp = _ask(v_smem, g_smem, g_full, stage, phase, BM, D, S_LAYOUT)
    s = warpgroup_mma_wait(1, deps=[s])
    q, grad = q_smem.index(stage).reshape([BM, D]), g_smem.index(stage).reshape([BM, D])
    lse2 = lse_smem.index(stage).load(COLUMN)
    weights = gl.exp2(s * scale_log2 - lse2[None, :])
    if MASK:
        t = t0 + gl.arange(0, BM, COLUMN)
        low = gl.load(starts + t, mask=t < T, other=FAR).to(gl.int32)
        low = gl.maximum(low, offset + t - window + 1)
        seen = (keys[:, None] <= (offset + t)[None, :]) & (keys[:, None] >= low[None, :])
        weights = gl.where(seen, weights, 0.0)
    # It has come: the loop keeps ptxas from waiting for dP before the weights.
    mbarrier.wait(g_full.index(stage), phase)
    dp = warpgroup_mma_wait(0, deps=[dp])
    delta = delta_smem.index(stage).load(COLUMN)
    slope = weights * (dp - delta[None, :])
    ds = gl.convert_layout(slope.to(dtype), P_LAYOUT)
    p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
    acc_v = warpgroup_mma(p, grad, acc_v, is_async=True)
    acc_k = warpgroup_mma(ds, q, acc_k, is_async=True)
    acc_v, acc_k, p, ds = warpgroup_mma_wait(0, deps=[acc_v, acc_k, p, ds])
    mbarrier.arrive(empty.index(stage))
    return acc_k, acc_v


@gluon.jit
def _kv_consumer(
    W: gl.constexpr, k_smem, v_smem, tiles_smem, stats_smem, q_full, g_full, empty,
    K, V, GRAD_K, GRAD_V, START, k_strides, v_strides, d_strides, row, group, n0, offset, T, S, extent, scale, window,
    R: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    MEM: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = K.dtype.element_ty
    masked, free = R * extent[2], R * extent[3]
    row64, group64 = row.to(gl.int64), group.to(gl.int64)
    n0 += W * 64
    m_keys = n0 + gl.arange(0, 64, gl.SliceLayout(1, MEM))
    m_columns = gl.arange(0, D, gl.SliceLayout(0, MEM))
    # A static cache may hold anything behind the last query.
    written = (m_keys < gl.minimum(S, offset + T))[:, None]
    m_keys64 = m_keys.to(gl.int64)[:, None]
    k_base = K + row64 * k_strides[0] + group64 * k_strides[1]
    v_base = V + row64 * v_strides[0] + group64 * v_strides[1]
    k_smem.store(gl.load(k_base + m_keys64 * k_strides[2] + m_columns[None, :], mask=written, other=0.0))
    v_smem.store(gl.load(v_base + m_keys64 * v_strides[2] + m_columns[None, :], mask=written, other=0.0))
    fence_async_shared()
    barrier()
    keys = n0 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
    starts = START + row64 * T
    scale_log2 = scale * LOG2E
    acc_k = gl.zeros([64, D], gl.float32, O_LAYOUT)
    acc_v = gl.zeros([64, D], gl.float32, O_LAYOUT)
    for step in range(0, masked):
        _r, t0 = _kv_item(step, extent, R, BM)
        acc_k, acc_v = _kv_step(
            acc_k, acc_v, step, keys, t0, T, offset, window, starts, scale_log2, k_smem, v_smem, tiles_smem,
            stats_smem, q_full, g_full, empty, BM, D, STAGES, True, S_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    for step in range(masked, masked + free):
        acc_k, acc_v = _kv_step(
            acc_k, acc_v, step, keys, 0, T, offset, window, starts, scale_log2, k_smem, v_smem, tiles_smem, stats_smem,
            q_full, g_full, empty, BM, D, STAGES, False, S_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    o_keys = n0 + gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
    o_columns = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    place = row64 * d_strides[0] + group64 * d_strides[1]
    place = place + o_keys.to(gl.int64)[:, None] * d_strides[2] + o_columns[None, :]
    ok = (o_keys < S)[:, None]
    gl.store(GRAD_K + place, (acc_k * scale).to(dtype), mask=ok)
    gl.store(GRAD_V + place, acc_v.to(dtype), mask=ok)


@gluon.jit
def _kv_extent(
    starts, n0, offset, T, window,
    BM: gl.constexpr, BN: gl.constexpr, SCAN: gl.constexpr,
):  # fmt: skip
    """As in `backward._causal_grad_kv`: first query, masked steps before the free ones, masked steps, free steps."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    begin = gl.maximum(n0 - offset, 0)
    end = gl.minimum(T, n0 + BN - 1 + window - offset)
    last = gl.full([SCAN], -1, gl.int32, L)
    whole = gl.full([SCAN], FAR, gl.int32, L)
    for m in range(begin, end, SCAN):
        t = m + gl.arange(0, SCAN, L)
        first = gl.load(starts + t, mask=t < end, other=FAR).to(gl.int32)
        last = gl.maximum(last, gl.where(first < n0 + BN, t, -1))
        whole = gl.minimum(whole, gl.where(first > n0, t, FAR))
    end = gl.minimum(end, gl.max(last, 0) + 1)
    bound = gl.minimum(gl.minimum(end, gl.min(whole, 0)), n0 + window - offset)
    steps = (gl.maximum(end - begin, 0) + BM - 1) // BM
    before = gl.minimum((gl.maximum(n0 + BN - 1 - offset - begin, 0) + BM - 1) // BM, steps)
    free = gl.maximum(bound - begin - before * BM, 0) // BM
    return begin, before, steps - free, free


@gluon.jit
def _hopper_grad_kv(
    q_desc, g_desc, K, V, LSE2, DELTA, GRAD_K, GRAD_V, OFFSET, START,
    skb, skg, sks, svb, svg, svs, sdb, sdg, sds, T, S, tiles, scale, window,
    G: gl.constexpr, R: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    REGS: gl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, over all queries and heads that may see one of them."""
    dtype: gl.constexpr = K.dtype.element_ty
    ONES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    K_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    k0 = gl.allocate_shared_memory(dtype, [64, D], K_LAYOUT)
    k1 = gl.allocate_shared_memory(dtype, [64, D], K_LAYOUT)
    v0 = gl.allocate_shared_memory(dtype, [64, D], K_LAYOUT)
    v1 = gl.allocate_shared_memory(dtype, [64, D], K_LAYOUT)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], q_desc.layout)
    g_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], g_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ONES)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BM], ONES)
    # A bulk copy arrives, and 32 lanes' copies of log-sum-exps or deltas.
    q_full, g_full = barriers(STAGES, 33), barriers(STAGES, 33)
    empty = barriers(STAGES, 2)
    fence_async_shared()
    tile, line = gl.program_id(0) % tiles, gl.program_id(0) // tiles
    row, group = line // G, line % G
    offset = gl.load(OFFSET + row).to(gl.int32)
    n0 = tile * BN
    extent = _kv_extent(START + row.to(gl.int64) * T, n0, offset, T, window, BM, BN, 2048)
    tiles_smem, stats_smem = (q_smem, g_smem), (lse_smem, delta_smem)
    ks, vs, gs = (skb, skg, sks), (svb, svg, svs), (sdb, sdg, sds)
    gl.warp_specialize(
        [
            (_kv_consumer, (
                0, k0, v0, tiles_smem, stats_smem, q_full, g_full, empty, K, V, GRAD_K, GRAD_V, START, ks, vs, gs,
                row, group, n0, offset, T, S, extent, scale, window, R, BM, D, STAGES,
            )),
            (_kv_consumer, (
                1, k1, v1, tiles_smem, stats_smem, q_full, g_full, empty, K, V, GRAD_K, GRAD_V, START, ks, vs, gs,
                row, group, n0, offset, T, S, extent, scale, window, R, BM, D, STAGES,
            )),
            (_kv_producer, (
                q_desc, g_desc, tiles_smem, stats_smem, q_full, g_full, empty, LSE2, DELTA, row, group, T, extent,
                G, R, BM, STAGES,
            )),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip


@gluon.jit
def _q_item(step, extent, BN: gl.constexpr):
    """First key of a step: the masked ones come first, then the free ones."""
    low, begin, masked, free = extent
    j = gl.where(step < masked, gl.where(step < begin, step, step + free), begin + step - masked)
    return low + j * BN


@gluon.jit
def _q_producer(
    k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, row, group, extent,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for step in range(0, extent[2] + extent[3]):
        n = _q_item(step, extent, BN)
        fetch(k_desc, row, group, n, k_full, k_empty, k_smem, step, STAGES)
        fetch(v_desc, row, group, n, v_full, v_empty, v_smem, step, STAGES)


@gluon.jit
def _q_step(
    W: gl.constexpr, acc, step, n, slots, first_key, lse2, delta, written, scale_log2, q_smem, g_smem, k_smem, v_smem,
    k_full, k_empty, v_full, v_empty, cleaned, cleanings,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, S_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add the keys of a step to dQ."""
    dtype: gl.constexpr = q_smem.dtype
    stage, phase = step % STAGES, step // STAGES & 1
    s = _ask(q_smem, k_smem, k_full, stage, phase, BN, D, S_LAYOUT)
    dp = _ask(g_smem, v_smem, v_full, stage, phase, BN, D, S_LAYOUT)
    s = warpgroup_mma_wait(1, deps=[s])
    weights = gl.exp2(s * scale_log2 - lse2[:, None])
    # It has come: the loop keeps ptxas from waiting for dP before the weights.
    mbarrier.wait(v_full.index(stage), phase)
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(stage))
    slope = weights * (dp - delta[:, None])
    if MASK:
        keys = n + gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))
        seen = (keys[None, :] <= slots[:, None]) & (keys[None, :] >= first_key[:, None])
        slope = gl.where(seen, slope, 0.0)
        # Slots that no query of this batch row has reached may hold anything: they count as zeros.
        if n + BN > written:
            if W == 0:
                MEM: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
                rows = n + gl.arange(0, BN, gl.SliceLayout(1, MEM))
                tile = k_smem.index(stage).reshape([BN, D])
                clean = tile.load(MEM)
                clean = gl.where((rows < written)[:, None], clean, gl.zeros([BN, D], dtype, MEM))
                tile.store(clean)
                fence_async_shared()
            mbarrier.arrive(cleaned)
            mbarrier.wait(cleaned, cleanings & 1)
            cleanings += 1
    ds = gl.convert_layout(slope.to(dtype), P_LAYOUT)
    acc = warpgroup_mma(ds, k_smem.index(stage).reshape([BN, D]), acc, is_async=True)
    acc, ds = warpgroup_mma_wait(0, deps=[acc, ds])
    mbarrier.arrive(k_empty.index(stage))
    return acc, cleanings


@gluon.jit
def _q_consumer(
    W: gl.constexpr, q_smem, g_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, cleaned,
    Q, OUT, GRAD, LSE, GRAD_LSE, GRAD_Q, LSE2, DELTA, START, q_strides, o_strides, g_strides, d_strides,
    row, head, t_first, offset, T, extent, scale, window,
    H: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WITH_LSE: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    MEM: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    M_ROW: gl.constexpr = gl.SliceLayout(1, MEM)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = Q.dtype.element_ty
    masked, free = extent[2], extent[3]
    row64, head64 = row.to(gl.int64), head.to(gl.int64)
    t_first += W * 64
    m_t = t_first + gl.arange(0, 64, M_ROW)
    m_t64 = m_t.to(gl.int64)[:, None]
    m_columns = gl.arange(0, D, gl.SliceLayout(0, MEM))[None, :]
    m_ok = (m_t < T)[:, None]
    grad = gl.load(
        GRAD + row64 * g_strides[0] + head64 * g_strides[1] + m_t64 * g_strides[2] + m_columns,
        mask=m_ok,
        other=0.0,
    )
    g_smem.store(grad)
    out = gl.load(
        OUT + row64 * o_strides[0] + head64 * o_strides[1] + m_t64 * o_strides[2] + m_columns,
        mask=m_ok,
        other=0.0,
    )
    delta = gl.sum(grad.to(gl.float32) * out.to(gl.float32), 1)
    q_smem.store(gl.load(
        Q + row64 * q_strides[0] + head64 * q_strides[1] + m_t64 * q_strides[2] + m_columns, mask=m_ok, other=0.0
    ))  # fmt: skip
    at = (row64 * H + head64) * T + m_t
    lse = gl.load(LSE + at, mask=m_t < T, other=float("-inf"))
    if WITH_LSE:
        delta -= gl.load(GRAD_LSE + at, mask=m_t < T, other=0.0).to(gl.float32)
    empty = lse == float("-inf")
    lse2 = gl.where(empty, float("inf"), lse * LOG2E)
    delta = gl.where(empty, 0.0, delta)
    gl.store(LSE2 + at, lse2, mask=m_t < T)
    gl.store(DELTA + at, delta, mask=m_t < T)
    lse2, delta = gl.convert_layout(lse2, ROW), gl.convert_layout(delta, ROW)
    fence_async_shared()
    barrier()
    t = t_first + gl.arange(0, 64, ROW)
    slots = offset + t
    first_key = gl.load(START + row64 * T + t, mask=t < T, other=0).to(gl.int32)
    first_key = gl.maximum(first_key, slots - window + 1)
    scale_log2 = scale * LOG2E
    acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
    cleanings = 0
    for step in range(0, masked):
        n = _q_item(step, extent, BN)
        acc, cleanings = _q_step(
            W, acc, step, n, slots, first_key, lse2, delta, offset + T, scale_log2, q_smem, g_smem, k_smem, v_smem,
            k_full, k_empty, v_full, v_empty, cleaned, cleanings, BN, D, STAGES, True, S_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    for step in range(masked, masked + free):
        acc, cleanings = _q_step(
            W, acc, step, 0, slots, first_key, lse2, delta, 0, scale_log2, q_smem, g_smem, k_smem, v_smem, k_full,
            k_empty, v_full, v_empty, cleaned, cleanings, BN, D, STAGES, False, S_LAYOUT, P_LAYOUT,
        )  # fmt: skip
    o_t = t_first + gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
    o_columns = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))[None, :]
    place = GRAD_Q + row64 * d_strides[0] + head64 * d_strides[1] + o_t.to(gl.int64)[:, None] * d_strides[2]
    gl.store(place + o_columns, (acc * scale).to(dtype), mask=(o_t < T)[:, None])


@gluon.jit
def _hopper_grad_q(
    Q, k_desc, v_desc, OUT, GRAD, LSE, GRAD_LSE, GRAD_Q, LSE2, DELTA, OFFSET, START,
    sqb, sqh, sqt, sob, soh, sot, sgb, sgh, sgt, sdb, sdh, sdt, T, tiles, scale, window,
    G: gl.constexpr, R: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WITH_LSE: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """dQ of a tile of one head's queries; leaves LSE2 and DELTA for the key kernel."""
    dtype: gl.constexpr = Q.dtype.element_ty
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q0 = gl.allocate_shared_memory(dtype, [64, D], Q_LAYOUT)
    q1 = gl.allocate_shared_memory(dtype, [64, D], Q_LAYOUT)
    g0 = gl.allocate_shared_memory(dtype, [64, D], Q_LAYOUT)
    g1 = gl.allocate_shared_memory(dtype, [64, D], Q_LAYOUT)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    cleaned = barriers(1, 2).index(0)
    fence_async_shared()
    pid = gl.program_id(0)
    tile = tiles - 1 - pid // R % tiles  # longest first, and a group's heads side by side: they share keys
    line = pid // R // tiles
    row, group = line // G, line % G
    head = group * R + pid % R
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    t = tile * BM + gl.arange(0, BM, L)
    ok = t < T
    offset = gl.load(OFFSET + row).to(gl.int32)
    slots = offset + t
    first = gl.load(START + row.to(gl.int64) * T + t, mask=ok, other=0).to(gl.int32)
    first = gl.maximum(first, slots - window + 1)
    low = gl.min(gl.where(ok, first, FAR), 0)
    high = gl.max(gl.where(ok, slots, -1), 0) + 1
    begin = (
        gl.max(gl.where(ok, first, 0), 0) - low + BN - 1
    ) // BN  # steps before every query sees every key
    free = gl.maximum(gl.min(gl.where(ok, slots, FAR), 0) + 1 - low - begin * BN, 0) // BN
    masked = begin + (gl.maximum(high - low - (begin + free) * BN, 0) + BN - 1) // BN
    extent = (low, begin, masked, free)
    qs, os, gs, ds = (sqb, sqh, sqt), (sob, soh, sot), (sgb, sgh, sgt), (sdb, sdh, sdt)
    gl.warp_specialize(
        [
            (_q_consumer, (
                0, q0, g0, k_smem, v_smem, k_full, k_empty, v_full, v_empty, cleaned, Q, OUT, GRAD, LSE, GRAD_LSE,
                GRAD_Q, LSE2, DELTA, START, qs, os, gs, ds, row, head, tile * BM, offset, T, extent, scale, window,
                G * R, BN, D, STAGES, WITH_LSE,
            )),
            (_q_consumer, (
                1, q1, g1, k_smem, v_smem, k_full, k_empty, v_full, v_empty, cleaned, Q, OUT, GRAD, LSE, GRAD_LSE,
                GRAD_Q, LSE2, DELTA, START, qs, os, gs, ds, row, head, tile * BM, offset, T, extent, scale, window,
                G * R, BN, D, STAGES, WITH_LSE,
            )),
            (_q_producer, (
                k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, row, group, extent, BN, STAGES,
            )),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip


def fits(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether `backward` can take these inputs, on this device and under this Triton."""
    return (
        capable(q.device)
        and q.dtype == torch.bfloat16
        and q.shape[3] in (64, 128)
        and bool(q.numel() and k.numel())
    )


def backward(
    q, k, v, q_offset, start, out, lse, grad, grad_lse, grad_q, grad_k, grad_v, *, scale, window
) -> None:
    """`backward.backward`, for inputs that `fits` takes."""
    batch, heads, length, dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    grad = dense_rows(grad)
    lse2, delta = torch.empty(2, *lse.shape, dtype=torch.float32, device=q.device)
    shared = {"G": groups, "R": heads // groups, "D": dim}
    tile = hopper_grad_q_tile()
    tiles = triton.cdiv(length, tile.queries)
    _hopper_grad_q[(tiles * batch * heads,)](
        q, bulk_tiles(k, tile.keys), bulk_tiles(v, tile.keys), out, grad, lse,
        grad_lse.contiguous() if grad_lse is not None else lse, grad_q, lse2, delta, q_offset, start,
        *strides(q), *strides(out), *strides(grad), *strides(grad_q), length, tiles, scale, window,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, WITH_LSE=grad_lse is not None, REGS=tile.registers,
        num_warps=tile.warps, **shared,
    )  # fmt: skip
    tile = hopper_grad_kv_tile()
    tiles = triton.cdiv(slots, tile.keys)
    _hopper_grad_kv[(tiles * batch * groups,)](
        bulk_tiles(q, tile.queries), bulk_tiles(grad, tile.queries), k, v, lse2, delta, grad_k, grad_v, q_offset, start,
        *strides(k), *strides(v), *strides(grad_k), length, slots, tiles, scale, window,
        BM=tile.queries, BN=tile.keys, STAGES=tile.stages, REGS=tile.registers, num_warps=tile.warps, **shared,
    )  # fmt: skip
