"""An evaluation in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from hyconvert.evaluate import human_bytes
from hyconvert.evaluation.run import Evaluation
from hyconvert.evaluation.verdict import Verdict


def render(result: Evaluation, console: Console) -> None:
    """Print what was measured, one table per part."""
    console.print(result.line, style="bold", soft_wrap=True, highlight=False)
    for table in (_text(result), _lookup(result), _generation(result), _branches(result), _bytes_and_speed(result),
                  _tasks(result)):  # fmt: skip
        if table is not None:
            console.print(table)
    for note in result.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if result.verdict:
        _verdict(result.verdict, console)
    console.print(f"{result.seconds:.0f} s on {result.device} in {result.dtype}", highlight=False)


def _text(result: Evaluation) -> Table | None:
    text = result.text
    if text is None:
        return None
    title = f"{text.tokens:,} tokens of {result.settings.data}, perplexity by tokens before"
    table = _table(title, "tokens", "base", "ours", "ratio", "KL", "P95", "same top")
    named = [(f"{bucket.start:,}-{bucket.end:,}", bucket) for bucket in text.buckets]
    named.append(("all", text.whole))
    for name, bucket in named:
        error = f" ± {text.ratio_error:.3f}" if bucket is text.whole and text.ratio_error is not None else ""
        table.add_row(
            name, f"{bucket.base:.2f}", f"{bucket.converted:.2f}", f"{bucket.ratio:.3f}{error}", f"{bucket.kl:.4f}",
            f"{bucket.kl_p95:.3f}", f"{bucket.agreement:.1%}",
        )  # fmt: skip
    return table


def _lookup(result: Evaluation) -> Table | None:
    if result.lookup is None:
        return None
    table = _table("retrieval", "question", "count", "base exact", "ours exact", "base NLL", "ours NLL")
    for cell in (*result.lookup.by_length, *result.lookup.totals):
        name = f"{cell.kind}, {cell.length:,}" if cell.length else f"{cell.kind}, all"
        table.add_row(
            name, str(cell.count), f"{cell.base.exact:.0%}", f"{cell.converted.exact:.0%}", f"{cell.base.nll:.3f}",
            f"{cell.converted.nll:.3f}",
        )  # fmt: skip
    return table


def _generation(result: Evaluation) -> Table | None:
    found = result.generation
    if found is None:
        return None
    title = f"greedy text, {found.prompts} prompts, {found.new_tokens} tokens each"
    table = _table(title, "", "base", "ours")
    table.add_row("the base's NLL of it", f"{found.base_nll:.3f}", f"{found.converted_nll:.3f}")
    table.add_row("repeated 4-grams", f"{found.base_repeated:.1%}", f"{found.converted_repeated:.1%}")
    table.add_row("tokens until they part", "", f"{found.common_prefix:.1f}")
    table.add_row("equal tokens", "", f"{found.equal:.1%}")
    return table


def _branches(result: Evaluation) -> Table | None:
    found = result.branches
    if found is None:
        return None
    table = _table("sparse branch", "off", "in", "text NLL", "copy NLL", "needle NLL", "exact", "gate share")
    for row in found.ablations:
        where = "" if row.off is None else "all layers" if row.layer is None else f"layer {row.layer}"
        share = found.mean_share if row.layer is None else found.shares.get(row.layer)
        cells = [_number(x) for x in (row.nll, row.copy_nll, row.needle_nll)]
        cells.append("" if row.needle_exact is None else f"{row.needle_exact:.0%}")
        table.add_row(row.off or "none", where, *cells, "" if share is None else f"{share:.1%}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _bytes_and_speed(result: Evaluation) -> Table:
    kv, speed = result.kv, result.speed
    table = _table("KV cache and speed", "", "base", "ours", "ratio")
    table.add_row(
        "KV bytes per token, bf16", f"{kv.base_per_token:,}", f"{kv.converted_per_token:,}",
        f"{kv.base_per_token / max(1, kv.converted_per_token):.2f}x smaller",
    )  # fmt: skip
    for context, base, ours in zip(kv.contexts, kv.base, kv.converted, strict=True):
        if context in (8192, 32_768, 131_072):
            table.add_row(
                f"KV at {context:,} tokens",
                human_bytes(base),
                human_bytes(ours),
                f"{base / ours:.2f}x smaller",
            )
    if speed:
        for name in ("prefill", "decode"):
            base_rate, rate = getattr(speed.base, name), getattr(speed.converted, name)
            cells = f"{base_rate:,.0f}", f"{rate:,.0f}", f"{rate / base_rate:.2f}x as fast"
            table.add_row(f"{name} at {speed.tokens:,}, tokens/s", *cells)
    return table


def _tasks(result: Evaluation) -> Table | None:
    if not result.tasks:
        return None
    names = list(result.tasks)
    table = _table("standard tasks", "task", "metric", *names)
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for model, tasks in result.tasks.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                rows.setdefault((task, metric), {})[model] = value
    for (task, metric), values in rows.items():
        table.add_row(task, metric, *(f"{values[name]:.4f}" if name in values else "" for name in names))
    return table


def _verdict(verdict: Verdict, console: Any) -> None:
    console.print(
        "[bold green]PASS[/bold green]: every limit is kept"
        if verdict.passed
        else "[bold red]FAIL[/bold red]: " + "; ".join(verdict.reasons),
        highlight=False,
        soft_wrap=True,
    )
    for step in verdict.suggestions:
        console.print(
            f"  make layer {step.layer} ({step.now}) full: undoes a predicted {step.damage:.4f} nats for "
            f"{human_bytes(step.kv_bytes)} of KV at {step.context:,} tokens ({step.kv_bytes_per_token:,} per token), "
            f"then {step.kv_share:.1%} of the base's",
            highlight=False,
            soft_wrap=True,
        )
    if verdict.suggestions:
        console.print(f"  --plan '{verdict.suggestions[-1].line}'", highlight=False, soft_wrap=True)
    if not verdict.passed and not verdict.costs_known:
        console.print(
            "  which layers to make full next is not known; run hyconvert measure BASE -o COSTS and give --costs COSTS",
            highlight=False,
            soft_wrap=True,
        )
