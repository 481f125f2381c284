"""`hyconvert eval` and `hyconvert chat`. Heavy imports stay inside them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hyconvert.options import Device, Json, parse_count, show, user_facing


@user_facing
def evaluate(
    path: Annotated[str, typer.Argument(metavar="CONVERTED", help="Converted model, folder or Hub id.")],
    base: Annotated[
        str | None,
        typer.Option(help="Base to compare with: Hub id, folder or .gguf.  [default: the recorded one]"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text: file, folder, Hub dataset.  [default: stdlib-docstrings]"),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Text column of a dataset.  [default: text]")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to measure on.  [default: 16k]")] = None,
    sequence_length: Annotated[
        str | None, typer.Option(help="Tokens per sequence, such as 4k.  [default: 2k]")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(help="What to measure.  [default: text,retrieval,generation,branches,speed]"),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Lengths of retrieval prompts, such as 1k,4k.  [default: 1k, 2k, ... to T]"),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Where facts lie, such as 0.1,0.5,0.9.  [default: five]")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Retrieval prompts per length.  [default: 4]")] = None,
    generations: Annotated[
        int | None, typer.Option(help="Greedy continuations to compare.  [default: 8]")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens of each.  [default: 64]")] = None,
    by_layer: Annotated[
        bool | None, typer.Option("--by-layer/--no-by-layer", help="Ablate every layer alone too.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first impression; under a minute.")] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with 1 if the model breaks a limit.")] = False,
    limits: Annotated[
        Path | None,
        typer.Option(help="Limits for --gate: YAML or JSON, or a recipe with a section 'gate'."),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(help="Folder of measured costs, to name the layers to make full next."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", "-o", help="Write REPORT.html, and the same as REPORT.json.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Put the numbers into the converted model's card.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(help="Run tasks of lm-evaluation-harness, and --parts only if they are given."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task.  [default: all]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per batch of a task.  [default: 8]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of retrieval prompts.  [default: 0]")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of both; auto is the converted checkpoint's.")] = "auto",
    as_json: Json = False,
) -> None:
    """A converted model beside its base: quality on the same tokens, retrieval, own text, branches, KV, speed."""
    from hyconvert.evaluation.limits import Limits
    from hyconvert.evaluation.settings import EvalSettings

    chosen = EvalSettings.create(
        quick=quick,
        parts=_names(parts) if parts or not tasks else (),
        data=data,
        column=column,
        tokens=tokens and parse_count(tokens, "--tokens"),
        sequence_length=sequence_length and parse_count(sequence_length, "--sequence-length"),
        lengths=tuple(parse_count(x, "--lengths") for x in lengths.split(",")) if lengths else None,
        depths=_names(depths),
        prompts=prompts,
        generations=generations,
        new_tokens=new_tokens,
        by_layer=by_layer,
        seed=seed,
        tasks=_names(tasks),
        task_limit=limit,
        batch_size=batch_size,
    )
    bounds = Limits.load(limits) if limits else Limits() if gate else None

    from hyconvert.evaluation import output
    from hyconvert.evaluation.run import evaluate as run
    from hyconvert.progress import on_stderr, silent

    output.check_writable(path, report, card)
    progress = silent if as_json else on_stderr
    command = shlex.join(["hyconvert", *sys.argv[1:]])
    result = run(
        path, base=base, settings=chosen, device=device, dtype=dtype, command=command, progress=progress
    )
    if bounds is not None:
        from hyconvert.evaluation.verdict import judge
        from hyconvert.inspection import read_config

        result.verdict = judge(result, bounds, read_config(path), path, costs)
    output.write(result, path, report, card)
    show(result, as_json)
    if result.verdict is not None and not result.verdict.passed:
        raise typer.Exit(1)


def _names(text: str | None) -> tuple[Any, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


@user_facing
def chat(
    path: Annotated[str, typer.Argument(metavar="CONVERTED", help="Converted model, folder or Hub id.")],
    base: Annotated[bool, typer.Option("--base", help="Let the base answer too.")] = False,
    base_path: Annotated[
        str | None, typer.Option(help="Where the base is, if it has moved; implies --base.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of both; auto is the converted checkpoint's.")] = "auto",
) -> None:
    """Talk to a converted model, and see what its KV cache holds; --base lets the base answer beside it."""
    from hyconvert.evaluation.chat import chat as talk

    talk(
        path, base=base_path or base, system=system, max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
