"""Triton helpers shared by the attention kernels.

A tile holds ``BQ`` consecutive queries of all heads of one KV group, so that every key and value it loads serves the
whole group: row ``i`` is query ``i // RP``, head ``i % RP``, where RP is the group's head count rounded up to a
power of two (the spare rows are idle). Logits are kept in log2 units (``exp2`` is the hardware's exponential).
"""

import triton
import triton.language as tl

from .fp8 import LARGEST, SMALLEST

FAR: tl.constexpr = tl.constexpr(2147483647)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FP8_LARGEST: tl.constexpr = tl.constexpr(LARGEST)
FP8_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST)


@triton.jit
def await_inputs(EARLY: tl.constexpr):
    """Wait for the kernels before this one, if it was launched early (see `configs.early_start`); first thing in it.

    ``EARLY`` is 0 if it was not, and 2 if the next kernel may start, and wait in its turn, at once.
    What stands before may read weights only: all else may not be written yet, or still be read by somebody else.
    """
    if EARLY == 2:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def load_rows(base, offsets, row_ok, D: tl.constexpr, DP: tl.constexpr):
    """Load ``[rows, DP]`` from rows at int64 ``offsets`` (last stride 1); idle rows and columns from D on are 0."""
    columns = tl.arange(0, DP)
    mask = row_ok[:, None]
    if D < DP:
        mask = mask & (columns < D)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, offsets, values, row_ok, D: tl.constexpr, DP: tl.constexpr):
    """Store ``[rows, DP]`` as `load_rows` loads it."""
    columns = tl.arange(0, DP)
    mask = row_ok[:, None]
    if D < DP:
        mask = mask & (columns < D)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    base, stride, first, end, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr
):
    """Load slots ``first .. first + BN`` as ``[BN, DP]``; with MASK, slots from ``end`` on are 0."""
    keys = tl.arange(0, BN)
    columns = tl.arange(0, DP)
    pointers = base + tl.cast(first, tl.int64) * stride + (keys[:, None] * stride + columns[None, :])
    if MASK:
        mask = (first + keys < end)[:, None]
        if D < DP:
            mask = mask & (columns < D)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if D < DP:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def softmax_step(logits, v, acc, top, total, MASK: tl.constexpr, PREC: tl.constexpr, v_scale=None):
    """One online-softmax update with ``logits [rows, keys]`` in log2 units (-inf where masked).

    With ``v_scale [keys]`` the values are ``v_scale`` times ``v``.
    """
    new = tl.maximum(top, tl.max(logits, 1))
    safe = new
    if MASK:
        safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(logits - safe[:, None])
    decay = tl.exp2(top - safe)
    total = total * decay + tl.sum(weights, 1)
    if v_scale is not None:
        weights = weights * v_scale[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PREC)
    return acc, new, total


@triton.jit
def finish(acc, top, total):
    """Normalised output and natural-log sum-exp; an empty row gives 0 and -inf."""
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    out = acc / safe[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN2)
    return out, lse


@triton.jit
def grad_rows(grad, out, LSE, GRAD_LSE, at, ok, WITH_LSE: tl.constexpr):
    """What a backward needs of each row of ``grad, out [rows, DP]``.

    Returns:
        The log2-sum-exp2, +inf for idle and empty rows so that their weights are 0, and delta = rowsum(grad out) less
        the log-sum-exp's gradient, 0 for such rows.
    """
    lse = tl.load(LSE + at, mask=ok, other=float("-inf"))
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if WITH_LSE:
        delta -= tl.load(GRAD_LSE + at, mask=ok, other=0.0).to(tl.float32)
    empty = lse == float("-inf")
    return tl.where(empty, float("inf"), lse * LOG2E), tl.where(empty, 0.0, delta)
