"""Dispatch of oracle attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import check_inputs
from ..dispatch import attention_problem, choose, dense_rows, on_device
from . import reference

SCORE_ELEMENTS = 1 << 26
"""Scores that `oracle_attention_topk` holds at a time (its query chunk is cut to fit)."""


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    block_size: int,
    window: int,
    scale: float,
    with_scores: bool = True,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `reference.oracle_attention`."""
    check_inputs(q, k, v, q_offset, start)
    settings = {"block_size": block_size, "window": window, "scale": scale}
    problem = attention_problem(q, k, v, block_size=block_size, window=window)
    if choose("oracle_attention", (q, k, v, q_offset, start), implementation, problem) == "reference":
        return reference.oracle_attention(q, k, v, q_offset, start, with_scores=with_scores, **settings)
    from . import forward

    q, k, v, q_offset, start, out, lse = _prepare(q, k, v, q_offset, start)
    scores = None
    if with_scores:
        blocks = -(-k.shape[2] // block_size)
        scores = torch.empty(q.shape[0], k.shape[1], q.shape[2], blocks, dtype=torch.float32, device=q.device)
    if out.numel():
        with on_device(q):
            forward.forward(q, k, v, q_offset, start, out, lse, scores, **settings)
    return out, lse, scores


def oracle_attention_topk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    block_size: int,
    window: int,
    topk: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.oracle_attention_topk`."""
    check_inputs(q, k, v, q_offset, start)
    settings = {"block_size": block_size, "window": window, "scale": scale}
    problem = attention_problem(q, k, v, block_size=block_size, window=window, topk=topk)
    if choose("oracle_attention_topk", (q, k, v, q_offset, start), implementation, problem) == "reference":
        return reference.oracle_attention_topk(q, k, v, q_offset, start, topk=topk, **settings)
    from ..decode import full
    from ..topk import forward as topk_forward
    from . import forward

    q, k, v, q_offset, start, out, lse = _prepare(q, k, v, q_offset, start)
    batch, length, groups = q.shape[0], q.shape[2], k.shape[1]
    indices = torch.empty(batch, groups, length, topk, dtype=torch.int32, device=q.device)
    if not out.numel():
        return out, lse, indices
    blocks = -(-k.shape[2] // block_size)
    if length == 1 and blocks <= 65536:  # one query cannot fill the GPU, so its keys are split
        with on_device(q):
            full.oracle_decode(q, k, v, q_offset, start, out, lse, indices, **settings)
        return out, lse, indices
    step = min(length, max(64, SCORE_ELEMENTS // (batch * groups * blocks) // 64 * 64))
    buffer = torch.empty(batch * groups * step * blocks, dtype=torch.float32, device=q.device)
    with on_device(q):
        for first in range(0, length, step):
            end = min(length, first + step)
            count = batch * groups * (end - first) * blocks
            scores = buffer[:count].view(batch, groups, end - first, blocks)
            forward.forward(q, k, v, q_offset, start, out, lse, scores, span=(first, end), **settings)
            chunk = (first, q_offset, start, window, block_size)
            topk_forward.forward(scores, topk, indices, chunk=chunk)
    return out, lse, indices


def _prepare(q, k, v, q_offset, start):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return dense_rows(q), dense_rows(k), dense_rows(v), q_offset.contiguous(), start.contiguous(), out, lse
