"""Triton merge of the two branches: one pass over the outputs."""

import triton
import triton.language as tl


@triton.jit
def branch_share(lse_w, lse_s, gate):
    no_s, no_w = lse_s == float("-inf"), lse_w == float("-inf")
    share = tl.sigmoid(tl.where(no_s, 0.0, lse_s) - tl.where(no_w, 0.0, lse_w) + gate)
    return tl.where(no_s, 0.0, tl.where(no_w, 1.0, share)), no_s | no_w


@triton.jit
def _merge_forward(
    OUT_W, LSE_W, OUT_S, LSE_S, GATE, OUT, rows, H, T, sgb, sgh, sgt,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    gate_at = (row // (H * T)) * sgb + (row // T % H) * sgh + (row % T) * sgt
    gate = tl.load(GATE + gate_at, mask=ok, other=0.0).to(tl.float32)
    lse_w = tl.load(LSE_W + row, mask=ok, other=0.0)
    lse_s = tl.load(LSE_S + row, mask=ok, other=0.0)
    share, _ = branch_share(lse_w, lse_s, gate)
    column = tl.arange(0, DP)[None, :]
    at, mask = row[:, None] * D + column, ok[:, None] & (column < D)
    out_w = tl.load(OUT_W + at, mask=mask, other=0.0).to(tl.float32)
    out_s = tl.load(OUT_S + at, mask=mask, other=0.0).to(tl.float32)
    out = share[:, None] * out_s + (1.0 - share)[:, None] * out_w
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=mask)


def launch(kernel, out_w, lse_w, out_s, lse_s, gate, *rest):
    """Run ``kernel`` over all rows; all tensors contiguous but ``gate [B,H,T]``, which may be an expanded view."""
    batch, heads, length, dim = out_w.shape
    rows = batch * heads * length
    padded = triton.next_power_of_2(dim)
    per = max(1, 4096 // padded)
    kernel[(triton.cdiv(rows, per),)](
        out_w, lse_w, out_s, lse_s, gate, *rest, rows, heads, length, *gate.stride(),
        ROWS=per, D=dim, DP=padded, num_warps=4,
    )  # fmt: skip


def forward(out_w, lse_w, out_s, lse_s, gate, out) -> None:
    """Fill ``out``; layouts as in `launch`."""
    launch(_merge_forward, out_w, lse_w, out_s, lse_s, gate, out)
