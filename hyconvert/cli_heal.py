"""The commands `heal` and `run`. Heavy imports stay inside them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hyconvert.options import Device, Json, show, user_facing

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write the healed model to.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Forget an unfinished run; otherwise it is gone on with.")
]


@user_facing
def heal(
    path: Annotated[str, typer.Argument(metavar="CONVERTED", help="Folder that `hyconvert convert` wrote.")],
    out: Out,
    data: Annotated[
        str | None,
        typer.Option(help="Text to train on: file, folder, Hub dataset, pydoc or stdlib-packages."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Its text column.  [default: text]")] = None,
    chat: Annotated[
        str | None, typer.Option(help="A column of chats instead; the assistant's words are trained on.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hub dataset.  [default: train]")] = None,
    retrieval: Annotated[
        float | None,
        typer.Option(help="Share of its rows with facts, questions and repeats strewn in.  [default: 0]"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe whose section `heal` is used; options go over it.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Base that teaches.  [default: the one recorded at conversion]")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, such as 8M.  [default: 8M]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per row.  [default: 4096, or what the model was made for]")
    ] = None,
    batch_tokens: Annotated[
        str | None, typer.Option(help="Tokens per optimiser step, over all processes.  [default: 32,768]")
    ] = None,
    micro_tokens: Annotated[
        str | None,
        typer.Option(help="Tokens per forward pass and device.  [default: 32,768; 2,048 on a CPU]"),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of converted attention; the others follow it.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters; for one small GPU.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations; saves memory.")
    ] = False,
    precision: Annotated[str | None, typer.Option(help="bf16, fp32 or auto.  [default: auto]")] = None,
    tracker: Annotated[str | None, typer.Option(help="Log to tensorboard or wandb too.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of the text.  [default: 0]")] = None,
    device: Device = "auto",
    restart: Restart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the recipe; train nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Bring the quality of a converted model back by brief training, taught by its base."""
    from hyconvert.heal.options import heal_recipe
    from hyconvert.progress import on_stderr, silent

    chosen = heal_recipe(
        path,
        recipe,
        {
            "data": {
                "source": data,
                "column": column,
                "chat": chat,
                "subset": subset,
                "split": split,
                "retrieval": retrieval,
            },
            "teacher": teacher,
            "micro_tokens": micro_tokens,
            "lora": {} if lora else None,
            "gradient_checkpointing": gradient_checkpointing or None,
            "precision": precision,
            "tracker": tracker,
            "seed": seed,
        },
        {"tokens": tokens, "sequence_length": sequence_length, "batch_tokens": batch_tokens, "lr": lr},
    )
    from hyconvert import heal as healing

    if dry_run:
        from hyconvert.evaluate import pick_device

        healing.check(path, chosen, pick_device(device))
        print(json.dumps(chosen.model_dump(mode="json", exclude_none=True), indent=2))
        return
    with resumable():
        report = healing.heal(
            path,
            out,
            chosen,
            device=device,
            force=force,
            restart=restart,
            command=shlex.join(["hyconvert", *sys.argv[1:]]),
            progress=silent if as_json else on_stderr,
        )
    show(report, as_json)


@user_facing
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe with the sections `convert` and `heal`.")],
    out: Out,
    base: Annotated[str | None, typer.Option(help="Base to convert.  [default: the recipe's]")] = None,
    data: Annotated[str | None, typer.Option(help="Text to train on.  [default: the recipe's]")] = None,
    device: Device = "auto",
    restart: Restart = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert and heal in one go, as a recipe says; the converted model is kept as OUT-converted."""
    from hyconvert.heal.options import run_recipe
    from hyconvert.progress import on_stderr, silent
    from hyconvert.recipe import Recipe

    with resumable():
        report = run_recipe(
            Recipe.load(recipe, data={"source": data}),
            out,
            base=base,
            device=device,
            force=force,
            restart=restart,
            command=shlex.join(["hyconvert", *sys.argv[1:]]),
            progress=silent if as_json else on_stderr,
        )
    show(report, as_json)


@contextmanager
def resumable() -> Iterator[None]:
    """Say on Ctrl-C that the work so far is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        print("hyconvert: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        raise typer.Exit(130) from None
