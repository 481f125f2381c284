"""Synthetic retrieval prompts."""

from typing import Any

import pytest
import torch

from hyconvert.errors import DataError
from hyconvert.retrieval import COPIED, TASKS, by_task, make_prompts, mix_in, score_answers


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(10, 90, (3, 2048), generator=torch.Generator().manual_seed(0))


def test_every_answer_is_found_in_the_text_before_it(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    prompts = make_prompts(text, tiny_tokenizer, questions=2, decoys=2)
    assert prompts.tokens.shape == text.shape
    assert {a.task for a in prompts.answers} == set(TASKS)
    for answer in prompts.answers:
        row, end = prompts.tokens[answer.row].tolist(), prompts.text_end[answer.row]
        assert end <= answer.start < answer.end <= len(row)
        asked = tiny_tokenizer.decode(row[answer.start : answer.end])
        before = tiny_tokenizer.decode(row[:end])
        if answer.task == "copy":
            assert asked in before
        else:
            assert all(value in before for value in asked.strip(" .").split(" and "))


def test_facts_lie_where_they_were_asked_to(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    prompts = make_prompts(text, tiny_tokenizer, tasks=("needle",), questions=1, decoys=4, depths=[0.1, 0.9])
    for answer in prompts.answers:
        value = tiny_tokenizer.decode(prompts.tokens[answer.row, answer.start : answer.end]).strip(" .")
        body = tiny_tokenizer.decode(prompts.tokens[answer.row, : prompts.text_end[answer.row]])
        assert abs(body.index(value) / len(body) - answer.depth) < 0.2
    assert [a.depth for a in prompts.answers] == [0.1, 0.9, 0.1]


def test_decoys_share_words_with_what_is_asked(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    prompts = make_prompts(text[:1], tiny_tokenizer, tasks=("needle",), questions=4, decoys=8)
    body = tiny_tokenizer.decode(prompts.tokens[0, : prompts.text_end[0]])
    names = [part.split(" is ")[0].split() for part in body.split("The code of the ")[1:]]
    assert len(names) == 12
    for first, second in names:
        assert sum(first == a or second == b for a, b in names) > 1


def test_the_seed_decides(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    one, same, other = (make_prompts(text, tiny_tokenizer, questions=1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.tokens, same.tokens) and one.answers == same.answers
    assert not torch.equal(one.tokens, other.tokens)


def test_a_model_that_knows_scores_zero_and_exact(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    prompts = make_prompts(text, tiny_tokenizer, questions=1, decoys=1)
    after = torch.cat((prompts.tokens[:, 1:], prompts.tokens[:, :1]), 1)
    knows = score_answers(
        prompts, lambda row: torch.nn.functional.one_hot(after[row], 100).float() * 50, lambda x: x
    )
    assert all(score.nll < 1e-6 and score.exact == 1 for score in knows)
    blind = by_task(prompts, score_answers(prompts, lambda row: torch.zeros(2048, 100), lambda x: x))
    assert blind["needle"].nll == pytest.approx(torch.tensor(100.0).log().item())
    assert blind["copy"].exact == 0


def test_only_a_share_of_long_rows_becomes_prompts(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    rows = torch.cat((text, text))[:4]
    mixed = mix_in(rows, tiny_tokenizer, 0.5)
    changed = [bool((a != b).any()) for a, b in zip(rows, mixed.tokens, strict=True)]
    assert changed == mixed.asked.any(1).tolist() == [False, True, False, True]
    for plain, share in ((rows, 0.0), (rows[:, :512], 1.0)):
        unchanged = mix_in(plain, tiny_tokenizer, share)
        assert torch.equal(unchanged.tokens, plain) and not unchanged.asked.any()


def test_rows_without_room_get_fewer_repeats_and_questions(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    lengths = {}
    for length, repeats in ((2048, 0.5), (1536, 0.2), (1024, 0.2)):  # a character is a token here
        mixed = mix_in(text[:, :length], tiny_tokenizer, 1.0, repeats=repeats)
        assert mixed.tokens.shape == (3, length) and mixed.asked.any(1).all()
        lengths[length] = int(mixed.asked[0].sum())
    assert lengths[1024] <= lengths[1536] < lengths[2048]
    with pytest.raises(DataError, match="--calibration-retrieval 0"):
        mix_in(text[:, :1024], lambda words, **_: {"input_ids": tiny_tokenizer(words)["input_ids"] * 4}, 1.0)


def test_tokens_before_those_of_an_answer_are_marked(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    mixed = mix_in(text, tiny_tokenizer, 0.5, seed=3)
    prompts = make_prompts(text[1:2], tiny_tokenizer, copies=6, seed=3 + 1_000_003)
    answers = [range(answer.start, answer.end) for answer in prompts.answers]
    assert torch.equal(mixed.tokens[1:2], prompts.tokens)
    assert (mixed.asked[1].nonzero()[:, 0] + 1).tolist() == sorted(at for answer in answers for at in answer)
    assert torch.equal(mixed[1:].asked, mixed.asked[1:]) and len(mixed[1:]) == 2


def test_mixed_in_prompts_repeat_as_many_passages_as_they_are_told(
    text: torch.Tensor, tiny_tokenizer: Any
) -> None:
    for repeats, copies in ((0.0, 4), (0.1, 4), (0.22, 7)):  # of 2,048 tokens, 64 a passage
        mixed = mix_in(text[:1], tiny_tokenizer, 1.0, repeats=repeats).tokens[0].tolist()
        passages = [
            mixed[-at - COPIED : len(mixed) - at] for at in range(0, copies * (COPIED + 1), COPIED + 1)
        ]
        body = mixed[: -copies * (COPIED + 1)]
        windows = {tuple(body[i : i + COPIED]) for i in range(len(body))}
        assert all(tuple(passage) in windows for passage in passages)


def test_no_room_and_too_many_facts_are_refused(text: torch.Tensor, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="longer sequences, or fewer questions"):
        make_prompts(text[:, :300], tiny_tokenizer)
    with pytest.raises(DataError, match="too many"):
        make_prompts(text, tiny_tokenizer, questions=100)
