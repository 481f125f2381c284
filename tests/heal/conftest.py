"""A tiny converted checkpoint and a text to heal it on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyconvert.conversion import convert
from hyconvert.recipe import HealRecipe, validated

SCALES = {"new": 3, "converted": 1, "full": 0.03, "rest": 0.03}
STAGE = {"tokens": 1536, "sequence_length": 32, "batch_tokens": 128, "lr": 3e-3}


@pytest.fixture(scope="session")
def converted(tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Llama with a layer of every kind that is trained; read-only."""
    out = tmp_path_factory.mktemp("heal") / "converted"
    convert(tiny_base("llama"), out, plan="F S0 W F", align_layers=False, block_size=4, topk=2, window=8)
    return out


@pytest.fixture(scope="session")
def text(word_list: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short documents, about 9,000 tokens."""
    generator, path = random.Random(0), tmp_path_factory.mktemp("text") / "words.txt"
    path = path.with_name("text")
    path.mkdir()
    for i in range(60):
        document = " ".join(generator.choices(word_list, k=generator.randint(5, 45)))
        (path / f"{i:02}.txt").write_text(document)
    return path


@pytest.fixture
def recipe(text: Path) -> Callable[..., HealRecipe]:
    """`recipe(**changes)`: a recipe of twelve steps in float32."""

    def make(**changes: Any) -> HealRecipe:
        data = {
            "data": {"source": str(text)},
            "distill": STAGE,
            "lr_scale": SCALES,
            "heldout_tokens": 256,
            "log_every": 1,
            "eval_every": 4,
            "save_every": 4,
        }
        return validated(HealRecipe, data | changes, "recipe")

    return make
