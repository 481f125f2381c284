"""Triton product of few rows with a matrix: bound by reading the matrix, once, with many loads in flight."""

import triton
import triton.language as tl

from ..configs import Tile, early_start, matvec_tile
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


def matvec(x, weight, bias, out, *, gated, tile: Tile | None = None):
    """Fill contiguous ``out [rows, N]`` of ``x [rows, K]`` and ``weight [N or 2 N, K]``, last strides 1."""
    rows, width = x.shape
    count = out.shape[1]
    tile = tile or matvec_tile(x.dtype, rows, width)
    _matvec[(triton.cdiv(count, tile.queries),)](
        x, weight, bias if bias is not None else out, out, rows, count, width, x.stride(0), weight.stride(0),
        M=1 if rows == 1 else 16, BN=tile.queries, BK=tile.keys, BIASED=bias is not None, GATED=gated,
        PREC=tile.precision, STAGES=tile.stages, **tile.launch(),
        **early_start(x.device),
    )  # fmt: skip
