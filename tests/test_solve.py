"""Plans from costs: the integer program against brute force, budgets, rules and the frontier."""

import itertools
import random
import time
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from hyconvert.errors import PlanError
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.measure import Cost, Costs, MeasureSettings
from hyconvert.planning import choose, make_budget, sweep
from hyconvert.solve import Budget, Rules, alternatives, frontier, knee, solve


def config(layers: int) -> Any:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=8,
        intermediate_size=32,
    )  # fmt: skip


def drawn(layers: int, seed: int = 0, sliding: tuple[int, ...] = (), reuse: bool = False) -> Costs:
    """Costs as real ones look: windows dear in some layers, near sources better than far ones."""
    rng = random.Random(seed)
    costs = Costs("base", "f" * 64, "llama", MeasureSettings(window=16), layers, sliding)
    for j in range(layers):
        if j in sliding:
            continue
        window = rng.expovariate(10)
        costs.add(Cost(j, "window", None, window, {"needle": rng.uniform(-0.1, 0.3) * window}))
        for i in range(j):
            if i not in sliding:
                share = min(1.1, rng.uniform(0.1, 0.5) + 0.04 * (j - i))
                costs.add(Cost(j, "sparse", i, window * share, {"needle": 0.0}))
                if reuse:
                    costs.add(Cost(j, "reuse", i, window * share / 2, {"needle": 0.0}))
    costs.expected = len(costs.rows)
    return costs


def with_copying(costs: Costs, seed: int = 7) -> Costs:
    """The same, and rises of copying that have nothing to do with the others."""
    rng = random.Random(seed)
    rows = [replace(row, nll=row.nll | {"copy": rng.expovariate(5) - 0.05}) for row in costs]
    return replace(costs, rows=rows)


def brute_force(costs: Costs, full: int) -> float:
    best = float("inf")
    for chosen in itertools.combinations(range(costs.num_layers), full):
        total = 0.0
        for layer in set(range(costs.num_layers)) - set(chosen):
            total += min(
                row.damage()
                for row in costs
                if row.layer == layer and (row.source is None or row.source in chosen)
            )
        best = min(best, total)
    return best


@pytest.mark.parametrize("full", [1, 2, 3, 5])
def test_the_solver_finds_what_brute_force_finds(full: int) -> None:
    costs = drawn(9, seed=full)
    found = solve(costs, config(9), Budget(full_layers=full))
    assert found.damage == pytest.approx(brute_force(costs, full), rel=1e-6)
    assert len(found.plan.full_layers) <= full
    assert costs.predicted(found.plan) == pytest.approx(found.damage)


def test_eighty_layers_take_less_than_five_seconds() -> None:
    costs, began = drawn(80), time.monotonic()
    assert solve(costs, config(80), Budget(full_layers=20)).optimal
    assert time.monotonic() - began < 5


def test_kv_bytes_stay_within_the_budget() -> None:
    costs, base = drawn(10), config(10)
    whole = sum(base_kv_bytes(base, 4096))
    for share in (0.15, 0.25, 0.5, 1.0):
        found = solve(costs, base, make_budget(base, kv_budget=share, context=4096))
        assert found.kv_bytes == sum(kv_bytes(base, 4096, plan=found.plan)) <= share * whole
    assert found.damage == 0 and found.share == 1
    per_token = make_budget(base, kv_bytes_per_token=whole // 4096 // 4, context=4096)
    assert solve(costs, base, per_token).kv_bytes <= whole / 4


def test_reuse_is_never_chosen_for_bytes_and_only_when_allowed() -> None:
    costs, base = drawn(8, reuse=True), config(8)
    budget = make_budget(base, kv_budget=0.5, context=4096)
    allowed = Rules(kinds=frozenset({"window", "sparse", "reuse"}))
    assert {layer.kind for layer in solve(costs, base, budget, allowed).plan.layers} <= {
        "full",
        "sparse",
        "window",
    }
    by_count = solve(costs, base, Budget(full_layers=2), allowed).plan
    assert any(layer.kind == "reuse" for layer in by_count.layers)
    assert all(layer.kind != "reuse" for layer in solve(costs, base, Budget(full_layers=2)).plan.layers)


def test_rules_are_kept() -> None:
    costs, base = drawn(12), config(12)
    rules = Rules(pinned={3: "full", 7: "window"}, span=4, readers=2)
    plan = solve(costs, base, Budget(full_layers=4), rules).plan
    assert plan.layers[3].kind == "full" and plan.layers[7].kind == "window"
    readers = [layer.source for layer in plan.layers if layer.source is not None]
    assert all(i - layer.source <= 4 for i, layer in enumerate(plan.layers) if layer.source is not None)
    assert max(map(readers.count, readers)) <= 2
    only = solve(costs, base, Budget(full_layers=4), Rules(kinds=frozenset({"sparse"}))).plan
    assert {layer.kind for layer in only.layers} == {"full", "sparse"} and only.layers[0].kind == "full"


def test_the_bases_own_sliding_layers_stay() -> None:
    costs, base = drawn(8, sliding=(1, 3)), config(8)
    plan = solve(costs, base, Budget(full_layers=2)).plan
    assert [i for i, layer in enumerate(plan.layers) if layer.kind == "sliding"] == [1, 3]


def test_the_frontier_falls_and_has_a_knee() -> None:
    costs, base = drawn(10), config(10)
    found = frontier(costs, base, 4096)
    damages = [s.damage for s in found]
    assert damages == sorted(damages, reverse=True) and damages[-1] == 0
    assert knee(found) in found[:-1]
    data = sweep(costs, base, 4096).to_dict()
    assert [row["full_layers"] for row in data["plans"]] == list(range(1, 11))


def test_the_explanation_adds_up() -> None:
    costs, base = drawn(10), config(10)
    report = choose(costs, base, Budget(full_layers=3))
    assert sum(a.damage for a in report.alternatives) == pytest.approx(report.solution.damage)
    for a in alternatives(report.solution.plan, costs):
        assert a.damage == pytest.approx(a.others[a.chosen.kind])
        assert a.chosen.kind == "full" or a.damage == min(v for k, v in a.others.items() if k != "full")


def test_a_task_that_does_not_count_might_as_well_not_have_been_measured() -> None:
    costs, base, budget = with_copying(drawn(9)), config(9), Budget(full_layers=3)
    alone = replace(costs, rows=[replace(row, nll={"copy": row.nll["copy"]}) for row in costs])
    rules = Rules(tasks=frozenset({"copy"}), pinned={4: "full"})
    report = choose(costs, base, budget, rules)
    assert report.to_dict() == choose(alone, base, budget, Rules(pinned={4: "full"})).to_dict()
    assert report.solution.tasks == ("copy",) and "(KL, copy)" in (report.solution.plan.note or "")
    assert report.solution.damage == pytest.approx(costs.predicted(report.solution.plan, tasks={"copy"}))
    assert sum(a.damage for a in report.alternatives) == pytest.approx(report.solution.damage)
    found = sweep(costs, base, 4096, rules).to_dict()
    assert found == sweep(alone, base, 4096, Rules(pinned={4: "full"})).to_dict()
    assert solve(costs, base, budget).plan != solve(costs, base, budget, Rules(tasks=rules.tasks)).plan


def test_all_tasks_count_unless_some_are_chosen() -> None:
    costs, base, budget = with_copying(drawn(9)), config(9), Budget(full_layers=3)
    both = solve(costs, base, budget, Rules(tasks=frozenset({"copy", "needle"})))
    assert both == solve(costs, base, budget) and both.tasks == ("needle", "copy")
    assert Cost(1, "window", None, 1.0, {"needle": 0.5, "copy": -2.0}).damage(2.0) == 1.5
    assert Cost(1, "window", None, 1.0, {"needle": 0.5, "copy": -2.0}).damage(2.0, {"needle"}) == 2.0


def test_tasks_of_costs_without_retrieval_are_refused() -> None:
    costs = drawn(6)
    bare = replace(costs, rows=[replace(row, nll={}) for row in costs])
    with pytest.raises(PlanError, match=r"--tasks copy: .* no retrieval; leave it out"):
        solve(bare, config(6), Budget(full_layers=2), Rules(tasks=frozenset({"copy"})))
    for refused in ({"copy"}, {"copy", "needle"}):
        with pytest.raises(PlanError, match=r"--tasks copy: .* which have needle;"):
            sweep(costs, config(6), 4096, Rules(tasks=frozenset(refused)))
        with pytest.raises(PlanError, match="--tasks copy"):
            costs.predicted(solve(costs, config(6), Budget(full_layers=2)).plan, tasks=refused)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(pinned={20: "full"}), "layers 0 to 5"),
        (Rules(pinned={0: "sparse"}), "no such candidate"),
        (Rules(pinned={0: "windows"}), "use full, sparse"),
        (Rules(pinned={2: "window"}, kinds=frozenset({"sparse"})), "rule out"),
        (Rules(pinned={1: "full", 2: "full", 3: "full"}), "raise the budget"),
        (Rules(tasks=frozenset({"needle", "speed", "copy"})), "--tasks copy, speed: not measured"),
        (Rules(tasks=frozenset()), "names no task"),
    ],
)
def test_rules_that_cannot_be_met_are_refused(rules: Rules, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        solve(drawn(6), config(6), Budget(full_layers=2), rules)


def test_a_budget_below_the_windows_says_what_they_take() -> None:
    with pytest.raises(PlanError, match="windows alone take"):
        solve(drawn(6), config(6), make_budget(config(6), kv_budget=0.01, context=128))


def test_exactly_one_budget_is_wanted() -> None:
    with pytest.raises(PlanError, match="give one budget"):
        make_budget(config(6))
    with pytest.raises(PlanError, match="--full-layers and --ratio"):
        make_budget(config(6), full_layers=2, ratio=3)
    assert make_budget(config(6), ratio=2).full_layers == 2
