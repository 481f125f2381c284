"""One sequence gives the same logits however it is fed: cached, chunked, padded, packed, in a static cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.modeling.tiny import EXACT, FAMILY_NAMES, mixed_model, tokens

SETTINGS: dict[str, dict[str, Any]] = {
    "merge gate": {},
    "sigmoid gate": {"gate": "sigmoid"},
    "sinks": {"sinks": True},
    "sigmoid gate with maps": {"gate": "sigmoid", "maps": True},
    "window below block": {"window": 3, "block_size": 8},
    "smallest window": {"window": 2},
    "window of one block": {"window": 4},
    "window above text": {"window": 70},
    "one block": {"topk": 1},
    "one key per block": {"block_size": 1, "topk": 5},
    "block above text": {"block_size": 64},
}
LENGTH = 45
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
every_family = pytest.mark.parametrize("family", FAMILY_NAMES)


def fed_in_parts(model: Any, ids: Tensor, sizes: list[int], cache: Any = None, **kwargs: Any) -> Tensor:
    """Logits of ids [B, T] fed through a cache, the rest token by token; a `mask` [B, T] grows along."""
    sizes = [*sizes, *[1] * (ids.shape[1] - sum(sizes))]
    cache = DynamicCache(config=model.config) if cache is None else cache
    mask, positions = kwargs.get("mask"), kwargs.get("positions")
    logits, at = [], 0
    for size in sizes:
        part = slice(at, at + size)
        at += size
        out = model(
            ids[:, part],
            past_key_values=cache,
            attention_mask=None if mask is None else mask[:, :at],
            position_ids=None if positions is None else positions[:, part],
        )
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def check_cached(model: Any, length: int = LENGTH) -> None:
    ids = tokens(2, length)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(fed_in_parts(model, ids, [31]), whole, **EXACT)
    torch.testing.assert_close(fed_in_parts(model, ids, [1, 13, 7, 2, 20]), whole, **EXACT)
    static = StaticCache(config=model.config, max_cache_len=length + 6)
    torch.testing.assert_close(fed_in_parts(model, ids, [31], cache=static), whole, **EXACT)
    static = StaticCache(config=model.config, max_cache_len=length)
    torch.testing.assert_close(fed_in_parts(model, ids, [1, 3, 17, 2, 8, 1], cache=static), whole, **EXACT)


@torch.no_grad()
def check_padded(model: Any) -> None:
    ids = tokens(3, LENGTH)
    pads = (0, 1, 19)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    static = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    without_positions = model(ids, attention_mask=mask).logits
    cached = fed_in_parts(model, ids, [22, 9], mask=mask, positions=positions)
    in_static = fed_in_parts(model, ids, [22, 9], cache=static, mask=mask, positions=positions)
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, pad:]).logits[0]
        for logits in (whole, without_positions, cached, in_static):
            torch.testing.assert_close(logits[row, pad:], alone, **EXACT)
            assert logits.isfinite().all()


@torch.no_grad()
def check_packed(model: Any) -> None:
    ids = tokens(2, LENGTH)
    lengths = (17, 1, 27)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions).logits
    for part, document in zip(packed.split(lengths, 1), ids.split(lengths, 1), strict=True):
        torch.testing.assert_close(part, model(document).logits, **EXACT)


@every_setting
def test_cached_decoding_is_the_uncached_forward(settings: dict[str, Any]) -> None:
    check_cached(mixed_model(**settings))


@every_setting
def test_a_left_padded_batch_is_its_sequences_alone(settings: dict[str, Any]) -> None:
    check_padded(mixed_model(**settings))


@every_setting
def test_packed_documents_are_separate_ones(settings: dict[str, Any]) -> None:
    check_packed(mixed_model(**settings))


@every_family
def test_every_family_cached_padded_and_packed(family: str) -> None:
    model = mixed_model(family)
    check_cached(model)
    check_padded(model)
    check_packed(model)


@pytest.mark.parametrize("line", ["F*7", "W*7", "W F S1 R1 S1 W W", "F F S0 S1 R0 R1 S0"])
def test_plans_without_some_kinds_cached_padded_and_packed(line: str) -> None:
    model = mixed_model(line=line)
    check_cached(model)
    check_padded(model)
    check_packed(model)


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 8, 33])
def test_short_texts_decode_as_they_prefill(length: int) -> None:
    model, ids = mixed_model(), tokens(2, length)
    with torch.no_grad():
        torch.testing.assert_close(fed_in_parts(model, ids, []), model(ids).logits, **EXACT)


@torch.no_grad()
def test_right_padding_leaves_the_real_tokens_alone() -> None:
    model, ids = mixed_model().train(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, 28:] = 0
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], model(ids[:1]).logits[0], **EXACT)
    torch.testing.assert_close(logits[1, :28], model(ids[1:, :28]).logits[0], **EXACT)
    assert logits.isfinite().all()


@torch.no_grad()
def test_padding_on_both_sides_leaves_the_real_tokens_alone() -> None:
    model, ids = mixed_model(), tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    mask[:, :5] = mask[:, 30:] = 0
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:, 5:30], model(ids[:, 5:30]).logits, **EXACT)


@torch.no_grad()
def test_a_cache_made_without_the_config_works_but_keeps_everything() -> None:
    model, ids = mixed_model(), tokens(2, LENGTH)
    cache = DynamicCache()
    torch.testing.assert_close(fed_in_parts(model, ids, [31], cache=cache), model(ids).logits, **EXACT)
    assert all(layer.keys.shape[2] == LENGTH for layer in cache.layers)


@torch.no_grad()
def test_a_window_cache_can_be_rolled_back() -> None:
    model, ids = mixed_model(), tokens(1, LENGTH)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :25], past_key_values=cache)
    cache.activate_past_recording()
    wrong = tokens(1, 4, seed=9)
    model(wrong, past_key_values=cache)
    model(wrong[:, :2], past_key_values=cache)  # two forward passes before the next crop
    cache.crop(-6)
    torch.testing.assert_close(fed_in_parts(model, ids[:, 25:], [9], cache=cache), whole[:, 25:], **EXACT)


@torch.no_grad()
def test_embeddings_may_come_instead_of_ids() -> None:
    model, ids = mixed_model(), tokens(2, LENGTH)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits, **EXACT)


@torch.no_grad()
def test_the_decoder_takes_positional_arguments_as_the_base_does() -> None:
    model, ids = mixed_model(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positional = model.model(ids, mask).last_hidden_state
    named = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(positional, named)


@torch.no_grad()
def test_nothing_of_a_forward_pass_stays_on_the_model() -> None:
    model = mixed_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    first = model(tokens(2, LENGTH)).logits
    model(tokens(3, 11, seed=5))
    assert torch.equal(model(tokens(2, LENGTH)).logits, first)
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}
