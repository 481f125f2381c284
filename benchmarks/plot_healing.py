"""Quality against tokens of healing, a line for each healed row: KL on the way, and what was measured before and after.

    python -m benchmarks.plot_healing benchmarks/results/healing.json benchmarks/results/healing.svg

Several files of rows may come before the plot's name. A row is called by its variant, with the tokens, the rate or the
batch where one variant occurs with several. The base is the line at 0: perplexity is drawn as its rise over the
base's, the NLL of retrieved answers as the mean rise per answer with its standard error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from hyconvert.retrieval import TASKS

COLUMNS = 3
STYLES = ("-", "--", ":", "-.")
Row = dict[str, Any]
Measured = Callable[
    [Row, str], tuple[float, float]
]  # of a row "converted" or "healed", with its standard error


def main() -> None:
    """Plot the rows that `benchmarks.healing` saved."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", help="files of `benchmarks.healing`")
    parser.add_argument("out", help="the plot, such as an .svg")
    options = parser.parse_args()
    rows = [row for path in options.rows for row in json.loads(Path(path).read_text()) if row.get("healed")]
    if not rows:
        parser.error(f"no row of {', '.join(options.rows)} was healed")
    with matplotlib.rc_context({"svg.hashsalt": "hyconvert"}):  # the same rows give the same file
        metadata = {"Date": None} if options.out.endswith(".svg") else None
        draw(rows).savefig(options.out, metadata=metadata)


def draw(rows: Sequence[Row]) -> Figure:
    """KL on the way of every row, then a panel for each kind of text and each retrieval task."""
    panels = list(measures(rows))
    lines = -(-(1 + len(panels)) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.4 * lines + 0.8), layout="constrained")
    first, *axes = figure.subplots(lines, COLUMNS, squeeze=False).flat
    looks = [
        {"label": label, "ms": 4, "lw": 1.3} | look
        for label, look in zip(labels(rows), styles(rows), strict=True)
    ]
    for row, look in zip(rows, looks, strict=True):
        points = row["heldout"]
        first.plot([p["tokens"] / 1e6 for p in points], [p["kl"] for p in points], marker=".", **look)
    first.set(yscale="log", ylabel="nats", title="KL(base || model) while healing")
    first.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    first.yaxis.set_major_formatter("{x:g}")
    for axis, (title, unit, linear, value) in zip(axes, panels, strict=False):
        for row, look in zip(rows, looks, strict=True):
            (before, spread), (after, spread_after) = value(row, "converted"), value(row, "healed")
            axis.errorbar(
                [0, row["tokens"] / 1e6],
                [before, after],
                [spread, spread_after],
                marker="o",
                capsize=2,
                **look,
            )
        axis.axhline(0, color="black", lw=1, label="base")
        axis.set(ylabel=unit, title=title)
        linear_then_log(axis, linear)
    budgets = sorted({float(f"{row['tokens'] / 1e6:.3g}") for row in rows})
    for axis in (first, *axes[: len(panels)]):
        if budgets[-1] > 3 * budgets[0]:
            axis.set_xscale("symlog", linthresh=budgets[0])
            axis.autoscale_view(scaley=False)
        axis.set_xticks([0, *budgets], [f"{tick:g}" for tick in (0, *budgets)])
        axis.minorticks_off()
        axis.set_xlabel("million tokens of healing")
        axis.grid(lw=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    handles, names = (axes[0] if panels else first).get_legend_handles_labels()
    columns = max(1, min(4, 180 // (12 + max(map(len, names)))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9, handlelength=3.5)
    return figure


def measures(rows: Sequence[Row]) -> Iterator[tuple[str, str, float, Measured]]:
    """Title, unit, up to where the axis is linear, and value of everything that all rows were measured on."""
    bases = [row["base_perplexity"] for row in rows]

    def base(values: list[float]) -> str:
        return "base " + ", ".join(f"{value:.3g}" for value in sorted(set(values)))

    for kind in bases[0]["perplexity"]:
        if all(kind in known["perplexity"] for known in bases):
            title = f"perplexity, {kind} ({base([known['perplexity'][kind] for known in bases])})"
            yield title, "% over the base's", 10, perplexity_of(kind)
    for task in TASKS:
        if all(task in known for known in bases):
            title = f"NLL of answers, {task} ({base([known[task]['nll'] for known in bases])})"
            yield title, "nats over the base's", 0.1, rise_of(task)


def perplexity_of(kind: str) -> Measured:
    """Per cent over the base's."""

    def value(row: Row, when: str) -> tuple[float, float]:
        return 100 * (row[when]["perplexity"][kind] / row["base_perplexity"]["perplexity"][kind] - 1), 0.0

    return value


def rise_of(task: str) -> Measured:
    """NLL minus the base's, answer by answer."""
    return lambda row, when: tuple(row[when][task]["nll_rise"])


def linear_then_log(axis: Axes, linear: float) -> None:
    """Small rises as they are, large ones in decades, so that both can be read from one axis."""
    axis.set_yscale("symlog", linthresh=linear)
    axis.autoscale_view()
    low, high = axis.get_ylim()
    ticks = [linear * times for times in (-2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ylim(low, high)


def labels(rows: Sequence[Row]) -> list[str]:
    """Names of rows: the variant, and what tells it from others of the same variant."""
    names = [row["variant"] for row in rows]
    told: tuple[Callable[[Row], str], ...] = (
        lambda distill: f"{distill['tokens'] / 1e6:.3g}M tokens",
        lambda distill: f"rate {distill['lr']:g}",
        lambda distill: f"batch {distill['batch_tokens']:,}",
    )
    for tell in told:
        values = [tell(row["recipe"]["distill"]) for row in rows]
        seen = {name: {v for n, v in zip(names, values, strict=True) if n == name} for name in names}
        names = [f"{n}, {v}" if len(seen[n]) > 1 else n for n, v in zip(names, values, strict=True)]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def styles(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """A colour for each variant, a dash for each budget, rate and batch."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    colours = matplotlib.colormaps["tab10" if len(variants) <= 10 else "tab20"]
    settings = [
        tuple(row["recipe"]["distill"][key] for key in ("tokens", "lr", "batch_tokens")) for row in rows
    ]
    known = list(dict.fromkeys(settings))
    for row, setting in zip(rows, settings, strict=True):
        dash = STYLES[known.index(setting) % len(STYLES)]
        yield {"color": colours(variants.index(row["variant"]) % colours.N), "ls": dash}


if __name__ == "__main__":
    main()
