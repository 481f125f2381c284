"""Plain PyTorch block selection. This is the truth for the kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def block_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` highest-scoring blocks.

    Args:
        scores: ``[B,G,T,NB]``; -inf marks blocks that may not be chosen.
        k: blocks to choose, at least 1; may exceed NB.

    Returns:
        int32 ``[B,G,T,k]``: block indices, ascending and packed to the left, -1 where fewer than k blocks are
        eligible. Equal scores: the lower index wins.
    """
    if k < 1:
        raise ValueError(f"top-k must be at least 1, got {k}")
    blocks = scores.shape[-1]
    count = min(k, blocks)
    values, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    order = order[..., :count].masked_fill(values[..., :count] == -torch.inf, blocks)
    order = order.sort(-1).values
    order = order.masked_fill(order == blocks, -1).to(torch.int32)
    return torch.nn.functional.pad(order, (0, k - count), value=-1)
