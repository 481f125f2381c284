"""Which way of choosing full layers keeps most quality, without training: plans measured on held-out text.

    python -m benchmarks.planning MODEL.gguf --calibration train.jsonl --data heldout.jsonl

Measures costs (timed), solves for plans, and sets beside them uniform plans, anchors by overlap of the selected blocks
(as Kascade chooses them), full layers ranked by window damage alone, and random ones. Each plan is aligned on the same
tokens and measured on the same held-out text and prompts. Rows go to `benchmarks/results/planning.json` as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch

from hyconvert.checkpoint import open_source
from hyconvert.data import read_texts, token_blocks
from hyconvert.errors import PlanError
from hyconvert.evaluate import device_name, nll_of_hidden, pick_device
from hyconvert.measure import Costs, JointEvaluator, MeasureSettings, measure, refine
from hyconvert.plan import LayerPlan, Plan, nearest_sources
from hyconvert.retrieval import by_task, make_prompts, mix_in, score_answers
from hyconvert.solve import Budget, Rules, solve

SPARSE_ONLY = frozenset({"sparse"})


def overlap_anchors(evaluator: JointEvaluator, count: int) -> Plan:
    """Kascade's rule: anchors by dynamic programming over how much of a layer's own selection an earlier one covers."""
    layers = len(evaluator.visits)
    share = torch.zeros(layers, layers)
    for j in range(layers):
        for i in range(j):
            found = []
            for mine, theirs in zip(evaluator.oracles[j], evaluator.oracles[i], strict=True):
                a, b = mine.indices[0, :, ::16], theirs.indices[0, :, ::16]
                real = a >= 0
                hit = ((a[..., :, None] == b[..., None, :]).any(-1) & real).sum() / real.sum().clamp(min=1)
                found.append(float(hit))
            share[i, j] = sum(found) / len(found)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 1): (0.0, (0,))}
    for used in range(1, count):
        for last in range(layers):
            if (last, used) not in best:
                continue
            value, chosen = best[last, used]
            for to in range(last + 1, layers):
                gain = value + float(share[last, last + 1 : to].sum())
                if gain > best.get((to, used + 1), (-1.0, ()))[0]:
                    best[to, used + 1] = (gain, (*chosen, to))
    ends = [
        (value + float(share[last, last + 1 :].sum()), chosen)
        for (last, used), (value, chosen) in best.items()
        if used == count
    ]
    return nearest(evaluator, max(ends)[1])


def nearest(evaluator: JointEvaluator, full: tuple[int, ...]) -> Plan:
    """Sparse layers that read the nearest full layer."""
    return Plan(layers=nearest_sources(len(evaluator.visits), full), **evaluator.settings.plan_settings())


def plans(costs: Costs, config: Any, evaluator: JointEvaluator, full: int) -> dict[str, Plan]:
    """The contenders with `full` full layers."""
    layers = costs.num_layers
    window = sorted(range(layers), key=lambda i: -costs.table[i, "window", None].damage())
    budget = Budget(full_layers=full)
    steps = [round(i * (layers - 1) / (full - 1)) for i in range(full)]  # the first and the last layer full
    found = {
        "measured, mixed": solve(costs, config, budget).plan,
        "measured, sparse only": solve(
            costs, config, budget, Rules(kinds=SPARSE_ONLY, pinned={0: "full"})
        ).plan,
        "uniform": nearest(evaluator, tuple(steps)),
        "overlap anchors": overlap_anchors(evaluator, full),
        "window damage": nearest(evaluator, tuple(sorted(window[:full]))),
        "windows only": windows_only(evaluator, tuple(sorted(window[:full]))),
    }
    if "copy" in costs.reference:
        rules = Rules(tasks=frozenset({"copy"}))
        found["measured, for copying"] = solve(costs, config, budget, rules).plan
    for seed in range(3):
        drawn = random.Random(seed).sample(range(1, layers), full - 1)
        found[f"random {seed}"] = nearest(evaluator, (0, *sorted(drawn)))
    return found


def windows_only(evaluator: JointEvaluator, full: tuple[int, ...]) -> Plan:
    """Full layers and windows, nothing sparse."""
    layers = tuple(LayerPlan(kind="full" if i in full else "window") for i in range(len(evaluator.visits)))
    return Plan(layers=layers, **evaluator.settings.plan_settings())


class Held:
    """Held-out text and prompts, and what a plan does on them."""

    def __init__(self, tokenizer: Any, data: list[str], tokens: int, length: int, prompts: int = 25) -> None:
        self.rows = {}
        for path in data:
            self.rows[Path(path).stem] = token_blocks(
                read_texts(path), tokenizer, sequences=tokens // length, length=length, name=path
            )
        text = token_blocks(
            read_texts(data[0]), tokenizer, sequences=tokens // length + prompts, length=length, name=data[0]
        )[-prompts:]
        self.prompts = make_prompts(text, tokenizer, questions=8, decoys=8, copies=4, seed=1)

    def __call__(self, evaluator: JointEvaluator, plan: Plan | None) -> dict[str, float]:
        """Perplexities, and NLL and share of exact answers per task."""
        model, result = evaluator.model, {}
        for name, rows in self.rows.items():
            hidden = evaluator.hidden(plan, rows)
            losses = [nll_of_hidden(model, h, row.to(h.device)) for h, row in zip(hidden, rows, strict=True)]
            result[f"ppl {name}"] = math.exp(sum(losses) / len(losses))
        hidden = evaluator.hidden(plan, self.prompts.tokens)
        reading = evaluator.yardstick.read(hidden)
        result["kl"], result["damage"] = reading.kl, evaluator.weigh(reading)
        scores = score_answers(self.prompts, lambda row: hidden[row], model.lm_head)
        for task, score in by_task(self.prompts, scores).items():
            result[f"{task} nll"], result[f"{task} exact"] = score.nll, score.exact
        return result


def main() -> None:
    """Measure, solve, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", help="text to measure costs and to align on")
    parser.add_argument("--data", nargs="+", required=True, help="held-out text")
    parser.add_argument("--costs", default="costs", help="folder for the costs")
    parser.add_argument("--kinds", nargs="+", default=["window", "sparse"])
    parser.add_argument("--full", type=int, nargs="+", default=[5, 7, 10])
    parser.add_argument(
        "--frontier",
        type=int,
        nargs="*",
        default=[2, 3, 4, 6, 8, 9, 12, 15, 20],
        help="more of the measured plan",
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument(
        "--fit-tokens", type=int, nargs="+", default=[65_536], help="tokens to align the plans on"
    )
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens to measure on, per text")
    parser.add_argument(
        "--retrieval", type=float, nargs="+", default=[1.0], help="share of prompts in what is aligned on"
    )
    parser.add_argument("--only", nargs="+", help="names of the contenders to run")
    parser.add_argument("--refine", type=int, default=0, help="swaps tried per measured plan")
    parser.add_argument(
        "--fit", nargs="+", default=[], metavar="NAME=NUMBER", help="settings of alignment, as uniform=0.8"
    )
    parser.add_argument("--out", default="benchmarks/results/planning.json")
    options = parser.parse_args()

    device = pick_device("auto")
    card = device_name(device)
    settings = MeasureSettings.create(
        topk=options.topk,
        calibration=options.calibration,
        sequence_length=options.length,
        kinds=tuple(options.kinds),
    )
    began = time.monotonic()
    costs = measure(options.model, options.costs, settings=settings)
    print(f"measured {len(costs.rows)} candidates in {time.monotonic() - began:.1f} s on {card}", flush=True)
    source = open_source(options.model, dtype="bfloat16" if device.type == "cuda" else "auto")
    tokenizer, config = source.load_tokenizer(), source.config
    began = time.monotonic()
    refined: dict[int, Plan] = {}
    if options.refine:
        joint = JointEvaluator.for_costs(options.model, costs)
        for full in options.full:
            found = refine(
                joint, costs, solve(costs, config, Budget(full_layers=full)).plan, tries=options.refine
            )
            refined[full] = found.plan
            print(f"{full}: {found.before:.4f} to {found.after:.4f}: {found.moves}", flush=True)
        print(f"refined in {time.monotonic() - began:.1f} s", flush=True)
        del joint
    rows: list[dict[str, Any]] = []
    held = None
    for tokens, share in itertools.product(options.fit_tokens, options.retrieval):
        fit = token_blocks(
            read_texts(options.calibration), tokenizer, sequences=tokens // options.length, length=options.length,
            name="calibration",
        )  # fmt: skip
        fit = mix_in(fit, tokenizer, share)
        evaluator = None  # frees the last one first
        held = held or Held(tokenizer, options.data, options.tokens, options.length)
        evaluator = JointEvaluator(source, settings, fit, held.prompts, device)
        evaluator.fit = dataclasses.replace(evaluator.fit, **numbers(options.fit))
        if not rows:
            rows.append({"plan": "base", "device": card, **held(evaluator, None)})
            print(rows[0], flush=True)
        for full in sorted({*options.full, *options.frontier}):
            contenders = plans(costs, config, evaluator, full) if full in options.full else {}
            contenders["measured, mixed"] = solve(costs, config, Budget(full_layers=full)).plan
            if full in refined:
                contenders["measured, mixed, refined"] = refined[full]
            for name, plan in contenders.items():
                if options.only and name not in options.only:
                    continue
                row = {"plan": name, "full": full, "fit tokens": tokens, "prompts among them": share}
                row |= {"fit": options.fit} if options.fit else {}
                row |= {"predicted": predicted(costs, plan), "line": plan.line, **held(evaluator, plan)}
                rows.append(row)
                Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")
                ratios = [f"{row[k] / rows[0][k]:.3f}" for k in row if k.startswith("ppl")]
                print(
                    f"{tokens:>7} {share} {full:3} {name:26} {row['predicted']:7.3f} {ratios} "
                    f"damage {row['damage']:.3f} copy {row['copy nll']:.3f} "
                    f"needle {row['needle nll']:.3f} {row['needle exact']:.2f} {plan.line}",
                    flush=True,
                )


def numbers(pairs: list[str]) -> dict[str, float]:
    """NAME=NUMBER as a dictionary; whole numbers stay whole."""
    split = dict(pair.split("=", 1) for pair in pairs)
    return {name: int(value) if value.isdigit() else float(value) for name, value in split.items()}


def predicted(costs: Costs, plan: Plan) -> float:
    """Summed damage, not a number where a candidate was not measured."""
    try:
        return costs.predicted(plan)
    except PlanError:
        return math.nan


if __name__ == "__main__":
    main()
