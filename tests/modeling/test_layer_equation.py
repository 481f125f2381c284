"""Each layer computes what its definition says, written out query by query without blocks, tiles or masks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hyconvert.modeling.state import ForwardState, OracleState, prepare_state
from tests.modeling.tiny import base_model, converted, plan_of

BATCH, LENGTH, BLOCK, TOPK, WINDOW = 2, 23, 4, 2, 6
HEADS, GROUPS, DIM = 4, 2, 8


def softmax_over(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [d] and log-sum-exp of one query over keys [n, d]; n may be 0."""
    if not len(k):
        return torch.zeros(DIM), torch.tensor(-torch.inf)
    logits = k @ q * DIM**-0.5
    if sink is None:
        return torch.softmax(logits, 0) @ v, torch.logsumexp(logits, 0)
    logits = torch.cat([logits, sink[None]])
    return torch.softmax(logits, 0)[:-1] @ v, torch.logsumexp(logits, 0)


def rotated(attention: Any, x: Tensor, tables: tuple[Tensor, Tensor], wanted: bool) -> Tensor:
    return attention.rotate(x, tables) if wanted else x


def expected(attention: Any, x: Tensor, tables: tuple[Tensor, Tensor], oracle: OracleState | None) -> Tensor:
    """The layer's output [B, T, D] for its input x [B, T, D], by DESIGN's definition."""
    q, k, v = attention.project(x)
    q_window = rotated(attention, q, tables, attention.use_rope)
    k = rotated(attention, k, tables, attention.use_rope)
    k_sparse, v_sparse = k, v
    q_sparse = q_window
    if attention.kind == "sparse":
        assert oracle is not None
        k_sparse, v_sparse = oracle.keys, oracle.values
        if attention.query_map is not None:
            q = torch.stack([q[:, h] @ attention.query_map[h].T for h in range(HEADS)], 1)
        q_sparse = rotated(attention, q, tables, attention.source_uses_rope)
    out = torch.zeros(BATCH, LENGTH, HEADS, DIM)
    for b, t, h in itertools.product(range(BATCH), range(LENGTH), range(HEADS)):
        g = h // (HEADS // GROUPS)
        recent = slice(max(0, t - WINDOW + 1), t + 1)
        sink = None if attention.window_sink is None else attention.window_sink[h]
        out_w, lse_w = softmax_over(q_window[b, h, t], k[b, g, recent], v[b, g, recent], sink)
        if attention.source is None:
            out[b, t, h] = out_w
            continue
        assert oracle is not None
        slots = [
            slot
            for block in oracle.indices[b, g, t].tolist()
            for slot in range(block * BLOCK, (block + 1) * BLOCK)
            if block >= 0 and slot <= t - WINDOW
        ]
        sink = None if attention.sparse_sink is None else attention.sparse_sink[h]
        out_s, lse_s = softmax_over(q_sparse[b, h, t], k_sparse[b, g, slots], v_sparse[b, g, slots], sink)
        if attention.value_map is not None:
            out_s = attention.value_map[h] @ out_s
        tilt = attention.gate.weight @ x[b, t] + attention.gate.bias
        if len(tilt) == HEADS:
            share = torch.sigmoid(lse_s - lse_w + tilt[h])
            out[b, t, h] = share * out_s + (1 - share) * out_w
        else:
            out[b, t, h] = torch.sigmoid(tilt[h]) * out_s + torch.sigmoid(tilt[HEADS + h]) * out_w
    return attention.o_proj(out.flatten(2))


def chosen_blocks(q: Tensor, k: Tensor, t: int) -> list[int]:
    """Blocks of one query and KV group: q [R, d], k [t + 1, d]."""
    probs = torch.softmax(q @ k.T * DIM**-0.5, -1).amax(0)
    scores = {}
    for slot in range(t - WINDOW + 1):
        block = slot // BLOCK
        scores[block] = max(scores.get(block, -1.0), probs[slot].item())
    best = sorted(scores, key=lambda block: (-scores[block], block))[:TOPK]
    return sorted(best) + [-1] * (TOPK - len(best))


def run_layer(model: Any, layer: int, x: Tensor, state: ForwardState) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    tables = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
    return model.model.layers[layer].self_attn(x, tables, hyconvert_state=state)[0], tables


@pytest.mark.parametrize("settings", [{}, {"gate": "sigmoid"}, {"maps": False}, {"sinks": True}], ids=str)
@pytest.mark.parametrize(
    "with_rope", list(itertools.product([True, False], repeat=2)), ids=["RR", "RN", "NR", "NN"]
)
@pytest.mark.parametrize("line", ["F S0 F*5", "F R0 F*5"])
def test_a_layer_follows_its_definition(
    line: str, with_rope: tuple[bool, bool], settings: dict[str, Any]
) -> None:
    """Source and layer with RoPE or without, in every combination, and every setting."""
    base = base_model("smollm3", no_rope_layers=[int(rope) for rope in with_rope] + [1] * 5)
    model = converted(base, plan_of(line, block_size=BLOCK, topk=TOPK, window=WINDOW, **settings))
    x, y = torch.randn(2, BATCH, LENGTH, 32)
    state = prepare_state(BATCH, LENGTH, x.device)
    with torch.no_grad():
        run_layer(model, 0, x, state)
        got, tables = run_layer(model, 1, y, state)
        want = expected(model.model.layers[1].self_attn, y, tables, state.oracle[0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_window_layer_follows_its_definition(sinks: bool) -> None:
    model = converted(base_model("qwen3"), plan_of("W F*6", window=WINDOW, sinks=sinks))
    x = torch.randn(BATCH, LENGTH, 32)
    with torch.no_grad():
        got, tables = run_layer(model, 0, x, prepare_state(BATCH, LENGTH, x.device))
        want = expected(model.model.layers[0].self_attn, x, tables, None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_full_layer_hands_on_its_rotated_keys_and_the_blocks_that_mattered() -> None:
    model = converted(base_model("llama"), plan_of("F S0 F*5", block_size=BLOCK, topk=TOPK, window=WINDOW))
    x = torch.randn(BATCH, LENGTH, 32)
    state = prepare_state(BATCH, LENGTH, x.device)
    with torch.no_grad():
        _, tables = run_layer(model, 0, x, state)
        attention = model.model.layers[0].self_attn
        q, k, v = attention.project(x)
        q, k = attention.rotate(q, tables), attention.rotate(k, tables)
    oracle = state.oracle[0]
    torch.testing.assert_close(oracle.keys, k)
    torch.testing.assert_close(oracle.values, v)
    assert oracle.indices.shape == (BATCH, GROUPS, LENGTH, TOPK)
    for b, g, t in itertools.product(range(BATCH), range(GROUPS), range(LENGTH)):
        group = q[b, g * 2 : g * 2 + 2, t]
        assert oracle.indices[b, g, t].tolist() == chosen_blocks(group, k[b, g, : t + 1], t), (b, g, t)
