"""`hyconvert measure` and `hyconvert plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hyconvert.options import (
    Device,
    Json,
    parse_count,
    parse_pins,
    parse_ratio,
    parse_share,
    parse_tasks,
    show,
    user_facing,
)


@user_facing
def measure(
    base: Annotated[str, typer.Argument(help="Hugging Face id, folder with safetensors, or .gguf file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the costs.")],
    block_size: Annotated[int | None, typer.Option(help="Keys per block.  [default: 64]")] = None,
    topk: Annotated[int | None, typer.Option(help="Blocks read per query.  [default: 16]")] = None,
    window: Annotated[int | None, typer.Option(help="Window in tokens.  [default: 128]")] = None,
    gate: Annotated[str | None, typer.Option(help="merge or sigmoid.  [default: merge]")] = None,
    sinks: Annotated[bool | None, typer.Option("--sinks/--no-sinks", help="Learnable sinks.")] = None,
    kinds: Annotated[
        str | None, typer.Option(help="Kinds tried beside full.  [default: window,sparse]")
    ] = None,
    span: Annotated[int | None, typer.Option(help="Farthest source, in layers.  [default: any]")] = None,
    oracles: Annotated[
        int | None,
        typer.Option(help="Try only this many layers as sources.  [default: all; 6 on the CPU]"),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per sequence.  [default: 4096; 1024 on the CPU]")
    ] = None,
    fit_tokens: Annotated[
        int | None, typer.Option(help="Tokens to align on.  [default: 16384; 4096 on the CPU]")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help="Sequences to measure on.  [default: 16; 2 on the CPU]")
    ] = None,
    positions: Annotated[
        int | None,
        typer.Option(help="Tokens per sequence where KL is taken.  [default: 512; 192 on the CPU]"),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(help="Questions per prompt and task; 0 for none.  [default: 4; 3 on the CPU]"),
    ] = None,
    decoys: Annotated[int | None, typer.Option(help="Decoys per prompt.  [default: 8]")] = None,
    copies: Annotated[
        int | None, typer.Option(help="Repeated passages per prompt; 0 for none.  [default: 4; 2 on the CPU]")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text: file, folder or Hub dataset.  [default: built-in text]")
    ] = None,
    calibration_column: Annotated[str, typer.Option(help="Text column of a dataset.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of prompts, positions and rows.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto is bfloat16 on a GPU, else the checkpoint's.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace other costs in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what converting each layer alone would cost; goes on where it was interrupted."""
    from hyconvert.measure import measure as run
    from hyconvert.planning import CostReport
    from hyconvert.progress import on_stderr, silent

    costs = run(
        base, out, device=device, dtype=dtype, revision=revision, force=force,
        progress=silent if as_json else on_stderr, block_size=block_size, topk=topk, window=window, gate=gate,
        sinks=sinks, kinds=tuple(kinds.split(",")) if kinds else None, span=span, oracles=oracles,
        sequence_length=sequence_length, fit_tokens=fit_tokens, prompts=prompts, positions=positions,
        questions=questions, decoys=decoys, copies=copies, calibration=calibration,
        column=calibration_column, seed=seed,
    )  # fmt: skip
    show(CostReport(costs, out), as_json)


@user_facing
def plan(
    costs: Annotated[Path, typer.Argument(help="Folder that hyconvert measure wrote.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this plan.json.")] = None,
    kv_budget: Annotated[
        str | None, typer.Option(help="Most KV bytes, as a share of the base's such as 25%.")
    ] = None,
    full_layers: Annotated[int | None, typer.Option(help="Most layers that stay full.")] = None,
    ratio: Annotated[str | None, typer.Option(help="1:N, N other layers per full layer.")] = None,
    kv_bytes_per_token: Annotated[int | None, typer.Option(help="Most bfloat16 KV bytes per token.")] = None,
    context: Annotated[str, typer.Option(help="Tokens at which KV bytes count.")] = "32k",
    pin: Annotated[
        list[str] | None, typer.Option(help="Kind of a layer, such as 0=full or 3-5=window; repeatable.")
    ] = None,
    farthest: Annotated[int | None, typer.Option(min=1, help="Farthest source, in layers.")] = None,
    windows: Annotated[
        bool, typer.Option("--windows/--no-windows", help="Allow layers with a window alone.")
    ] = True,
    reuse: Annotated[
        bool, typer.Option("--reuse/--no-reuse", help="Allow reuse layers, which keep all their KV.")
    ] = False,
    readers: Annotated[int | None, typer.Option(min=1, help="Most layers that read one source.")] = None,
    retrieval: Annotated[float, typer.Option(min=0, help="Weight of retrieval against KL.")] = 1.0,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Retrieval tasks that count, such as copy or needle,copy; repeatable.  [default: all measured]"
        ),
    ] = None,
    refine: Annotated[
        int, typer.Option(min=0, help="Measure the whole plan, and up to this many rivals and swaps.")
    ] = 0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Show the best plan for every number of full layers.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Choose every layer's kind and source: the least measured damage within a budget."""
    from hyconvert import planning
    from hyconvert.progress import on_stderr, silent
    from hyconvert.solve import Rules

    tokens = parse_count(context, "--context")
    rules = Rules(
        pinned=parse_pins(pin or []),
        span=farthest,
        kinds=frozenset({"sparse", *(["window"] if windows else []), *(["reuse"] if reuse else [])}),
        readers=readers,
        retrieval=retrieval,
        tasks=parse_tasks(tasks),
    )
    table, config = planning.read_costs(costs)
    if sweep:
        found: Any = planning.sweep(table, config, tokens, rules)
        show(found, as_json)
        planning.save_sweep(found, costs)
        return
    budget = planning.make_budget(
        config, kv_budget=parse_share(kv_budget, "--kv-budget"), full_layers=full_layers,
        ratio=parse_ratio(ratio, "--ratio"), kv_bytes_per_token=kv_bytes_per_token, context=tokens,
    )  # fmt: skip
    report = planning.choose(
        table, config, budget, rules, tries=refine, device=device, progress=silent if as_json else on_stderr
    )
    if out is not None:
        report.solution.plan.save(out)
    show(report, as_json)
