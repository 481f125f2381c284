"""The gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hyconvert.errors import PlanError, RecipeError
from hyconvert.evaluation.limits import Limits
from hyconvert.evaluation.models import Pair
from hyconvert.evaluation.run import Evaluation
from hyconvert.evaluation.verdict import CONTEXT, check_limits, judge, next_layers
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.measure.costs import Cost, Costs, MeasureSettings
from hyconvert.plan import Plan, parse_line
from hyconvert.recipe import Recipe

LOOSE = Limits(
    perplexity_ratio=100, kl=100, agreement=0, needle_drop=1, copy_nll_rise=100, own_text_rise=100, repeated_rise=1
)  # fmt: skip


def cost(layer: int, kind: str, source: int | None, kl: float) -> Cost:
    return Cost(layer=layer, kind=kind, source=source, kl=kl, nll={})  # type: ignore[arg-type]


def costs_of(pair: Pair, rows: list[Cost]) -> Costs:
    settings = MeasureSettings(block_size=4, topk=2, window=8)
    return Costs("base", pair.fingerprint, "llama", settings, 4, rows=rows, expected=len(rows))


def save(costs: Costs, folder: Path) -> None:
    costs.save_header(folder)
    costs.save_rows(folder)


def test_limits_that_are_kept_pass(evaluation: Evaluation, pair: Pair, checkpoint: Path) -> None:
    verdict = judge(evaluation, LOOSE, pair.converted.config, str(checkpoint))
    assert verdict.passed and not verdict.reasons and not verdict.suggestions
    assert len(verdict.checks) == 7


def test_a_broken_limit_is_a_reason_with_both_numbers(evaluation: Evaluation) -> None:
    (broken,) = [c for c in check_limits(evaluation, LOOSE.model_copy(update={"kl": 1e-4})) if not c.passed]
    assert evaluation.text is not None
    assert broken.name == "kl" and broken.value == evaluation.text.whole.kl
    assert "at most 0.0001" in broken.text and f"{broken.value:.4g}" in broken.text
    share = [c for c in check_limits(evaluation, LOOSE.model_copy(update={"kv_share": 0.3})) if not c.passed]
    assert [c.value for c in share] == [0.5]


def test_what_was_not_measured_does_not_pass(evaluation: Evaluation) -> None:
    blind = replace(evaluation, lookup=None)
    assert [c.name for c in check_limits(blind, LOOSE) if not c.passed] == ["needle_drop", "copy_nll_rise"]


def test_unknown_costs_suggest_nothing_and_say_so(
    evaluation: Evaluation, pair: Pair, checkpoint: Path
) -> None:
    verdict = judge(evaluation, Limits(kl=1e-4), pair.converted.config, str(checkpoint))
    assert not verdict.passed and not verdict.suggestions and not verdict.costs_known


def test_the_plans_own_record_names_layers_and_their_kv(
    evaluation: Evaluation, pair: Pair, checkpoint: Path, tmp_path: Path
) -> None:
    layers = [{"layer": 1, "chosen": "S0", "damage": 0.02}, {"layer": 2, "chosen": "W", "damage": 0.5}]
    (tmp_path / "conversion.json").write_text(json.dumps({"planning": {"layers": layers}}))
    config = pair.converted.config
    first, second = judge(evaluation, Limits(kl=1e-4), config, str(tmp_path)).suggestions
    assert (first.layer, first.now, first.damage) == (2, "W", 0.5) and second.layer == 1
    full = Plan(layers=parse_line("F S0 F F"), block_size=4, topk=2, window=8)
    more = sum(kv_bytes(config, CONTEXT, plan=full)) - sum(kv_bytes(config, CONTEXT))
    assert first.line == "F S0 F*2" and first.kv_bytes == more
    assert first.kv_bytes_per_token == 2 * 2 * 16 * 2 and second.line == "F*4" and second.kv_share == 1
    assert first.kv_share == sum(kv_bytes(config, CONTEXT, plan=full)) / sum(base_kv_bytes(config, CONTEXT))


def test_measured_costs_let_other_layers_read_the_new_one(pair: Pair) -> None:
    rows = [cost(1, "sparse", 0, 0.3), cost(2, "window", None, 0.25), cost(2, "sparse", 1, 0.05)]
    first, second = next_layers(pair.converted.config, costs_of(pair, rows))
    assert (first.layer, first.line) == (1, "F*2 S1 F")
    assert first.damage == pytest.approx(0.3 + 0.25 - 0.05)
    assert (second.layer, second.line) == (2, "F*4") and second.damage == pytest.approx(0.05)


def test_costs_come_from_a_folder_of_the_same_base(
    evaluation: Evaluation, pair: Pair, checkpoint: Path, tmp_path: Path
) -> None:
    rows = [cost(1, "sparse", 0, 0.3), cost(2, "window", None, 0.25)]
    config, limits = pair.converted.config, Limits(kl=1e-4)
    save(costs_of(pair, rows), tmp_path)
    verdict = judge(evaluation, limits, config, str(checkpoint), tmp_path)
    assert verdict.costs_known and [step.layer for step in verdict.suggestions] == [1, 2]
    save(replace(costs_of(pair, rows), fingerprint="sha256:other"), tmp_path)
    with pytest.raises(PlanError, match="another model"):
        judge(evaluation, limits, config, str(checkpoint), tmp_path)


def test_limits_come_from_a_recipe_or_a_file_of_their_own(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "heal: {data: {source: pydoc}, distill: {tokens: 8k}}\ngate: {kl: 0.05, agreement: null}\n"
    )
    assert Limits.load(recipe) == Limits(kl=0.05, agreement=None) == Recipe.load(recipe).gate
    alone = tmp_path / "limits.json"
    alone.write_text('{"perplexity_ratio": 1.02}')
    assert Limits.load(alone).perplexity_ratio == 1.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kll: 0.1", "kll"),
        ("kl: -1", "kl"),
        ("heal: {}", "no section 'gate'"),
        ("- 1", "holds no limits"),
        ("{", "not valid YAML"),
        (None, "cannot be read"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "limits.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Limits.load(path)
