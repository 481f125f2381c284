"""`hyconvert bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyconvert.options import Device, Json, parse_count, parse_ratio, show, user_facing


@user_facing
def bench(
    target: Annotated[
        str,
        typer.Argument(
            help="Converted model, base, or a shape with random weights: Qwen3-8B, Llama-3.1-8B, Qwen3-30B-A3B, "
            "HySparse-7B, HySparse-80B-A3B, SmolLM2-135M."
        ),
    ],
    base: Annotated[bool, typer.Option("--base", help="Time the dense model too, and compare.")] = False,
    uniform: Annotated[
        list[str] | None, typer.Option(help="For a base or a shape: uniform plan 1:N; repeatable.")
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="For a base or a shape: plan.json or layer map; repeatable.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batches, such as 1,8,64.")] = "1,8",
    context: Annotated[str, typer.Option(help="Tokens before what is timed, such as 8k,32k.")] = "8k,32k",
    what: Annotated[
        str, typer.Option(help="What to time; throughput is at the largest batch that fits.")
    ] = "prefill,decode,throughput",
    overlap: Annotated[
        str,
        typer.Option(
            help="Selections in prompts: own (the model's), or text (synthetic, neighbours share most blocks)."
        ),
    ] = "own",
    steps: Annotated[int, typer.Option(min=1, help="Tokens per timing.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timings; the median counts.")] = 3,
    block_size: Annotated[int | None, typer.Option(help="Keys per block.  [default: 64]")] = None,
    topk: Annotated[int | None, typer.Option(help="Blocks read per query.  [default: 16]")] = None,
    window: Annotated[int | None, typer.Option(help="Window in tokens.  [default: 128]")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the rows as JSON, one by one.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the times to this .svg, .png or .pdf.")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto is bfloat16 on a GPU, float32 elsewhere.")] = "auto",
    kv_dtype: Annotated[
        str | None,
        typer.Option(help="fp8: keys and values of full and reuse layers in FP8.  [default: --dtype]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time prompts, steps and throughput, dense and converted on the same decode loop."""
    from hyconvert.bench import Grid, find_subjects
    from hyconvert.bench import bench as run
    from hyconvert.progress import on_stderr, silent

    def counts(text: str, option: str) -> tuple[int, ...]:
        return tuple(parse_count(part.strip(), option) for part in text.split(","))

    grid = Grid(
        batches=counts(batch, "--batch"), contexts=counts(context, "--context"),
        what=tuple(part.strip() for part in what.split(",")), steps=steps, repeats=repeats, overlap=overlap,
    )  # fmt: skip
    ratios = [ratio for text in uniform or [] if (ratio := parse_ratio(text)) is not None]
    subjects = find_subjects(
        target, uniform=ratios, plans=plan or [], base=base, block_size=block_size, topk=topk, window=window
    )
    report = run(
        target,
        subjects,
        grid,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        file=out,
        progress=silent if as_json else on_stderr,
    )
    if plot is not None:
        report.plot(plot)
    show(report, as_json)
