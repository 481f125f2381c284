"""Dispatch of block-sparse attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import check_inputs
from ..dispatch import attention_problem, choose, dense_rows, on_device
from . import reference
from .union import BlockUnion


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
    union: BlockUnion | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_sparse_attention`.

    Args:
        union: what `tile_union` made of the same ``indices``, ``q_offset``, ``start``, block size and window; None
            builds it. Layers that share a source can share it. The reference does not need it.
    """
    check_inputs(q, k, v, q_offset, start)
    batch, groups, length = q.shape[0], k.shape[1], q.shape[2]
    if indices.ndim != 4 or indices.shape[:3] != (batch, groups, length):
        raise ValueError(f"indices must be [{batch},{groups},{length},K], got {tuple(indices.shape)}")
    settings = {"block_size": block_size, "window": window, "scale": scale}
    topk = max(1, indices.shape[3])
    problem = attention_problem(q, k, v, block_size=block_size, window=window, topk=topk)
    tensors = (q, k, v, indices, q_offset, start)
    if choose("block_sparse_attention", tensors, implementation, problem) == "reference":
        return reference.block_sparse_attention(*tensors, **settings)
    from . import forward

    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    q_offset, start = q_offset.contiguous(), start.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    if not indices.shape[3]:
        return out.zero_(), lse.fill_(-torch.inf)
    with on_device(q):
        if union is None:
            ratio = q.shape[1] // groups
            union = tile_union(
                indices, q_offset, start, slots=k.shape[2], block_size=block_size, window=window, ratio=ratio
            )
        forward.forward(q, k, v, union, q_offset, start, out, lse, **settings)
    return out, lse


def tile_union(
    indices: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    slots: int,
    block_size: int,
    window: int,
    ratio: int,
) -> BlockUnion:
    """Union of the selected blocks per tile of queries, by a Triton kernel; arguments as in `union.build_union`."""
    from . import forward

    with on_device(indices):
        return forward.build_union(
            indices.to(torch.int32).contiguous(), q_offset.contiguous(), start.contiguous(),
            slots=slots, block_size=block_size, window=window, ratio=ratio,
        )  # fmt: skip
