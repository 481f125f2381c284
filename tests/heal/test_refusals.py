"""What healing refuses, before anything heavy starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyconvert.errors import CheckpointError, DataError, HealError, HyconvertError, RecipeError
from hyconvert.heal import heal
from hyconvert.heal.options import heal_recipe, run_recipe
from hyconvert.recipe import HealRecipe, Recipe, validated
from tests.heal.conftest import STAGE


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    def heavy(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hyconvert.heal.run.load_student", heavy)


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """The converted checkpoint, free to be spoilt."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(kind: type[HyconvertError], message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        heal(*arguments, device="cpu", **options)


def test_a_missing_teacher(copy: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for base, message in ((str(tmp_path / "gone"), "base of .* cannot be opened.*gone"), (None, "--teacher")):
        plan = {key: value for key, value in config["plan"].items() if key != "base"}
        edit(copy / "config.json", plan=plan | ({"base": base} if base else {}))
        refused(CheckpointError, message, copy, tmp_path / "out", recipe())
    refused(CheckpointError, "nowhere", copy, tmp_path / "out", recipe(teacher="/nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_shape_content_or_tokenizer(
    converted: Path, copy: Path, recipe: Callable[..., Any], tmp_path: Path, tiny_base: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    for other in (tiny_base("qwen3"), tiny_base("llama", intermediate_size=32)):
        refused(CheckpointError, "different shapes", converted, out, recipe(teacher=str(other)))
    edit(copy / "conversion.json", fingerprint="sha256:0")
    refused(CheckpointError, "no longer what .* was converted from", copy, out, recipe())
    data = json.loads((copy / "tokenizer.json").read_text())
    data["model"]["vocab"]["é"] = data["model"]["vocab"].pop("~")
    (copy / "tokenizer.json").write_text(json.dumps(data))
    teacher = recipe(teacher=str(tiny_base("llama")))
    refused(CheckpointError, "another tokenizer", copy, out, teacher)


def test_lengths_and_batches_that_do_not_fit(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    long = STAGE | {"sequence_length": 1024, "batch_tokens": 2048}
    refused(
        HealError, "1024 tokens are longer than the 512", converted, tmp_path / "out", recipe(distill=long)
    )
    with pytest.raises(RecipeError, match="distill: batch_tokens 16 is less than one sequence of 32"):
        recipe(distill=STAGE | {"batch_tokens": 16})


def test_text_that_is_missing_or_too_short(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("short")
    for source, message in (("short.txt", "not one row of 32"), ("none.txt", "no file or folder")):
        chosen = recipe(data={"source": str(tmp_path / source)})
        refused(DataError, message, converted, tmp_path / "out", chosen)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short.txt"]


def test_a_disk_without_room(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100))
    refused(HealError, "for text and saved states", converted, tmp_path / "out", recipe())


def test_an_output_that_exists(converted: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    refused(CheckpointError, "--force", converted, tmp_path / "out", recipe())
    refused(CheckpointError, "OUT", converted, converted, recipe(), force=True)


def test_a_model_that_is_not_converted(
    recipe: Callable[..., Any], tmp_path: Path, tiny_base: Callable[..., Path]
) -> None:
    refused(CheckpointError, "not a converted one", tiny_base("llama"), tmp_path / "out", recipe())
    refused(CheckpointError, "no", tmp_path / "nowhere", tmp_path / "out", recipe())


def test_mistakes_in_a_recipe_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("heal: {data: {sorce: x}, distill: {tokens: many, lr: -1}, sed: 3}")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    message = str(caught.value)
    for part in (
        "heal.data.source: Field required",
        "heal.data.sorce: unknown key; did you mean 'source'?",
        "heal.distill.tokens: 'many' is no count; write 8M",
        "heal.distill.lr: Input should be greater than 0 (got -1)",
        "heal.sed: unknown key; did you mean 'seed'?",
    ):
        assert part in message, part
    path.write_text("heal: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="no stage is set"):
        validated(HealRecipe, {"data": {"source": "x"}}, "recipe")


def test_options_go_over_a_recipe(converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "heal: {data: {source: x}, distill: {tokens: 8M, sequence_length: 64, lr: 1e-3}, seed: 3}"
    )
    stage = {"tokens": "64k", "sequence_length": None, "batch_tokens": None, "lr": None}
    chosen = heal_recipe(str(converted), path, {"data": {"source": "y"}, "seed": None}, stage)
    assert chosen.data.source == "y" and chosen.seed == 3
    assert chosen.distill is not None
    assert (chosen.distill.tokens, chosen.distill.sequence_length, chosen.distill.lr) == (65_536, 64, 1e-3)
    nothing = dict.fromkeys(stage)
    chosen = heal_recipe(str(converted), None, {"data": {"source": "y"}}, nothing)
    assert chosen.distill is not None
    assert (chosen.distill.tokens, chosen.distill.sequence_length) == (8_000_000, 512)
    with pytest.raises(RecipeError, match="--data"):
        heal_recipe(str(converted), None, {"data": {"source": None}}, nothing)


def test_a_recipe_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("heal: {data: {source: x}, distill: {tokens: 8M}}")
    with pytest.raises(HealError, match="no section 'convert'"):
        run_recipe(Recipe.load(path), tmp_path / "out")
    path.write_text("convert: {uniform: 3}\nheal: {data: {source: x}, distill: {tokens: 8M}}")
    with pytest.raises(HealError, match="--base"):
        run_recipe(Recipe.load(path), tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HealError, match="one process"):
        run_recipe(Recipe.load(path), tmp_path / "out", base="x")
