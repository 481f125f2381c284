"""Dispatch of block selection, and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose, on_device
from . import reference


def block_topk(scores: Tensor, k: int, *, implementation: str | None = None) -> Tensor:
    """See `reference.block_topk`; no gradient flows through a selection."""
    scores = scores.detach()
    problem = None
    if scores.dtype == torch.float64:
        problem = "scores are float64; they must be float32 or narrower"
    elif not 1 <= scores.shape[-1] <= 65536:
        problem = f"{scores.shape[-1]} blocks; from 1 to 65536"
    elif k > 128:
        problem = f"top-k {k}; at most 128"
    if choose("block_topk", (scores,), implementation, problem) == "reference":
        return reference.block_topk(scores, k)
    if k < 1:
        raise ValueError(f"top-k must be at least 1, got {k}")
    return _topk(scores, k)


@torch.library.custom_op("hyconvert::block_topk", mutates_args=())
def _topk(scores: Tensor, k: int) -> Tensor:
    from . import forward

    indices = _indices(scores, k)
    if indices.numel():
        with on_device(scores):
            forward.forward(scores.float().contiguous(), k, indices)
    return indices


@_topk.register_fake
def _indices(scores, k):
    return scores.new_empty((*scores.shape[:3], k), dtype=torch.int32)
