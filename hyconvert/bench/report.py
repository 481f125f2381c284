"""What was measured: as JSON, as a table, and as a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyconvert.bench.measure import Row
from hyconvert.bench.targets import DENSE
from hyconvert.errors import HyconvertError

WHATS = ("prefill", "decode", "throughput")


@dataclass
class BenchReport:
    """All rows of a run.

    Attributes:
        target: what was benchmarked.
        device: its name.
        dtype: of weights and caches.
        plans: layer map by model.
        versions: of the libraries.
        ceilings: measured rates of the card, or None.
        rows: in the order measured.
        file: where to keep them; they are saved after each row.
    """

    target: str
    device: str
    dtype: str
    plans: dict[str, str]
    versions: dict[str, str]
    ceilings: dict[str, float] | None = None
    rows: list[Row] = field(default_factory=list)
    file: Path | None = None

    def add(self, row: Row) -> Row:
        """Note a row, and save all."""
        self.rows.append(row)
        self.save()
        return row

    def save(self) -> None:
        """Write the file, if there is one; a run that is cut loses nothing."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_name(self.file.name + ".part")
        aside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        aside.replace(self.file)

    def dense_of(self, row: Row) -> Row | None:
        """The dense model's row that a converted one's stands beside; at the largest batch, whatever it was."""
        for other in self.rows:
            same = other.what == row.what and other.context == row.context
            if other.model == DENSE and same and (row.what == "throughput" or other.batch == row.batch):
                return other
        return None

    def gain(self, row: Row) -> float | None:
        """How many times as fast as the dense model: tokens per second over tokens per second."""
        dense = self.dense_of(row)
        if row.model == DENSE or dense is None or not row.tokens_per_second or not dense.tokens_per_second:
            return None
        return row.tokens_per_second / dense.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "target": self.target,
            "device": self.device,
            "dtype": self.dtype,
            "plans": self.plans,
            "versions": self.versions,
            "ceilings": self.ceilings,
            "rows": [row.to_dict() | {"gain": self.gain(row)} for row in self.rows],
        }

    def render(self, console: Any) -> None:
        """Print the table."""
        from rich.table import Table

        from hyconvert.evaluate import human_bytes

        table = Table(title=f"{self.target}, {self.dtype}, {self.device}", box=None, pad_edge=False)
        table.add_column("what")
        table.add_column("model")
        for name in ("batch", "context", "ms", "tokens/s", "x dense", "of roofline", "KV", "peak"):
            table.add_column(name, justify="right")
        for row in self.rows:
            head = (row.what, row.model, str(row.batch), f"{row.context:,}")
            if row.error or row.seconds is None or row.tokens_per_second is None:
                table.add_row(*head, f"[red]{row.error}[/red]")
                continue
            gain = self.gain(row)
            table.add_row(
                *head,
                f"{row.seconds * 1e3:,.2f}",
                f"{row.tokens_per_second:,.0f}",
                f"{gain:.2f}" if gain else "",
                f"{row.roofline:.0%}" if row.roofline else "",
                human_bytes(row.kv_bytes) if row.kv_bytes is not None else "",
                human_bytes(row.peak_bytes) if row.peak_bytes else "",
            )
        console.print(table)
        for name, line in self.plans.items():
            console.print(f"{name}: {line}", style="dim", highlight=False)

    def plot(self, path: str | Path) -> None:
        """Draw time against context, one panel per kind of measurement.

        Raises:
            HyconvertError: matplotlib is missing, or does not know the file's ending.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise HyconvertError(
                "the plot needs matplotlib; pip install 'hyconvert[plot]', or leave out --plot"
            ) from error
        shown = [what for what in WHATS if any(row.what == what and row.seconds for row in self.rows)]
        figure = Figure(figsize=(5 * max(1, len(shown)), 3.6), layout="constrained")
        axes = figure.subplots(1, max(1, len(shown)), squeeze=False)
        for axis, what in zip(axes[0], shown, strict=False):
            lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
            for row in self.rows:
                if row.what == what and row.seconds and row.tokens_per_second:
                    batch = 0 if what == "throughput" else row.batch
                    value = row.tokens_per_second if what == "throughput" else row.seconds * 1e3
                    lines.setdefault((row.model, batch), []).append((row.context, value))
            for (model, batch), points in lines.items():
                label = model + (f", batch {batch}" if batch else "")
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
            unit = {"prefill": "ms per prompt", "decode": "ms per token", "throughput": "tokens/s"}[what]
            axis.set(title=what, xlabel="context", ylabel=unit, xscale="log", yscale="log")
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
            axis.legend(fontsize=8)
        try:
            figure.savefig(path)
        except ValueError as error:
            raise HyconvertError(f"cannot draw to {path}: {error}; use .svg, .png or .pdf") from error
