"""The attention of every layer kind, standing in for the base's `self_attn` with the base's own projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import rotate_half

from hyconvert.modeling.families import Family
from hyconvert.modeling.gates import GATES, MergeGate, SigmoidGate
from hyconvert.modeling.state import ForwardState, OracleState
from hyconvert.plan import Plan
from hyconvert_kernels import (
    block_sparse_attention,
    oracle_attention,
    oracle_attention_topk,
    sparse_decode,
    tile_union,
    window_attention,
)

IMPLEMENTATIONS: dict[str, str | None] = {
    "hyconvert": None,
    "hyconvert_triton": "triton",
    "hyconvert_reference": "reference",
}
"""`attn_implementation` names: kernels where they run and the reference elsewhere, or one of the two explicitly."""


class HyConvertAttention(nn.Module):
    """Attention of one layer of a converted model.

    Projections, norms and biases are the base's own modules under their own names. A sparse layer adds `query_map`
    and `value_map` [H, d, d] and a `gate`; any branch may have a sink [H].

    Args:
        base: the base's attention module, whose children are taken over.
        config: the converted model's config.
        plan: its plan.
        layer_idx: which layer this is.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    gate: MergeGate | SigmoidGate
    query_map: nn.Parameter | None
    value_map: nn.Parameter | None

    def __init__(self, base: Any, config: Any, plan: Plan, layer_idx: int) -> None:
        super().__init__()
        for name, child in base.named_children():
            self.add_module(name, child)
        layer = plan.layers[layer_idx]
        self.config = config
        self.family: Family = config.family
        self.layer_idx = layer_idx
        self.kind = layer.kind
        self.source = layer.source
        self.sources = plan.sources
        self.head_dim: int = base.head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.scaling: float = base.scaling
        self.use_rope = bool(getattr(base, "use_rope", True))
        self.source_uses_rope = self.use_rope
        self.block_size, self.topk, self.plan_window = plan.block_size, plan.topk, plan.window
        self.window = config.cache_windows[layer_idx] if layer.kind == "sliding" else plan.window
        if layer.source is not None:
            self.gate = GATES[plan.gate](config.hidden_size, self.num_heads)
        if self.kind == "sparse" and plan.has_maps:
            shape = (self.num_heads, self.head_dim, self.head_dim)
            self.query_map = nn.Parameter(torch.empty(shape))
            self.value_map = nn.Parameter(torch.empty(shape))
        else:
            self.query_map = self.value_map = None
        sinks = plan.sinks and self.kind not in ("full", "sliding")
        self.window_sink = nn.Parameter(torch.empty(self.num_heads)) if sinks else None
        self.sparse_sink = (
            nn.Parameter(torch.empty(self.num_heads)) if sinks and self.source is not None else None
        )

    def reset_parameters(self) -> None:
        """Start as an identity: maps one, gate neutral, sinks without weight."""
        if self.query_map is not None and self.value_map is not None:
            eye = torch.eye(self.head_dim, device=self.query_map.device).expand(self.num_heads, -1, -1)
            init.copy_(self.query_map, eye)
            init.copy_(self.value_map, eye)
        for sink in (self.window_sink, self.sparse_sink):
            if sink is not None:
                init.constant_(sink, -30.0)
        if hasattr(self, "gate"):
            self.gate.reset_parameters()

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, d] and k, v [B, G, T, d] before RoPE, after any q/k norm, from x [B, T, D]."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.family.qk_norm == "flat":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.family.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        # Under autocast a norm gives float32 where a projection gives bfloat16; the kernels take one dtype.
        q, k = q.to(v.dtype), k.to(v.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        hyconvert_state: ForwardState | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend; masks come from `hyconvert_state`, which the model prepares once per forward pass.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: cos and sin, [B or 1, T, d].
            attention_mask: not read.
            past_key_values: KV cache to extend, if any.
            hyconvert_state: sequence starts, and the oracle states of earlier full layers.

        Returns:
            The layer's output [B, T, D], and None in place of attention weights.
        """
        state = hyconvert_state
        if state is None:
            raise RuntimeError("a converted layer runs inside its model only; call the model, not its layers")
        q, k, v = self.project(hidden_states)
        q_rot = self.rotate(q, position_embeddings) if self.use_rope else q
        k = self.rotate(k, position_embeddings) if self.use_rope else k
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        state = state.to(q.device)
        if self.kind == "full" or (state.dense and self.kind != "sliding"):
            out = self._full(q_rot, k, v, state)
        else:
            # A window cache ends with the newest token; a cache with room left begins with slot 0.
            first_slot = (state.q_offset + q.shape[2] - k.shape[2]).clamp(min=0)
            near = q_rot, k, v, state.q_offset - first_slot, (state.start - first_slot[:, None]).clamp(min=0)
            if self.source is None:
                out, _ = self._window(*near)
            else:
                query, oracle = self._read_source(q, near, position_embeddings, state)
                if self._fits_one_launch(q):
                    out = self._decode(hidden_states, near, query, oracle, state)
                else:
                    branches = *self._window(*near), *self._blocks(query, oracle, state)
                    out = self.gate(hidden_states, *branches, implementation=self.implementation)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    @property
    def implementation(self) -> str | None:
        """What the kernels' `implementation` argument is, by the config's `attn_implementation`."""
        return IMPLEMENTATIONS[self.config._attn_implementation]

    @staticmethod
    def rotate(x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """RoPE on x [B, H, T, d] with cos and sin [B or 1, T, d]."""
        cos, sin = (table.unsqueeze(1) for table in position_embeddings or ())
        rotated: Tensor = x * cos + rotate_half(x) * sin
        return rotated.to(x.dtype)

    def _full(self, q: Tensor, k: Tensor, v: Tensor, state: ForwardState) -> Tensor:
        out: Tensor
        shared: dict[str, Any] = {
            "block_size": self.block_size,
            "window": self.plan_window,
            "scale": self.scaling,
        }
        shared["implementation"] = self.implementation
        scored = self.layer_idx in (state.oracles_wanted if state.dense else self.sources)
        if state.dense and not scored:  # whole sequences without padding or cache: any causal kernel will do
            return nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scaling, enable_gqa=True
            )
        if not scored:
            out, _, _ = oracle_attention(q, k, v, state.q_offset, state.start, with_scores=False, **shared)
            return out
        out, _, indices = oracle_attention_topk(
            q, k, v, state.q_offset, state.start, topk=self.topk, **shared
        )
        union = None
        if q.shape[2] > 1 or torch.is_grad_enabled():  # a decoding step reads its few blocks without one
            union = tile_union(
                indices, state.q_offset, state.start, slots=k.shape[2], block_size=self.block_size,
                window=self.plan_window, ratio=self.num_heads // self.num_kv_heads,
                transposed=torch.is_grad_enabled() and q.requires_grad, implementation=self.implementation,
            )  # fmt: skip
        state.oracle[self.layer_idx] = OracleState(k, v, indices, union)
        return out

    def _window(
        self, q: Tensor, k: Tensor, v: Tensor, offset: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The window branch, [B, H, T, d], and its log-sum-exp, [B, H, T]."""
        out, lse = window_attention(
            q, k, v, offset, start, window=self.window, scale=self.scaling, implementation=self.implementation
        )
        return with_sink(out, lse, self.window_sink)

    def _read_source(
        self, q: Tensor, near: tuple[Tensor, ...], position_embeddings: Any, state: ForwardState
    ) -> tuple[Tensor, OracleState]:
        """The sparse branch's query, and the keys, values and blocks it reads."""
        assert self.source is not None
        q_rot, k, v = near[:3]
        oracle = state.oracle[self.source].to(q.device)
        if self.kind == "reuse":
            return q_rot, replace(oracle, keys=k, values=v)
        return self.sparse_query(q, q_rot, position_embeddings), oracle

    def _blocks(self, query: Tensor, oracle: OracleState, state: ForwardState) -> tuple[Tensor, Tensor]:
        """The sparse branch, [B, H, T, d], and its log-sum-exp, [B, H, T]."""
        out, lse = block_sparse_attention(
            query, oracle.keys, oracle.values, oracle.indices, state.q_offset, state.start,
            block_size=self.block_size, window=self.window, scale=self.scaling, union=oracle.union,
            implementation=self.implementation,
        )  # fmt: skip
        out, lse = with_sink(out, lse, self.sparse_sink)
        if self.value_map is not None:
            out = torch.einsum("bhtd,hed->bhte", out, self.value_map)
        return out, lse

    def _fits_one_launch(self, q: Tensor) -> bool:
        """Whether `sparse_decode` does all that this layer wants: one token, the merge gate, no sinks, no gradient."""
        plain = isinstance(self.gate, MergeGate) and self.window_sink is None and self.sparse_sink is None
        return plain and q.shape[2] == 1 and not torch.is_grad_enabled()

    def _decode(
        self,
        hidden_states: Tensor,
        near: tuple[Tensor, ...],
        query: Tensor,
        oracle: OracleState,
        state: ForwardState,
    ) -> Tensor:
        """Both branches, value map and gate for one token per row, [B, H, 1, d]."""
        assert isinstance(self.gate, MergeGate)
        q_rot, k, v, offset, start = near
        return sparse_decode(
            q_rot, k, v, query, oracle.keys, oracle.values, oracle.indices, state.q_offset, state.start,
            self.gate.logit(hidden_states), block_size=self.block_size, window=self.window, scale=self.scaling,
            value_map=self.value_map, window_offset=offset, window_start=start, implementation=self.implementation,
        )  # fmt: skip

    def sparse_query(self, q: Tensor, q_rot: Tensor, position_embeddings: Any) -> Tensor:
        """The query that reads the source's keys: mapped before RoPE, and rotated as the source's keys are."""
        if self.query_map is not None:
            q = torch.einsum("bhtd,hed->bhte", q, self.query_map)
        elif self.use_rope == self.source_uses_rope:
            return q_rot
        return self.rotate(q, position_embeddings) if self.source_uses_rope else q


def with_sink(out: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add a learnable sink logit to a branch's softmax denominator.

    Args:
        out: [B, H, T, d] branch output.
        lse: [B, H, T] its log-sum-exp; -inf where the branch is empty, which then stays empty.
        sink: [H] logits, or None for no sink.

    Returns:
        Output and log-sum-exp with the sink in the denominator.
    """
    if sink is None:
        return out, lse
    empty = lse == -torch.inf
    finite = lse.masked_fill(empty, 0.0)
    logit = sink.to(lse.dtype)[None, :, None]
    share = torch.sigmoid(finite - logit).unsqueeze(-1)
    return (out * share).to(out.dtype), torch.logaddexp(finite, logit).masked_fill(empty, -torch.inf)
