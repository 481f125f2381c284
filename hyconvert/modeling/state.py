"""What one forward pass shares between layers: where sequences begin, and what full layers hand to their readers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hyconvert_kernels import BlockUnion


@dataclass
class OracleState:
    """What a full layer hands to the layers that read it.

    Attributes:
        keys: [B, G, S, d] post-RoPE keys of the full layer (its KV cache when there is one).
        values: [B, G, S, d].
        indices: [B, G, T, k] int32 selected blocks per query token and KV head, ascending, -1 padded, numbered
            from the first token of the query's own sequence.
        union: what the Triton kernels made of the indices once for all readers, or None.
    """

    keys: Tensor
    values: Tensor
    indices: Tensor
    union: BlockUnion | None = None

    def to(self, device: torch.device) -> OracleState:
        """The same state on another device (layers of one model may lie on several)."""
        if self.keys.device == device:
            return self
        union = self.union and BlockUnion._make(None if x is None else x.to(device) for x in self.union)
        return OracleState(self.keys.to(device), self.values.to(device), self.indices.to(device), union)


@dataclass
class ForwardState:
    """Lives for one forward pass and is never kept on a module.

    Attributes:
        q_offset: [B] int64; query t of a row sits in key slot q_offset + t.
        start: [B, T] int64; first key slot of each query's own sequence: behind the left padding, or the first
            token of its packed document. A padding token's own slot.
        oracle: oracle states by full-layer index, filled as the layers run.
        dense: run every layer as the base does, full attention in its own KV; used to align, for whole
            sequences without padding or cache only.
        oracles_wanted: with `dense`, layers that compute their oracle state nevertheless.
    """

    q_offset: Tensor
    start: Tensor
    oracle: dict[int, OracleState] = field(default_factory=dict)
    dense: bool = False
    oracles_wanted: frozenset[int] = frozenset()

    def to(self, device: torch.device) -> ForwardState:
        """The same state with its tensors on another device; the oracle states stay shared."""
        if self.q_offset.device == device:
            return self
        return replace(self, q_offset=self.q_offset.to(device), start=self.start.to(device))


def prepare_state(
    batch: int,
    length: int,
    device: torch.device,
    *,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    cache_layer: int = 0,
) -> ForwardState:
    """Work out slots and sequence starts of one forward pass.

    Args:
        batch, length: B and T of the new tokens.
        device: where the tokens are.
        attention_mask: None, or [B, S] with 0 for padding, S counting cached and new tokens.
        position_ids: [B or 1, T]; without a mask or cached tokens, a jump in them begins a new packed document.
        cache: KV cache with the tokens seen so far.
        cache_layer: a layer of the cache that counts them.

    Returns:
        The state to pass to every layer.

    Raises:
        ValueError: the mask is not 2-D, is too short, or has padding inside a sequence.
    """
    past = cache.get_seq_length(cache_layer) if cache is not None else 0
    q_offset = torch.zeros(batch, dtype=torch.int64, device=device) + past
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is not None:
        return ForwardState(q_offset, _starts_from_mask(attention_mask.to(device), past, length))
    start = torch.zeros(batch, length, dtype=torch.int64, device=device)
    if position_ids is not None and isinstance(past, int) and past == 0 and length > 1:
        start += _starts_from_positions(position_ids.to(device))
    return ForwardState(q_offset, start)


def dense_state(
    batch: int, length: int, device: torch.device, oracles_wanted: frozenset[int] = frozenset()
) -> ForwardState:
    """The state by which every layer of a converted model runs as the base's, on whole sequences without padding."""
    return replace(prepare_state(batch, length, device), dense=True, oracles_wanted=oracles_wanted)


def _starts_from_mask(mask: Tensor, past: int | Tensor, length: int) -> Tensor:
    if mask.ndim != 2:
        raise ValueError(
            f"converted models take a 2-D attention mask [batch, tokens] with 0 for padding, not one of shape "
            f"{tuple(mask.shape)}; pack documents with position_ids instead"
        )
    if isinstance(past, int) and mask.shape[1] < past + length:
        raise ValueError(
            f"the attention mask covers {mask.shape[1]} tokens, but {past} are cached and {length} are new; it must "
            f"cover all {past + length}"
        )
    real = mask.bool()
    slots = torch.arange(real.shape[1], device=mask.device)
    last_pad = torch.where(real, -1, slots).cummax(dim=1).values
    start = torch.minimum(last_pad + 1, slots)
    if not (torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing())):
        begins = real[:, 1:] & ~real[:, :-1]
        if bool((begins.sum(dim=1) + real[:, 0] > 1).any()):
            raise ValueError(
                "the attention mask has padding between two stretches of real tokens of one row; converted models "
                "take padding on the left or the right only, and packed documents through position_ids"
            )
    if isinstance(past, int):
        return start[:, past : past + length]
    return start.gather(1, (torch.arange(length, device=mask.device) + past).expand(mask.shape[0], length))


def _starts_from_positions(position_ids: Tensor) -> Tensor:
    slots = torch.arange(position_ids.shape[1], device=position_ids.device)
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.where(begins, slots, 0).cummax(dim=1).values
