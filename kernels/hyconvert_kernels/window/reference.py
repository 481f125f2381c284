"""Plain PyTorch sliding-window attention. This is the truth for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import (
    accumulation_dtype,
    check_inputs,
    masked_softmax_attention,
    query_slots,
    run_chunk,
    visible_only,
)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, q_offset: Tensor, start: Tensor, *, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the last ``window`` slots of each query, its own included.

    Args:
        q: ``[B,H,T,d]`` queries after RoPE.
        k, v: ``[B,G,S,d]``, the whole sequence or a short window cache; ``q_offset`` and ``start`` count from its
            first slot.
        q_offset: int ``[B]``, at least 0.
        start: int ``[B,T]``, at least 0.
        window: slots ``max(start, slot - window + 1) .. slot`` take part.
        scale: factor of the logits.

    Returns:
        ``out [B,H,T,d]`` in q's dtype and ``lse [B,H,T]`` (float32; float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit.
    """
    check_inputs(q, k, v, q_offset, start)
    length, slots_total = q.shape[2], k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    slots = query_slots(q_offset, length)
    k_seen = visible_only(k, q_offset, length)
    v_seen = visible_only(v, q_offset, length)
    first, last = int(q_offset.min()), int(q_offset.max())
    step = max(64, window)
    outs, lses = [], []
    for at in range(0, length, step):
        part = slice(at, at + step)
        low = max(0, min(first + at - window + 1, slots_total - 1))
        high = max(low + 1, min(slots_total, last + min(at + step, length)))

        def chunk(q_chunk, k_chunk, v_chunk, part=part, low=low):
            keys = torch.arange(low, low + k_chunk.shape[2], device=q.device)
            at_slot = slots[:, part, None]
            mask = (keys >= start[:, part, None]) & (keys <= at_slot) & (keys > at_slot - window)
            out, lse, *_ = masked_softmax_attention(q_chunk, k_chunk, v_chunk, mask[:, None, None], scale)
            return out.to(q.dtype), lse

        out, lse = run_chunk(
            chunk, q[:, :, part].to(dtype), k_seen[:, :, low:high].to(dtype), v_seen[:, :, low:high].to(dtype)
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
