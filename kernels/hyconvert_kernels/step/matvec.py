"""Triton product of few rows with a matrix: bound by reading the matrix, once, with many loads in flight."""

import triton
import triton.language as tl

from ..configs import Tile, early_start, matvec_tile
from ..tiles import await_inputs


@triton.jit
def _accumulate(acc, w, X, m, rows, sx, k, ok, column, VEC: tl.constexpr):
    """Add row ``m`` of ``x`` times ``w [BN, BK]``, summed over the ``VEC`` neighbours that one thread holds."""
    x = tl.load(X + m * sx + k + column, mask=ok & (m < rows), other=0.0).to(tl.float32)
    return acc + tl.sum(tl.reshape(w * x[None, :], [w.shape[0], w.shape[1] // VEC, VEC]), 2)


@triton.jit
def _dots(X, W, n, inside, sx, sw, rows, K, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
          STAGES: tl.constexpr):  # fmt: skip
    """``x W'`` for the matrix rows ``n [BN]``: float32 ``[BN, M]``."""
    column = tl.arange(0, BK)
    weights = W + n.to(tl.int64)[:, None] * sw + column[None, :]
    m = tl.arange(0, M)
    if M == 16:
        out = tl.zeros([BN, M], tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            ok = k + column < K
            x = tl.load(
                X + m[:, None] * sx + k + column[None, :], mask=(m < rows)[:, None] & ok[None, :], other=0.0
            )
            w = tl.load(weights + k, mask=inside[:, None] & ok[None, :], other=0.0)
            out = tl.dot(w, tl.trans(x), out, input_precision=PREC)
        return out
    elif M == 1:
        acc = tl.zeros([BN, BK], tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            ok = k + column < K
            x = tl.load(X + k + column, mask=ok, other=0.0).to(tl.float32)
            w = tl.load(weights + k, mask=inside[:, None] & ok[None, :], other=0.0)
            acc += w.to(tl.float32) * x[None, :]
        return tl.sum(acc, 1)[:, None]
    else:  # one sum per row of x, and per thread until the end
        vec: tl.constexpr = 128 // W.dtype.element_ty.primitive_bitwidth
        zeros = tl.zeros([BN, BK // vec], tl.float32)
        a0, a1, a2, a3, a4, a5, a6, a7 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
        for k in tl.range(0, K, BK, num_stages=STAGES):
            ok = k + column < K
            w = tl.load(weights + k, mask=inside[:, None] & ok[None, :], other=0.0).to(tl.float32)
            a0 = _accumulate(a0, w, X, 0, rows, sx, k, ok, column, vec)
            a1 = _accumulate(a1, w, X, 1, rows, sx, k, ok, column, vec)
            if M > 2:
                a2 = _accumulate(a2, w, X, 2, rows, sx, k, ok, column, vec)
                a3 = _accumulate(a3, w, X, 3, rows, sx, k, ok, column, vec)
            if M > 4:
                a4 = _accumulate(a4, w, X, 4, rows, sx, k, ok, column, vec)
                a5 = _accumulate(a5, w, X, 5, rows, sx, k, ok, column, vec)
                a6 = _accumulate(a6, w, X, 6, rows, sx, k, ok, column, vec)
                a7 = _accumulate(a7, w, X, 7, rows, sx, k, ok, column, vec)
        out = tl.where(m == 0, tl.sum(a0, 1)[:, None], tl.sum(a1, 1)[:, None])
        if M > 2:
            out = tl.where(m == 2, tl.sum(a2, 1)[:, None], out)
            out = tl.where(m == 3, tl.sum(a3, 1)[:, None], out)
        if M > 4:
            out = tl.where(m == 4, tl.sum(a4, 1)[:, None], out)
            out = tl.where(m == 5, tl.sum(a5, 1)[:, None], out)
            out = tl.where(m == 6, tl.sum(a6, 1)[:, None], out)
            out = tl.where(m == 7, tl.sum(a7, 1)[:, None], out)
        return out


@triton.jit
def _matvec(
    X, W, BIAS, OUT, rows, N, K, sx, sw, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIASED: tl.constexpr,
    GATED: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``N`` counts the outputs: half the matrix rows with ``GATED``, gate rows first."""
    await_inputs(EARLY)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    out = _dots(X, W, n, inside, sx, sw, rows, K, M, BN, BK, PREC, STAGES)
    if BIASED:
        out += tl.load(BIAS + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    out = out.to(OUT.dtype.element_ty)
    if GATED:
        up = _dots(X, W, n + N, inside, sx, sw, rows, K, M, BN, BK, PREC, STAGES)
        if BIASED:
            up += tl.load(BIAS + N + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        gate = out.to(tl.float32)
        out = (gate * tl.sigmoid(gate)).to(OUT.dtype.element_ty) * up.to(OUT.dtype.element_ty)
    m = tl.arange(0, M)
    tl.store(OUT + m[None, :] * N + n[:, None], out, mask=inside[:, None] & (m < rows)[None, :])


def matvec(x, weight, bias, out, *, gated, tile: Tile | None = None, dots=None):
    """Fill contiguous ``out [rows, N]`` of ``x [rows, K]`` and ``weight [N or 2 N, K]``, last strides 1.

    ``dots``: whether tensor cores do it, 16 rows at once, or one multiplication after the other for up to 8 rows.
    """
    rows, width = x.shape
    count = out.shape[1]
    dots = rows > 8 if dots is None else dots
    tile = tile or matvec_tile(x.dtype, rows, width)
    _matvec[(triton.cdiv(count, tile.queries),)](
        x, weight, bias if bias is not None else out, out, rows, count, width, x.stride(0), weight.stride(0),
        M=16 if dots else triton.next_power_of_2(rows), BN=tile.queries, BK=tile.keys, BIASED=bias is not None, GATED=gated,
        PREC=tile.precision, STAGES=tile.stages, **tile.launch(),
        **early_start(x.device),
    )  # fmt: skip
