"""Measured costs on tiny models: what is measured, that it is true, and that it is kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyconvert.align import align
from hyconvert.checkpoint import open_source
from hyconvert.conversion import Calibration, convert, load_base_as
from hyconvert.errors import DataError, HyconvertError, PlanError
from hyconvert.measure import Costs, JointEvaluator, MeasureSettings, measure, refine
from hyconvert.measure.run import read_sequences
from hyconvert.modeling import HyConvertConfig
from hyconvert.plan import Plan, parse_line
from hyconvert.planning import choose, read_costs, rivals
from hyconvert.retrieval import Mixed
from hyconvert.solve import Budget, Rules


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    letters = torch.randint(97, 123, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(map(chr, letters)))
    return str(path)


@pytest.fixture(scope="module")
def settings(text: str) -> MeasureSettings:
    return MeasureSettings(
        kinds=("window", "sparse", "reuse"), block_size=16, topk=2, window=16, sequence_length=512, fit_tokens=1024,
        prompts=2, positions=64, questions=1, decoys=1, copies=1, map_rows=32, rows=64, calibration=text,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def folder(base: Path, settings: MeasureSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("costs") / "costs"
    measure(base, out, settings=settings, device="cpu")
    return out


@pytest.fixture(scope="module")
def costs(folder: Path) -> Costs:
    return Costs.load(folder)


@pytest.fixture(scope="module")
def evaluator(base: Path, costs: Costs) -> JointEvaluator:
    return JointEvaluator.for_costs(base, costs, device="cpu")


def test_every_candidate_is_measured(costs: Costs) -> None:
    pairs = [(j, kind, i) for j in range(4) for i in range(j) for kind in ("sparse", "reuse")]
    assert set(costs.table) == {(j, "window", None) for j in range(4)} | set(pairs)
    assert all(row.kl > 0 for row in costs)
    assert set(costs.reference) == {"needle", "multivalue", "copy"}


@pytest.mark.parametrize("line", ["F*2 W F", "F*2 S0 F", "F*3 R1"])
def test_a_cost_is_the_true_damage_of_the_plan_with_that_layer_alone(
    line: str, costs: Costs, evaluator: JointEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "fit", replace(evaluator.fit, compensation=0.0))
    monkeypatch.setattr(evaluator, "compensated", ("", []))
    plan = Plan(layers=parse_line(line), **costs.settings.plan_settings())
    reading = evaluator.read(plan)
    for tasks in (None, {"copy"}, {"needle", "multivalue"}):
        predicted = costs.predicted(plan, 3.0, tasks)
        assert evaluator.weigh(reading, 3.0, tasks) == pytest.approx(predicted, rel=1e-4)


def test_whole_plans_are_measured_with_compensation_and_as_they_are_converted(
    base: Path, costs: Costs, evaluator: JointEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(layers=parse_line("F W S0 S0"), **costs.settings.plan_settings())
    source = open_source(base)
    model = load_base_as(HyConvertConfig.from_base(source.config, plan), source, torch.device("cpu"))
    asked = torch.rand(evaluator.text.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    monkeypatch.setattr(evaluator, "text", Mixed(evaluator.text.tokens, asked))
    monkeypatch.setattr(evaluator, "compensated", ("", []))
    align(model, evaluator.text.tokens, evaluator.fit, evaluator.text.asked)
    tokens = evaluator.prompts.tokens[:1]
    for wanted in (plan, Plan(layers=parse_line("F*4"), **costs.settings.plan_settings()), plan):
        hidden = evaluator.hidden(wanted, tokens)
    torch.testing.assert_close(hidden, model.model(tokens).last_hidden_state, rtol=1e-3, atol=1e-3)


def test_more_text_to_fit_on_leaves_the_prompts_as_they_are(
    base: Path, text: str, settings: MeasureSettings, tmp_path: Path
) -> None:
    source, words = open_source(base), Path(text).read_text()
    for name in "ab":  # a document gives four sequences at most
        (tmp_path / f"{name}.txt").write_text(words if name == "a" else words[::-1])
    settings = settings.model_copy(update={"calibration": str(tmp_path)})
    (some, prompts), (more, same) = (read_sequences(source, settings, wanted) for wanted in (None, 2048))
    assert (len(some), len(more)) == (2, 4) and torch.equal(some.tokens, more.tokens[:2])
    assert torch.equal(prompts.tokens, same.tokens)
    assert not any(
        torch.equal(row, text) for row in more.tokens[2:] for text in (*some.tokens, *prompts.tokens)
    )


def test_nothing_changed_costs_nothing(costs: Costs, evaluator: JointEvaluator) -> None:
    reading = evaluator.read(Plan(layers=parse_line("F*4"), **costs.settings.plan_settings()))
    assert reading.kl == pytest.approx(0, abs=1e-6)
    assert reading.nll == pytest.approx(costs.reference, abs=1e-5)


def test_swaps_never_make_a_plan_worse(costs: Costs, evaluator: JointEvaluator) -> None:
    bad = Plan(layers=parse_line("W*3 F"), **costs.settings.plan_settings())
    found = refine(evaluator, costs, bad, tries=8)
    assert found.after < found.before and found.moves
    assert found.after == pytest.approx(evaluator.weigh(evaluator.read(found.plan)), rel=1e-5)
    assert len(found.plan.full_layers) == 1


def test_refinement_begins_at_the_best_of_several_plans(costs: Costs, evaluator: JointEvaluator) -> None:
    bad, good = (Plan(layers=parse_line(x), **costs.settings.plan_settings()) for x in ("W*3 F", "F*3 W"))
    found = refine(evaluator, costs, bad, tries=1, others=[bad, good])
    assert found.plan == good and found.tried == 1 and found.moves == (f"begun at {good.line}",)
    assert found.before > found.after == pytest.approx(evaluator.weigh(evaluator.read(good)), rel=1e-5)
    assert refine(evaluator, costs, good, tries=1, others=[bad]).plan == good
    assert (
        refine(evaluator, costs, bad, tries=1, others=[good], allowed=lambda plan: plan != good).plan != good
    )


def test_rivals_keep_to_the_bounds(costs: Costs, base: Path) -> None:
    config, rules = open_source(base).config, Rules(pinned={3: "full", 0: "window"})
    found = rivals(costs, config, Budget(full_layers=2), rules, 2)
    # No retrieval, three times as much, each of three tasks, the largest window damage.
    assert len(found) == 6
    for plan in found:
        assert 3 in plan.full_layers and plan.layers[0].kind == "window" and len(plan.full_layers) <= 2
    windows = {layer: costs.table[layer, "window", None].damage() for layer in (1, 2)}
    assert found[-1].full_layers == (max(windows, key=windows.__getitem__), 3)


def test_swaps_are_judged_by_the_tasks_that_count(
    costs: Costs, folder: Path, evaluator: JointEvaluator
) -> None:
    bad = Plan(layers=parse_line("W*3 F"), **costs.settings.plan_settings())
    found = refine(evaluator, costs, bad, tries=3, retrieval=9.0, tasks={"copy"})
    assert found.before == pytest.approx(evaluator.weigh(evaluator.read(bad), 9.0, {"copy"}), rel=1e-5)
    assert found.after == pytest.approx(evaluator.weigh(found.reading, 9.0, {"copy"}), rel=1e-5)
    rules = Rules(tasks=frozenset({"copy"}))
    report = choose(*read_costs(folder), Budget(full_layers=1), rules, tries=3, evaluator=evaluator)
    assert report.refinement and report.solution.tasks == ("copy",)
    assert report.refinement.after == pytest.approx(
        evaluator.weigh(report.refinement.reading, tasks={"copy"}), rel=1e-5
    )
    with pytest.raises(PlanError, match=r"--tasks cpoy: .* needle, multivalue, copy"):
        refine(evaluator, costs, bad, tasks={"cpoy"})


def test_an_interrupted_measurement_goes_on_where_it_stopped(
    base: Path, folder: Path, settings: MeasureSettings, tmp_path: Path
) -> None:
    lines = (folder / "costs.jsonl").read_text().splitlines()
    (tmp_path / "costs.json").write_text((folder / "costs.json").read_text())
    (tmp_path / "costs.jsonl").write_text("\n".join([*lines[:9], lines[9][:20]]))
    with pytest.raises(PlanError, match="stopped after 9 of 16"):
        Costs.load(tmp_path)
    done: list[Any] = []

    def progress(title: str, total: int) -> Any:
        import contextlib

        @contextlib.contextmanager
        def stage() -> Any:
            yield lambda note="": done.append(title)

        return stage()

    costs = measure(base, tmp_path, settings=settings, device="cpu", progress=progress)
    assert sum(title.startswith("Measuring") for title in done) == 16 - 9
    whole = {key: row.kl for key, row in Costs.load(folder).table.items()}
    assert {key: row.kl for key, row in costs.table.items()} == pytest.approx(whole, rel=1e-5)
    assert len(Costs.load(tmp_path).rows) == 16


def test_costs_are_refused_for_another_base_and_other_settings(
    tiny_base: Callable[..., Path], base: Path, folder: Path, settings: MeasureSettings
) -> None:
    other = tiny_base("llama", max_position_embeddings=1024, seed=5)
    with pytest.raises(PlanError, match="another model"):
        measure(other, folder, settings=settings, device="cpu")
    with pytest.raises(PlanError, match=r"other settings \(topk\)"):
        measure(base, folder, settings=settings.model_copy(update={"topk": 4}), device="cpu")
    with pytest.raises(PlanError, match="another model"):
        JointEvaluator.for_costs(other, Costs.load(folder), device="cpu")
    assert len(Costs.load(folder).rows) == 16


def test_few_sources_and_a_span_leave_candidates_out(
    base: Path, settings: MeasureSettings, tmp_path: Path
) -> None:
    few = settings.model_copy(
        update={"kinds": ("window", "sparse"), "oracles": 2, "span": 1, "copies": 0, "questions": 0}
    )
    costs = measure(base, tmp_path / "costs", settings=few, device="cpu")
    sources = {row.source for row in costs if row.source is not None}
    assert len(sources) <= 2 and all(row.layer - row.source == 1 for row in costs if row.source is not None)
    assert all(row.nll == {} for row in costs)


@pytest.mark.parametrize("family", ["smollm3", "olmo2", "qwen3_moe"])
def test_other_families_are_measured(
    family: str, tiny_base: Callable[..., Path], settings: MeasureSettings, tmp_path: Path
) -> None:
    base = tiny_base(family, max_position_embeddings=1024)
    small = settings.model_copy(update={"kinds": ("window", "sparse"), "fit_tokens": 512, "prompts": 1})
    costs = measure(base, tmp_path / "costs", settings=small, device="cpu")
    evaluator = JointEvaluator.for_costs(base, costs, device="cpu")
    plan = Plan(layers=parse_line("F*3 S1"), **settings.plan_settings())
    assert evaluator.weigh(evaluator.read(plan)) == pytest.approx(costs.predicted(plan), rel=1e-3, abs=1e-6)


def test_converting_without_a_plan_measures_and_solves(
    base: Path, folder: Path, settings: MeasureSettings, text: str, tmp_path: Path
) -> None:
    report = convert(
        base, tmp_path / "out", kv_budget=0.5, costs=folder, device="cpu",
        calibration=Calibration(text, tokens=512, sequence_length=64),
    )  # fmt: skip
    assert report.planning is not None and report.planning["kv_share"] <= 0.5
    assert report.plan.topk == settings.topk and len(report.plan.full_layers) <= 2
    with pytest.raises(PlanError, match="nothing to choose"):
        convert(base, tmp_path / "two", uniform=1, kv_budget=0.5, device="cpu")


def test_mistakes_are_told(base: Path, settings: MeasureSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="trained for"):
        measure(
            base, tmp_path / "a", settings=settings.model_copy(update={"sequence_length": 2048}), device="cpu"
        )
    with pytest.raises(DataError, match="lower --fit-tokens"):
        measure(base, tmp_path / "b", settings=settings.model_copy(update={"prompts": 99}), device="cpu")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(HyconvertError, match="holds no costs"):
        measure(base, tmp_path / "c", settings=settings, device="cpu")
    with pytest.raises(PlanError, match="hyconvert measure BASE"):
        Costs.load(tmp_path / "c")
    for wrong in ({"prompts": 0}, {"block_size": 24}, {"topk": 0}, {"window": 1}, {"kinds": ("windows",)}):
        with pytest.raises(PlanError, match="settings of the measurement"):
            MeasureSettings.create(**wrong)


@pytest.mark.parametrize(
    ("header", "message"),
    [("{", "no costs can be read"), ("[]", "no costs can be read"), ("{}", "no costs can be read"),
     ('{"format": 0}', "format 0"), ('{"format": 1}', "damaged")],
)  # fmt: skip
def test_a_damaged_folder_of_costs_is_told(header: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(header)
    (tmp_path / "costs.jsonl").write_text("")
    with pytest.raises(PlanError, match=message):
        Costs.load(tmp_path)


def test_costs_remember_the_revision_of_a_hub_id(
    base: Path, settings: MeasureSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    where = {"org/model": base}

    def from_hub(name: Any, *, revision: str | None = None, dtype: Any = "auto") -> Any:
        asked.append(revision)
        return open_source(where.get(str(name), name), dtype=dtype)

    for module in (
        "hyconvert.conversion",
        "hyconvert.measure.run",
        "hyconvert.measure.joint",
        "hyconvert.planning",
    ):
        monkeypatch.setattr(f"{module}.open_source", from_hub)
    small = settings.model_copy(update={"kinds": ("window",), "fit_tokens": 512, "prompts": 1})
    measure("org/model", tmp_path / "costs", settings=small, device="cpu", revision="v2")
    text = Calibration(settings.calibration, tokens=256, sequence_length=64)
    convert(
        "org/model", tmp_path / "out", costs=tmp_path / "costs", device="cpu", revision="v2", calibration=text
    )
    costs, _ = read_costs(tmp_path / "costs")
    JointEvaluator.for_costs("org/model", costs, device="cpu")
    assert costs.revision == "v2" and set(asked) == {"v2"}
