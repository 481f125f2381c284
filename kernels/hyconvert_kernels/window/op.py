"""Dispatch of window attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import check_inputs
from ..dispatch import attention_problem, choose, dense_rows, on_device
from . import reference


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    window: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.window_attention`."""
    check_inputs(q, k, v, q_offset, start)
    problem = attention_problem(q, k, v, window=window)
    if choose("window_attention", (q, k, v, q_offset, start), implementation, problem) == "reference":
        return reference.window_attention(q, k, v, q_offset, start, window=window, scale=scale)
    from . import forward

    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel():
        with on_device(q):
            forward.forward(
                q, k, v, q_offset.contiguous(), start.contiguous(), out, lse, window=window, scale=scale
            )
    return out, lse
