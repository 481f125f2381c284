"""What healing did: `heal.json`, the plot, and the section of the model card."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from hyconvert.heal.engine import Record
from hyconvert.recipe import HealRecipe


@dataclass(frozen=True)
class HealReport:
    """What healing did and measured.

    Attributes:
        converted, out, teacher: from where, to where, by whom.
        recipe: how.
        record: tokens, seconds, the curve of the training loss, and what was measured on held-out text.
        processes, device: on how many of what.
    """

    converted: str
    out: str
    teacher: str
    recipe: HealRecipe
    record: Record
    processes: int
    device: str

    @property
    def before(self) -> dict[str, Any]:
        """Held-out measurements of the converted model."""
        return self.record.heldout[0]

    @property
    def after(self) -> dict[str, Any]:
        """Held-out measurements at the end."""
        return self.record.heldout[-1]

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run, without measuring and saving."""
        return self.record.tokens / max(self.record.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "converted": self.converted,
            "teacher": self.teacher,
            "tokens": self.record.tokens,
            "seconds": round(self.record.seconds, 2),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "processes": self.processes,
            "device": self.device,
            "before": self.before,
            "after": self.after,
            "warnings": self.record.warnings,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "heldout": self.record.heldout,
            "curve": asdict(self.record)["curve"],
        }

    def render(self, console: Any) -> None:
        """As a few lines."""
        for line in (self.summary, *self.record.warnings, f"saved to {self.out}"):
            console.print(line, highlight=False, soft_wrap=True)

    @property
    def summary(self) -> str:
        """One line for people."""
        before, after = self.before, self.after
        base = after["base_perplexity"]
        return (
            f"held-out KL {before['kl']:.4f} -> {after['kl']:.4f}, perplexity {before['perplexity']:.2f} -> "
            f"{after['perplexity']:.2f} (base {base:.2f}, {after['perplexity'] / base:.3f}x), "
            f"{self.record.tokens:,} tokens at {self.tokens_per_second:,.0f} tokens/s"
        )


_HEADING = "## Healing"


def healed_card(card: str, report: HealReport, command: str | None, with_plot: bool) -> str:
    """The converted model's card with a section on healing in front of its plan."""
    card = card.replace("without training.", "and healed by distillation from it.")
    card = card.replace(
        "None (`--no-align`): the new parameters are identities. Expect nonsense until healed.", "None."
    )
    before, after = report.before, report.after
    base = after["base_perplexity"]
    stages = "; ".join(
        f"{name}: {stage.steps * stage.rows * stage.sequence_length:,} tokens in rows of {stage.sequence_length:,}, "
        f"{stage.rows * stage.sequence_length:,} per step, learning rate {stage.lr:g}"
        for name, stage in report.recipe.stages()
    )
    lines = [
        _HEADING,
        "",
        f"Distilled from `{report.teacher}` on `{report.recipe.data.source}`, seed {report.recipe.seed}. {stages}.",
        "",
        "| held-out text | KL to the base | perplexity | x base |",
        "|---|---|---|---|",
        f"| base | 0 | {base:.3f} | 1 |",
        f"| converted | {before['kl']:.4f} | {before['perplexity']:.3f} | {before['perplexity'] / base:.3f} |",
        f"| healed | {after['kl']:.4f} | {after['perplexity']:.3f} | {after['perplexity'] / base:.3f} |",
        "",
        f"{report.record.seconds:.0f} s of training at {report.tokens_per_second:,.0f} tokens/s "
        f"({report.processes} x {report.device}). `heal.json` has the curves.",
        "",
    ]
    if with_plot:
        lines += [
            "![Held-out KL and perplexity against tokens, and the share of each sparse branch](heal.png)",
            "",
        ]
    if command:
        lines += ["Made with:", "", f"    {command}", ""]
    lines += [f"- {warning}" for warning in report.record.warnings] + [""] * bool(report.record.warnings)
    section = "\n".join(lines)
    if "## Plan" in card:
        return card.replace("## Plan", f"{section}\n## Plan", 1)
    return f"{card}\n{section}"


def plot(report: HealReport) -> bytes | None:
    """Held-out KL and perplexity against tokens, and the sparse share of each layer, as a PNG.

    Returns:
        None where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    record = report.record
    millions = [row["tokens"] / 1e6 for row in record.heldout]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    trained = [row for row in record.curve if "kl" in row]
    left.plot(
        [row["tokens"] / 1e6 for row in trained], [row["kl"] for row in trained], lw=0.8, label="training"
    )
    left.plot(millions, [row["kl"] for row in record.heldout], marker="o", ms=3, label="held out")
    left.set(yscale="log", ylabel="KL(base || model), nats", xlabel="million tokens")
    left.legend()
    middle.plot(millions, [row["perplexity"] for row in record.heldout], marker="o", ms=3, label="model")
    middle.axhline(report.after["base_perplexity"], color="black", lw=0.8, label="base")
    middle.set(ylabel="held-out perplexity", xlabel="million tokens")
    middle.legend()
    for layer in report.after["sparse_share"]:
        shares = [row["sparse_share"].get(layer, 0.0) for row in record.heldout]
        right.plot(millions, shares, lw=0.8, label=layer)
    right.set(ylabel="share of the sparse branch", xlabel="million tokens", ylim=(0, 1))
    if report.after["sparse_share"]:
        right.legend(title="layer", fontsize=6, ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
