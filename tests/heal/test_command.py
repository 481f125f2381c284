"""`hyconvert heal` and `hyconvert run`, as they are typed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hyconvert.heal.engine import Engine
from tests.conftest import ROOT
from tests.test_cli import run

STAGE = ("--tokens", "256", "--sequence-length", "32", "--batch-tokens", "128")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_heal_and_inspect(converted: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--data", text, *STAGE, "--device", "cpu")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("heal: {data: {source: x}, distill: {tokens: 1}, heldout_tokens: 256}")
    code, stdout, stderr = run("heal", converted, "-o", out, *options, "--recipe", recipe, "--dry-run")
    assert code == 0, stderr
    assert json.loads(stdout)["distill"]["tokens"] == 256 and not out.exists()
    code, stdout, stderr = run("heal", converted, "-o", out, *options, "--recipe", recipe)
    assert code == 0, stderr
    assert "held-out KL" in stdout and f"saved to {out}" in stdout
    assert "Healing 2/2" in stderr and "tokens/s" in stderr
    code, stdout, stderr = run("inspect", out)
    assert code == 0 and "F S0 W F" in stdout, stderr


def test_mistakes_are_one_line_and_exit_code_2(converted: Path, text: Path, tmp_path: Path) -> None:
    for options, message in (
        ((), "--data"),
        (("--data", text, "--tokens", "lots"), "'lots' is no count"),
        (("--data", tmp_path / "none.txt"), "no file or folder"),
        (("--data", text, "--sequence-length", "4096"), "longer than the 512"),
        (("--data", text, "--teacher", "/nowhere", *STAGE), "/nowhere"),
        (("--recipe", tmp_path / "none.yaml"), "cannot be read"),
    ):
        code, _, stderr = run("heal", converted, "-o", tmp_path / "out", *options)
        assert code == 2 and message in stderr and stderr.startswith("hyconvert: "), stderr
        assert stderr.rstrip().count("\n") == 0 or "Tokenising" in stderr
    assert not list(tmp_path.iterdir())


def test_interruption_says_how_to_go_on(
    converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "run", interrupted)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"heal: {{data: {{source: '{text}'}}, distill: {{tokens: 1}}, heldout_tokens: 256}}")
    code, _, stderr = run(
        "heal", converted, "-o", tmp_path / "out", "--recipe", recipe, *STAGE, "--device", "cpu"
    )
    assert code == 130 and "goes on from the last saved state" in stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_converts_and_heals(tiny_base: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        "convert: {full_layers: [0, 3], block_size: 4, topk: 2, window: 8, align: false}\n"
        "heal: {data: {source: x}, distill: {tokens: 256, sequence_length: 32, batch_tokens: 128},\n"
        "       heldout_tokens: 256}\n"
    )
    arguments = ("run", recipe, "-o", out, "--base", tiny_base("llama"), "--data", text, "--device", "cpu")
    code, stdout, stderr = run(*arguments, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["tokens"] == 256
    assert (out / "config.json").is_file() and (tmp_path / "out-converted" / "config.json").is_file()
    code, _, stderr = run(*arguments)
    assert code == 2 and "--force" in stderr


def test_convert_heals_by_a_recipe_in_one_go(
    tiny_base: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        "convert: {uniform: 1}\n"  # the command line's options count, not these
        "heal: {data: {source: x}, distill: {tokens: 256, sequence_length: 32, batch_tokens: 128},\n"
        "       heldout_tokens: 256}\n"
    )
    options = (
        "--plan",
        "F S0 W F",
        "--block-size",
        4,
        "--topk",
        2,
        "--window",
        8,
        "--no-align",
        "--device",
        "cpu",
    )
    arguments = ("convert", tiny_base("llama"), "-o", out, *options, "--heal", recipe, "--data", text)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "run", interrupted)
        code, _, stderr = run(*arguments)
    assert code == 130 and "goes on from the last saved state" in stderr and not out.exists()
    converted = tmp_path / "out-converted"
    written = (converted / "model.safetensors").stat().st_mtime_ns
    code, stdout, stderr = run(*arguments)
    assert code == 0 and f"saved to {out}" in stdout and "is there already and used again" in stderr, stderr
    assert (converted / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads((out / "heal.json").read_text())["tokens"] == 256
    code, stdout, _ = run("inspect", out)
    assert code == 0 and "F S0 W F" in stdout
    shutil.rmtree(converted)
    code, _, stderr = run(*arguments)
    assert code == 2 and "--force" in stderr and not converted.exists()  # before anything is converted
    code, stdout, stderr = run(*arguments, "--force", "--json")
    assert code == 0 and json.loads(stdout)["tokens"] == 256, stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "x"), "--data is about healing; give a recipe with --heal"),
        (("--restart",), "--restart is about healing"),
        (("--heal", "none.yaml"), "none.yaml cannot be read"),
    ],
)
def test_convert_checks_the_recipe_before_it_converts(
    tiny_base: Callable[..., Path], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, stderr = run("convert", tiny_base("llama"), "-o", tmp_path / "out", "--uniform", "1:1", *options)
    assert code == 2 and message in stderr and stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_recipes_that_come_along_are_valid() -> None:
    from hyconvert.recipe import Recipe

    found = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(found) >= 2
    for path in found:
        recipe = Recipe.load(path)
        assert recipe.convert is not None and recipe.base, path
        assert path.read_text().startswith("# "), "it opens with its command, cost and result"


def test_the_gates_of_the_recipes_are_no_looser_than_the_default(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyconvert.errors import DataError
    from hyconvert.evaluation import run as evaluation
    from hyconvert.evaluation.limits import Limits

    def stopped(*_: object, **__: object) -> None:
        raise DataError("nothing is measured here")

    monkeypatch.setattr(evaluation, "evaluate", stopped)
    default = Limits()
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        limits = Limits.load(path)
        for name in Limits.model_fields:
            ours, theirs = getattr(limits, name), getattr(default, name)
            if theirs is not None:
                assert ours is not None, (path, name)
                assert ours >= theirs if name == "agreement" else ours <= theirs, (path, name)
        code, _, stderr = run("eval", converted, "--gate", "--limits", path)
        assert code == 2 and "nothing is measured here" in stderr  # the limits were read before
