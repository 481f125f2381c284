"""Plots of `benchmarks/results/planning.json`: is damage additive, and which way of choosing layers keeps most.

    python -m benchmarks.plot_planning

Writes `planning.svg` beside it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from scipy.stats import spearmanr

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Write `planning.svg`, print the rank correlation."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "hyconvert"  # the same rows give the same file
    base, *rows = json.loads((RESULTS / "planning.json").read_text())
    rows = [row for row in rows if math.isfinite(row["predicted"])]
    predicted, measured = [row["predicted"] for row in rows], [row["damage"] for row in rows]
    rank = spearmanr(predicted, measured).statistic
    print(f"{len(rows)} plans, rank correlation of predicted and measured damage {rank:.3f}")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6))
    names = list(dict.fromkeys(row["plan"].rstrip(" 0123456789") for row in rows))
    for name in names:
        mine = [row for row in rows if row["plan"].rstrip(" 0123456789") == name]
        left.plot([r["predicted"] for r in mine], [r["damage"] for r in mine], "o", ms=5, label=name)
        ppl = "ppl heldout_technical"
        mine.sort(key=lambda r: r["full"])
        style = "o" if name == "random" else "o-"
        right.plot([r["full"] for r in mine], [r[ppl] / base[ppl] for r in mine], style, ms=4, label=name)
    ends = [min(predicted + measured), max(predicted + measured)]
    left.plot(ends, ends, color="grey", lw=0.8)
    left.set(xscale="log", yscale="log", xlabel="summed damage of single layers (nats)",
             ylabel="damage of the whole plan, held-out (nats)", title=f"rank correlation {rank:.2f}")  # fmt: skip
    right.set(xlabel="full layers of 30", ylabel="perplexity / base, held-out technical text")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "planning.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
