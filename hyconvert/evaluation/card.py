"""The section of a model card that says what an evaluation measured."""

from __future__ import annotations

from typing import Any

HEADING = "## Evaluation"
_BEGIN, _END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"


def update_card(card: str, data: dict[str, Any]) -> str:
    """A model card with its evaluation section replaced, or put in front of the plan.

    Args:
        card: Markdown; may be empty.
        data: `Evaluation.to_dict()`.
    """
    card = without_evaluation(card)
    section = f"{_BEGIN}\n{evaluation_section(data)}\n{_END}\n"
    if "## Plan" in card:
        return card.replace("## Plan", f"{section}\n## Plan", 1)
    return f"{card.rstrip()}\n\n{section}".lstrip()


def without_evaluation(card: str) -> str:
    """A model card without its evaluation section, for a model that has changed since."""
    if _BEGIN not in card or _END not in card:
        return card
    head, _, rest = card.partition(_BEGIN)
    return head + rest.partition(_END)[2].lstrip("\n")


def evaluation_section(data: dict[str, Any]) -> str:
    """Markdown of what was measured, with the command."""
    lines = [HEADING, ""]
    verdict = data["verdict"]
    if verdict:
        failed = "; ".join(verdict["reasons"])
        lines += [
            "**Passes its gate.**" if verdict["passed"] else f"**Fails its gate:** {failed}.",
            "",
        ]
    rows = [*_text_rows(data), *_lookup_rows(data), *_generation_rows(data), *_other_rows(data)]
    lines += ["| | base | converted | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"On {data['device']} in {data['dtype']}, {data['seconds']:.0f} s."]
    if data["command"]:
        lines += ["", "Made with:", "", f"    {data['command']}"]
    lines += [f"\n- {note}" for note in data["notes"]]
    return "\n".join(lines)


def _text_rows(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    text = data["text"]
    if not text:
        return []
    whole, length = text["whole"], text["sequence_length"]
    name = f"perplexity, {text['tokens']:,} tokens of `{data['settings']['data']}` in rows of {length:,}"
    rows = [(name, f"{whole['base']:.2f}", f"{whole['converted']:.2f}", f"{whole['ratio']:.3f}x")]
    last = text["buckets"][-1]
    rows.append(
        (
            f"with {last['start']:,} to {last['end']:,} tokens before", f"{last['base']:.2f}",
            f"{last['converted']:.2f}", f"{last['ratio']:.3f}x",
        )
    )  # fmt: skip
    rows.append(
        ("KL from the base per token, mean and P95", "", f"{whole['kl']:.4f}", f"{whole['kl_p95']:.3f}")
    )
    rows.append(("same most likely token", "", f"{whole['agreement']:.1%}", ""))
    return rows


def _lookup_rows(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    words = {
        "single": "one needle, exact",
        "multikey": "needle among decoys, exact",
        "multivalue": "two values of a key, exact",
    }
    rows = []
    for cell in (data["lookup"] or {}).get("totals", []):
        base, ours = cell["base"], cell["converted"]
        if cell["kind"] == "copy":
            rows.append(
                (
                    "copied passage, NLL",
                    f"{base['nll']:.3f}",
                    f"{ours['nll']:.3f}",
                    f"{cell['count']} passages",
                )
            )
        else:
            rows.append(
                (
                    words[cell["kind"]],
                    f"{base['exact']:.0%}",
                    f"{ours['exact']:.0%}",
                    f"{cell['count']} questions",
                )
            )
    return rows


def _generation_rows(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    found = data["generation"]
    if not found:
        return []
    return [
        (
            "the base's NLL of greedy text", f"{found['base_nll']:.3f}", f"{found['converted_nll']:.3f}",
            f"{found['equal']:.0%} equal tokens",
        ),
        ("repeated 4-grams in it", f"{found['base_repeated']:.1%}", f"{found['converted_repeated']:.1%}", ""),
    ]  # fmt: skip


def _other_rows(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    kv, rows = data["kv"], []
    if data["branches"] and data["branches"]["mean_share"] is not None:
        rows.append(
            (
                "attention mass of the sparse branch, mean of layers",
                "",
                f"{data['branches']['mean_share']:.1%}",
                "",
            )
        )
    rows.append(
        (
            "KV bytes per token, bfloat16", f"{kv['base_per_token']:,}", f"{kv['converted_per_token']:,}",
            f"{kv['base_per_token'] / max(1, kv['converted_per_token']):.2f}x smaller",
        )
    )  # fmt: skip
    for model, tasks in (data["tasks"] or {}).items():
        for task, metrics in tasks.items():
            metric, value = next(iter(metrics.items()), ("", 0.0))
            cells = [f"{value:.3f}", ""] if model == "base" else ["", f"{value:.3f}"]
            rows.append((f"{task}, {metric}", *cells, ""))  # type: ignore[arg-type]
    return rows
