"""Plain PyTorch attention over selected blocks. This is the truth for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import (
    accumulation_dtype,
    check_inputs,
    chunk_length,
    masked_softmax_attention,
    query_slots,
    run_chunk,
    visible_only,
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    block_size: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of the selected blocks that lie outside the window.

    Args:
        q: ``[B,H,T,d]`` queries after RoPE.
        k, v: ``[B,G,S,d]`` of the source full layer.
        indices: int32 ``[B,G,T,K]`` block numbers relative to ``start``, -1 for none. A block named twice counts once.
        q_offset: int ``[B]``, slot of each row's first query.
        start: int ``[B,T]``, first slot each query may see.
        block_size: keys per block.
        window: keys within the window (``slot > query slot - window``) are left out.
        scale: factor of the logits.

    Returns:
        ``out [B,H,T,d]`` in q's dtype and ``lse [B,H,T]`` (float32; float64 for float64 inputs). A query without any
        eligible key has out 0, lse -inf, and zero gradients.

    Raises:
        ValueError: shapes do not fit.
    """
    check_inputs(q, k, v, q_offset, start)
    batch, _, length, _ = q.shape
    groups, slots_total = k.shape[1], k.shape[2]
    if indices.shape[:3] != (batch, groups, length):
        raise ValueError(f"indices must be [{batch},{groups},{length},K], got {tuple(indices.shape)}")
    dtype = accumulation_dtype(q.dtype)
    slots = query_slots(q_offset, length)
    seen = min(slots_total, max(1, int(q_offset.max()) + length - window)) if length else 0
    k_seen = visible_only(k[:, :, :seen], q_offset, length).to(dtype)
    v_seen = visible_only(v[:, :, :seen], q_offset, length).to(dtype)
    step = chunk_length(q, seen)
    outs, lses = [], []
    for at in range(0, length, step):
        part = slice(at, at + step)
        high = max(1, min(seen, int(slots[:, part].max()) + 1 - window))

        def chunk(q_chunk, k_chunk, v_chunk, part=part):
            mask = _selected_keys(
                indices[:, :, part],
                slots[:, part],
                start[:, part].long(),
                block_size,
                window,
                k_chunk.shape[2],
            )
            out, lse, *_ = masked_softmax_attention(q_chunk, k_chunk, v_chunk, mask[:, :, None], scale)
            return out.to(q.dtype), lse

        out, lse = run_chunk(chunk, q[:, :, part].to(dtype), k_seen[:, :, :high], v_seen[:, :, :high])
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _selected_keys(indices, slots, start, block_size, window, keys):
    """Bool ``[B,G,C,keys]``: the key is in a selected block, outside the window and not before ``start``."""
    batch, groups, length, _ = indices.shape
    blocks = -(-keys // block_size)
    chosen = torch.zeros(batch, groups, length, blocks + 1, dtype=torch.bool, device=indices.device)
    valid = (indices >= 0) & (indices < blocks)
    chosen.scatter_(3, torch.where(valid, indices, blocks).long(), True)
    slot = torch.arange(keys, device=indices.device)
    outside = (slot >= start[..., None]) & (slot <= slots[..., None] - window)
    first = int(start.min())
    if first == int(start.max()):
        member = chosen[..., :blocks].repeat_interleave(block_size, dim=3)[..., : max(0, keys - first)]
        member = torch.nn.functional.pad(member, (keys - member.shape[3], 0))
    else:
        block = (slot - start[..., None]).div(block_size, rounding_mode="floor").clamp(min=0)
        member = chosen.gather(3, block[:, None].expand(-1, groups, -1, -1))
    return member & outside[:, None]
