"""The command line. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hyconvert import cli_bench, cli_eval, cli_heal, cli_planning
from hyconvert.errors import PlanError, RecipeError
from hyconvert.options import (
    Device,
    Json,
    parse_layers,
    parse_ratio,
    parse_share,
    show,
    user_facing,
    warn,
)

app = typer.Typer(
    name="hyconvert",
    help="Convert a pretrained full-attention language model into a HySparse model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
@user_facing
def convert(
    base: Annotated[str, typer.Argument(help="Hugging Face id, folder with safetensors, or .gguf file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the converted model to.")],
    uniform: Annotated[
        str | None, typer.Option(help="Uniform plan 1:N, N sparse layers per full layer.")
    ] = None,
    full_layers: Annotated[
        str | None,
        typer.Option(help="Layers that stay full, such as 0,1,7 or 0-2,7; others read the nearest before."),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="A plan.json, or a layer map such as 'F*3 S2*4 F W*2'.")
    ] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(help="Without a plan: share of the base's KV that may stay.  [default: 25%]"),
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="Without a plan: folder of measured costs.  [default: OUT.costs]")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Keys per block.  [default: the plan's, or 64]")
    ] = None,
    topk: Annotated[
        int | None, typer.Option(help="Blocks read per query.  [default: the plan's, or 16]")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Window in tokens.  [default: the plan's, or 128]")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="merge or sigmoid.  [default: the plan's, or merge]")
    ] = None,
    sinks: Annotated[
        bool | None, typer.Option("--sinks/--no-sinks", help="Learnable sinks in the branches.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text to align on: file, folder or Hub dataset.  [default: built-in text]"),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=64, help="Tokens to align on.")] = 65_536,
    calibration_column: Annotated[str, typer.Option(help="Text column of a dataset.")] = "text",
    calibration_retrieval: Annotated[
        float, typer.Option(min=0, max=1, help="Share of it with synthetic facts and repeats strewn in.")
    ] = 1.0,
    calibration_repeats: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of these that repeats passages.")
    ] = 0.2,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=64, help="Tokens per sequence.  [default: 2048, or the base's positions if fewer]"),
    ] = None,
    align: Annotated[bool, typer.Option("--align/--no-align", help="Align in closed form.")] = True,
    dtype: Annotated[
        str, typer.Option(help="auto keeps the checkpoint's; float32, bfloat16, float16.")
    ] = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the rows that alignment samples.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.")] = None,
    max_shard_size: Annotated[float, typer.Option(min=0.001, help="Largest shard in GB.")] = 5.0,
    heal: Annotated[
        Path | None,
        typer.Option(help="Heal by this recipe too; the converted model is kept as OUT-converted."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to train on with --heal.  [default: the recipe's]")
    ] = None,
    restart: cli_heal.Restart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Choose the full layers, rewire the others, align them in closed form, save."""
    from hyconvert import conversion
    from hyconvert.align import FitSettings
    from hyconvert.inspection import layer_table
    from hyconvert.progress import on_stderr, silent

    chosen: dict[str, Any] = {
        "plan": plan,
        "uniform": parse_ratio(uniform),
        "full_layers": parse_layers(full_layers),
        "block_size": block_size,
        "topk": topk,
        "window": window,
        "gate": gate,
        "sinks": sinks,
    }
    planned = any((plan, uniform, full_layers))
    if heal is None and (data or restart):
        raise RecipeError(f"{'--data' if data else '--restart'} is about healing; give a recipe with --heal")
    healing = None
    if heal is not None:
        from hyconvert.recipe import Recipe

        healing = Recipe.load(heal, data={"source": data}).heal
    if dry_run and not planned:
        raise PlanError(
            "no plan is given, so converting would first measure every layer; run hyconvert measure and hyconvert plan "
            "to see what it chooses, or give --plan, --full-layers or --uniform"
        )
    if dry_run:
        from hyconvert.checkpoint import open_source
        from hyconvert.modeling import HyConvertConfig
        from hyconvert.modeling.families import family_of_base

        source = open_source(base, revision=revision, dtype=dtype)
        family_of_base(source)
        made = conversion.make_plan(source.config, **chosen)
        warn(conversion.kernel_warnings(source.config, made))
        show(layer_table(HyConvertConfig.from_base(source.config, made)), as_json)
        return
    budget = parse_share(kv_budget, "--kv-budget")
    if not planned and not as_json:
        print("No plan is given: measuring what each layer would cost, then choosing.", file=sys.stderr)
    command = shlex.join(["hyconvert", *sys.argv[1:]])
    progress = silent if as_json else on_stderr

    def convert_to(folder: Path) -> conversion.ConversionReport:
        return conversion.convert(
            base,
            folder,
            kv_budget=budget,
            costs=costs,
            align_layers=align,
            calibration=conversion.Calibration(
                calibration,
                calibration_tokens,
                sequence_length,
                calibration_column,
                calibration_retrieval,
                calibration_repeats,
            ),
            fit=FitSettings(seed=seed),
            dtype=dtype,
            device=device,
            force=force,
            revision=revision,
            max_shard_bytes=int(max_shard_size * 1e9),
            command=command,
            progress=progress,
            **chosen,
        )

    if healing is not None:
        from hyconvert.heal.options import convert_and_heal

        with cli_heal.resumable():
            healed = convert_and_heal(
                convert_to, healing, out, device=device, force=force, restart=restart, command=command,
                progress=progress,
            )  # fmt: skip
        show(healed, as_json)
        return
    report = convert_to(out)
    warn(report.warnings)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    if report.planning:
        print(f"the costs are in {costs or f'{out}.costs'}; hyconvert plan answers other budgets from them")
    print(report.plan.line)
    if report.perplexity:
        base_ppl, ours = report.perplexity["base"], report.perplexity["converted"]
        figures = f"base {base_ppl:.2f}, converted {ours:.2f} ({ours / base_ppl:.3f}x)"
        print(f"perplexity on held-out calibration text: {figures}")
    print(f"saved to {out} in {report.seconds:.0f} s")


app.command()(cli_planning.measure)
app.command()(cli_planning.plan)
app.command()(cli_heal.heal)
app.command()(cli_heal.run)


@app.command()
@user_facing
def inspect(
    path: Annotated[str, typer.Argument(help="Converted model, folder or Hub id.")],
    as_json: Json = False,
) -> None:
    """Show the layer map, and what the KV cache weighs against the base's."""
    from hyconvert.inspection import inspect_path

    show(inspect_path(path), as_json)


app.command("eval")(cli_eval.evaluate)
app.command()(cli_eval.chat)
app.command()(cli_bench.bench)


def main() -> None:
    """Entry point of the `hyconvert` command."""
    app()


if __name__ == "__main__":
    main()
