"""What alignment keeps of a plan, without training: perplexity, KL divergence and retrieval on held-out text.

    python -m benchmarks.alignment MODEL --calibration train.jsonl --data heldout.jsonl --plan 'W*3 F S3*3 ...'
    python -m benchmarks.alignment MODEL ... --plan LINE --fit-tokens 65536 1048576 --fit compensation=0 uniform=0.8

Every plan is aligned on so many tokens with every setting of `--fit` (names and numbers, commas between those of one
run; nothing for the defaults). Rows go to `benchmarks/results/alignment.json` as they come, behind those of other runs
on the same model, text and card.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.planning import Held, numbers
from hyconvert.align import FitSettings, align
from hyconvert.checkpoint import Source, open_source
from hyconvert.conversion import load_base_as
from hyconvert.data import read_texts, token_blocks
from hyconvert.evaluate import device_name, pick_device
from hyconvert.measure import MeasureSettings
from hyconvert.measure.costs import weigh
from hyconvert.measure.yardstick import Reading, Yardstick
from hyconvert.modeling import HyConvertConfig
from hyconvert.modeling.state import dense_state
from hyconvert.plan import Plan, parse_line
from hyconvert.retrieval import REPEATED, Prompts, mix_in


class Whole:
    """A model as a whole, measured as `benchmarks.planning` measures plans."""

    def __init__(
        self, source: Source, plan: Plan, prompts: Prompts, settings: MeasureSettings, device: torch.device
    ) -> None:
        self.model: Any = load_base_as(HyConvertConfig.from_base(source.config, plan), source, device)
        self.plan, self.device = plan, device
        self.yardstick = Yardstick(self.model, prompts, self.hidden(None, prompts.tokens), settings)

    @torch.no_grad()
    def hidden(self, plan: Plan | None, tokens: Tensor) -> Tensor:
        """Final hidden states [N, T, D] of the converted model, or of the base if there is no plan."""
        states = []
        for row in tokens:
            dense = {} if plan else {"hyconvert_state": dense_state(1, len(row), self.device)}
            out = self.model.model(row[None].to(self.device), use_cache=False, **dense)
            states.append(out.last_hidden_state)
        return torch.cat(states)

    def weigh(self, reading: Reading, tasks: Collection[str] | None = None) -> float:
        """Damage, as a `Cost`'s."""
        rises = {task: nll - self.yardstick.reference[task] for task, nll in reading.nll.items()}
        return weigh(reading.kl, rises, 1.0, tasks)


def main() -> None:
    """Align and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to align on")
    parser.add_argument("--data", nargs="+", required=True, help="held-out text")
    parser.add_argument("--plan", nargs="+", required=True, metavar="LINE", help="layer maps")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--fit-tokens", type=int, nargs="+", default=[65_536])
    parser.add_argument(
        "--retrieval", type=float, nargs="+", default=[1.0], help="share of prompts in what is aligned on"
    )
    parser.add_argument(
        "--repeats",
        type=float,
        nargs="+",
        default=[REPEATED],
        help="share of such a prompt that repeats passages",
    )
    parser.add_argument("--fit", nargs="*", default=[""], metavar="NAME=NUMBER,...")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens to measure on, per text")
    parser.add_argument(
        "--prompts", type=int, default=100, help="prompts to measure on, made from the first text"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "alignment.json")
    options = parser.parse_args()

    device = pick_device("auto")
    source = open_source(options.model, dtype="bfloat16" if device.type == "cuda" else "auto")
    tokenizer, length = source.load_tokenizer(), options.length
    settings = MeasureSettings.create(topk=options.topk, sequence_length=length)
    held = Held(tokenizer, options.data, options.tokens, length, options.prompts)
    setting = {
        "device": device_name(device), "model": Path(options.model).name, "length": length, "topk": options.topk,
        "data": [Path(path).name for path in options.data], "tokens": options.tokens,
        "prompts": options.prompts,
    }  # fmt: skip
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    same = all(known.get(key) == value for key, value in setting.items())
    rows: list[dict[str, Any]] = known["rows"] if same else []
    base: dict[str, Any] | None = None
    kinds = itertools.product(options.plan, options.retrieval, options.repeats, options.fit_tokens)
    for line, share, repeats, tokens in kinds:
        blocks = token_blocks(
            read_texts(options.calibration), tokenizer, sequences=tokens // length, length=length, name="calibration"
        )  # fmt: skip
        fit = mix_in(blocks, tokenizer, share, repeats=repeats)
        plan = Plan(layers=parse_line(line), **settings.plan_settings())
        for changes in options.fit:
            whole = Whole(source, plan, held.prompts, settings, device)
            if base is None:
                base = {"line": "base", **held(whole, None)}
                rows = [base, *(row for row in rows if row["line"] != "base")]
                print(base, flush=True)
            began = time.monotonic()
            given = numbers(changes.split(",")) if changes else {}
            align(whole.model, fit.tokens, FitSettings(**given), fit.asked)
            row = {
                "line": line, "fit tokens": len(fit) * length, "prompts among them": share,
                "repeats in them": repeats, "fit": given,
            }  # fmt: skip
            row |= {"seconds": time.monotonic() - began, **held(whole, plan)}
            rows.append(row)
            options.out.write_text(json.dumps(setting | {"rows": rows}, indent=1) + "\n")
            ratios = [f"{row[k] / base[k]:.3f}" for k in base if k.startswith("ppl")]
            print(
                f"{tokens:>8} {share} {repeats} {changes or 'defaults':40} {ratios} KL {row['kl']:.4f} "
                f"copy {row['copy nll'] - base['copy nll']:+.3f} needle {row['needle nll'] - base['needle nll']:+.3f} "
                f"{row['seconds']:.0f} s  {line}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
