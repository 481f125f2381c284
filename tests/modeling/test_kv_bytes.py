"""The cache weighs what the plan says, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.modeling import HyConvertConfig
from hyconvert.plan import Plan
from tests.modeling.tiny import (
    FAMILY_NAMES,
    MIXED,
    base_config,
    base_model,
    converted,
    mixed_model,
    plan_of,
    tokens,
)


def held(cache: Any) -> list[int]:
    """Bytes of each layer's keys and values, counting storage that a view keeps alive only where it is used."""
    return [sum(x.numel() * x.element_size() for x in (layer.keys, layer.values)) for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_prefilled_cache_weighs_what_the_plan_says(family: str, length: int) -> None:
    model = mixed_model(family)
    cache = model(tokens(2, length), use_cache=True).past_key_values
    assert held(cache) == kv_bytes(model.config, length, dtype_bytes=4, batch=2)
    static = StaticCache(config=model.config, max_cache_len=length + 3)
    model(tokens(2, length), past_key_values=static)
    assert held(static) == kv_bytes(model.config, length + 3, dtype_bytes=4, batch=2, static=True)


@torch.no_grad()
def test_decoding_grows_full_and_reuse_layers_only() -> None:
    model = mixed_model("qwen3").to(torch.bfloat16)
    cache = model(tokens(1, 20), use_cache=True).past_key_values
    before = held(cache)
    for step in range(5):
        model(tokens(1, 1, seed=step), past_key_values=cache)
    after = held(cache)
    assert before == kv_bytes(model.config, 20)
    assert after == kv_bytes(model.config, 25)
    grew = [kind for kind, a, b in zip(MIXED.split(), before, after, strict=True) if b > a]
    assert grew == ["F", "R0", "F", "F"]


@torch.no_grad()
def test_generate_makes_caches_of_that_weight() -> None:
    model = mixed_model()
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "return_dict_in_generate": True}
    out = model.generate(tokens(1, 20), do_sample=False, **options)
    assert held(out.past_key_values) == kv_bytes(model.config, 24, dtype_bytes=4)  # the last token is not fed


def test_the_arithmetic_spelled_out() -> None:
    config = HyConvertConfig.from_base(base_config("llama"), plan_of(MIXED))
    per_token = 2 * 2 * 8 * 2  # K and V, KV heads, head dim, bfloat16
    assert kv_bytes(config, 100) == [n * per_token for n in (100, 5, 100, 5, 100, 5, 100)]
    assert kv_bytes(config, 100, static=True) == [n * per_token for n in (100, 6, 100, 6, 100, 6, 100)]
    assert kv_bytes(config, 3) == [3 * per_token] * 7
    assert base_kv_bytes(config, 100) == base_kv_bytes(base_config("llama"), 100) == [100 * per_token] * 7


def test_a_plan_can_be_weighed_before_converting() -> None:
    base, plan = base_config("qwen3"), plan_of("F S0*6", window=32)
    config = HyConvertConfig.from_base(base, plan)
    assert kv_bytes(base, 500, plan=plan) == kv_bytes(config, 500)


@torch.no_grad()
def test_the_base_s_cache_weighs_what_base_kv_bytes_says() -> None:
    base = base_model("mistral", sliding_window=9)
    cache = base(tokens(1, 20), use_cache=True).past_key_values
    assert held(cache) == base_kv_bytes(base.config, 20, dtype_bytes=4)
    plan = Plan(layers=plan_of("L*7").layers)
    model = converted(base, plan)
    assert base_kv_bytes(model.config, 20) == kv_bytes(model.config, 20) == base_kv_bytes(base.config, 20)
    assert held(model(tokens(1, 20), use_cache=True).past_key_values) == held(cache)


@torch.no_grad()
def test_sliding_layers_of_the_base_keep_their_own_window() -> None:
    base = base_model("qwen2", use_sliding_window=True, sliding_window=11, max_window_layers=4)
    model = converted(base, plan_of("F F S1 W L L L"))
    cache = model(tokens(2, 30), use_cache=True).past_key_values
    assert held(cache) == kv_bytes(model.config, 30, dtype_bytes=4, batch=2)
    assert [layer.keys.shape[2] for layer in cache.layers] == [30, 30, 5, 5, 10, 10, 10]


@torch.no_grad()
def test_a_sliced_window_does_not_keep_the_whole_prefill_alive() -> None:
    model = mixed_model()
    cache = DynamicCache(config=model.config)
    model(tokens(1, 200), past_key_values=cache)
    model(tokens(1, 1), past_key_values=cache)
    stored = [layer.keys.untyped_storage().nbytes() for layer in cache.layers]
    per_token = 2 * 8 * 4
    assert max(stored[1], stored[3], stored[5]) <= 6 * per_token
