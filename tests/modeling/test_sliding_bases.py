"""Bases with sliding-window layers of their own keep them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hyconvert.errors import PlanError
from hyconvert.modeling import HyConvertConfig
from hyconvert.modeling.model import fit_cache
from tests.modeling.test_generate import GREEDY, step_by_step
from tests.modeling.test_masks_and_caches import check_cached, check_packed, check_padded
from tests.modeling.tiny import EXACT, base_config, base_model, converted, plan_of, tokens

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 11}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 4}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 5}),
    "smollm3": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["full_attention", "sliding_attention"] * 3 + ["full_attention"],
        },
    ),
}
IDENTITY = {"mistral": "L*7", "qwen2": "F R0 F R2 L L L", "qwen3": "F*5 L L", "smollm3": "F L R0 L F L R4"}
MIXED = {
    "mistral": "L*7",
    "qwen2": "F S0 R0 W L L L",
    "qwen3": "F S0 F W S2 L L",
    "smollm3": "F L S0 L W L R0",
}
every_base = pytest.mark.parametrize("name", BASES)


def base_named(name: str) -> Any:
    family, changes = BASES[name]
    return base_model(family, **changes)


@every_base
def test_kept_layers_behave_as_the_base_s(name: str) -> None:
    base = base_named(name)
    model = converted(base, plan_of(IDENTITY[name], topk=64), stirred=False)
    ids = tokens(2, 37)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, **EXACT)
    prompt = tokens(1, 27)
    assert torch.equal(model.generate(prompt, **GREEDY), base.generate(prompt, **GREEDY))


@every_base
@pytest.mark.parametrize("window", [6, 11, 16])
def test_cached_padded_and_packed_with_two_window_sizes(name: str, window: int) -> None:
    model = converted(base_named(name), plan_of(MIXED[name], window=window))
    check_cached(model)
    check_padded(model)
    check_packed(model)


@every_base
def test_generation_with_two_window_sizes(name: str) -> None:
    model, prompt = converted(base_named(name), plan_of(MIXED[name])), tokens(1, 27)
    want = step_by_step(model, prompt)
    for options in (
        {},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 8},
    ):
        assert torch.equal(model.generate(prompt, **GREEDY, **options), want), options


def test_a_drafting_model_with_two_window_sizes_can_be_rolled_back() -> None:
    draft, base, prompt = (
        converted(base_named("qwen2"), plan_of(MIXED["qwen2"])),
        base_model("llama"),
        tokens(1, 27),
    )
    assert torch.equal(
        base.generate(prompt, assistant_model=draft, **GREEDY), base.generate(prompt, **GREEDY)
    )


def test_caches_get_each_layer_s_window() -> None:
    model = converted(base_named("qwen2"), plan_of("F S0 R0 W L L L"))
    assert model.config.cache_windows == [None, 6, None, 6, 11, 11, 11]
    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=40)
    fit_cache(dynamic, model.config.cache_windows)
    fit_cache(static, model.config.cache_windows)
    assert [getattr(layer, "sliding_window", None) for layer in dynamic.layers] == [
        None,
        6,
        None,
        6,
        11,
        11,
        11,
    ]
    assert [layer.max_cache_len for layer in static.layers] == [40, 6, 40, 6, 11, 11, 11]


def test_a_filled_cache_is_left_alone() -> None:
    model = converted(base_named("qwen2"), plan_of("F S0 R0 W L L L"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    before = list(cache.layers)
    fit_cache(cache, [None, 3, None, 3, 3, 3, 3])
    assert all(a is b for a, b in zip(before, cache.layers, strict=True))


def test_a_dense_forward_keeps_the_sliding_layers() -> None:
    from hyconvert.modeling.state import prepare_state

    base = base_named("smollm3")
    model, ids = converted(base, plan_of(MIXED["smollm3"])), tokens(2, 37)
    state = prepare_state(2, 37, ids.device)
    state.dense = True
    with torch.no_grad():
        torch.testing.assert_close(model(ids, hyconvert_state=state).logits, base(ids).logits, **EXACT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("F S0 R0 W F L L", "layer 4 of the base has a sliding window of 11; keep it with kind 'sliding'"),
        ("F L R0 W L L L", "layer 1 is planned as 'sliding', but the base has full attention there"),
    ],
)
def test_plans_must_keep_sliding_layers(line: str, message: str) -> None:
    family, changes = BASES["qwen2"]
    with pytest.raises(PlanError, match=message):
        HyConvertConfig.from_base(base_config(family, **changes), plan_of(line))


@every_base
def test_the_base_s_own_settings_come_back(name: str, tmp_path: Any) -> None:
    family, changes = BASES[name]
    base = base_config(family, **changes)
    config = HyConvertConfig.from_base(base, plan_of(MIXED[name]))
    config.save_pretrained(tmp_path)
    loaded = HyConvertConfig.from_pretrained(tmp_path)
    for config_, key in itertools.product(
        (config, loaded), ("sliding_window", "layer_types", "max_window_layers")
    ):
        assert config_.base_dict().get(key) == base.to_dict().get(key), key
    assert loaded.cache_windows == config.cache_windows
    assert loaded.to_dict() == config.to_dict()
