"""Converted models beside their base at several context lengths: what `hyconvert eval` measures, a row per length.

    python -m benchmarks.evaluation healed/ --data heldout.jsonl.xz --length 2048 4096 8192 --reports reports/

Rows go to `benchmarks/results/evaluation.json` as they come; `--reports` keeps a page for each. Every row holds its
model against the limits of the gate and says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hyconvert.evaluation import output
from hyconvert.evaluation.limits import Limits
from hyconvert.evaluation.models import load_pair
from hyconvert.evaluation.run import Evaluation, evaluate_pair
from hyconvert.evaluation.settings import EvalSettings
from hyconvert.evaluation.verdict import judge
from hyconvert.progress import on_stderr, silent


def main() -> None:
    """Evaluate every folder at every length, print a row for each and save them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="converted models")
    parser.add_argument("--base", help="their base  [default: the recorded one]")
    parser.add_argument("--data", default="stdlib-docstrings", help="text to measure on")
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 4096, 8192], help="T")
    parser.add_argument("--tokens", type=int, default=262_144, help="tokens to measure on, per length")
    parser.add_argument(
        "--prompts", type=int, default=20, help="retrieval prompts per length, five needles in each"
    )
    parser.add_argument("--singles", type=int, default=40, help="prompts per length with one needle alone")
    parser.add_argument("--generations", type=int, default=16)
    parser.add_argument("--limits", help="limits of the gate  [default: the built-in ones]")
    parser.add_argument("--costs", help="folder of measured costs, for models that fail")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--reports", help="folder for a page per row")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/evaluation.json")
    options = parser.parse_args()
    limits = Limits.load(options.limits) if options.limits else Limits()
    rows: list[dict[str, Any]] = []
    for path in options.models:
        pair = load_pair(path, base=options.base, dtype=options.dtype)
        for length in options.length:
            settings = EvalSettings.create(
                data=options.data,
                tokens=max(options.tokens, length),
                sequence_length=length,
                lengths=(length,),
                prompts=options.prompts,
                singles=options.singles,
                generations=options.generations,
                prompt_tokens=min(1024, length // 2),
            )
            result = evaluate_pair(
                pair, settings, command=shlex.join(["python", "-m", "benchmarks.evaluation", *sys.argv[1:]]),
                progress=silent if options.quiet else on_stderr,
            )  # fmt: skip
            result.verdict = judge(result, limits, pair.converted.config, path, options.costs)
            rows.append(row_of(result, length))
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")
            print(
                json.dumps({k: v for k, v in rows[-1].items() if k not in ("buckets", "ablations")}),
                flush=True,
            )
            if options.reports:
                report = Path(options.reports, f"{Path(path).resolve().name}-{length}.html")
                output.check_writable(path, report, card=False)
                output.write(result, path, report, card=False)
        del pair


def row_of(result: Evaluation, length: int) -> dict[str, Any]:
    """An evaluation without curves and texts."""
    text, generation, branches, speed = result.text, result.generation, result.branches, result.speed
    verdict = result.verdict
    assert text and generation and branches and speed and verdict and result.lookup
    return {
        "model": Path(result.model).resolve().name,
        "length": length,
        "passed": verdict.passed,
        "reasons": verdict.reasons,
        "make_full_next": [asdict(step) for step in verdict.suggestions],
        "tokens": text.tokens,
        "data": Path(result.settings.data).name,
        **asdict(text.whole),
        "ratio": text.whole.ratio,
        "ratio_error": text.ratio_error,
        "buckets": [asdict(bucket) | {"ratio": bucket.ratio} for bucket in text.buckets],
        "retrieval": {cell.kind: asdict(cell) for cell in result.lookup.totals},
        "generation": {k: v for k, v in asdict(generation).items() if k != "samples"},
        "sparse_share": branches.mean_share,
        "sparse_share_by_layer": branches.shares,
        "ablations": [asdict(row) for row in branches.ablations],
        "kv_bytes_per_token": {"base": result.kv.base_per_token, "converted": result.kv.converted_per_token},
        "speed": asdict(speed),
        "line": result.line,
        "settings": result.settings.model_dump(mode="json", exclude_defaults=True),
        "seconds": round(result.seconds, 1),
        "device": result.device,
        "dtype": result.dtype,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
