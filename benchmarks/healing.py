"""Quality against tokens of healing, for several conversions of one base, and how fast it trains.

    python -m benchmarks.healing MODEL.gguf --train train.jsonl.xz --heldout heldout.jsonl.xz --tokens 8M

Every variant is converted, healed on the same tokens in the same order, and measured on held-out text beside the base.
`--plans benchmarks/results/planning.json --full 7` takes the plans of `benchmarks.planning` as variants. `base`
fine-tunes the base itself (cross-entropy, the base's own Transformers class with its fastest attention) in the same
loop with the same settings, for its tokens per second. Rows are printed and saved as they come; with `--append` several
runs, also at the same time, share one file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from hyconvert.checkpoint import open_source
from hyconvert.conversion import Calibration, convert, dense_plan, load_base_as
from hyconvert.data import read_texts, token_blocks
from hyconvert.evaluate import device_name, perplexity, pick_device
from hyconvert.evaluation.output import write_file
from hyconvert.heal import heal
from hyconvert.heal.engine import Engine
from hyconvert.heal.objective import Healing
from hyconvert.heal.run import accelerator_of
from hyconvert.heal.tokens import build_streams
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.loading import load, quiet_loading
from hyconvert.modeling import HyConvertConfig, family_of
from hyconvert.plan import Plan, nearest_sources, parse_line, uniform_full_layers
from hyconvert.progress import on_stderr, silent
from hyconvert.recipe import HealRecipe, merged, parse_count, validated
from hyconvert.retrieval import Prompts, Score, by_task, make_prompts, score_answers

FULL_LAYERS = "F*3 S2*4 F S7*8 F S16 F S18 F S20*9"
DEPTHS = (0.1, 0.35, 0.6, 0.85)
KV_TOKENS = 32_768
"""Cached tokens at which a row's `kv` says how many times smaller than the base's the KV cache is."""

VARIANTS = ("plan", "unaligned", "uniform", "sigmoid", "window", "reuse", "base")


def main() -> None:
    """Heal the chosen variants, and save a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="base: Hub id, folder or .gguf")
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--heldout", required=True, help="text to measure on")
    parser.add_argument("--only", help="of JSON lines: rows whose 'source' begins with this")
    parser.add_argument("--plan", default=FULL_LAYERS, help="a plan.json or a layer map")
    parser.add_argument("--variants", nargs="+", default=["plan"], choices=VARIANTS)
    parser.add_argument(
        "--plans", help="rows of `benchmarks.planning`, whose plans are variants in place of those"
    )
    parser.add_argument(
        "--full", type=int, nargs="+", help="full layers of the plans to take from there  [default: all]"
    )
    parser.add_argument("--rules", nargs="+", help="their rules, such as 'uniform'  [default: all]")
    parser.add_argument("--tokens", type=parse_count, default=8_000_000)
    parser.add_argument("--length", type=int, default=4096, help="T")
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--calibration", help="text to align on  [default: the built-in text]")
    parser.add_argument("--calibration-tokens", type=parse_count, default=65_536)
    parser.add_argument("--eval-tokens", type=parse_count, default=65_536)
    parser.add_argument("--prompts", type=int, default=200, help="retrieval prompts, four needles in each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE",
                        help="settings of the recipe, such as distill.lr=1e-3 lr_scale.rest=0.1")  # fmt: skip
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[None], help="distill.lr, one run of each variant per value"
    )
    parser.add_argument("--keep", help="folder to keep the models in; a conversion found there is used again")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/healing.json")
    parser.add_argument(
        "--append",
        action="store_true",
        help="add to the rows in --out, in place of those of the same variant, tokens and rate",
    )
    options = parser.parse_args()
    maps = {f"{row['plan']}, {row['full']} full": row for row in planned(options)}
    if options.plans and not maps:
        parser.error(f"{options.plans} holds no plan of --full {options.full} and --rules {options.rules}")
    keep_rows = options.append
    texts = list(documents(options.train, options.only))
    random.Random(options.seed).shuffle(texts)
    held = Held(options)
    base = base_quality(options, held)
    print(f"base: {base}", flush=True)
    for variant, lr in itertools.product(maps or options.variants, options.lr):
        if lr is not None:
            options.set = [
                *(item for item in options.set if not item.startswith("distill.lr=")),
                f"distill.lr={lr}",
            ]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
        row = (
            finetune_base(options, texts)
            if variant == "base"
            else heal_variant(options, variant, maps[variant]["line"] if maps else None, texts, held)
        )
        if maps:
            row["rule"] = maps[variant]["plan"]
        row |= {
            "base_perplexity": base,
            "device": device_name(pick_device("auto")),
            "torch": torch.__version__,
        }
        if torch.cuda.is_available():
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row = {"variant": variant} | row
        save(Path(options.out), row, keep_rows)
        keep_rows = True
        print(
            json.dumps({k: v for k, v in row.items() if k not in ("curve", "heldout", "recipe")}),
            flush=True,
        )


def planned(options: Any) -> list[dict[str, Any]]:
    """The plans that were asked for by rule and number of full layers, each once."""
    rows = json.loads(Path(options.plans).read_text()) if options.plans else []
    return [
        row
        for row in rows
        if "line" in row
        and row["full"] in (options.full or (row["full"],))
        and row["plan"] in (options.rules or (row["plan"],))
    ]


def save(path: Path, row: dict[str, Any], keep_rows: bool) -> None:
    """Put a row into a results file in place of one of the same variant, tokens and learning rate.

    Processes that share the file wait for each other. Without `keep_rows` the row is all that is left in it.
    """
    import fcntl

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["variant"], *(row["recipe"]["distill"][name] for name in ("tokens", "lr"))

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the folder, because the file itself is replaced
        rows = json.loads(path.read_text()) if keep_rows and path.is_file() else []
        rows = [old for old in rows if key(old) != key(row)] + [row]
        write_file(path, json.dumps(rows, indent=1) + "\n")
    finally:
        os.close(folder)


def documents(path: str, only: str | None) -> Iterator[str]:
    """Texts of a source; of JSON lines those from the sources asked for."""
    if only is None:
        yield from read_texts(path)
        return
    from hyconvert.data import _json_lines

    yield from (row["text"] for row in _json_lines([Path(path)]) if row["source"].startswith(only))


def texts_by_kind(path: str) -> dict[str, Iterable[str]]:
    """Documents of JSON lines by the first part of their source, technical before books; any other text is one kind."""
    from hyconvert.data import _json_lines

    if ".jsonl" not in path:
        return {"text": read_texts(path)}
    kinds: dict[str, list[str]] = {}
    for row in _json_lines([Path(path)]):
        kinds.setdefault(row.get("source", "text").split("/")[0], []).append(row["text"])
    return {kind: kinds[kind] for kind in sorted(kinds, reverse=True)}


def shares(available: dict[str, int], wanted: int) -> dict[str, int]:
    """How many rows to take of each kind: evenly, and what a short kind lacks from the others."""
    taken = {}
    shortest_first = sorted(available, key=lambda kind: available[kind])
    for left, kind in zip(range(len(available), 0, -1), shortest_first, strict=True):
        taken[kind] = min(available[kind], wanted // left)
        wanted -= taken[kind]
    return {kind: taken[kind] for kind in available}


class Held:
    """What every model is measured on.

    Attributes:
        rows: [N, T] tokens by kind of text, for perplexity.
        prompts: retrieval over text that is not in `rows`, each stretch of it in one prompt: needles among decoys at
            four depths, two values of one key, and copying.
        prompt_text: how many of the prompts are over each kind of text.
        base: the base's score of every answer, once it was measured.
    """

    def __init__(self, options: Any) -> None:
        self.rows: dict[str, torch.Tensor] = {}
        self.prompts: Prompts | None = None
        self.base: list[Score] = []
        tokenizer = open_source(options.model).load_tokenizer()
        wanted = max(1, options.eval_tokens // options.length)
        spare: dict[str, torch.Tensor] = {}
        for kind, texts in texts_by_kind(options.heldout).items():
            rows = token_blocks(
                texts, tokenizer, sequences=wanted + options.prompts, length=options.length, name=kind
            )
            self.rows[kind], spare[kind] = rows[:wanted], rows[wanted:]
        self.prompt_text = shares({kind: len(rows) for kind, rows in spare.items()}, options.prompts)
        found = sum(self.prompt_text.values())
        if found < options.prompts:
            print(
                f"warning: {options.heldout} holds text for {found} of {options.prompts} prompts of {options.length} "
                f"tokens beside the {wanted} rows of each kind for perplexity: {self.prompt_text}; give more text, or "
                "fewer --eval-tokens",
                file=sys.stderr,
            )
        if found:
            text = torch.cat([spare[kind][:count] for kind, count in self.prompt_text.items()])
            self.prompts = make_prompts(text, tokenizer, depths=DEPTHS, seed=1)


@torch.no_grad()
def measured(model: Any, held: Held) -> dict[str, Any]:
    """Perplexity by kind of text; by retrieval task the mean negative log-likelihood and the share of exact answers.

    `nll_rise` and `exact_rise` are those of the base subtracted, answer by answer, with their standard errors.
    """
    quality: dict[str, Any] = {
        "perplexity": {name: round(perplexity(model, rows), 4) for name, rows in held.rows.items()}
    }
    prompts = held.prompts
    if prompts is None:
        return quality
    device = next(model.parameters()).device

    def hidden_of(row: int) -> torch.Tensor:
        ids = prompts.tokens[row : row + 1].to(device)
        hidden: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state[0]
        return hidden

    scores = score_answers(prompts, hidden_of, model.lm_head)
    held.base = held.base or scores
    for task, score in by_task(prompts, scores).items():
        mine = [i for i, answer in enumerate(prompts.answers) if answer.task == task]
        rises = {
            f"{what}_rise": rise([getattr(scores[i], what) - getattr(held.base[i], what) for i in mine])
            for what in ("nll", "exact")
        }
        quality[task] = {"nll": round(score.nll, 4), "exact": round(score.exact, 4), "answers": len(mine)}
        quality[task] |= rises
    quality |= {"prompts": len(prompts.tokens), "prompt_text": held.prompt_text}
    return quality


def rise(differences: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    values = torch.tensor(differences, dtype=torch.float64)
    return round(float(values.mean()), 4), round(float(values.std() / len(values) ** 0.5), 4)


def base_quality(options: Any, held: Held) -> dict[str, Any]:
    """The base's own."""
    source = open_source(options.model)
    config = HyConvertConfig.from_base(source.config, dense_plan(source.config))
    return measured(load_base_as(config, source, pick_device("auto")), held)


def plan_of(options: Any, variant: str, line: str | None) -> dict[str, Any]:
    """What `convert` is told for a variant; a plan's own line is all there is to say."""
    if line is not None:
        return {"plan": Plan(layers=parse_line(line))}
    text = options.plan
    chosen = Plan.load(text) if Path(text).is_file() else Plan(layers=parse_line(text))
    count, full = len(chosen.layers), chosen.full_layers
    nearest = nearest_sources(count, full)
    if variant == "uniform":  # as many full layers
        ratio = min(range(1, count), key=lambda n: abs(len(uniform_full_layers(count, n)) - len(full)))
        return {"uniform": ratio}
    if variant in ("window", "reuse"):
        letters = {"window": "W", "reuse": "R"}
        line = " ".join(
            "F" if layer.kind == "full" else "W" if variant == "window" or layer.source is None
            else f"{letters[variant]}{layer.source}" for layer in nearest
        )  # fmt: skip
        return {"plan": Plan(layers=parse_line(line))}
    return {"plan": chosen} | ({"gate": "sigmoid"} if variant == "sigmoid" else {})


def recipe_of(options: Any, **changes: Any) -> HealRecipe:
    """The recipe of all variants."""
    data: dict[str, Any] = {
        "data": {"source": Path(options.train).name},  # the documents themselves are handed over
        "distill": {"tokens": options.tokens, "sequence_length": options.length},
        "seed": options.seed,
        "save_every": 0,
    }
    for item in options.set:
        key, _, value = item.partition("=")
        for part in reversed(key.split(".")):
            value = {part: value}
        data = merged(data, value)
    recipe: HealRecipe = validated(HealRecipe, merged(data, changes), "--set")
    return recipe


def heal_variant(
    options: Any, variant: str, line: str | None, texts: list[str], held: Held
) -> dict[str, Any]:
    """Convert, measure, heal, measure."""
    progress = silent if options.quiet else on_stderr
    device = str(pick_device("auto"))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(options.keep or folder)
        name = variant.replace(", ", "-").replace(" ", "-")
        converted, out = place / f"converted-{name}", place / f"healed-{name}"
        began = time.monotonic()
        if not converted.exists():
            convert(
                options.model,
                converted,
                align_layers=variant != "unaligned",
                calibration=Calibration(
                    options.calibration, options.calibration_tokens, min(2048, options.length)
                ),
                topk=options.topk,
                progress=silent,
                **plan_of(options, variant, line),
            )
        plan = Plan.load(converted / "plan.json")
        seconds = time.monotonic() - began
        before = measured(load(converted, device=device), held)
        print(f"{variant}: {plan.line}; converted in {seconds:.0f} s: {before}", flush=True)
        healed = heal(
            converted, out, recipe_of(options), texts=texts, device=device, force=True, progress=progress
        )
        model = load(out, device=device)
        after = measured(model, held)
    return {
        "plan": plan.line,
        "full": len(plan.full_layers),
        "kv": round(sum(base_kv_bytes(model.config, KV_TOKENS)) / sum(kv_bytes(model.config, KV_TOKENS)), 2),
        "gate": plan.gate,
        "topk": plan.topk,
        "window": plan.window,
        "block_size": plan.block_size,
        "tokens": healed.record.tokens,
        "converted": before,
        "healed": after,
        "seconds": round(healed.record.seconds, 1),
        "tokens_per_second": round(healed.tokens_per_second),
        "steady_tokens_per_second": steady(healed.record.curve),
        "warnings": healed.record.warnings,
        "recipe": healed.recipe.model_dump(mode="json", exclude_none=True),
        "heldout": healed.record.heldout,
        "curve": healed.record.curve,
    }


def steady(curve: list[dict[str, Any]]) -> int:
    """Median tokens per second of the second half of a run."""
    half = sorted(row["tokens_per_second"] for row in curve[len(curve) // 2 :])
    return round(half[len(half) // 2])


class BaseTraining(Healing):
    """The base itself, each row one document, so that its attention takes the fastest path there is."""

    def _run(self, model: Any, batch: Any, layers: bool) -> Any:
        hidden = model.model(batch.ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[batch.at], []


def finetune_base(options: Any, texts: list[str]) -> dict[str, Any]:
    """Throughput of ordinary fine-tuning in the same loop, over a tenth of the tokens (at least 1M, at most all)."""
    tokens = min(options.tokens, max(1_000_000, options.tokens // 10))
    recipe = recipe_of(options, distill={"tokens": tokens, "cross_entropy": 1.0}, eval_every=0)
    source = open_source(options.model)
    accelerator = accelerator_of(recipe, "auto", "base")
    base_class = family_of(source.config.model_type).load_class("ForCausalLM")
    with quiet_loading():
        if source.path.is_dir():
            model = base_class.from_pretrained(source.path, dtype=torch.float32)
        else:
            state = {name: tensor.float() for _, name, tensor in source.iter_tensors()}
            model = base_class.from_pretrained(
                None, config=source.config, state_dict=state, dtype=torch.float32
            )
    train, held = build_streams(
        texts, source.load_tokenizer(), tokens=tokens, heldout=options.length, length=options.length
    )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    healing = BaseTraining(model.to(accelerator.device), None)
    engine = Engine(accelerator, healing, recipe, dense_plan(source.config), train, held, None)
    record = engine.run(silent if options.quiet else on_stderr)
    return {
        "tokens": record.tokens,
        "seconds": round(record.seconds, 1),
        "tokens_per_second": round(record.tokens / record.seconds),
        "steady_tokens_per_second": steady(record.curve),
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "curve": record.curve,
    }


if __name__ == "__main__":
    main()
