"""What an evaluation measures, on how much."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hyconvert.errors import DataError
from hyconvert.plan import explain

Part = Literal["text", "retrieval", "generation", "branches", "speed"]
PARTS: tuple[Part, ...] = ("text", "retrieval", "generation", "branches", "speed")
"""Text: perplexity, KL, agreement. Branches: gate shares and ablations. The rest as they are called."""

QUICK: dict[str, Any] = {
    "tokens": 1536,
    "sequence_length": 768,
    "lengths": (1024,),
    "depths": (0.1, 0.5, 0.9),
    "prompts": 1,
    "singles": 1,
    "generations": 2,
    "prompt_tokens": 128,
    "new_tokens": 16,
    "by_layer": False,
    "speed_tokens": 256,
    "decode_tokens": 8,
}
"""What `--quick` changes."""


class EvalSettings(BaseModel):
    """What is measured.

    Attributes:
        parts: some of `PARTS`.
        data, column: text, as `hyconvert.data.read_texts` takes it.
        tokens, sequence_length: how much of it, in rows of what length, T.
        lengths: of retrieval prompts; None is 1,024 and its doubles up to T.
        depths: where in a prompt the facts lie that are asked for; each is asked for once per prompt and task.
        prompts: per length, each with facts among decoys, values and copies.
        singles: prompts per length with one fact alone, at the depths in turn.
        decoys: facts in a prompt that nobody asks for.
        generations, prompt_tokens, new_tokens: continuations, of how long prompts, of how many tokens each.
        by_layer: switch the sparse branch off in each layer alone too, and not only in all.
        speed_tokens: length of the sequence on which speed is measured; None is T.
        decode_tokens: tokens decoded after it.
        seed: of retrieval prompts.
        tasks: of lm-evaluation-harness, to be run besides.
        task_limit: examples per task; None for all.
        batch_size: prompts per batch of a task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[Part, ...] = PARTS
    data: str = "stdlib-docstrings"
    column: str = "text"
    tokens: int = Field(default=16_384, ge=2)
    sequence_length: int = Field(default=2048, ge=2)
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = (0.05, 0.275, 0.5, 0.725, 0.95)
    prompts: int = Field(default=4, ge=1)
    singles: int = Field(default=10, ge=0)
    decoys: int = Field(default=4, ge=0)
    generations: int = Field(default=8, ge=1)
    prompt_tokens: int = Field(default=256, ge=1)
    new_tokens: int = Field(default=64, ge=1)
    by_layer: bool = True
    speed_tokens: int | None = Field(default=None, ge=1)
    decode_tokens: int = Field(default=64, ge=1)
    seed: int = 0
    tasks: tuple[str, ...] = ()
    task_limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _depths_are_shares(self) -> EvalSettings:
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError("depths must lie between 0 and 1")
        return self

    @classmethod
    def create(cls, *, quick: bool = False, **settings: Any) -> EvalSettings:
        """Validated settings, on top of `QUICK` if asked for; None values are left at their defaults.

        Raises:
            DataError: a value is out of range.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        try:
            return cls(**((QUICK if quick else {}) | given))
        except ValidationError as error:
            raise DataError(f"settings of the evaluation: {explain(error, cls)}") from error

    def prompt_lengths(self) -> tuple[int, ...]:
        """Lengths of retrieval prompts; none where T is too short for any."""
        if self.lengths is not None:
            return self.lengths
        shorter = (1024 << i for i in range(20))
        return tuple(length for length in shorter if length <= self.sequence_length)
