"""Triton product of few rows with a matrix: bound by reading the matrix, once, with many loads in flight."""

import triton
import triton.language as tl

from ..configs import MATVEC_FETCH, Tile, early_start, matvec_tile
from ..tiles import await_inputs


@triton.jit
def _dots(X, W, n, inside, sx, sw, rows, K, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
          STAGES: tl.constexpr):  # fmt: skip
    """``x W'`` for the matrix rows ``n [BN]``: float32 ``[BN, M]``."""
    column = tl.arange(0, BK)
    weights = W + n.to(tl.int64)[:, None] * sw + column[None, :]
    if M == 1:
        acc = tl.zeros([BN, BK], tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            ok = k + column < K
            x = tl.load(X + k + column, mask=ok, other=0.0).to(tl.float32)
            w = tl.load(weights + k, mask=inside[:, None] & ok[None, :], other=0.0)
            acc += w.to(tl.float32) * x[None, :]
        return tl.sum(acc, 1)[:, None]
    else:
        m = tl.arange(0, M)
        out = tl.zeros([BN, M], tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            ok = k + column < K
            x = tl.load(
                X + m[:, None] * sx + k + column[None, :], mask=(m < rows)[:, None] & ok[None, :], other=0.0
            )
            w = tl.load(weights + k, mask=inside[:, None] & ok[None, :], other=0.0)
            out = tl.dot(w, tl.trans(x), out, input_precision=PREC)
        return out


@triton.jit
def _fetch(W, n, sw, N, K, WIDTH: tl.constexpr):
    """Begin to bring the first ``WIDTH`` columns of matrix rows ``n`` into the L2 cache, 128 bytes at a time."""
    line: tl.constexpr = 1024 // W.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(tl.arange(0, WIDTH // line) * line, K - 1)
    places = W + tl.minimum(n, N - 1).to(tl.int64)[:, None] * sw + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _matvec(
    X, W, BIAS, OUT, rows, N, K, sx, sw, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIASED: tl.constexpr,
    GATED: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr, FETCH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``N`` counts the outputs: half the matrix rows with ``GATED``, gate rows first.

    Launched early, it brings ``FETCH`` columns of its rows into the L2 cache while the kernels before still run.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if EARLY and FETCH > 0:
        _fetch(W, n, sw, N, K, FETCH)
        if GATED:
            _fetch(W + N.to(tl.int64) * sw, n, sw, N, K, FETCH)
    await_inputs(EARLY)
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


def matvec(x, weight, bias, out, *, gated, tile: Tile | None = None, fetch=None):
    """Fill contiguous ``out [rows, N]`` of ``x [rows, K]`` and ``weight [N or 2 N, K]``, last strides 1.

    ``fetch`` columns, a power of two or 0, are brought into the cache early.
    """
    rows, width = x.shape
    count = out.shape[1]
    tile = tile or matvec_tile(x.dtype, rows, width)
    _matvec[(triton.cdiv(count, tile.queries),)](
        x, weight, bias if bias is not None else out, out, rows, count, width, x.stride(0), weight.stride(0),
        M=1 if rows == 1 else 16, BN=tile.queries, BK=tile.keys, BIASED=bias is not None, GATED=gated,
        PREC=tile.precision, STAGES=tile.stages, FETCH=MATVEC_FETCH if fetch is None else fetch, **tile.launch(),
        **early_start(x.device),
    )  # fmt: skip
