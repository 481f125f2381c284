"""Whether a converted model may stand in for its base; and if not, which layers to make full next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyconvert.evaluation.limits import Limits
from hyconvert.evaluation.lookup import LookupResult
from hyconvert.evaluation.models import read_json
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.measure.costs import Costs
from hyconvert.plan import LayerPlan, Plan

CONTEXT = 32_768
"""Tokens at which the KV bytes of a suggestion are counted."""


@dataclass(frozen=True)
class Check:
    """One limit and what was measured.

    Attributes:
        name: the limit's name in `Limits`.
        text: for people, with value and limit in it.
        value, limit: the numbers; value is None where the part was not measured.
        passed: whether the limit is kept.
    """

    name: str
    text: str
    value: float | None
    limit: float
    passed: bool


@dataclass(frozen=True)
class Suggestion:
    """A layer to make full, all earlier suggestions being followed.

    Attributes:
        layer: which.
        now: what it is, such as `S2` or `W`.
        damage: predicted damage in nats that this undoes.
        kv_bytes: bfloat16 KV bytes that it adds at `context` tokens; and per token.
        kv_bytes_per_token: per token.
        kv_share: what the model would then hold, as a share of the base.
        line: the plan as it would be then.
    """

    layer: int
    now: str
    damage: float
    kv_bytes: int
    kv_bytes_per_token: int
    kv_share: float
    line: str
    context: int = CONTEXT


@dataclass(frozen=True)
class Verdict:
    """Limits kept and broken, and what to do.

    Attributes:
        checks: one per limit that is set.
        suggestions: layers to make full next; empty where costs are not known, or nothing failed.
        costs_known: whether the damage of layers is known.
    """

    checks: list[Check]
    suggestions: list[Suggestion] = field(default_factory=list)
    costs_known: bool = True

    @property
    def passed(self) -> bool:
        """Whether every limit is kept."""
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """What failed, for people."""
        return [check.text for check in self.checks if not check.passed]


def check_limits(result: Any, limits: Limits) -> list[Check]:
    """Hold an `Evaluation` against limits; a limit whose part was not measured is broken, since nobody knows."""
    text, lookup, generation = result.text, result.lookup, result.generation
    needles, copy = _cells(lookup)
    kv = result.kv.converted_per_token / max(1, result.kv.base_per_token)
    measured: dict[str, tuple[float | None, str, str]] = {
        "perplexity_ratio": (text and text.whole.ratio, "perplexity over the base's", "at most"),
        "kl": (text and text.whole.kl, "KL from the base per token", "at most"),
        "agreement": (text and text.whole.agreement, "share of the same most likely token", "at least"),
        "needle_drop": (
            needles and needles.base.exact - needles.converted.exact,
            "exact needle answers lost",
            "at most",
        ),
        "copy_nll_rise": (copy and copy.converted.nll - copy.base.nll, "rise of the copy NLL", "at most"),
        "own_text_rise": (
            generation and generation.converted_nll - generation.base_nll,
            "the base's NLL of the model's own text, above that of its own",
            "at most",
        ),
        "repeated_rise": (
            generation and generation.converted_repeated - generation.base_repeated,
            "rise of repeated 4-grams in its own text",
            "at most",
        ),
        "kv_share": (kv, "KV bytes per token over the base's", "at most"),
    }
    checks = []
    for name, limit in limits.model_dump().items():
        if limit is None:
            continue
        value, words, bound = measured[name]
        if value is None:
            checks.append(Check(name, f"{words}: not measured", None, limit, False))
            continue
        passed = value >= limit if bound == "at least" else value <= limit
        checks.append(Check(name, f"{words} {value:.4g}, {bound} {limit:g}", value, limit, passed))
    return checks


def _cells(lookup: LookupResult | None) -> tuple[Any, Any]:
    return (lookup.needles, lookup.total("copy")) if lookup else (None, None)


def judge(result: Any, limits: Limits, config: Any, path: str, costs: str | Path | None = None) -> Verdict:
    """Check the limits, and suggest layers where they are broken.

    Args:
        result: an `Evaluation`.
        limits: the limits.
        config: the converted model's config.
        path: the converted checkpoint, whose `conversion.json` may know what its layers cost.
        costs: folder of `hyconvert measure`, which knows more.

    Raises:
        PlanError: `costs` cannot be used.
    """
    verdict = Verdict(check_limits(result, limits))
    if verdict.passed:
        return verdict
    table = Costs.load(costs) if costs is not None else None
    if table is not None and result.fingerprint:
        table.check_base(result.fingerprint, result.base)
    planned = {row["layer"]: row["damage"] for row in _planned_layers(path)}
    if table is None and not planned:
        return Verdict(verdict.checks, [], costs_known=False)
    return Verdict(verdict.checks, next_layers(config, planned if table is None else table))


def _planned_layers(path: str) -> list[dict[str, Any]]:
    return list((read_json(path, "conversion.json").get("planning") or {}).get("layers") or [])


def next_layers(config: Any, costs: Costs | dict[int, float], count: int = 3) -> list[Suggestion]:
    """Layers to make full, one after the other: at each step the one that undoes most damage per KV byte.

    Args:
        config: the converted model's config.
        costs: measured costs, by which layers may also move to a new source; or the damage of each layer as it is.
        count: how many at most.
    """
    plan, found = config.get_plan(), []
    total: Callable[[Sequence[LayerPlan]], float] = lambda layers: _damage(layers, costs)  # noqa: E731
    for _ in range(count):
        best: tuple[float, int, Plan] | None = None
        now = sum(kv_bytes(config, CONTEXT, plan=plan))
        for index, layer in enumerate(plan.layers):
            if layer.kind in ("full", "sliding"):
                continue
            changed = plan.model_copy(update={"layers": _made_full(plan.layers, index, costs)})
            drop = total(plan.layers) - total(changed.layers)
            added = sum(kv_bytes(config, CONTEXT, plan=changed)) - now
            worth = drop / max(1, added)
            if drop > 0 and (best is None or worth > best[0]):
                best = worth, index, changed
        if best is None:
            break
        _, index, changed = best
        bytes_then = sum(kv_bytes(config, CONTEXT, plan=changed))
        more = (
            kv_bytes(config, CONTEXT + 1, plan=changed)[index]
            - kv_bytes(config, CONTEXT, plan=changed)[index]
        )
        found.append(
            Suggestion(
                layer=index,
                now=str(plan.layers[index]),
                damage=total(plan.layers) - total(changed.layers),
                kv_bytes=bytes_then - now,
                kv_bytes_per_token=more,
                kv_share=bytes_then / sum(base_kv_bytes(config, CONTEXT)),
                line=changed.line,
            )
        )
        plan = changed
    return found


def _made_full(
    layers: Sequence[LayerPlan], index: int, costs: Costs | dict[int, float]
) -> tuple[LayerPlan, ...]:
    """The layers with one made full, and others reading it where that was measured to be better."""
    changed = list(layers)
    changed[index] = LayerPlan(kind="full")
    if isinstance(costs, Costs):
        for later in range(index + 1, len(changed)):
            layer = changed[later]
            offer = costs.get(later, "sparse", index)
            mine = costs.get(later, layer.kind, layer.source)
            if layer.kind in ("sparse", "window") and offer and mine and offer.damage() < mine.damage():
                changed[later] = LayerPlan(kind="sparse", source=index)
    return tuple(changed)


def _damage(layers: Sequence[LayerPlan], costs: Costs | dict[int, float]) -> float:
    total = 0.0
    for index, layer in enumerate(layers):
        if layer.kind in ("full", "sliding"):
            continue
        if isinstance(costs, Costs):
            cost = costs.get(index, layer.kind, layer.source)
            total += cost.damage() if cost else 0.0
        else:
            total += costs.get(index, 0.0)
    return total
