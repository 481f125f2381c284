"""Triton backward of the merge of branches: one pass over the outputs."""

import triton
import triton.language as tl

from .forward import branch_share, launch


@triton.jit
def _merge_backward(
    OUT_W, LSE_W, OUT_S, LSE_S, GATE, GRAD, GRAD_W, GRAD_S, GRAD_LOGIT, rows, H, T, sgb, sgh, sgt,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    gate_at = (row // (H * T)) * sgb + (row // T % H) * sgh + (row % T) * sgt
    gate = tl.load(GATE + gate_at, mask=ok, other=0.0).to(tl.float32)
    lse_w = tl.load(LSE_W + row, mask=ok, other=0.0)
    lse_s = tl.load(LSE_S + row, mask=ok, other=0.0)
    share, fixed = branch_share(lse_w, lse_s, gate)
    column = tl.arange(0, DP)[None, :]
    at, mask = row[:, None] * D + column, ok[:, None] & (column < D)
    out_w = tl.load(OUT_W + at, mask=mask, other=0.0).to(tl.float32)
    out_s = tl.load(OUT_S + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + at, mask=mask, other=0.0).to(tl.float32)
    slope = tl.where(fixed, 0.0, share * (1.0 - share) * tl.sum(grad * (out_s - out_w), 1))
    tl.store(GRAD_W + at, ((1.0 - share)[:, None] * grad).to(GRAD_W.dtype.element_ty), mask=mask)
    tl.store(GRAD_S + at, (share[:, None] * grad).to(GRAD_S.dtype.element_ty), mask=mask)
    tl.store(GRAD_LOGIT + row, slope, mask=ok)


def backward(out_w, lse_w, out_s, lse_s, gate, grad, grad_w, grad_s, grad_logit) -> None:
    """Fill the outputs' gradients and ``grad_logit [B,H,T]``, the gradient of the sigmoid's argument."""
    launch(_merge_backward, out_w, lse_w, out_s, lse_s, gate, grad, grad_w, grad_s, grad_logit)
