"""Plain PyTorch oracle attention: causal attention that also scores key blocks. This is the truth for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import (
    accumulation_dtype,
    check_inputs,
    chunk_length,
    hidden_unless,
    masked_softmax_attention,
    query_slots,
    run_chunk,
    visible_only,
)
from ..fp8 import Scales, plain_rows
from ..topk.reference import block_topk


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
    scales: Scales | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Causal softmax attention that also says how much each key block outside the window mattered.

    The score of block i for query t is the largest softmax probability ``exp(s - lse)`` among its eligible keys and
    the query heads of the KV group (HySparse, arXiv 2602.03560, Algorithm 1, with the exponential that it misprints).
    A key is eligible when it lies outside the window: ``slot <= query slot - window``.

    Args:
        q: ``[B,H,T,d]`` queries after RoPE.
        k, v: ``[B,G,S,d]``; slots after a row's last query are never read as numbers.
        q_offset: int ``[B]``, slot of each row's first query.
        start: int ``[B,T]``, first slot each query may see.
        block_size: keys per block.
        window: keys, the query's own included, that the window branch covers.
        scale: factor of the logits.
        with_scores: skip the scores when False.
        scales: float32 ``[B,G,S]`` of keys and of values, where k and v are what `fp8.quantise_rows` makes.

    Returns:
        ``out [B,H,T,d]`` in q's dtype, ``lse [B,H,T]`` (float32; float64 for float64 inputs) and
        ``scores [B,G,T,NB]`` in lse's dtype with ``NB = ceil(S / block_size)``, -inf for blocks without an eligible
        key, or None. Gradients flow through out and lse, never through scores.

    Raises:
        ValueError: shapes do not fit.
    """
    k, v = plain_rows(q, k, v, scales)
    out, lse, scores, _ = _run(q, k, v, q_offset, start, block_size, window, scale, with_scores, 0)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle attention that selects blocks chunk by chunk, so that scores of more than a query chunk never exist.

    Returns:
        out and lse as `oracle_attention`, and ``indices [B,G,T,topk]`` int32 as `block_topk`.
    """
    out, lse, _, indices = _run(q, k, v, q_offset, start, block_size, window, scale, True, topk)
    return out, lse, indices


def _run(q, k, v, q_offset, start, block_size, window, scale, with_scores, topk):
    check_inputs(q, k, v, q_offset, start)
    batch, _, length, _ = q.shape
    groups, slots_total = k.shape[1], k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    slots = query_slots(q_offset, length)
    blocks = -(-slots_total // block_size)
    seen = min(slots_total, int(q_offset.max()) + length) if length else 0
    k_seen = visible_only(k[:, :, :seen], q_offset, length).to(dtype)
    v_seen = visible_only(v[:, :, :seen], q_offset, length).to(dtype)
    step = chunk_length(q, seen)
    outs, lses, selected = [], [], []
    for at in range(0, length, step):
        chunk_slots, chunk_start = slots[:, at : at + step], start[:, at : at + step].long()
        high = min(seen, int(chunk_slots.max()) + 1)
        scored = with_scores and bool((chunk_slots - window >= chunk_start).any())

        def chunk(q_chunk, k_chunk, v_chunk, chunk_slots=chunk_slots, chunk_start=chunk_start, scored=scored):
            keys = torch.arange(k_chunk.shape[2], device=q.device)
            mask = (keys >= chunk_start[..., None]) & (keys <= chunk_slots[..., None])
            out, lse, weights, total = masked_softmax_attention(
                q_chunk, k_chunk, v_chunk, mask[:, None, None], scale
            )
            if not scored:
                return out.to(q.dtype), lse, None
            with torch.no_grad():
                eligible = mask & (keys <= chunk_slots[..., None] - window)
                best = (weights.detach() / total.detach()).amax(2).add_(hidden_unless(eligible)[:, None])
                return out.to(q.dtype), lse, _block_max(best, chunk_start, block_size, blocks)

        out, lse, scores = run_chunk(
            chunk, q[:, :, at : at + step].to(dtype), k_seen[:, :, :high], v_seen[:, :, :high]
        )
        outs.append(out)
        lses.append(lse)
        if not with_scores:
            continue
        count = chunk_slots.shape[1]
        if topk:
            if scores is None:
                selected.append(
                    torch.full((batch, groups, count, topk), -1, dtype=torch.int32, device=q.device)
                )
            else:
                selected.append(block_topk(scores, topk))
        else:
            selected.append(
                torch.full((batch, groups, count, blocks), -torch.inf, dtype=dtype, device=q.device)
                if scores is None
                else scores
            )
    picked = torch.cat(selected, 2) if selected else None
    return torch.cat(outs, 2), torch.cat(lses, 2), None if topk else picked, picked if topk else None


def _block_max(best: Tensor, start: Tensor, block_size: int, blocks: int) -> Tensor:
    """Maximum of ``best [B,G,C,S]`` over each query's blocks, which begin at its own ``start [B,C]``."""
    batch, groups, length, keys = best.shape
    first = int(start.min())
    if first == int(start.max()):
        best = best[..., first:]
    else:
        index = start[..., None] + torch.arange(keys, device=best.device)
        beyond = index >= keys
        best = best.gather(3, index.clamp(max=keys - 1)[:, None].expand(-1, groups, -1, -1))
        best = best.masked_fill(beyond[:, None], -torch.inf)
    have = -(-best.shape[3] // block_size)
    best = torch.nn.functional.pad(best, (0, have * block_size - best.shape[3]), value=-torch.inf)
    best = best.view(batch, groups, length, have, block_size).amax(-1)
    return torch.nn.functional.pad(best, (0, blocks - have), value=-torch.inf)
