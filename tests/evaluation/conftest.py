"""A tiny converted checkpoint, evaluated once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyconvert.conversion import convert
from hyconvert.evaluation.models import Pair, load_pair
from hyconvert.evaluation.run import Evaluation, evaluate_pair
from hyconvert.evaluation.settings import EvalSettings

LINE = "F S0 W F"
SMALL: dict[str, Any] = {
    "tokens": 512,
    "sequence_length": 256,
    "lengths": (1024,),
    "depths": (0.2, 0.8),
    "prompts": 1,
    "singles": 1,
    "decoys": 1,
    "generations": 2,
    "prompt_tokens": 32,
    "new_tokens": 6,
    "speed_tokens": 64,
    "decode_tokens": 4,
}


@pytest.fixture(scope="session")
def text(word_list: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of about 8,000 tokens in all."""
    generator, path = random.Random(0), tmp_path_factory.mktemp("text") / "words.jsonl"
    path.write_text(
        "".join(f'{{"text": "{" ".join(generator.choices(word_list, k=120))}"}}\n' for _ in range(12))
    )
    return path


@pytest.fixture(scope="session")
def checkpoint(tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Llama with a sparse and a window layer; read-only."""
    out = tmp_path_factory.mktemp("evaluation") / "converted"
    base = tiny_base("llama", max_position_embeddings=4096)
    convert(base, out, plan=LINE, align_layers=False, block_size=4, topk=2, window=8)
    return out


@pytest.fixture(scope="session")
def pair(checkpoint: Path) -> Pair:
    """Both models."""
    return load_pair(str(checkpoint), device="cpu")


@pytest.fixture(scope="session")
def settings(text: Path) -> EvalSettings:
    """All parts, as small as they go."""
    return EvalSettings(data=str(text), **SMALL)


@pytest.fixture(scope="session")
def evaluation(pair: Pair, settings: EvalSettings) -> Evaluation:
    """All parts measured."""
    return evaluate_pair(pair, settings, command="hyconvert eval converted")
