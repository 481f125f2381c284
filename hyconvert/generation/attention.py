"""Attention of one layer in the decode loop: prompts, whole or in pieces, and one token per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyconvert.generation.caches import KV
from hyconvert.generation.network import Block, Network
from hyconvert.modeling.attention import with_sink
from hyconvert_kernels import (
    add_norm,
    block_sparse_attention,
    fill_rings,
    merged_window_attention,
    oracle_attention,
    oracle_attention_topk,
    oracle_decode,
    sparse_decode,
    split_heads,
    tile_union,
    window_attention,
    window_decode,
)
from hyconvert_kernels.decode.reference import in_order

SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

VIEWED = 1 << 24
"""Numbers of a fused projection that a gate's logits, a view of it, may keep in memory while attention runs."""


class Selected(NamedTuple):
    """What a full layer leaves for its readers: its keys and values, the blocks, and their union per tile."""

    cache: KV
    indices: Tensor
    union: Any = None


class DenseWay(NamedTuple):
    """PyTorch's attention for decoding, to time it: over exactly `length` keys, by the first backend that can."""

    length: int
    backends: list[SDPBackend]


@dataclass
class Pass:
    """One pass of tokens through the layers: a step's, or those of prompts or of a piece of them.

    Attributes:
        offset: [B] int64, slot of each row's first token in this pass.
        first: [B] int64, slot of each row's first real token.
        start: [B, T] int64, first slot that each token may see.
        cos, sin: RoPE's tables.
        padded: whether any row has padding.
        at: of a prompt's pass, the slot that `offset` holds; tokens before it have gone through all layers.
        ends: whether the pass holds the prompts' last tokens.
        last: [1] int64, of a prompt's pass the index of its last token; what is behind it fills up a pass of whole
            prompts.
        selected: by full layer.
        implementation: of the kernels.
        select: puts other block indices [B, G, T, K] in the place of a layer's own, which begin at slot `at`, to time a
            given overlap; None for none.
        dense: with it, a full layer without readers decodes by PyTorch's attention, over a fixed number of keys.
    """

    offset: Tensor
    first: Tensor
    start: Tensor
    cos: Tensor
    sin: Tensor
    padded: bool = False
    at: int = 0
    ends: bool = True
    last: Tensor | None = None
    selected: dict[int, Selected] = field(default_factory=dict)
    implementation: str | None = None
    select: Callable[[Tensor, int], Tensor] | None = None
    dense: DenseWay | None = None

    def at_end(self, x: Tensor, dim: int) -> Tensor:
        """What x has for the prompts' last token; one entry along `dim`."""
        if x.shape[dim] == 1:
            return x
        assert self.last is not None
        return x.index_select(dim, self.last)


def attend(
    network: Network,
    index: int,
    x: Tensor,
    cache: KV,
    now: Pass,
    *,
    last_only: bool = False,
) -> Tensor:
    """Attention and output projection of layer `index`, without a gradient: intermediate results are overwritten.

    Args:
        network: the model.
        index: of the layer.
        x: [B, T, D], after the norm before attention: tokens of prompts, or a step's with T = 1.
        cache: the layer's keys and values, of these B rows.
        now: the pass.
        last_only: only the prompts' last token's output is wanted.

    Returns:
        [B, T, D], or with `last_only` perhaps [B, 1, D].
    """
    block = network.blocks[index]
    if x.shape[1] == 1 and now.ends:
        out = _decode(network, index, x, _fused(block, x, now), cache, now)
    else:  # the fused projection is large, and given away so that `_prefill` can let go of it
        out = _prefill(network, index, x, _fused(block, x, now), cache, now, last_only)
    return block.output(out.transpose(1, 2).flatten(2))


def _fused(block: Block, x: Tensor, now: Pass) -> Tensor:
    """The fused projection; with q and k normalised over all their heads where the model does that, as OLMo2."""
    fused = block.inputs(x)
    if not block.flat_norm:
        return fused
    assert block.q_norm is not None and block.k_norm is not None
    ends = block.heads * block.dim, (block.heads + block.groups) * block.dim
    q, k, rest = fused.tensor_split(ends, -1)
    normed = [
        add_norm(part, None, weight, block.eps, implementation=now.implementation)[0]
        for part, weight in ((q, block.q_norm), (k, block.k_norm))
    ]
    return torch.cat([*normed, rest], -1)


def _queries(
    block: Block,
    fused: Tensor,
    keys: Tensor,
    values: Tensor | None,
    now: Pass,
    ring: bool,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Both queries, and the keys and values in their places."""
    mapped = block.attention.query_map if block.kind == "sparse" else None
    q, sparse = split_heads(
        fused, now.offset, now.first, keys, values, heads=block.heads, cos=now.cos, sin=now.sin,
        q_norm=None if block.flat_norm else block.q_norm, k_norm=None if block.flat_norm else block.k_norm,
        eps=block.eps, query_map=mapped, rotate=block.rotate,
        rotate_source=block.rotate_source if block.kind == "sparse" else block.rotate, ring=ring,
        scales=scales, implementation=now.implementation,
    )  # fmt: skip
    return q, q if sparse is None else sparse


def _gate_logit(block: Block, fused: Tensor) -> Tensor:
    """[B, H, T], a view."""
    at = (block.heads + 2 * block.groups) * block.dim
    return fused[..., at : at + block.heads].transpose(1, 2)


def _settings(network: Network, block: Block, now: Pass) -> dict[str, Any]:
    return {
        "block_size": network.block_size,
        "window": block.window,
        "scale": block.scale,
        "implementation": now.implementation,
    }


def _decode(network: Network, index: int, x: Tensor, fused: Tensor, cache: KV, now: Pass) -> Tensor:
    block = network.blocks[index]
    keys, values, scales = cache
    q, query = _queries(block, fused, keys, values, now, block.ring is not None, scales)
    settings = _settings(network, block, now)
    if block.ring is not None:  # a shorter ring has room for every token that there will be
        settings["window"] = min(block.window, keys.shape[2])
    where = now.offset, now.start
    if block.kind == "full" and block.scored:
        out, _, indices = oracle_decode(q, keys, values, *where, topk=network.topk, scales=scales, **settings)
        now.selected[index] = Selected(cache, indices)
        return out
    if block.kind == "full" and now.dense is not None and scales is None:
        seen = slice(now.dense.length)
        with sdpa_kernel(now.dense.backends, set_priority=True):
            return torch.nn.functional.scaled_dot_product_attention(
                q, keys[:, :, seen], values[:, :, seen], scale=block.scale, enable_gqa=True
            )
    if block.kind == "full":
        return oracle_attention(q, keys, values, *where, with_scores=False, scales=scales, **settings)[0]
    near = {key: settings[key] for key in ("window", "scale", "implementation")}
    plain = block.attention is None or block.attention.window_sink is None
    if block.source is None and plain:
        return window_decode(q, keys, values, *where, **near)
    at_source = None if block.source is None else now.selected[block.source]
    if at_source is not None and block.kind == "reuse":
        at_source = at_source._replace(cache=cache)
    if at_source is not None and block.merges:
        ordered_offset, ordered_start = (None, None) if block.ring else where
        return sparse_decode(
            q, keys, values, query, *at_source.cache[:2], at_source.indices, *where,
            _gate_logit(block, fused), value_map=block.attention.value_map,
            window_offset=ordered_offset, window_start=ordered_start, scales=at_source.cache.scales,
            window_scales=scales, **settings,
        )  # fmt: skip
    # Kernels for sigmoid gates and sinks read no FP8, so that a whole cache is widened here, in every step.
    own = cache.plain(q.dtype)
    ordered = in_order(q, *own[:2], *where) if block.ring else (q, *own[:2], *where)
    branch = with_sink(*window_attention(*ordered, **near), block.attention.window_sink)
    if at_source is None:
        return branch[0]
    source = own if block.kind == "reuse" else at_source.cache.plain(q.dtype)
    far = block_sparse_attention(query, *source[:2], at_source.indices, *where, **settings)
    return _mix(block, x, branch, _far_branch(block, far), now)


def _prefill(
    network: Network,
    index: int,
    x: Tensor,
    fused: Tensor,
    cache: KV,
    now: Pass,
    last_only: bool,
) -> Tensor:
    block = network.blocks[index]
    length = x.shape[1]
    assert now.last is not None
    keys, values, scales = cache
    where = whole = now.offset, now.start
    if scales is not None:  # attention within the prompt is by its keys and values as they were
        k, v = (x.new_empty(keys.shape[0], block.groups, length, block.dim) for _ in "kv")
        q, query = _queries(block, fused, k, v, now, False)
        cache.store(k, v)
    elif block.ring is None:
        q, query = _queries(block, fused, keys, values, now, False)
        k, v = keys[:, :, : now.at + length], values[:, :, : now.at + length]
    else:  # what the ring holds of earlier pieces, and this piece
        size = keys.shape[2]
        kept = min(now.at, size)
        shift = now.at - kept
        near_by = now
        if shift:
            start = (now.start - shift).clamp(min=0)
            near_by = replace(now, offset=now.offset - shift, first=now.first - shift, start=start)
        where = near_by.offset, near_by.start
        k, v = (x.new_empty(keys.shape[0], block.groups, kept + length, block.dim) for _ in "kv")
        q, query = _queries(block, fused, k, v, near_by, False)
        for ring, joined in ((keys, k), (values, v)):
            joined[:, :, :kept] = ring[:, :, :kept] if now.at < size else ring.roll(-(now.at % size), 2)
        fill_rings(k, v, keys, values, now.last, at=now.at, shift=shift, implementation=now.implementation)
    gate = None
    if block.source is not None and block.merges:
        gate = _gate_logit(block, fused)
        gate = gate if fused.numel() <= VIEWED else gate.contiguous()
    del fused
    settings = _settings(network, block, now)
    if last_only and not now.ends:
        return q[:, :, -1:]  # nobody wants it
    if block.kind == "full" and last_only and not block.scored:
        one = now.offset + now.last, now.at_end(now.start, 1)
        return oracle_attention(now.at_end(q, 2), k, v, *one, with_scores=False, **settings)[0]
    if block.kind == "full":
        return _prefill_full(network, index, q, k, v, now, settings)
    near = {key: settings[key] for key in ("window", "scale", "implementation")}
    if block.source is None:
        branch = window_attention(q, k, v, *where, **near)
        return branch[0] if block.attention is None else with_sink(*branch, block.attention.window_sink)[0]
    source = now.selected[block.source]
    k_far, v_far = (k, v) if block.kind == "reuse" else source.cache[:2]
    far = block_sparse_attention(query, k_far, v_far, source.indices, *whole, union=source.union, **settings)
    del query
    far = _far_branch(block, far)
    if gate is not None:
        return merged_window_attention(q, k, v, *where, *far, gate, **near)
    branch = with_sink(*window_attention(q, k, v, *where, **near), block.attention.window_sink)
    return _mix(block, x, branch, far, now)


def _prefill_full(
    network: Network, index: int, q: Tensor, k: Tensor, v: Tensor, now: Pass, settings: dict[str, Any]
) -> Tensor:
    block = network.blocks[index]
    where = now.offset, now.start
    if not block.scored and q.is_cuda and not now.padded and not now.at:
        with sdpa_kernel(SDPA_ORDER, set_priority=True):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=block.scale, enable_gqa=True
            )
    if not block.scored:
        return oracle_attention(q, k, v, *where, with_scores=False, **settings)[0]
    out, _, indices = oracle_attention_topk(q, k, v, *where, topk=network.topk, **settings)
    if now.select is not None:
        indices = now.select(indices, now.at)
    union = tile_union(
        indices, *where, slots=k.shape[2], block_size=network.block_size, window=block.window,
        ratio=block.heads // block.groups, implementation=now.implementation,
    )  # fmt: skip
    now.selected[index] = Selected(KV(k, v), indices, union)
    return out


def _far_branch(block: Block, far: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sparse branch with its sink and its value map."""
    out, lse = with_sink(*far, block.attention.sparse_sink)
    if block.attention.value_map is not None:
        out = out @ block.attention.value_map.transpose(1, 2)
    return out, lse


def _mix(
    block: Block, x: Tensor, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], now: Pass
) -> Tensor:
    out: Tensor = block.attention.gate(x, *near, *far, implementation=now.implementation)
    return out
