"""Packed text: what is trained on, in which order, and that documents never see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyconvert.errors import DataError
from hyconvert.heal.tokens import (
    BEGIN,
    TRAINED,
    TokenStream,
    build_streams,
    row_order,
    tokenised_chat,
    with_retrieval,
)
from hyconvert.recipe import DataRecipe, Stage
from tests.modeling.tiny import mixed_model, tokens


def stream(*documents: list[int], trained: bool = True) -> TokenStream:
    flags = [[TRAINED * trained | BEGIN] + [TRAINED * trained] * (len(d) - 1) for d in documents]
    return TokenStream(np.concatenate(documents).astype(np.int32), np.concatenate(flags).astype(np.uint8))


def test_positions_restart_and_no_token_predicts_the_next_document() -> None:
    batch = stream([5, 6, 7], [8, 9], [10, 11, 12]).batch(np.arange(2), 4)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert batch.at.tolist() == [0, 1, 5, 6]
    assert batch.labels.tolist() == [6, 7, 11, 12]


def test_the_predictions_of_a_step_are_counted_as_they_are_made() -> None:
    text = stream([5, 6, 7], [8, 9], [10, 11, 12], [13, 14, 15, 16])
    for rows in (np.array([0]), np.array([2, 1]), np.arange(3)):
        assert text.trained_in(rows, 4) == len(text.batch(rows, 4).labels)


def test_a_packed_row_gives_each_document_what_it_gives_alone() -> None:
    model = mixed_model()
    ids = tokens(1, 40)[0].tolist()
    batch = stream(ids[:23], ids[23:40]).batch(np.array([0]), 40)
    with torch.no_grad():
        packed = model(batch.ids, position_ids=batch.positions).logits[0]
        alone = [model(torch.tensor([part])).logits[0] for part in (ids[:23], ids[23:])]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=2e-5)


def test_every_row_comes_once_before_one_comes_twice() -> None:
    rows = row_order(10, 25, 3, seed=0)
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows.tolist() == row_order(10, 25, 3, seed=0).tolist() != row_order(10, 25, 3, seed=1).tolist()
    assert sorted(row_order(10, 4, 3, seed=0)) == [3, 4, 5, 6]


def test_held_out_documents_are_not_trained_on(tiny_tokenizer: Any) -> None:
    texts = [chr(97 + i % 26) * 40 for i in range(26)]
    train, held = build_streams(texts, tiny_tokenizer, tokens=400, heldout=60, length=30)
    assert len(train) == 400 and len(held) == 60
    end = {tiny_tokenizer.eos_token_id}
    assert set(train.tokens.tolist()) & set(held.tokens.tolist()) <= end


def test_order_is_the_seeds(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(f'{{"text": "document {i:02}"}}' for i in range(20)))

    def tokens_of(**options: Any) -> list[int]:
        data = DataRecipe(source=str(path), shuffle=options.pop("shuffle", 100))
        found, _ = build_streams(data, tiny_tokenizer, tokens=100, heldout=12, length=10, **options)
        return list(found.tokens)

    assert tokens_of(seed=1) == tokens_of(seed=1) != tokens_of(seed=2)
    assert tiny_tokenizer.decode(tokens_of(shuffle=1)[:11]) == "document 02"  # 0 and 1 are held out


def test_only_the_assistants_words_are_trained_on(tmp_path: Path, tiny_tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": "this"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "that"},
    ]
    ids, trained = tokenised_chat(chat, tiny_tokenizer, "chats")
    assert tiny_tokenizer.decode(ids[trained]) == "this\nthat\n"
    assert "".join(tiny_tokenizer.decode(ids)) == "user: what\nassistant: this\nuser: and\nassistant: that\n"
    import json

    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(8)))
    data = DataRecipe(source=str(path), chat="messages")
    train, _ = build_streams(data, tiny_tokenizer, tokens=300, heldout=50, length=50)
    batch = train.batch(np.arange(len(train) // 50), 50)
    assert set(tiny_tokenizer.decode(batch.labels)) <= set("this\nthat\n")
    assert len(batch.labels) == train.trained_in(np.arange(len(train) // 50), 50)


def test_chats_that_cannot_be_masked_are_refused(tiny_tokenizer: Any) -> None:
    import copy

    rewriting = copy.deepcopy(tiny_tokenizer)
    rewriting.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    with pytest.raises(DataError, match="rewrites earlier turns"):
        tokenised_chat(chat, rewriting, "chats")
    with pytest.raises(DataError, match="no list of messages"):
        tokenised_chat("hello", tiny_tokenizer, "chats")
    rewriting.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenised_chat(chat, rewriting, "chats")


def test_the_built_in_text_to_heal_on_is_not_the_one_to_measure_on() -> None:
    import itertools

    from hyconvert.data import read_texts

    train = set(itertools.islice(read_texts("stdlib-packages"), 20))
    held = set(itertools.islice(read_texts("stdlib-docstrings"), 20))
    assert len(train) == len(held) == 20 and not train & held


def test_short_and_empty_text_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="holds 30 tokens, of which 16 are held out"):
        build_streams(["a" * 14, "b" * 14], tiny_tokenizer, tokens=100, heldout=16, length=16)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        build_streams(
            DataRecipe(source=str(tmp_path / "empty.jsonl")), tiny_tokenizer, tokens=9, heldout=9, length=9
        )


def test_some_rows_become_retrieval_prompts(word_list: list[str], tiny_tokenizer: Any) -> None:
    texts = [" ".join(word_list * 4)] * 400
    train, _ = build_streams(texts, tiny_tokenizer, tokens=16 * 2048, heldout=2048, length=2048)
    stages = [
        (Stage(tokens=16384, sequence_length=2048, batch_tokens=2048), 0),
        (Stage(tokens=16384, sequence_length=4096, batch_tokens=4096), 4),
    ]
    mixed = with_retrieval(train, tiny_tokenizer, 0.5, stages)
    changed = (mixed.tokens != train.tokens).reshape(-1, 2048).any(1).nonzero()[0].tolist()
    assert changed == [1, 3, 5, 7, 10, 11, 14, 15]
    for row, length in ((1, 2048), (5, 4096)):
        batch = mixed.batch(np.array([row]), length)
        assert batch.positions.tolist() == [list(range(length))] and len(batch.at) == length - 1
        assert "The code of the" in tiny_tokenizer.decode(batch.ids[0])
    kept = mixed.batch(np.array([0]), 2048)
    assert torch.equal(kept.positions, train.batch(np.array([0]), 2048).positions)
