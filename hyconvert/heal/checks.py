"""What healing checks before anything heavy starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from hyconvert.checkpoint import Source, open_source
from hyconvert.errors import CheckpointError, HealError
from hyconvert.inspection import read_config
from hyconvert.recipe import HealRecipe

_PROBE = "The quick brown fox: déjà vu, 12 345.67 — naïve\n\tdef f(x): return x ** 2\n北京 🙂"


@dataclass(frozen=True)
class Checked:
    """What was found to be in order before anything heavy starts.

    Attributes:
        converted: the checkpoint to heal.
        config: its config.
        teacher: its base, opened in the dtype to compute in.
        compute: bfloat16 or float32.
    """

    converted: Source
    config: Any
    teacher: Source
    compute: torch.dtype


def check(path: str | Path, recipe: HealRecipe, device: torch.device) -> Checked:
    """Check checkpoint, teacher, tokenizer and lengths, reading no more than headers.

    Raises:
        HyconvertError: something does not fit; the message says what to do.
    """
    config = read_config(str(path))
    compute = compute_dtype(recipe, device)
    converted = open_source(path)
    plan, name = config.get_plan(), recipe.teacher or config.get_plan().base
    if name is None:
        raise CheckpointError(f"{path} does not say what it was converted from; name its base with --teacher")
    try:
        teacher = open_source(name, dtype=compute)
    except CheckpointError as error:
        if recipe.teacher:
            raise
        raise CheckpointError(
            f"the base of {path} cannot be opened: {error}; name it with --teacher"
        ) from error
    if teacher.config.model_type != config.family.model_type or any(
        teacher.shapes.get(key) != shape for key, shape in converted.shapes.items() if key in teacher.shapes
    ):
        raise CheckpointError(
            f"teacher {name} and {path} have different shapes; name the base it was converted from"
        )
    if (
        not recipe.teacher
        and (known := _recorded_fingerprint(converted.path))
        and known != teacher.fingerprint
    ):
        raise CheckpointError(
            f"{name} is no longer what {path} was converted from; name the base with --teacher (that very path, if it "
            "shall teach nevertheless)"
        )
    ours, theirs = converted.load_tokenizer(), teacher.load_tokenizer()
    if ours.get_vocab() != theirs.get_vocab() or ours(_PROBE)["input_ids"] != theirs(_PROBE)["input_ids"]:
        raise CheckpointError(
            f"teacher {name} has another tokenizer than {path}, so their logits cannot be compared; name its base"
        )
    limit = getattr(config, "max_position_embeddings", None)
    for stage_name, stage in recipe.stages():
        if limit and stage.sequence_length > limit:
            raise HealError(
                f"{stage_name}: sequences of {stage.sequence_length} tokens are longer than the {limit} that the model "
                "was made for; use a smaller --sequence-length"
            )
    if recipe.layerwise and not any(layer.kind in ("sparse", "reuse", "window") for layer in plan.layers):
        raise HealError(f"{path} has no converted layer, so there is nothing for the stage layerwise")
    return Checked(converted, config, teacher, compute)


def compute_dtype(recipe: HealRecipe, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in."""
    mixed = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if mixed else torch.float32


def check_processes(recipe: HealRecipe, accelerator: Any) -> None:
    """Check that the processes can share the work.

    Raises:
        HealError: they cannot share a step evenly, or what is asked for does not work under FSDP.
    """
    world = accelerator.num_processes
    for name, stage in recipe.stages():
        if stage.rows % world:
            raise HealError(
                f"{name}: a step has {stage.rows} rows of {stage.sequence_length} tokens, which {world} processes "
                "cannot share evenly; change --batch-tokens"
            )
    if is_fsdp(accelerator) and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise HealError("FSDP version 1 is not supported; launch with --fsdp_version 2, or under DDP")
    if is_fsdp(accelerator) and (recipe.lora or recipe.layerwise):
        raise HealError(
            "under FSDP neither --lora nor the stage layerwise is available; use DDP or leave them out"
        )


def check_space(checked: Checked, recipe: HealRecipe, work: Path) -> None:
    """Check that the disk holds the tokenised text and two saved states, the last good one and the next.

    Raises:
        HealError: it does not.
    """
    weights = sum(prod(shape) for shape in checked.converted.shapes.values())
    states = 0 if recipe.save_every == 0 or recipe.steps < 2 else 2 * 3 * 4 * weights
    needed, place = states + 5 * recipe.tokens, work
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise HealError(
            f"{work} would need {needed / 1e9:.2f} GB for text and saved states, but its disk has only "
            f"{free / 1e9:.2f} GB free; free some space or choose another disk"
        )


def is_fsdp(accelerator: Any) -> bool:
    """Whether parameters are sharded over processes."""
    return str(accelerator.distributed_type).endswith("FSDP")


def _recorded_fingerprint(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "conversion.json").read_text()).get("fingerprint")
    except (OSError, ValueError):
        return None
    return str(found) if found else None
