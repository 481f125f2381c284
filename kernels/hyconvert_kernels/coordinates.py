"""Where queries and keys sit: slots, windows and blocks, shared by every plain PyTorch reference.

A *slot* is a position in the key/value tensors. Query ``t`` of batch row ``b`` sits at slot ``q_offset[b] + t`` and may
see the keys of slots ``start[b, t] .. q_offset[b] + t``; ``start`` is the first slot of the query's own sequence, so it
encodes left padding and packed documents alike. Block ``i`` of a query begins at slot ``start + i * block``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = {"cpu": 1 << 20}
"""Logits that a reference holds at a time (its query chunk is cut to fit): what a CPU's caches hold, else 2^23."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_inputs(q: Tensor, k: Tensor, v: Tensor, q_offset: Tensor, start: Tensor) -> None:
    """Raise ValueError, naming the tensor at fault, unless shapes are ``[B,H,T,d]``, ``[B,G,S,d]``, [B] and [B,T]."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q and k must be [B,H,T,d] and [B,G,S,d], got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, heads, length, dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k {tuple(k.shape)} does not match q {tuple(q.shape)} in batch or head dim")
    if heads % k.shape[1]:
        raise ValueError(f"{heads} query heads are no multiple of {k.shape[1]} KV heads")
    if q_offset.shape != (batch,) or q_offset.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"q_offset must be int32 or int64 [{batch}], got {q_offset.dtype} {tuple(q_offset.shape)}"
        )
    if start.shape != (batch, length) or start.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"start must be int32 or int64 [{batch}, {length}], got {start.dtype} {tuple(start.shape)}"
        )


def query_slots(q_offset: Tensor, length: int) -> Tensor:
    """Slots ``[B, T]`` (int64) of ``length`` queries."""
    return q_offset.long()[:, None] + torch.arange(length, device=q_offset.device)


def visible_only(x: Tensor, q_offset: Tensor, length: int) -> Tensor:
    """Zero the slots of ``x [B,G,S,d]`` after a row's last query: a static cache may hold even NaN there."""
    hidden = torch.arange(x.shape[2], device=x.device) >= (q_offset.long()[:, None] + length)
    return x.masked_fill(hidden[:, None, :, None], 0)


def chunk_length(q: Tensor, keys: int) -> int:
    """Queries of ``q [B,H,T,d]`` per chunk such that one chunk's logits stay near ``CHUNK_ELEMENTS``."""
    most = CHUNK_ELEMENTS.get(q.device.type, 1 << 23)
    return max(16, most // max(1, q.shape[0] * q.shape[1] * keys))


def run_chunk(function, *tensors):
    """Call ``function``; under autograd recompute it in backward, so that no chunk's logits outlive the chunk."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return function(*tensors)


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention of ``q [B,H,C,d]`` over ``k, v [B,G,S,d]`` where ``mask`` is true.

    Args:
        q, k, v: in the accumulation dtype.
        mask: bool, broadcastable to ``[B,G,1,C,S]``.
        scale: factor of the logits.

    Returns:
        ``out [B,H,C,d]`` and ``lse [B,H,C]``, and the probabilities as ``weights [B,G,R,C,S]`` over
        ``total [B,G,R,C,1]``, which hold where ``mask`` is true. A row without any true key has out 0, lse -inf, and
        zero gradients.
    """
    batch, heads, length, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    ratio = heads // groups
    logits = (q.reshape(batch, groups, ratio * length, dim) * scale) @ k.transpose(-1, -2)
    # All in place, which no gradient minds: passes over the logits are what a CPU spends its time on.
    logits = logits.view(batch, groups, ratio, length, keys).add_(hidden_unless(mask))
    top = logits.detach().amax(-1, keepdim=True)
    empty = top == -torch.inf
    weights = logits.sub_(top.masked_fill(empty, 0)).clamp_(min=lowest_exponent(logits.dtype)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights.view(batch, groups, ratio * length, keys) @ v).view(batch, groups, ratio, length, dim)
    out = (out / total).masked_fill(empty, 0).view(batch, heads, length, dim)
    return out, (torch.log(total) + top).view(batch, heads, length), weights, total


def hidden_unless(mask: Tensor) -> Tensor:
    """What hides finite logits when it is added: 0 where ``mask`` is true, else -inf. Many times faster than a fill."""
    return torch.where(mask, 0.0, -torch.inf)


def lowest_exponent(dtype: torch.dtype) -> float:
    """The least integer whose exponential is a normal number; a CPU takes 30 times as long for smaller ones."""
    return math.ceil(math.log(torch.finfo(dtype).tiny))
