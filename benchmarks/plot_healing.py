"""Held-out KL and perplexity against tokens of healing, one line per variant.

python -m benchmarks.plot_healing benchmarks/results/healing.json docs/healing.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(rows: str, out: str) -> None:
    """Plot the rows that `benchmarks.healing` saved."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = None
    for row in json.loads(Path(rows).read_text()):
        if not row.get("heldout"):
            continue
        tokens = [point["tokens"] / 1e6 for point in row["heldout"]]
        left.plot(tokens, [point["kl"] for point in row["heldout"]], marker="o", ms=3, label=row["variant"])
        right.plot(
            tokens, [point["perplexity"] for point in row["heldout"]], marker="o", ms=3, label=row["variant"]
        )
        base = row["heldout"][-1]["base_perplexity"]
    if base is not None:
        right.axhline(base, color="black", lw=0.8, label="base")
    left.set(xlabel="million tokens", ylabel="held-out KL(base || model), nats", yscale="log")
    right.set(xlabel="million tokens", ylabel="held-out perplexity", yscale="log")
    left.legend()
    right.legend()
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
