"""`generate` and what is built on it, against uncached step by step decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from tests.modeling.tiny import FAMILY_NAMES, VOCAB, base_model, mixed_model, tokens

NEW = 14
PROMPT = 27
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def step_by_step(model: Any, ids: Tensor, steps: int = NEW) -> Tensor:
    """Greedy continuation of ids [1, T] without any cache."""
    for _ in range(steps):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    return ids


@pytest.fixture(scope="module")
def model() -> Any:
    return mixed_model()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return tokens(1, PROMPT)


@pytest.fixture(scope="module")
def expected(model: Any, prompt: Tensor) -> Tensor:
    want = step_by_step(model, prompt)
    assert len(set(want[0, PROMPT:].tolist())) > 4, "a continuation that repeats one token would prove little"
    return want


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_is_step_by_step_argmax_in_every_family(family: str) -> None:
    model, prompt = mixed_model(family), tokens(1, PROMPT)
    assert torch.equal(model.generate(prompt, **GREEDY), step_by_step(model, prompt))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 8},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 8},
        {"prefill_chunk_size": 26},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_greedy_is_step_by_step_argmax_with(
    options: dict[str, Any], model: Any, prompt: Tensor, expected: Tensor
) -> None:
    assert torch.equal(model.generate(prompt, **GREEDY, **options), expected)


def test_a_left_padded_batch_generates_what_its_rows_generate_alone(model: Any) -> None:
    ids = tokens(3, PROMPT)
    mask = torch.ones_like(ids)
    mask[1, :9] = mask[2, :20] = 0
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 6}):
        out = model.generate(ids, attention_mask=mask, **GREEDY, **options)
        for row, pad in enumerate((0, 9, 20)):
            assert torch.equal(out[row, pad:], step_by_step(model, ids[row : row + 1, pad:])[0]), (
                row,
                options,
            )


def test_a_draft_of_another_model_changes_nothing(model: Any, prompt: Tensor, expected: Tensor) -> None:
    draft = base_model("llama", num_hidden_layers=2)
    assert torch.equal(model.generate(prompt, assistant_model=draft, **GREEDY), expected)


def test_a_converted_model_drafts_for_its_base(model: Any, prompt: Tensor) -> None:
    base = base_model("llama")
    want = base.generate(prompt, **GREEDY)
    assert torch.equal(base.generate(prompt, assistant_model=model, **GREEDY), want)


def test_sampling_follows_the_seed(model: Any, prompt: Tensor) -> None:
    outputs = []
    for options in ({}, {}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        sampled = model.generate(
            prompt, max_new_tokens=NEW, do_sample=True, top_k=20, eos_token_id=None, **options
        )
        outputs.append(sampled)
    assert all(torch.equal(out, outputs[0]) for out in outputs[1:])
    torch.manual_seed(4)
    assert not torch.equal(model.generate(prompt, max_new_tokens=NEW, do_sample=True, top_k=20), outputs[0])


def test_several_samples_of_one_prompt(model: Any, prompt: Tensor) -> None:
    torch.manual_seed(3)
    out = model.generate(
        prompt, max_new_tokens=NEW, do_sample=True, num_return_sequences=3, eos_token_id=None
    )
    assert out.shape == (3, PROMPT + NEW)
    assert len({tuple(row) for row in out.tolist()}) == 3
    assert torch.equal(out[:, :PROMPT], prompt.expand(3, -1))


def test_beams_reorder_every_cache(model: Any) -> None:
    ids = tokens(2, PROMPT)
    beams = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
    want = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), want)
    assert torch.equal(model.generate(ids, cache_implementation="static", **beams), want)


def test_a_conversation_goes_on_with_its_cache(model: Any, prompt: Tensor, expected: Tensor) -> None:
    first = model.generate(prompt, return_dict_in_generate=True, **GREEDY | {"max_new_tokens": 5})
    cache = first.past_key_values
    rest = model.generate(first.sequences, past_key_values=cache, **GREEDY | {"max_new_tokens": NEW - 5})
    assert torch.equal(rest, expected)


def test_streaming_yields_the_tokens_one_by_one(model: Any, prompt: Tensor, expected: Tensor) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.pieces.append([])

    streamer = Collect()
    model.generate(prompt, streamer=streamer, **GREEDY)
    assert streamer.pieces == [prompt[0].tolist(), *([token] for token in expected[0, PROMPT:].tolist()), []]


def test_generation_stops_at_the_base_s_end_token(model: Any, prompt: Tensor, expected: Tensor) -> None:
    token = int(expected[0, PROMPT + 3])
    first = expected[0, PROMPT:].tolist().index(token)
    out = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=token)
    assert torch.equal(out, expected[:, : PROMPT + first + 1])
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)


def test_pipeline_generates_text(model: Any) -> None:
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w2", padding_side="left"
    )
    texts = [
        " ".join(f"w{i}" for i in row)
        for row in (tokens(1, 20)[0].tolist(), tokens(1, 9, seed=2)[0].tolist())
    ]
    generate = pipeline("text-generation", model=model, tokenizer=fast)
    results = generate(texts, batch_size=2, return_full_text=False, **GREEDY)
    for text, result in zip(texts, results, strict=True):
        ids = fast(text, return_tensors="pt").input_ids
        want = fast.decode(step_by_step(model, ids)[0, ids.shape[1] :], skip_special_tokens=True)
        assert result[0]["generated_text"].split() == want.split()
