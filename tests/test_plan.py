"""Plans: written, read, and every mistake in them named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hyconvert.errors import PlanError
from hyconvert.plan import LayerPlan, Plan, nearest_sources, parse_line, uniform_full_layers

FULL, SPARSE = {"kind": "full"}, {"kind": "sparse", "source": 0}


def check(message: str, **data: Any) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict({"layers": [FULL, SPARSE]} | data)


def test_the_layer_map_is_one_line_that_reads_back() -> None:
    line = "W*2 F*3 S2*4 R3 F W L*2"
    plan = Plan(layers=parse_line(line))
    assert plan.line == line
    assert len(plan.layers) == 14
    assert plan.full_layers == (2, 3, 4, 10)
    assert plan.sources == {2, 3}


def test_plans_survive_a_file_and_diff_layer_by_layer(tmp_path: Path) -> None:
    plan = Plan(
        layers=parse_line("F S0*3 R0 W"), topk=3, gate="sigmoid", sinks=True, maps=True, base="b", note="n"
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert sum("kind" in line for line in lines) == 6


def test_a_plan_written_by_hand_needs_layers_alone() -> None:
    plan = Plan.from_dict({"layers": [FULL, SPARSE]})
    assert (plan.block_size, plan.topk, plan.window, plan.gate) == (64, 16, 128, "merge")
    assert plan.has_maps
    assert not plan.with_settings(gate="sigmoid").has_maps
    assert plan.with_settings(gate="sigmoid", maps=True).has_maps


def test_settings_left_out_change_nothing() -> None:
    plan = Plan.from_dict({"layers": [FULL, SPARSE]})
    assert plan.with_settings(topk=None, window=None) is plan
    assert plan.with_settings(topk=4, window=None).topk == 4
    with pytest.raises(PlanError, match=r"topk: .* greater than or equal to 1"):
        plan.with_settings(topk=0)


def test_a_large_topk_is_fine() -> None:
    assert Plan.from_dict({"layers": [FULL, SPARSE], "topk": 100_000}).topk == 100_000


@pytest.mark.parametrize("kind", ["sparse", "reuse"])
def test_the_first_layer_cannot_read_another(kind: str) -> None:
    check(f"layer 0 is {kind}, but no full layer comes before it", layers=[{"kind": kind, "source": 0}, FULL])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [FULL, {"kind": "sparse", "source": 2}, FULL],
            "layer 1 names source 2, but a source must come before",
        ),
        ([FULL, {"kind": "sparse", "source": 1}], "layer 1 names source 1, but a source must come before"),
        (
            [FULL, {"kind": "reuse", "source": 9}],
            "layer 1 names source 9, which is not a layer; .* layers 0 to 1",
        ),
        ([FULL, {"kind": "sparse", "source": -1}], "names source -1, which is not a layer"),
        ([FULL, SPARSE, {"kind": "sparse", "source": 1}], r"which is a sparse layer; .* \(full layers: 0\)"),
        ([{"kind": "window"}, SPARSE], r"which is a window layer; .* \(full layers: none\)"),
        ([FULL, {"kind": "sparse"}], "layers.1: a sparse layer needs a source layer"),
        ([FULL, {"kind": "window", "source": 0}], "layers.1: a window layer takes no source layer"),
        ([FULL, {"kind": "spars", "source": 0}], "layers.1.kind: .*'sparse'.*got 'spars'"),
        ([FULL, {"kind": "sparse", "sorce": 0}], "layers.1.sorce: unknown key; did you mean 'source'?"),
        ([], "at least one layer"),
        ("F S0", "layers: .*got 'F S0'"),
    ],
)
def test_wrong_layers_are_named(layers: Any, message: str) -> None:
    check(message, layers=layers)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"topk": 0}, r"topk: .* greater than or equal to 1 \(got 0\)"),
        ({"window": 0}, r"window: .* greater than or equal to 2 \(got 0\)"),
        ({"window": 1}, r"window: .* greater than or equal to 2 \(got 1\)"),
        ({"block_size": 0}, r"block_size: .* greater than or equal to 1 \(got 0\)"),
        ({"block_size": 48}, "block_size 48 is not a power of two; use 16, 32, 64 or 128"),
        ({"gate": "softmax"}, "gate: .*'merge' or 'sigmoid'.*got 'softmax'"),
        ({"blocksize": 64}, "blocksize: unknown key; did you mean 'block_size'?"),
        ({"zzz": 64}, "zzz: unknown key$"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(setting: dict[str, Any], message: str) -> None:
    check(message, **setting)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(PlanError, match=r"topk: .*; window: .*; widow: "):
        Plan.from_dict({"layers": [FULL], "topk": 0, "window": 0, "widow": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1, 2]", "holds a list, not a JSON object with 'layers'"),
        ('{"topk": 3}', "layers: Field required"),
    ],
)
def test_files_that_hold_no_plan_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=f"plan.json.*{message}"):
        Plan.load(path)


def test_binary_and_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(PlanError, match="is not valid JSON"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"no plan at .*missing.json; write one"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="is a folder"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("token", ["X", "S", "F2", "W1", "S0*", "F*0", "s0", "S-1", "S0S0", "FF", "*3"])
def test_wrong_tokens_of_the_layer_map_are_named(token: str) -> None:
    with pytest.raises(PlanError, match=rf"'{token.replace('*', '[*]')}' in the layer map"):
        parse_line(f"F {token} F")


def test_an_empty_layer_map_is_refused() -> None:
    with pytest.raises(PlanError, match="layer map is empty"):
        parse_line("  ")


def test_sources_default_to_the_nearest_full_layer_before() -> None:
    assert Plan(layers=nearest_sources(7, [1, 4])).line == "W F S1*2 F S4*2"
    assert Plan(layers=nearest_sources(5, [0, 3], sliding=[2])).line == "F S0 L F S3"


@pytest.mark.parametrize(
    ("full", "sliding", "message"),
    [
        ([0, 9], [], r"full layers \[9\] do not exist; the base has layers 0 to 4"),
        ([-1], [], r"full layers \[-1\] do not exist"),
        ([0, 2], [2], r"layers \[2\] are sliding-window layers of the base"),
        ([], [], "at least one full layer"),
    ],
)
def test_wrong_full_layers_are_named(full: list[int], sliding: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        nearest_sources(5, full, sliding)


def test_uniform_plans_are_the_paper_s() -> None:
    assert uniform_full_layers(49, 11) == (0, 12, 24, 36, 48)
    assert uniform_full_layers(36, 3) == (0, 4, 8, 12, 16, 20, 24, 28, 32, 35)
    assert uniform_full_layers(6, 1, sliding=(0, 2)) == (1, 4, 5)


def test_uniform_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="--uniform 1:0 is not a ratio"):
        uniform_full_layers(8, 0)
    with pytest.raises(PlanError, match="the base has 1 full-attention layers, too few"):
        uniform_full_layers(4, 3, sliding=(0, 1, 2))


def test_plans_cannot_be_changed_in_place() -> None:
    plan = Plan.from_dict({"layers": [FULL, SPARSE]})
    with pytest.raises(ValueError, match="frozen"):
        plan.topk = 3
    with pytest.raises(ValueError, match="frozen"):
        plan.layers[0].kind = "window"
    assert str(LayerPlan(kind="sparse", source=3)) == "S3"


def test_plan_json_is_plain_json() -> None:
    plan = Plan(layers=parse_line("F S0*3"))
    assert json.loads(plan.to_json()) == plan.model_dump(mode="json", exclude_none=True)
