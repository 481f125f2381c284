"""Retrieval: needles alone and among decoys, several values of one key, and copying, by depth and by length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyconvert.evaluation.models import Pair, hidden_states
from hyconvert.evaluation.settings import EvalSettings
from hyconvert.retrieval import Prompts, Score, make_prompts, score_answers

KINDS = ("single", "multikey", "multivalue", "copy")
"""One fact; a fact among others and decoys that share its words; both values of a key; a repeated passage."""


@dataclass(frozen=True)
class Cell:
    """Both models on the questions of one kind at one length and depth.

    Attributes:
        kind: one of `KINDS`.
        length: tokens of the prompt.
        depth: where the fact lies in the text, 0 at its beginning and 1 at its end; None is all depths together.
        count: questions.
        base, converted: mean NLL of the answers' tokens in nats, and the share whose tokens greedy decoding would have
            given, all of them.
    """

    kind: str
    length: int
    depth: float | None
    count: int
    base: Score
    converted: Score


@dataclass(frozen=True)
class LookupResult:
    """Retrieval of both models.

    Attributes:
        cells: by kind, length and depth.
        by_length: by kind and length.
        totals: by kind; `length` is 0.
    """

    cells: list[Cell]
    by_length: list[Cell]
    totals: list[Cell]

    def total(self, kind: str) -> Cell | None:
        """All questions of a kind."""
        return next((cell for cell in self.totals if cell.kind == kind), None)

    @property
    def needles(self) -> Cell | None:
        """All needles, alone, among decoys and in pairs."""
        found = [cell for cell in self.totals if cell.kind != "copy"]
        return _pooled("needle", 0, None, found) if found else None


def make_suites(
    rows: Tensor, tokenizer: Any, settings: EvalSettings
) -> Iterator[tuple[int, Prompts, dict[str, str]]]:
    """Prompts of every length, each with the kinds of question by the task of `hyconvert.retrieval`.

    Args:
        rows: [N, T] running text; prompts of a length take the rows in turn and cut them.
        tokenizer: the models'.
        settings: lengths, depths, decoys, prompts and seed.

    Raises:
        DataError: a length leaves no room.
    """
    depths, at = settings.depths, 0
    for length in settings.prompt_lengths():
        for alone in (False, True):
            count = settings.singles if alone else settings.prompts
            if not count:
                continue
            picked = [(at + i) % len(rows) for i in range(count)]
            at += count
            options: dict[str, Any] = (
                {"tasks": ("needle",), "questions": 1, "decoys": 0, "copies": 0}
                if alone
                else {"questions": len(depths), "decoys": settings.decoys, "copies": len(depths)}
            )
            prompts = make_prompts(
                rows[picked, :length], tokenizer, copied=32 if length < 2048 else 64,
                depths=_spread(depths, count) if alone else depths, seed=settings.seed + at, **options,
            )  # fmt: skip
            kinds = {"needle": "single"} if alone else {"needle": "multikey"}
            yield length, prompts, {"multivalue": "multivalue", "copy": "copy"} | kinds


def _spread(depths: tuple[float, ...], count: int) -> tuple[float, ...]:
    """As many of the depths as there are questions, from the first to the last."""
    if count >= len(depths):
        return depths
    if count == 1:
        return (depths[len(depths) // 2],)
    return tuple(depths[round(i * (len(depths) - 1) / (count - 1))] for i in range(count))


def measure_lookup(
    pair: Pair,
    suites: list[tuple[int, Prompts, dict[str, str]]],
    on_prompt: Callable[[], None] | None = None,
) -> LookupResult:
    """Ask both models, every answer's token predicted from the true tokens before it."""
    found: dict[tuple[str, int, float | None], dict[str, list[Score]]] = defaultdict(
        lambda: {"base": [], "converted": []}
    )
    for length, prompts, kinds in suites:
        for name, model in pair.models.items():
            scores = score_answers(
                prompts, _reader(model, prompts, on_prompt if name == "converted" else None), model.lm_head
            )
            for answer, score in zip(prompts.answers, scores, strict=True):
                found[kinds[answer.task], length, answer.depth][name].append(score)
    cells = [
        Cell(kind, length, depth, len(scores["base"]), _mean(scores["base"]), _mean(scores["converted"]))
        for (kind, length, depth), scores in sorted(found.items(), key=lambda item: _order(*item[0]))
    ]
    lengths = sorted({cell.length for cell in cells})
    by_length = [
        _pooled(kind, length, None, group)
        for kind in KINDS
        for length in lengths
        if (group := [cell for cell in cells if (cell.kind, cell.length) == (kind, length)])
    ]
    totals = [
        _pooled(kind, 0, None, group)
        for kind in KINDS
        if (group := [cell for cell in cells if cell.kind == kind])
    ]
    return LookupResult(cells, by_length, totals)


def _reader(model: Any, prompts: Prompts, step: Callable[[], None] | None) -> Callable[[int], Tensor]:
    def read(row: int) -> Tensor:
        hidden = hidden_states(model, prompts.tokens[row])
        if step:
            step()
        return hidden

    return read


def _order(kind: str, length: int, depth: float | None) -> tuple[int, int, float]:
    return KINDS.index(kind), length, depth or 0.0


def _mean(scores: list[Score], weights: list[int] | None = None) -> Score:
    weights = weights or [1] * len(scores)
    total = sum(weights)
    pairs = list(zip(scores, weights, strict=True))
    return Score(sum(s.nll * w for s, w in pairs) / total, sum(s.exact * w for s, w in pairs) / total)


def _pooled(kind: str, length: int, depth: float | None, cells: list[Cell]) -> Cell:
    weights = [cell.count for cell in cells]
    return Cell(
        kind, length, depth, sum(weights), _mean([cell.base for cell in cells], weights),
        _mean([cell.converted for cell in cells], weights),
    )  # fmt: skip
