"""Plain PyTorch single-token decoding, composed from the other references. This is the truth for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8 import Scales, plain_rows
from ..merge.reference import merge_branches
from ..oracle.reference import oracle_attention_topk
from ..sparse.reference import block_sparse_attention
from ..window.reference import window_attention


def oracle_decode(
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
    scales: Scales | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`oracle_attention_topk` for one query per row (``T = 1``).

    With ``scales`` of keys and values, float32 ``[B,G,S]`` each, k and v are what `fp8.quantise_rows` makes.
    """
    if q.shape[2] != 1:
        raise ValueError(f"decode takes one query per row, got T={q.shape[2]}")
    k, v = plain_rows(q, k, v, scales)
    return oracle_attention_topk(
        q, k, v, q_offset, start, block_size=block_size, window=window, topk=topk, scale=scale
    )


def sparse_decode(
    q: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    q_sparse: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    q_offset: Tensor,
    start: Tensor,
    gate_logit: Tensor,
    *,
    block_size: int,
    window: int,
    scale: float,
    value_map: Tensor | None = None,
    window_offset: Tensor | None = None,
    window_start: Tensor | None = None,
    scales: Scales | None = None,
    window_scales: Scales | None = None,
) -> Tensor:
    """A sparse layer's attention for one query per row: window branch, sparse branch and merge.

    Args:
        q: ``[B,H,1,d]`` query of the window branch, after RoPE.
        k_window, v_window: ``[B,G,W,d]``, the layer's own keys and values. With ``window_offset`` left out this is a
            ring: the key of slot s lives at ``s % W`` (``W >= window``), the query's own key is stored already.
        q_sparse: ``[B,H,1,d]`` query of the sparse branch, after query map and RoPE.
        k, v: ``[B,G,S,d]`` of the source full layer.
        indices: int32 ``[B,G,1,K]``, as `block_topk` returns them.
        q_offset, start: int ``[B]`` and ``[B,1]``, in slots of the source cache.
        gate_logit: broadcastable to ``[B,H,1]``.
        value_map: ``[H,d,d]`` or None; the sparse output becomes ``value_map[h] @ out_s``.
        window_offset, window_start: int ``[B]`` and ``[B,1]`` when k_window is no ring: the query's slot and its first
            visible slot, counted from k_window's first slot.
        scales, window_scales: float32 ``[B,G,S]`` and ``[B,G,W]`` of keys and of values, where k and v, or k_window and
            v_window, are what `fp8.quantise_rows` makes; else None.

    Returns:
        ``[B,H,1,d]`` in q's dtype.
    """
    if q.shape[2] != 1:
        raise ValueError(f"decode takes one query per row, got T={q.shape[2]}")
    k, v = plain_rows(q, k, v, scales)
    k_window, v_window = plain_rows(q, k_window, v_window, window_scales)
    if window_offset is None:
        _, k_window, v_window, window_offset, window_start = in_order(q, k_window, v_window, q_offset, start)
    out_w, lse_w = window_attention(
        q, k_window, v_window, window_offset, window_start, window=window, scale=scale
    )
    out_s, lse_s = block_sparse_attention(
        q_sparse, k, v, indices, q_offset, start, block_size=block_size, window=window, scale=scale
    )
    if value_map is not None:
        out_s = (value_map[None] @ out_s.transpose(2, 3).to(value_map.dtype)).transpose(2, 3).to(out_s.dtype)
    return merge_branches(out_w, lse_w, out_s, lse_s, gate_logit)


def window_decode(
    q: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """Window attention for one query per row on a ring.

    Args:
        q: ``[B,H,1,d]`` query after RoPE.
        k_window, v_window: ``[B,G,W,d]`` ring, as `sparse_decode` takes it; ``W < window`` will do where no sequence
            is longer than W.
        q_offset, start: int ``[B]`` and ``[B,1]``, in slots of the sequence.
        window: slots ``max(start, slot - window + 1) .. slot`` take part.
        scale: factor of the logits.

    Returns:
        ``[B,H,1,d]`` in q's dtype.
    """
    return window_attention(*in_order(q, k_window, v_window, q_offset, start), window=window, scale=scale)[0]


def in_order(
    q: Tensor, k_window: Tensor, v_window: Tensor, q_offset: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `window_attention` takes, of one query per row on a ring."""
    size = k_window.shape[2]
    return (
        q,
        _unroll(k_window, q_offset),
        _unroll(v_window, q_offset),
        torch.full_like(q_offset, size - 1),
        (start - q_offset[:, None] + size - 1).clamp(min=0),
    )


def _unroll(ring: Tensor, q_offset: Tensor) -> Tensor:
    """Put a ring ``[B,G,W,d]`` in order, the query's own slot last; slots not written yet become zero."""
    size = ring.shape[2]
    slot = q_offset.long()[:, None] - (size - 1) + torch.arange(size, device=ring.device)
    index = slot.remainder(size)[:, None, :, None].expand_as(ring)
    return ring.gather(2, index).masked_fill((slot < 0)[:, None, :, None], 0)
