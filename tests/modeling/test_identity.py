"""A conversion that keeps every key changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyconvert.modeling.attention import HyConvertAttention
from tests.modeling.tiny import EXACT, FAMILY_NAMES, base_model, converted, plan_of, tokens

ALL_BLOCKS = 64


def assert_same_logits(base: Any, model: Any, length: int = 37, **tolerance: Any) -> None:
    ids = tokens(2, length)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, **(tolerance or EXACT))


def share_weights(base: Any, source: int, layer: int) -> None:
    """Make `layer` compute what `source` computes: equal weights, and layers between that leave the stream alone."""
    layers = base.model.layers
    with torch.no_grad():
        for between in layers[source:layer]:
            for name, parameter in between.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.zero_()
        own = dict(layers[layer].named_parameters())
        for name, parameter in layers[source].named_parameters():
            if "o_proj" not in name and "mlp" not in name:
                own[name].copy_(parameter)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_reuse_of_all_blocks_is_the_base(family: str) -> None:
    base = base_model(family)
    assert_same_logits(base, converted(base, plan_of("F R0*3 F R0 R4", topk=ALL_BLOCKS), stirred=False))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sparse_with_its_source_s_weights_and_all_blocks_is_the_base(family: str) -> None:
    base = base_model(family)
    share_weights(base, source=4, layer=6)
    assert_same_logits(base, converted(base, plan_of("F R0*3 F F S4", topk=ALL_BLOCKS), stirred=False))


@pytest.mark.parametrize(("with_rope", "source", "layer"), [(True, 0, 2), (True, 1, 4), (False, 3, 5)])
def test_sparse_is_the_base_when_both_layers_rotate_or_neither_does(
    with_rope: bool, source: int, layer: int
) -> None:
    no_rope_layers = [1, 1, 1, 1, 1, 1, 1] if with_rope else [1, 0, 1, 0, 1, 0, 1]
    base = base_model("smollm3", no_rope_layers=no_rope_layers)
    share_weights(base, source, layer)
    line = ["F"] * 7
    line[layer] = f"S{source}"
    assert_same_logits(base, converted(base, plan_of(" ".join(line), topk=ALL_BLOCKS), stirred=False))


@pytest.mark.parametrize("line", ["F S0*6", "W*7", "W F R1 S1*4"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_window_longer_than_the_text_is_the_base_whatever_the_plan(family: str, line: str) -> None:
    base = base_model(family)
    assert_same_logits(base, converted(base, plan_of(line, window=64), stirred=False))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_loss_and_its_extras_are_the_base_s(family: str) -> None:
    base, ids = base_model(family), tokens(2, 37)
    model = converted(base, plan_of("F R0*3 F R0 R4", topk=ALL_BLOCKS), stirred=False)
    extras = {"output_router_logits": True} if family == "qwen3_moe" else {}
    got, want = (m(ids, labels=ids, output_hidden_states=True, **extras) for m in (model, base))
    torch.testing.assert_close(got.loss, want.loss, **EXACT)
    torch.testing.assert_close(got.hidden_states, want.hidden_states, **EXACT)
    if extras:
        torch.testing.assert_close(got.router_logits, want.router_logits, **EXACT)
        torch.testing.assert_close(got.aux_loss, want.aux_loss, **EXACT)


def test_sinks_start_without_weight() -> None:
    base = base_model("qwen3")
    assert_same_logits(base, converted(base, plan_of("F R0*6", topk=ALL_BLOCKS, sinks=True), stirred=False))


def test_float64_is_exact_to_its_own_precision() -> None:
    base = base_model("qwen3").double()
    base.set_attn_implementation("sdpa")  # transformers' eager softmax is float32
    model = converted(base, plan_of("F R0*3 F R0 R4", topk=ALL_BLOCKS), stirred=False).double()
    assert_same_logits(base, model, rtol=0, atol=1e-12)


def test_few_blocks_are_not_the_base() -> None:
    base = base_model("llama")
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(base, converted(base, plan_of("F R0*3 F R0 R4", topk=1), stirred=False))


def test_a_dense_forward_is_the_base_whatever_the_plan() -> None:
    from hyconvert.modeling.state import prepare_state

    base = base_model("llama")
    model = converted(base, plan_of("F S0 R0 W F S4 W"))
    ids = tokens(2, 37)
    state = prepare_state(2, 37, ids.device)
    state.dense, state.oracles_wanted = True, frozenset({1, 4})
    with torch.no_grad():
        logits = model(ids, hyconvert_state=state).logits
        torch.testing.assert_close(logits, base(ids).logits, **EXACT)
    assert set(state.oracle) == {1, 4}


def test_every_attention_is_replaced_and_keeps_the_base_s_weights() -> None:
    base = base_model("qwen2")
    model = converted(base, plan_of("F S0*6"))
    assert all(isinstance(layer.self_attn, HyConvertAttention) for layer in model.model.layers)
    state = model.state_dict()
    for name, weight in base.state_dict().items():
        assert torch.equal(state[name], weight), name
