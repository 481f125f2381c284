"""Training text as one long array of tokens on disk, cut into rows that hold several documents each.

A row is any `sequence_length` neighbouring tokens. Its documents never see each other: positions start again with each
document, and a document that goes on in the next row starts again there. Which rows a step reads is a function of the
step alone, so a run that was killed goes on at the exact token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyconvert.data import read_rows
from hyconvert.errors import DataError
from hyconvert.recipe import DataRecipe, Stage
from hyconvert.retrieval import mix_in

BEGIN, TRAINED = 1, 2
"""Flags of a token: it is the first of its document; predicting it is trained."""
_TEXTS_AT_ONCE = 64
_BUFFER_CHARACTERS = 2**28


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass.

    Attributes:
        ids: [B, T] int64 tokens.
        positions: [B, T] int64, 0 at the first token of each document.
        at: [N] int64, flat indices of the tokens whose prediction counts.
        labels: [N] int64, the tokens that follow them.
    """

    ids: Tensor
    positions: Tensor
    at: Tensor
    labels: Tensor


class TokenStream:
    """Tokens and flags on disk, memory-mapped.

    Attributes:
        tokens: [L] int32.
        flags: [L] uint8, see `BEGIN` and `TRAINED`.
    """

    def __init__(self, tokens: np.ndarray, flags: np.ndarray) -> None:
        self.tokens, self.flags = tokens, flags

    @classmethod
    def open(cls, folder: Path) -> TokenStream:
        """A stream that `save` wrote."""
        return cls(
            np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "flags.npy", mmap_mode="r")
        )

    def save(self, folder: Path) -> None:
        """Write `tokens.npy` and `flags.npy`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "tokens.npy", self.tokens)
        np.save(folder / "flags.npy", self.flags)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: np.ndarray, length: int) -> Batch:
        """Rows by number, each `length` tokens; the last token of a row predicts nothing."""
        index = rows[:, None] * length + np.arange(length)
        ids, flags = self.tokens[index], self.flags[index]
        begins = (flags & BEGIN).astype(bool)
        begins[:, 0] = True
        slots = np.arange(length)
        positions = slots - np.maximum.accumulate(np.where(begins, slots, 0), axis=1)
        counts = ((flags & TRAINED) > 0) & ~begins
        rows_at, columns = np.nonzero(counts[:, 1:])
        return Batch(
            *(
                torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64))
                for part in (ids, positions, rows_at * length + columns, ids[rows_at, columns + 1])
            )
        )

    def trained_in(self, rows: np.ndarray, length: int) -> int:
        """Predictions that count in these rows."""
        flags = self.flags[rows[:, None] * length + np.arange(1, length)]
        return int(np.count_nonzero((flags & (TRAINED | BEGIN)) == TRAINED))


def row_order(available: int, wanted: int, first: int, seed: int) -> np.ndarray:
    """Numbers of the rows of one stage, in the order they are read.

    Args:
        available: rows in the text.
        wanted: rows to read; the text is repeated if it is shorter.
        first: the first row to read, so that a stage continues where the one before it ended.
        seed: of the order.
    """
    rows = (first + np.arange(wanted)) % available
    generator = np.random.default_rng(seed)
    # Shuffled epoch by epoch, so that no row comes twice before every row came once.
    for at in range(0, wanted, available):
        generator.shuffle(rows[at : at + available])
    return rows


def build_streams(
    data: DataRecipe | Iterable[str],
    tokenizer: Any,
    *,
    tokens: int,
    heldout: int,
    length: int,
    seed: int = 0,
    on_tokens: Callable[[int], None] | None = None,
) -> tuple[TokenStream, TokenStream]:
    """Tokenise text into a stream to train on and a stream to measure on, from different documents.

    Args:
        data: where the text is from, or documents themselves.
        tokenizer: a fast transformers tokenizer.
        tokens: tokens to train on; fewer where the text is shorter.
        heldout: tokens to measure on; a document gives at most `length` of them.
        length: the shortest row that must be filled.
        seed: of the order of documents.
        on_tokens: told how many tokens there are so far.

    Returns:
        The stream to train on and the held-out stream.

    Raises:
        DataError: the text cannot be read, or does not fill a row of each.
    """
    name = data.source if isinstance(data, DataRecipe) else "the text"
    held, train = _Parts(), _Parts()
    for ids, trained in _documents(data, tokenizer, seed):
        if not trained.any():
            continue
        if held.count < heldout:
            held.add(ids[:length], trained[:length])
        else:
            train.add(ids, trained)
        if on_tokens:
            on_tokens(train.count)
        if train.count >= tokens:
            break
    if train.count < length:
        raise DataError(
            f"{name} holds {held.count + train.count} tokens, of which {heldout} are held out to measure on, so not "
            f"one row of {length} is left to train on; give more text, a smaller sequence_length or fewer "
            "heldout_tokens"
        )
    return train.stream(tokens), held.stream(heldout)


def with_retrieval(
    stream: TokenStream, tokenizer: Any, share: float, stages: Iterable[tuple[Stage, int]], seed: int = 0
) -> TokenStream:
    """A stream some of whose rows are retrieval prompts: their text as one document, with facts, questions and repeats.

    Packed text rarely asks for anything far back; these rows do, and the base's own answers are what is learnt.

    Args:
        stream: text of which every token is trained on.
        tokenizer: a transformers tokenizer.
        share: of the rows that become prompts, spread evenly; rows too short for one stay as they are.
        stages: that read the stream one after the other, and the row, of its own length, at which each begins.
        seed: of the prompts.
    """
    tokens, flags = stream.tokens.copy(), stream.flags.copy()
    for stage, first in stages:
        length = stage.sequence_length
        rows = min(first + stage.steps * stage.rows, len(tokens) // length) - first
        if rows < 1:
            break
        part = slice(first * length, (first + rows) * length)
        text = tokens[part].reshape(rows, length)  # a view, as are the flags
        mixed = mix_in(torch.from_numpy(text.astype(np.int64)), tokenizer, share, seed).tokens.numpy()
        changed = (mixed != text).any(1)
        text[changed] = mixed[changed]
        flags[part].reshape(rows, length)[changed] = TRAINED
        flags[part].reshape(rows, length)[changed, 0] |= BEGIN
    return TokenStream(tokens, flags)


class _Parts:
    """Documents collected into one array."""

    def __init__(self) -> None:
        self.count = 0
        self.ids: list[np.ndarray] = []
        self.flags: list[np.ndarray] = []

    def add(self, ids: np.ndarray, trained: np.ndarray) -> None:
        flags = np.where(trained, TRAINED, 0).astype(np.uint8)
        flags[0] |= BEGIN
        self.ids.append(ids.astype(np.int32))
        self.flags.append(flags)
        self.count += len(ids)

    def stream(self, limit: int) -> TokenStream:
        return TokenStream(np.concatenate(self.ids)[:limit], np.concatenate(self.flags)[:limit])


def _documents(
    data: DataRecipe | Iterable[str], tokenizer: Any, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each document's tokens, and which of them are trained on."""
    if not isinstance(data, DataRecipe):
        yield from _tokenised_texts(iter(data), tokenizer)
        return
    rows = read_rows(data.source, data.chat or data.column, subset=data.subset, split=data.split)
    shuffled = _shuffled(rows, data.shuffle, seed)
    if data.chat:
        for chat in shuffled:
            yield tokenised_chat(chat, tokenizer, data.source)
    else:
        yield from _tokenised_texts(map(str, shuffled), tokenizer)


def _shuffled(rows: Iterator[Any], buffer: int, seed: int) -> Iterator[Any]:
    """Rows in random order as far as a buffer allows: bounded in rows and in characters, exact if all rows fit."""
    generator, held, characters = random.Random(seed), [], 0
    for row in rows:
        held.append(row)
        characters += len(row)
        while len(held) > 1 and (len(held) >= buffer or characters > _BUFFER_CHARACTERS):
            at = generator.randrange(len(held)) if buffer > 1 else 0
            held[at], held[-1] = held[-1], held[at]
            characters -= len(held[-1])
            yield held.pop()
    if buffer > 1:
        generator.shuffle(held)
    yield from held


def _tokenised_texts(texts: Iterator[str], tokenizer: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    import itertools

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while some := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            array = np.array(ids + end)
            yield array, np.ones(len(array), bool)


def tokenised_chat(messages: Any, tokenizer: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A chat rendered by the tokenizer's template, with a mask over what the assistant said.

    Args:
        messages: a list of dictionaries with `role` and `content`.
        tokenizer: a fast tokenizer with a chat template.
        name: of the source, for errors.

    Returns:
        Tokens [n], and [n] bool: true for the tokens of assistant turns, their end marker included.

    Raises:
        DataError: there is no template, the messages do not fit it, or it does not render a chat as a continuation of
            its beginning, so that it cannot be said which tokens are the assistant's.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{name} holds chats, but the model's tokenizer has no chat template; give a text column"
        )
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise DataError(
            f"a chat of {name} is no list of messages with 'role' and 'content'; check the column"
        )
    text = _render(messages, tokenizer, name)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(messages[:turn], tokenizer, name, prompt=True)
            after = _render(messages[: turn + 1], tokenizer, name)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"the chat template of the model's tokenizer rewrites earlier turns, so the assistant's tokens in "
                    f"{name} cannot be told from the others; render the chats to text yourself"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=int)
    trained = np.zeros(len(starts), bool)
    for start, end in spans:
        trained |= (starts >= start) & (starts < end)
    return np.array(encoded["input_ids"]), trained


def _render(messages: list[Any], tokenizer: Any, name: str, prompt: bool = False) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (jinja2.TemplateError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"a chat of {name} does not fit the model's chat template ({error})") from error
