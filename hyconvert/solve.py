"""From measured costs and a budget to a plan: an exact integer program, its whole frontier, and what else it weighed.

Choosing full layers and who reads them is a facility-location problem. Binary y_i says that layer i stays full, x_c
that candidate c (a layer, its kind and source) is taken:

    minimise sum_c damage_c x_c   subject to   y_i + sum_(c of layer i) x_c = 1,   x_c <= y_(source of c),
    sum_i kv_full y_i + sum_c kv_c x_c <= budget

Once the full layers are fixed the rest is a choice per layer, so the relaxation is tight and HiGHS needs a few nodes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hyconvert.errors import PlanError
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.measure.costs import Cost, Costs
from hyconvert.plan import LayerKind, LayerPlan, Plan


@dataclass(frozen=True)
class Rules:
    """What a user may ask of a plan beside the budget.

    Attributes:
        pinned: layers whose kind is given.
        span: farthest source, in layers.
        kinds: kinds allowed beside full. `reuse` is not among the defaults: it stores as much as a full layer.
        readers: most layers that read one source.
        retrieval: weight of the answers' NLL against the KL divergence.
        tasks: retrieval tasks whose answers count; None for all that were measured.
    """

    pinned: Mapping[int, LayerKind] = field(default_factory=dict)
    span: int | None = None
    kinds: frozenset[str] = frozenset({"window", "sparse"})
    readers: int | None = None
    retrieval: float = 1.0
    tasks: frozenset[str] | None = None


@dataclass(frozen=True)
class Budget:
    """An upper bound: either on the number of full layers, or on KV bytes.

    Attributes:
        full_layers: most layers that stay full; or
        kv_bytes: most bytes that all layers' keys and values take at `context` tokens.
        context: tokens cached, for `kv_bytes`.
    """

    full_layers: int | None = None
    kv_bytes: float | None = None
    context: int = 32_768


@dataclass(frozen=True)
class Solution:
    """A plan and what it was chosen for.

    Attributes:
        plan: the plan.
        damage: its summed predicted damage.
        kv_bytes: bfloat16 KV bytes at `context` tokens; and the base's.
        base_kv_bytes: the base's.
        context: tokens cached.
        optimal: whether the solver proved that no plan is better.
        tasks: retrieval tasks that count towards `damage`; none if their weight is 0.
    """

    plan: Plan
    damage: float
    kv_bytes: int
    base_kv_bytes: int
    context: int
    optimal: bool = True
    tasks: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """KV bytes as a share of the base's."""
        return self.kv_bytes / self.base_kv_bytes


def candidates(costs: Costs, rules: Rules) -> list[Cost]:
    """The measured candidates that the rules allow.

    Raises:
        PlanError: a pin cannot be met, or a task was not measured.
    """
    costs.counted(rules.tasks)
    for layer, kind in rules.pinned.items():
        if not 0 <= layer < costs.num_layers:
            raise PlanError(
                f"layer {layer} cannot be pinned; the base has layers 0 to {costs.num_layers - 1}"
            )
        if layer in costs.sliding:
            raise PlanError(
                f"layer {layer} is a sliding-window layer of the base and stays one; do not pin it"
            )
        if kind not in ("full", "window", "sparse", "reuse"):
            raise PlanError(f"layer {layer} cannot be pinned to '{kind}'; use full, sparse, reuse or window")
        if kind not in ("full", *rules.kinds):
            raise PlanError(f"layer {layer} is pinned to {kind}, which the other options rule out")
        if kind != "full" and not any(row.layer == layer and row.kind == kind for row in costs):
            raise PlanError(f"layer {layer} cannot be {kind}: no such candidate of it was measured")
    return [
        row
        for row in costs
        if row.kind in rules.kinds
        and rules.pinned.get(row.layer, row.kind) == row.kind
        and (row.source is None or rules.span is None or row.layer - row.source <= rules.span)
        and (row.source is None or rules.pinned.get(row.source, "full") == "full")
    ]


def solve(costs: Costs, config: Any, budget: Budget, rules: Rules | None = None) -> Solution:
    """The plan of least predicted damage within a budget.

    Args:
        costs: measured costs of the base.
        config: the base's config, for KV bytes.
        budget: the bound.
        rules: further constraints.

    Raises:
        PlanError: no plan meets budget and rules.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    rules = rules or Rules()
    rows = candidates(costs, rules)
    layers = [i for i in range(costs.num_layers) if i not in costs.sliding]
    place = {layer: i for i, layer in enumerate(layers)}
    count, total = len(layers), len(layers) + len(rows)
    damage = np.array([0.0] * count + [row.damage(rules.retrieval, rules.tasks) for row in rows])
    # Between equal damages prefer less to read: a nudge far below what can be measured.
    objective = damage + np.array(
        [0.0] * count + [1e-9 * (2 if row.source is not None else 1) for row in rows]
    )

    one_each = lil_array((count, total))
    for i in range(count):
        one_each[i, i] = 1
    for c, row in enumerate(rows):
        one_each[place[row.layer], count + c] = 1
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    reading = [(c, row) for c, row in enumerate(rows) if row.source is not None]
    if reading:
        sources = lil_array((len(reading), total))
        for at, (c, row) in enumerate(reading):
            assert row.source is not None
            sources[at, count + c], sources[at, place[row.source]] = 1, -1
        constraints.append(LinearConstraint(sources.tocsr(), -np.inf, 0))
    if rules.readers is not None and reading:
        crowd = lil_array((count, total))
        for c, row in reading:
            assert row.source is not None
            crowd[place[row.source], count + c] = 1
        constraints.append(LinearConstraint(crowd.tocsr(), -np.inf, rules.readers))
    sizes = _sizes(costs, config, budget, rows, layers)
    limit = budget.full_layers if budget.full_layers is not None else budget.kv_bytes
    if limit is None:
        raise PlanError("a plan needs a budget: --kv-budget, --full-layers, --ratio or --kv-bytes-per-token")
    if budget.kv_bytes is not None:  # sliding layers of the base take their share whatever the plan
        limit -= sum(base_kv_bytes(config, budget.context)[i] for i in costs.sliding)
    scale = max(1.0, sizes.max())  # bytes would be too large for the solver's tolerances
    constraints.append(LinearConstraint((sizes / scale)[None], -np.inf, limit / scale + 1e-9))
    lower, upper = np.zeros(total), np.ones(total)
    for layer, kind in rules.pinned.items():
        lower[place[layer]] = upper[place[layer]] = float(kind == "full")
    result = milp(
        objective, constraints=constraints, bounds=Bounds(lower, upper), integrality=np.ones(total),
        options={"time_limit": 60.0, "mip_rel_gap": 1e-6},
    )  # fmt: skip
    if result.x is None:
        least = _least(config, costs, budget)
        raise PlanError(f"no plan meets these demands ({least}); raise the budget or lift a constraint")
    chosen: dict[int, LayerPlan] = {i: LayerPlan(kind="sliding") for i in costs.sliding}
    for i, layer in enumerate(layers):
        if result.x[i] > 0.5:
            chosen[layer] = LayerPlan(kind="full")
    for c, row in enumerate(rows):
        if result.x[count + c] > 0.5:
            chosen[row.layer] = LayerPlan(kind=row.kind, source=row.source)
    plan = Plan(
        layers=tuple(chosen[i] for i in range(costs.num_layers)),
        **costs.settings.plan_settings(),
        base=costs.base,
    )
    return evaluate(
        plan, costs, config, budget.context, rules.retrieval, rules.tasks, optimal=result.status == 0
    )


def evaluate(
    plan: Plan,
    costs: Costs,
    config: Any,
    context: int,
    retrieval: float = 1.0,
    tasks: Collection[str] | None = None,
    *,
    optimal: bool = True,
) -> Solution:
    """What costs predict for a plan, and what it stores."""
    return Solution(
        plan=plan,
        damage=costs.predicted(plan, retrieval, tasks),
        kv_bytes=sum(kv_bytes(config, context, plan=plan)),
        base_kv_bytes=sum(base_kv_bytes(config, context)),
        context=context,
        optimal=optimal,
        tasks=costs.counted(tasks) if retrieval else (),
    )


def _sizes(costs: Costs, config: Any, budget: Budget, rows: list[Cost], layers: list[int]) -> np.ndarray:
    """What each variable takes of the budget: layers counted as full, or bytes."""
    if budget.full_layers is not None:
        return np.array([1.0] * len(layers) + [0.0] * len(rows))
    full = base_kv_bytes(config, budget.context)
    window = kv_bytes(config, budget.context, plan=_all_windows(costs))
    return np.array(
        [float(full[i]) for i in layers]
        + [float(full[row.layer] if row.kind == "reuse" else window[row.layer]) for row in rows]
    )


def _all_windows(costs: Costs) -> Plan:
    layers = tuple(
        LayerPlan(kind="sliding" if i in costs.sliding else "window") for i in range(costs.num_layers)
    )
    return Plan(layers=layers, **costs.settings.plan_settings())


def _least(config: Any, costs: Costs, budget: Budget) -> str:
    if budget.full_layers is not None:
        return f"at most {budget.full_layers} full layers"
    floor = sum(kv_bytes(config, budget.context, plan=_all_windows(costs)))
    wanted = (budget.kv_bytes or 0) / sum(base_kv_bytes(config, budget.context))
    share = floor / sum(base_kv_bytes(config, budget.context))
    return (
        f"{wanted:.1%} of the base's KV at {budget.context:,} tokens, of which windows alone take {share:.1%}"
    )


def frontier(costs: Costs, config: Any, context: int, rules: Rules | None = None) -> list[Solution]:
    """The best plan for every number of full layers, fewest first."""
    rules = rules or Rules()
    layers = costs.num_layers - len(costs.sliding)
    pinned = sum(kind == "full" for kind in rules.pinned.values())
    solutions = []
    for full in range(max(1, pinned), layers + 1):
        try:
            solutions.append(solve(costs, config, Budget(full_layers=full, context=context), rules))
        except PlanError:
            if full == layers:
                raise
    return solutions


def knee(solutions: Iterable[Solution]) -> Solution:
    """Where the frontier bends: farthest below the line between its ends (both axes scaled to 1)."""
    points = list(solutions)
    first, last = points[0], points[-1]
    width = max(1, last.kv_bytes - first.kv_bytes)
    height = max(1e-12, first.damage - last.damage)

    def drop(s: Solution) -> float:
        return 1 - (s.kv_bytes - first.kv_bytes) / width - (s.damage - last.damage) / height

    return max(points, key=drop)


@dataclass(frozen=True)
class Alternative:
    """What one layer of a plan could have been instead, all other layers staying as they are.

    Attributes:
        layer: which layer.
        chosen: what it is.
        damage: what that costs.
        others: damage by kind, of the best source in the plan; 0 for full. A kind that was not measured is missing.
    """

    layer: int
    chosen: LayerPlan
    damage: float
    others: dict[str, float]


def alternatives(plan: Plan, costs: Costs, rules: Rules | None = None) -> list[Alternative]:
    """Per layer, what the alternatives would have cost."""
    rules = rules or Rules()
    result = []
    for index, layer in enumerate(plan.layers):
        if layer.kind == "sliding":
            continue
        others: dict[str, float] = {"full": 0.0}
        for row in costs:
            if row.layer == index and (row.source is None or row.source in plan.full_layers):
                damage = row.damage(rules.retrieval, rules.tasks)
                others[row.kind] = min(damage, others.get(row.kind, math.inf))
        cost = costs.get(index, layer.kind, layer.source)
        damage = cost.damage(rules.retrieval, rules.tasks) if cost else 0.0
        result.append(Alternative(index, layer, damage, others))
    return result
