"""From options and recipe files to what is run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyconvert.checkpoint.staging import StagedFolder
from hyconvert.conversion import Calibration, ConversionReport, convert
from hyconvert.errors import HealError, RecipeError
from hyconvert.heal.report import HealReport
from hyconvert.heal.run import heal
from hyconvert.inspection import read_config
from hyconvert.options import warn
from hyconvert.progress import Progress, silent
from hyconvert.recipe import HealRecipe, Recipe, merged, validated

DEFAULT_TOKENS = 8_000_000
DEFAULT_LENGTH = 4096


def heal_recipe(
    path: str, recipe: Path | None, settings: dict[str, Any], stage: dict[str, Any]
) -> HealRecipe:
    """The recipe that a command line describes.

    Args:
        path: the converted checkpoint, whose context bounds the default sequence length.
        recipe: a file whose `heal` section the options go over; None starts from one stage, `distill`.
        settings: of the recipe; None is left out.
        stage: of the stage `distill`.

    Raises:
        HyconvertError: something is not valid, or no text is named.
    """
    if any(value is not None for value in stage.values()):
        settings = settings | {"distill": stage}
    if recipe is not None:
        return Recipe.load(recipe, **settings).heal
    if settings["data"]["source"] is None:
        raise RecipeError("say what to train on: --data FILE, FOLDER or HUB_ID, or a --recipe that does")
    limit = getattr(read_config(path), "max_position_embeddings", None) or DEFAULT_LENGTH
    defaults = {"tokens": DEFAULT_TOKENS, "sequence_length": min(DEFAULT_LENGTH, limit)}
    data = merged({"distill": defaults}, settings)
    result: HealRecipe = validated(HealRecipe, data, "options")
    return result


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    base: str | None = None,
    device: str = "auto",
    force: bool = False,
    restart: bool = False,
    command: str | None = None,
    progress: Progress = silent,
) -> HealReport:
    """Convert and heal as a recipe says; see `convert_and_heal`.

    Args:
        recipe: both sections.
        out: the folder to write the healed model to.
        base: in place of the recipe's.
        device: where.
        force: replace an existing `out`, and convert again.
        restart: forget what an unfinished run has done.
        command: the command line to put into the model cards.
        progress: told about each stage.

    Raises:
        HyconvertError: something cannot be used.
    """
    name = base or recipe.base
    if recipe.convert is None or name is None:
        missing = "section 'convert'; heal a converted model with `hyconvert heal --recipe`"
        raise HealError(
            f"the recipe has no {missing if recipe.convert is None else 'base; name one with --base'}"
        )
    options: dict[str, Any] = {"device": device, "command": command, "progress": progress}
    return convert_and_heal(
        lambda folder: convert_by(recipe, name, folder, force=force, **options),
        recipe.heal,
        out,
        force=force,
        restart=restart,
        **options,
    )


def convert_and_heal(
    convert_to: Callable[[Path], ConversionReport],
    recipe: HealRecipe,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> HealReport:
    """Convert and heal. A conversion that is there already, under `<out>-converted`, is used again.

    Args:
        convert_to: converts into the folder that it is given.
        recipe: how to heal.
        out: the folder to write the healed model to.
        force: replace an existing `out`, and convert again.
        progress: told about each stage.
        **options: `device`, `restart` and `command` of `heal`.

    Raises:
        HyconvertError: something cannot be used.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise HealError(
            "converting is for one process; launch `hyconvert heal --recipe` on the converted model instead"
        )
    # Refused now rather than at the end.
    StagedFolder(out, force=force, base=None, expected_bytes=None).discard()
    converted = converted_folder(out)
    if force or not (converted / "config.json").is_file():
        warn(convert_to(converted).warnings)
    else:
        with progress(f"{converted} is there already and used again", total=1) as step:
            step()
    return heal(converted, out, recipe, force=force, progress=progress, **options)


def converted_folder(out: Path) -> Path:
    """Where the converted model is kept that the healed one comes from."""
    return out.with_name(f"{out.name}-converted")


def convert_by(recipe: Recipe, base: str, out: Path, **options: Any) -> ConversionReport:
    """Convert a base as the section `convert` of a recipe says.

    Args:
        recipe: with that section.
        base: to convert.
        out: the folder to write.
        **options: `device`, `force`, `command` and `progress` of `hyconvert.convert`.
    """
    assert recipe.convert is not None
    settings = recipe.convert.model_dump(exclude={"calibration"}, exclude_none=True)
    calibration = Calibration(**recipe.convert.calibration.model_dump())
    return convert(base, out, calibration=calibration, **settings, **options)
