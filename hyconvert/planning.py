"""What `hyconvert plan` shows: a chosen plan with its reasons, or the whole frontier of damage against KV bytes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hyconvert.checkpoint import open_source
from hyconvert.errors import HyconvertError, PlanError
from hyconvert.evaluate import human_bytes
from hyconvert.kv import base_kv_bytes
from hyconvert.measure import Cost, Costs, JointEvaluator, Refinement, refine
from hyconvert.plan import Plan
from hyconvert.progress import Progress, silent
from hyconvert.solve import (
    Alternative,
    Budget,
    Rules,
    Solution,
    alternatives,
    candidates,
    evaluate,
    frontier,
    knee,
    solve,
)

DEFAULT_BUDGET = 0.25
"""Share of the base's KV that `convert` plans for when nobody says."""


@dataclass(frozen=True)
class CostReport:
    """Measured costs for the reader: per layer what a window would cost, and the best source.

    Attributes:
        costs: the costs.
        folder: where they are kept.
    """

    costs: Costs
    folder: Path

    def best(self, layer: int, kind: str) -> Cost | None:
        """The candidate of a kind that costs least."""
        rows = [row for row in self.costs if row.layer == layer and row.kind == kind]
        return min(rows, key=Cost.damage, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return self.costs.header() | {
            "folder": str(self.folder),
            "costs": [asdict(row) for row in self.costs],
        }

    def render(self, console: Console) -> None:
        """As a table."""
        kinds = [k for k in ("window", "sparse", "reuse") if any(row.kind == k for row in self.costs)]
        table = Table(
            "layer",
            *(heading for k in kinds for heading in (f"{k}: damage", "KL", "source")[: 3 - (k == "window")]),
        )
        for layer in range(self.costs.num_layers):
            cells = []
            for kind in kinds:
                row = self.best(layer, kind)
                found = [f"{row.damage():.4f}", f"{row.kl:.4f}", str(row.source)] if row else ["", "", ""]
                cells += found[: 3 - (kind == "window")]
            table.add_row(str(layer), *cells)
        console.print(table)
        c = self.costs
        console.print(
            f"{len(c.rows)} candidates in {c.seconds:.0f} s, kept in {self.folder}. Choose with hyconvert plan "
            f"{self.folder} --kv-budget 25%, or see all budgets with --sweep.",
            highlight=False,
        )


@dataclass(frozen=True)
class PlanReport:
    """A plan and why it was chosen.

    Attributes:
        solution: the plan and its damage.
        alternatives: per layer, what else it could have been.
        refinement: what measuring the plan as a whole changed, if that was asked for.
    """

    solution: Solution
    alternatives: list[Alternative]
    refinement: Refinement | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        s = self.solution
        result: dict[str, Any] = {
            "line": s.plan.line,
            "full_layers": list(s.plan.full_layers),
            "damage": s.damage,
            "tasks": list(s.tasks),
            "kv_bytes": s.kv_bytes,
            "base_kv_bytes": s.base_kv_bytes,
            "kv_share": s.share,
            "context": s.context,
            "optimal": s.optimal,
            "layers": [
                {"layer": a.layer, "chosen": str(a.chosen), "damage": a.damage, "others": a.others}
                for a in self.alternatives
            ],
        }
        if self.refinement is not None:
            r = self.refinement
            result["measured"] = {
                "before": r.before, "after": r.after, "kl": r.reading.kl, "nll": r.reading.nll, "tried": r.tried,
                "moves": list(r.moves),
            }  # fmt: skip
        return result

    def render(self, console: Console) -> None:
        """As a table of layers and a few lines."""
        kinds = [
            k for k in ("full", "sparse", "reuse", "window") if any(k in a.others for a in self.alternatives)
        ]
        table = Table("layer", "choice", *(f"if {kind}" for kind in kinds))
        for a in self.alternatives:
            cells = [f"{a.others[k]:.4f}" if k in a.others else "" for k in kinds]
            cells = [
                f"[bold]{c}[/bold]" if k == a.chosen.kind else c for k, c in zip(kinds, cells, strict=True)
            ]
            table.add_row(str(a.layer), str(a.chosen), *cells)
        console.print(table)
        s = self.solution
        console.print(s.plan.line, highlight=False)
        console.print(
            f"{len(s.plan.full_layers)} full layers, predicted damage {s.damage:.4f} ({_counting(s)}), "
            f"KV at {s.context:,} tokens {human_bytes(s.kv_bytes)} of {human_bytes(s.base_kv_bytes)} ({s.share:.1%})"
            + ("" if s.optimal else "; the solver stopped before it could prove that no plan is better"),
            highlight=False,
        )
        if self.refinement is not None:
            r = self.refinement
            console.print(
                f"measured as a whole: damage {r.before:.4f}, after {len(r.moves)} swaps ({r.tried} plans tried) "
                f"{r.after:.4f}, KL {r.reading.kl:.4f}",
                highlight=False,
            )


@dataclass(frozen=True)
class Sweep:
    """The best plan for every number of full layers.

    Attributes:
        solutions: fewest full layers first.
        knee: where the frontier bends.
    """

    solutions: list[Solution]
    knee: Solution = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "knee", knee(self.solutions))

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "context": self.knee.context,
            "tasks": list(self.knee.tasks),
            "knee": len(self.knee.plan.full_layers),
            "plans": [
                {
                    "full_layers": len(s.plan.full_layers),
                    "damage": s.damage,
                    "kv_bytes": s.kv_bytes,
                    "kv_share": s.share,
                    "line": s.plan.line,
                }
                for s in self.solutions
            ],
        }

    def render(self, console: Console) -> None:
        """As a table."""
        table = Table("full", "KV bytes", "of base", "damage", "plan")
        for s in self.solutions:
            mark = "  <- knee" if s is self.knee else ""
            table.add_row(
                str(len(s.plan.full_layers)), human_bytes(s.kv_bytes), f"{s.share:.1%}", f"{s.damage:.4f}",
                s.plan.line + mark,
            )  # fmt: skip
        console.print(table)

    def plot(self, path: Path) -> None:
        """Damage against KV bytes.

        Raises:
            HyconvertError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise HyconvertError("the plot needs matplotlib; pip install 'hyconvert[plot]'") from None
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([s.share * 100 for s in self.solutions], [s.damage for s in self.solutions], "o-", ms=4)
        axes.plot([self.knee.share * 100], [self.knee.damage], "o", ms=10, mfc="none", label="knee")
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set_xlabel(f"KV bytes at {self.knee.context:,} tokens, % of the base's")
        axes.set_ylabel("predicted damage (nats)")
        axes.legend()
        figure.savefig(path)


def read_costs(folder: str | Path) -> tuple[Costs, Any]:
    """Costs and the config of the base that they are of, which must be the one that was measured.

    Raises:
        PlanError: there are no complete costs, or the base has changed.
        CheckpointError: the base cannot be found.
    """
    costs = Costs.load(folder)
    source = open_source(costs.base, revision=costs.revision)
    costs.check_base(source.fingerprint, costs.base)
    return costs, source.config


def make_budget(
    config: Any,
    *,
    kv_budget: float | None = None,
    full_layers: int | None = None,
    ratio: int | None = None,
    kv_bytes_per_token: int | None = None,
    context: int = 32_768,
) -> Budget:
    """The one budget that a user gave.

    Args:
        config: the base's config.
        kv_budget: share of the base's KV bytes at `context` tokens, between 0 and 1.
        full_layers: most full layers.
        ratio: N of 1:N, sparse layers per full layer.
        kv_bytes_per_token: bfloat16 KV bytes per token, averaged over `context` tokens.
        context: tokens cached.

    Raises:
        PlanError: none or several were given, or one is out of range.
    """
    given = {
        name: value
        for name, value in (
            ("--kv-budget", kv_budget),
            ("--full-layers", full_layers),
            ("--ratio", ratio),
            ("--kv-bytes-per-token", kv_bytes_per_token),
        )
        if value is not None
    }
    if len(given) != 1:
        names = " and ".join(given) or "--kv-budget, --full-layers, --ratio or --kv-bytes-per-token"
        raise PlanError(f"{names}: give one budget")
    if kv_budget is not None:
        if not 0 < kv_budget <= 1:
            raise PlanError(f"--kv-budget {kv_budget:.0%} must lie between 0 and 100%")
        return Budget(kv_bytes=kv_budget * sum(base_kv_bytes(config, context)), context=context)
    if kv_bytes_per_token is not None:
        return Budget(kv_bytes=float(kv_bytes_per_token) * context, context=context)
    count = config.num_hidden_layers
    full = full_layers if full_layers is not None else math.ceil(count / (1 + (ratio or 1)))
    if not 1 <= full <= count:
        raise PlanError(f"{full} full layers do not fit a base of {count} layers")
    return Budget(full_layers=full, context=context)


def choose(
    costs: Costs,
    config: Any,
    budget: Budget,
    rules: Rules | None = None,
    *,
    tries: int = 0,
    evaluator: JointEvaluator | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> PlanReport:
    """Solve for a plan; with `tries`, measure it as a whole and swap while that helps.

    Args:
        costs: measured costs.
        config: the base's config.
        budget, rules: what the plan must meet.
        tries: plans measured as a whole at most beside the solver's; 0 for none at all.
        evaluator: measures plans; made from the costs if None.
        device: where to measure plans.
        progress: told about plans measured.
    """
    rules = rules or Rules()
    solution = solve(costs, config, budget, rules)
    refinement = None
    if tries:
        evaluator = evaluator or JointEvaluator.for_costs(costs.base, costs, device=device, progress=progress)
        refinement = refine(
            evaluator, costs, solution.plan, tries=tries, retrieval=rules.retrieval, tasks=rules.tasks,
            pinned=frozenset(rules.pinned), allowed=lambda plan: obeys(plan, costs, rules),
            others=rivals(costs, config, budget, rules, len(solution.plan.full_layers)), progress=progress,
        )  # fmt: skip
        solution = evaluate(refinement.plan, costs, config, budget.context, rules.retrieval, rules.tasks)
    note = f"predicted damage {solution.damage:.4f} ({_counting(solution)})"
    if refinement is not None:
        note += f", measured as a whole {refinement.after:.4f} (KL {refinement.reading.kl:.4f})"
    plan = solution.plan.model_copy(update={"note": note})
    solution = replace(solution, plan=plan)
    return PlanReport(solution, alternatives(plan, costs, rules), refinement)


def rivals(costs: Costs, config: Any, budget: Budget, rules: Rules, full: int) -> list[Plan]:
    """Plans within the same bounds that might be better than the solver's, since damage is not quite additive.

    They have the least damage where retrieval counts for nothing, for three times as much, or by one task alone, or
    where the `full` layers are full that lose most with a window.
    """
    tasks = costs.counted(rules.tasks)
    variants = [replace(rules, retrieval=weight) for weight in (0.0, 3 * rules.retrieval)]
    variants += [replace(rules, tasks=frozenset({task})) for task in tasks]
    windows = {row.layer: row.damage(rules.retrieval, rules.tasks) for row in costs if row.kind == "window"}
    most = sorted((i for i in windows if i not in rules.pinned), key=lambda i: -windows[i])
    free = full - sum(kind == "full" for kind in rules.pinned.values())
    variants.append(replace(rules, pinned={**dict.fromkeys(most[:free], "full"), **rules.pinned}))
    found = []
    for variant in variants:
        with suppress(PlanError):  # such as a window's layers that leave no source for another
            found.append(solve(costs, config, budget, variant).plan)
    return found


def _counting(solution: Solution) -> str:
    """What its damage is made of."""
    return ", ".join(("KL", *solution.tasks))


def obeys(plan: Plan, costs: Costs, rules: Rules) -> bool:
    """Whether a plan is made of what the rules allow."""
    allowed = {(row.layer, row.kind, row.source) for row in candidates(costs, rules)}
    chosen = [(i, layer.kind, layer.source) for i, layer in enumerate(plan.layers)]
    readers = Counter(layer.source for layer in plan.layers if layer.source is not None)
    return all(choice in allowed for choice in chosen if choice[1] not in ("full", "sliding")) and (
        rules.readers is None or max(readers.values(), default=0) <= rules.readers
    )


def sweep(costs: Costs, config: Any, context: int, rules: Rules | None = None) -> Sweep:
    """The frontier of damage against KV bytes."""
    return Sweep(frontier(costs, config, context, rules))


def save_sweep(found: Sweep, folder: Path) -> Sequence[Path]:
    """Write `frontier.json` and `frontier.svg` into a folder; the plot is left out without matplotlib."""
    data = folder / "frontier.json"
    data.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    try:
        found.plot(folder / "frontier.svg")
    except HyconvertError:
        return [data]
    return [data, folder / "frontier.svg"]
