"""Synthetic retrieval over any text and tokenizer: needles among decoys, several values under one key, copying.

A prompt is running text with facts strewn into it ("The code of the amber falcon is 48302."), then questions about
some of them, then a passage of the text once more. Whatever a model has to look up far back is marked as an answer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyconvert.errors import DataError

TASKS = ("needle", "multivalue", "copy")
"""What a prompt may ask: a fact among decoys that share its words, both values of a key that has two, a repeat."""

SHORTEST = 1024
"""Tokens that a row needs for `mix_in` to put a prompt into it."""

COPIED = 64
"""Tokens of a passage that is repeated."""

REPEATED = 0.2
"""How much of a row that `mix_in` makes into a prompt repeats passages: what is hardest to keep in a conversion."""

CUE = 8
"""Tokens of a repeated passage that are given before the rest counts as an answer."""

_FIRST = (
    "amber azure brass coral crimson golden hollow ivory jade marble misty quiet royal silver stone velvet"
)
_SECOND = "anchor beacon castle falcon forest garden harbor lantern meadow mirror orchard river temple tiger"


@dataclass(frozen=True)
class Answer:
    """One stretch of tokens that a prompt expects the model to know.

    Attributes:
        row: which prompt.
        task: one of `TASKS`.
        depth: where the (first) fact lies in the text, 0 at its beginning and 1 at its end.
        start, end: the answer's tokens, `start` included and `end` not.
    """

    row: int
    task: str
    depth: float
    start: int
    end: int


@dataclass(frozen=True)
class Prompts:
    """Retrieval prompts of one length.

    Attributes:
        tokens: [N, T] int64.
        text_end: where each prompt's running text ends and its questions begin.
        answers: what is asked, prompt by prompt, in the order of the tokens.
    """

    tokens: Tensor
    text_end: tuple[int, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Score:
    """How a model did on one answer.

    Attributes:
        nll: mean negative log-likelihood of its tokens, in nats.
        exact: 1 if greedy decoding would have given all of its tokens, else 0; in a mean, the share that is exact.
    """

    nll: float
    exact: float


def make_prompts(
    text: Tensor,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = TASKS,
    questions: int = 4,
    decoys: int = 4,
    copies: int = 2,
    copied: int = COPIED,
    depths: Sequence[float] | None = None,
    seed: int = 0,
) -> Prompts:
    """One prompt per row of running text, as long as the row.

    Args:
        text: [N, T] int64 tokens of running text.
        tokenizer: a transformers tokenizer; any kind will do.
        tasks: which of `TASKS`, asked in this order.
        questions: questions per prompt and task (`copies` for `copy`).
        decoys: facts that nobody asks for.
        copies: passages that `copy` repeats per prompt.
        copied: tokens of each.
        depths: where the facts that are asked for lie, in turn over all prompts; drawn evenly if None.
        seed: the same seed gives the same prompts.

    Raises:
        DataError: T leaves no room for the text between facts and questions.
    """
    names = questions * sum(task != "copy" for task in tasks) + decoys
    built = [_Builder(tokenizer, random.Random(f"{seed}/{row}"), names) for row in range(len(text))]
    at = 0
    for builder in built:
        for task in tasks:
            for _ in range(copies if task == "copy" else questions):
                builder.ask(task, depths[at % len(depths)] if depths else builder.rng.random())
                at += 1
        for _ in range(decoys):
            builder.state(builder.rng.random(), builder.name(), builder.number())
    rows = [
        builder.build(tokens.tolist(), copied, row)
        for row, (builder, tokens) in enumerate(zip(built, text, strict=True))
    ]
    return Prompts(
        torch.tensor([tokens for tokens, _, _ in rows]),
        tuple(end for _, end, _ in rows),
        tuple(answer for _, _, answers in rows for answer in answers),
    )


@dataclass(frozen=True)
class Mixed:
    """Text some of whose rows are prompts.

    Attributes:
        tokens: [N, T] int64.
        asked: [N, T] bool, where the token that follows is part of an answer.
    """

    tokens: Tensor
    asked: Tensor

    @classmethod
    def plain(cls, tokens: Tensor) -> Mixed:
        """Text in which nothing is asked."""
        return cls(tokens, torch.zeros_like(tokens, dtype=torch.bool))

    def __len__(self) -> int:
        """Rows."""
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Mixed:
        """Some of the rows."""
        return Mixed(self.tokens[rows], self.asked[rows])


def mix_in(text: Tensor, tokenizer: Any, share: float, seed: int = 0, repeats: float = REPEATED) -> Mixed:
    """Text with some of its rows made into prompts, so that what looks things up is fitted on that too.

    Args:
        text: [N, T] int64 tokens of running text.
        tokenizer: a transformers tokenizer.
        share: of the rows that become prompts, spread evenly. Rows of fewer than `SHORTEST` tokens stay as they are.
        seed: of the prompts.
        repeats: share of a prompt's tokens that repeat passages of it. Four passages are repeated at least, and just
            four in rows of fewer than two times `SHORTEST` tokens.
    """
    length = text.shape[1]
    mixed = Mixed.plain(text.clone())
    rows = [i for i in range(len(text)) if int((i + 1) * share) > int(i * share)]
    if not rows or length < SHORTEST:
        return mixed
    copies = max(4, round(length * repeats / COPIED)) if length >= 2 * SHORTEST else 4
    prompts = _as_much_as_fits(text[rows], tokenizer, copies, seed + 1_000_003)
    mixed.tokens[rows] = prompts.tokens
    for answer in prompts.answers:
        mixed.asked[rows[answer.row], answer.start - 1 : answer.end - 1] = True
    return mixed


def _as_much_as_fits(text: Tensor, tokenizer: Any, copies: int, seed: int) -> Prompts:
    """Prompts with as many repeats and questions as the rows have room for; tokenizers differ in what facts take.

    Raises:
        DataError: there is no room for one question of each task.
    """
    smaller = [(most, 4) for most in (copies, copies // 2, copies // 4) if most > 4]
    for most, questions in (*smaller, (4, 4), (4, 2), (2, 1)):
        try:
            return make_prompts(
                text, tokenizer, copies=most, questions=questions, decoys=questions, seed=seed
            )
        except DataError:
            continue
    raise DataError(
        f"sequences of {text.shape[1]} tokens have no room for facts and questions beside the text; take longer ones "
        "(--sequence-length), or none with facts (--calibration-retrieval 0)"
    )


class _Builder:
    """Collects one prompt's facts and questions, then lays them out."""

    def __init__(self, tokenizer: Any, rng: random.Random, names: int) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        side = math.ceil(math.sqrt(2 * names))  # few enough words that every name shares them with others
        first, second = _FIRST.split(), _SECOND.split()
        if side > len(second):
            raise DataError(
                f"{names} facts in one prompt are too many; ask for at most {len(second) ** 2 // 2}"
            )
        self.names = [
            f"{a} {b}" for a, b in itertools.product(rng.sample(first, side), rng.sample(second, side))
        ]
        rng.shuffle(self.names)
        self.facts: list[tuple[float, list[int]]] = []
        self.questions: list[tuple[str, float, list[int], int]] = []

    def encode(self, words: str) -> list[int]:
        ids: list[int] = self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def name(self) -> str:
        return self.names.pop()

    def number(self) -> str:
        return str(self.rng.randrange(10_000, 100_000))

    def state(self, depth: float, name: str, value: str) -> None:
        self.facts.append((depth, self.encode(f"\nThe code of the {name} is {value}.\n")))

    def ask(self, task: str, depth: float) -> None:
        if task == "copy":
            self.questions.append((task, depth, [], 0))
            return
        name, values = self.name(), [self.number() for _ in range(2 if task == "multivalue" else 1)]
        places = sorted([depth, *(self.rng.random() for _ in values[1:])])
        for place, value in zip(places, values, strict=True):
            self.state(place, name, value)
        subject = f"code of the {name} is" if len(values) == 1 else f"codes of the {name} are"
        whole = self.encode(f"\nThe {subject} {' and '.join(values)}.")
        lead = _shared_prefix(whole, self.encode(f"\nThe {subject}"))
        self.questions.append((task, depth, whole, lead))

    def build(self, text: list[int], copied: int, row: int) -> tuple[list[int], int, list[Answer]]:
        """Tokens, the end of the text, and the answers of the prompt."""
        tail = sum(len(ids) if task != "copy" else copied + 1 for task, _, ids, _ in self.questions)
        room = len(text) - tail - sum(len(ids) for _, ids in self.facts)
        if room < max(2 * copied, len(text) // 4):
            raise DataError(
                f"a sequence of {len(text)} tokens leaves room for {max(0, room)} tokens of text beside facts and "
                "questions; take longer sequences, or fewer questions and decoys"
            )
        tokens: list[int] = []
        used = 0
        for depth, ids in sorted(self.facts, key=lambda fact: fact[0]):
            until = int(depth * room)
            tokens += text[used:until] + ids
            used = until
        tokens += text[used:room]
        end, answers = len(tokens), []
        for task, depth, ids, lead in self.questions:
            if task == "copy":
                at = int(depth * (end - 2 * copied))
                ids, lead = self.encode("\n")[:1] + tokens[at : at + copied], 1 + CUE
                ids = ids[: copied + 1]
            answers.append(Answer(row, task, depth, len(tokens) + lead, len(tokens) + len(ids)))
            tokens += ids
        tokens += text[room : room + len(text) - len(tokens)]  # a tokenizer may have no newline
        return tokens, end, answers


def _shared_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def score_answers(
    prompts: Prompts, hidden_of: Callable[[int], Tensor], lm_head: Callable[[Tensor], Tensor]
) -> list[Score]:
    """Score every answer of the prompts, each token predicted from all true tokens before it.

    Args:
        prompts: N prompts.
        hidden_of: gives the final hidden states [T, D] of a row; called once per row, in order.
        lm_head: maps hidden states [n, D] to logits [n, V].

    Returns:
        One score per answer, in the prompts' order.
    """
    if not prompts.answers:
        return []
    by_row: dict[int, list[Answer]] = defaultdict(list)
    for answer in prompts.answers:
        by_row[answer.row].append(answer)
    states, wanted = [], []
    for row, answers in by_row.items():
        positions = torch.cat([torch.arange(a.start, a.end) for a in answers])
        hidden = hidden_of(row)
        states.append(hidden[(positions - 1).to(hidden.device)])
        wanted.append(prompts.tokens[row, positions])
    targets = torch.cat(wanted).to(states[0].device)
    logits = lm_head(torch.cat(states)).float()
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
    right = (logits.argmax(-1) == targets).cpu()
    sizes = [a.end - a.start for a in prompts.answers]
    return [
        Score(float(losses.mean()), float(hits.all()))
        for losses, hits in zip(nll.split(sizes), right.split(sizes), strict=True)
    ]


def by_task(prompts: Prompts, scores: Sequence[Score]) -> dict[str, Score]:
    """Mean score per task."""
    grouped: dict[str, list[Score]] = defaultdict(list)
    for answer, score in zip(prompts.answers, scores, strict=True):
        grouped[answer.task].append(score)
    return {
        task: Score(sum(s.nll for s in group) / len(group), sum(s.exact for s in group) / len(group))
        for task, group in grouped.items()
    }
