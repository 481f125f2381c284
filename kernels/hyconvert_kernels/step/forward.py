"""Triton kernels of what a layer does around attention and products: each reads and writes its rows once."""

import torch
import triton
import triton.language as tl

from ..configs import early_start, strides
from ..tiles import FP8_LARGEST, FP8_SMALLEST, await_inputs, load_rows, store_rows


@triton.jit
def _add_norm(
    X,
    RESIDUAL,
    WEIGHT,
    OUT,
    eps,
    sx,
    D: tl.constexpr,
    DP: tl.constexpr,
    ADD: tl.constexpr,
    AFTER: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    ok = column < D
    weight = tl.load(WEIGHT + column, mask=ok, other=0.0).to(tl.float32)
    await_inputs(EARLY)
    x = tl.load(X + row * sx + column, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        old = tl.load(RESIDUAL + row * D + column, mask=ok, other=0.0).to(tl.float32)
    if AFTER:
        x = x * tl.rsqrt(tl.sum(x * x) / D + eps) * weight
        if ADD:
            x = x.to(OUT.dtype.element_ty).to(tl.float32) + old
            tl.store(RESIDUAL + row * D + column, x.to(OUT.dtype.element_ty), mask=ok)
        tl.store(OUT + row * D + column, x.to(OUT.dtype.element_ty), mask=ok)
    else:
        if ADD:
            x = (x + old).to(OUT.dtype.element_ty)
            tl.store(RESIDUAL + row * D + column, x, mask=ok)
            x = x.to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x) / D + eps) * weight
        tl.store(OUT + row * D + column, x.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def _silu_mul(X, OUT, width, sx, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    await_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    gate = tl.load(X + row * sx + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(X + row * sx + width + column, mask=ok, other=0.0)
    out = (gate * tl.sigmoid(gate)).to(OUT.dtype.element_ty) * up
    tl.store(OUT + row * width + column, out, mask=ok)


@triton.jit
def _normed(x1, x2, WEIGHT, c, inside, eps, D: tl.constexpr):
    half: tl.constexpr = D // 2
    scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)
    w1 = tl.load(WEIGHT + c, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(WEIGHT + half + c, mask=inside, other=0.0).to(tl.float32)
    return x1 * scale[:, None] * w1[None, :], x2 * scale[:, None] * w2[None, :]


@triton.jit
def _store_halves(base, x1, x2, c, mask, HALF: tl.constexpr):
    tl.store(base[:, None] + c[None, :], x1.to(base.dtype.element_ty), mask=mask)
    tl.store(base[:, None] + HALF + c[None, :], x2.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _store_scaled(base, scales, x1, x2, c, ok, mask, TYPE: tl.constexpr, HALF: tl.constexpr):
    """Store rows over their scales, and the scales; rows are rounded to the cache's wider type ``TYPE`` before."""
    x1, x2 = x1.to(TYPE).to(tl.float32), x2.to(TYPE).to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(x1), 1), tl.max(tl.abs(x2), 1))
    scale = tl.maximum(top, FP8_SMALLEST) / FP8_LARGEST
    tl.store(scales, scale, mask=ok)
    _store_halves(base, x1 / scale[:, None], x2 / scale[:, None], c, mask, HALF)


@triton.jit
def _split_heads(
    X, COS, SIN, Q_NORM, K_NORM, MAP, Q, QS, K_OUT, V_OUT, OFFSET, START, eps, sxb, sxt, skb, skg, sks, svb, svg, svs,
    T, rows, S,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DH: tl.constexpr, BR: tl.constexpr, NORM: tl.constexpr,
    MAPPED: tl.constexpr, SPARSE: tl.constexpr, ROTATE: tl.constexpr, ROTATE_S: tl.constexpr, RING: tl.constexpr,
    PREC: tl.constexpr, EARLY: tl.constexpr, K_SCALE=None, V_SCALE=None,
):  # fmt: skip
    half: tl.constexpr = D // 2
    head = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, DH)
    inside = c < half
    if SPARSE and MAPPED:  # [in, out] of the map's four quarters, heads of queries only
        corner = MAP + tl.minimum(head, H - 1) * D * D + c[None, :] * D + c[:, None]
        square = inside[:, None] & inside[None, :] & (head < H)
        m11 = tl.load(corner, mask=square, other=0.0)
        m21 = tl.load(corner + half, mask=square, other=0.0)
        m12 = tl.load(corner + half * D, mask=square, other=0.0)
        m22 = tl.load(corner + half * D + half, mask=square, other=0.0)
    await_inputs(EARLY)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    ok = row < rows
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    slot = tl.load(OFFSET + b, mask=ok, other=0).to(tl.int64) + t
    mask = ok[:, None] & inside[None, :]
    source = (X + b * sxb + t * sxt + head * D)[:, None] + c[None, :]
    raw1 = tl.load(source, mask=mask, other=0.0)
    raw2 = tl.load(source + half, mask=mask, other=0.0)
    place = slot % S if RING else slot
    if head >= H + G:
        values = V_OUT + b * svb + (head - H - G) * svg + place * svs
        if V_SCALE is not None:
            scales = V_SCALE + (b * G + head - H - G) * S + place
            _store_scaled(values, scales, raw1, raw2, c, ok, mask, X.dtype.element_ty, half)
        else:
            _store_halves(values, raw1, raw2, c, mask, half)
    else:
        at = tl.maximum(slot - tl.load(START + b, mask=ok, other=0).to(tl.int64), 0)
        table = at[:, None] * half + c[None, :]
        cos = tl.load(COS + table, mask=mask, other=0.0)
        sin = tl.load(SIN + table, mask=mask, other=0.0)
        x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
        if head >= H:
            if NORM:
                x1, x2 = _normed(x1, x2, K_NORM, c, inside, eps, D)
            base = K_OUT + b * skb + (head - H) * skg + place * sks
            if K_SCALE is not None:
                scales = K_SCALE + (b * G + head - H) * S + place
                if ROTATE:
                    x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
                _store_scaled(base, scales, x1, x2, c, ok, mask, X.dtype.element_ty, half)
            elif ROTATE:
                _store_halves(base, x1 * cos - x2 * sin, x2 * cos + x1 * sin, c, mask, half)
            else:
                _store_halves(base, x1, x2, c, mask, half)
        else:
            if NORM:
                x1, x2 = _normed(x1, x2, Q_NORM, c, inside, eps, D)
            to = ((b * H + head) * T + t) * D
            if ROTATE:
                _store_halves(Q + to, x1 * cos - x2 * sin, x2 * cos + x1 * sin, c, mask, half)
            else:
                _store_halves(Q + to, x1, x2, c, mask, half)
            if SPARSE:
                if MAPPED:
                    a1, a2 = x1.to(X.dtype.element_ty), x2.to(X.dtype.element_ty)
                    x1 = tl.dot(a2, m21, tl.dot(a1, m11, input_precision=PREC), input_precision=PREC)
                    x2 = tl.dot(a2, m22, tl.dot(a1, m12, input_precision=PREC), input_precision=PREC)
                if ROTATE_S:
                    _store_halves(QS + to, x1 * cos - x2 * sin, x2 * cos + x1 * sin, c, mask, half)
                else:
                    _store_halves(QS + to, x1, x2, c, mask, half)


@triton.jit
def _fill_rings(
    K, V, RING_K, RING_V, LAST, at, shift, skb, skg, sks, svb, svg, svs, srb, srg, srs, swb, swg, sws, S,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    await_inputs(EARLY)
    place = (tl.program_id(0) * BS + tl.arange(0, BS)).to(tl.int64)
    line = tl.program_id(1)
    b, g = (line // G).to(tl.int64), (line % G).to(tl.int64)
    end = tl.load(LAST).to(tl.int64) + at
    index = end - (end - place + S) % S - shift
    ok = (place < S) & (index >= 0)
    k = load_rows(K + b * skb + g * skg, index * sks, ok, D, DP)
    v = load_rows(V + b * svb + g * svg, index * svs, ok, D, DP)
    store_rows(RING_K + b * srb + g * srg, place * srs, k, ok, D, DP)
    store_rows(RING_V + b * swb + g * swg, place * sws, v, ok, D, DP)


def add_norm(x, residual, weight, eps, out, *, after):
    """Fill ``out`` and, if there is one, ``residual``; rows contiguous, ``out`` and ``residual`` wholly."""
    dim = x.shape[-1]
    flat = x.view(-1, dim)
    padded = triton.next_power_of_2(dim)
    _add_norm[(flat.shape[0],)](
        flat, residual if residual is not None else out, weight, out, eps, flat.stride(0),
        D=dim, DP=padded, ADD=residual is not None, AFTER=after, num_warps=max(1, min(16, padded // 512)),
        **early_start(x.device),
    )  # fmt: skip


def silu_mul(x, out):
    """Fill ``out``; both contiguous."""
    width = out.shape[-1]
    rows = out.numel() // width
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(rows, triton.cdiv(width, block))](
        x,
        out,
        width,
        2 * width,
        BLOCK=block,
        num_warps=max(1, block // 256),
        **early_start(x.device),
    )


def split_heads(
    x, q_offset, start, k_out, v_out, q, q_sparse, *, cos, sin, q_norm, k_norm, eps, query_map, rotate, rotate_source,
    ring, scales=None,
):  # fmt: skip
    """Fill contiguous ``q`` and, unless it is None, ``q_sparse``; slots of ``k_out`` and ``v_out``, their scales."""
    batch, heads, length, dim = q.shape
    groups = k_out.shape[1]
    rows = batch * length
    tile = 16 if rows <= 1024 or dim > 128 else 32
    mapped = query_map is not None
    none = torch.empty(0, dtype=x.dtype, device=x.device) if v_out is None else v_out
    _split_heads[(triton.cdiv(rows, tile), heads + groups * (1 if v_out is None else 2))](
        x, cos, sin, q_norm if q_norm is not None else q, k_norm if k_norm is not None else q,
        query_map if mapped else q, q, q_sparse if q_sparse is not None else q, k_out, none, q_offset, start, eps,
        x.stride(0), x.stride(1), *strides(k_out), *(strides(v_out) if v_out is not None else (0, 0, 0)),
        length, rows, k_out.shape[2],
        H=heads, G=groups, D=dim, DH=max(16, triton.next_power_of_2(dim // 2)), BR=tile, NORM=q_norm is not None,
        MAPPED=mapped, SPARSE=q_sparse is not None, ROTATE=rotate, ROTATE_S=rotate_source, RING=ring, PREC="ieee",
        K_SCALE=None if scales is None else scales[0], V_SCALE=None if scales is None else scales[1], num_warps=4,
        **early_start(x.device),
    )  # fmt: skip


def fill_rings(k, v, ring_k, ring_v, last, *, at, shift):
    """Fill the rings' slots; last strides 1."""
    batch, groups, size, dim = ring_k.shape
    slots = 16
    _fill_rings[(triton.cdiv(size, slots), batch * groups)](
        k, v, ring_k, ring_v, last, at, shift, *strides(k), *strides(v), *strides(ring_k), *strides(ring_v), size,
        G=groups, D=dim, DP=triton.next_power_of_2(dim), BS=slots, num_warps=4, **early_start(k.device),
    )  # fmt: skip
