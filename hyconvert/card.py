"""The model card of a converted checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hyconvert.evaluate import human_bytes
from hyconvert.inspection import CONTEXTS
from hyconvert.kv import base_kv_bytes, kv_bytes

if TYPE_CHECKING:
    from hyconvert.checkpoint import Source
    from hyconvert.conversion import ConversionReport


def model_card(report: ConversionReport, config: Any, source: Source, command: str | None) -> str:
    """Markdown that states base, plan, command and what was measured."""
    plan = report.plan
    kinds = ", ".join(
        f"{sum(layer.kind == kind for layer in plan.layers)} {kind}"
        for kind in ("full", "sparse", "reuse", "window", "sliding")
        if any(layer.kind == kind for layer in plan.layers)
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [hyconvert, hysparse, sparse-attention]",
        "---",
        "",
        f"# {source.name.rstrip('/').rsplit('/', 1)[-1]}, converted by hyconvert",
        "",
        f"A HySparse model (arXiv 2602.03560) made from `{source.name}` ({source.format}) without training.",
        f"Base fingerprint `{report.fingerprint}`.",
        "",
        "```python",
        "import hyconvert",
        'model = hyconvert.load("<this folder>")',
        "```",
        "",
        "## Plan",
        "",
        f"`{plan.line}`",
        "",
        f"{len(plan.layers)} layers: {kinds}. Blocks of {plan.block_size} keys, top-k {plan.topk}, window "
        f"{plan.window}, {plan.gate} gate{', sinks' if plan.sinks else ''}.",
        "",
    ]
    if plan.note:
        lines += [f"Chosen by measured damage: {plan.note}.", ""]
    if command:
        lines += ["Made with:", "", f"    {command}", ""]
    lines += [
        "## KV cache, bfloat16, one sequence",
        "",
        "| context | base | converted | ratio |",
        "|---|---|---|---|",
    ]
    for context in CONTEXTS:
        base, ours = sum(base_kv_bytes(config, context)), sum(kv_bytes(config, context))
        lines.append(f"| {context:,} | {human_bytes(base)} | {human_bytes(ours)} | {base / ours:.1f}x |")
    lines += ["", "## Alignment", ""]
    if report.calibration is None:
        return "\n".join(
            [
                *lines,
                "None (`--no-align`): the new parameters are identities. Expect nonsense until healed.",
                "",
            ]
        )
    calibration = report.calibration
    lines.append(
        f"Closed form, on {calibration.tokens:,} tokens of `{calibration.source or 'pydoc'}` in sequences of "
        f"{calibration.sequence_length:,}."
    )
    if report.perplexity:
        before, after = report.perplexity["base"], report.perplexity["converted"]
        lines += ["", f"Perplexity on held-out sequences of the same text: base {before:.2f}, converted {after:.2f} "
                  f"({after / before:.3f}x)."]  # fmt: skip
    lines += [
        "",
        "| layer | kind | source | mass outside window | explained | output error, without compensation |",
        "|---|---|---|---|---|---|",
    ]
    for fit in report.fits:
        source_cell = "" if fit.source is None else str(fit.source)
        explained = "" if fit.explained is None else f"{fit.explained:.3f}"
        lines.append(
            f"| {fit.layer} | {fit.kind} | {source_cell} | {fit.outside_mass:.2f} | {explained} | {fit.error:.4f} |"
        )
    return "\n".join([*lines, ""])
