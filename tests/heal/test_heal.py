"""Healing end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hyconvert
from hyconvert.checkpoint import open_source
from hyconvert.heal import heal
from hyconvert.heal.models import load_student, load_teacher, shared_bytes
from tests.heal.conftest import STAGE
from tests.test_conversion import stored

NEW = ("query_map", "value_map", "gate.weight", "gate.bias")
CPU = torch.device("cpu")


def test_healing_lowers_kl_and_says_so(converted: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = heal(converted, out, recipe(), device="cpu", command="hyconvert heal x")
    assert report.after["kl"] < 0.95 * report.before["kl"]
    data = json.loads((out / "heal.json").read_text())
    assert [row["tokens"] for row in data["heldout"]] == [0, 512, 1024, 1536]
    assert data["heldout"][-1]["kl"] == report.after["kl"]
    assert [row["step"] for row in data["curve"]] == list(range(1, 13))
    assert set(data["after"]["sparse_share"]) == {"1"} and 0 < data["after"]["sparse_share"]["1"] < 1
    assert data["before"]["base_perplexity"] == data["after"]["base_perplexity"]
    assert (out / "heal.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    for fact in ("## Healing", "hyconvert heal x", f"| healed | {report.after['kl']:.4f} |", "## Plan"):
        assert fact in card, fact
    assert not list(tmp_path.glob(".*")), "the working folder is removed"


def test_a_healed_checkpoint_loads_as_any_other(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    heal(converted, out, recipe(), device="cpu")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = stored(converted), stored(out)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before), "everything was trained"
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, hyconvert.load(out)(ids).logits)
    assert {p.name for p in converted.iterdir()} <= {p.name for p in out.iterdir()}
    assert hyconvert.Plan.load(out / "plan.json") == hyconvert.Plan.load(converted / "plan.json")


def test_frozen_groups_keep_their_bytes(converted: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    for scales, parts in (
        ({"converted": 0, "full": 0, "rest": 0}, {"layers.1.self_attn." + name for name in NEW}),
        ({"full": 0, "rest": 0}, {"layers.1.self_attn", "layers.2.self_attn"}),
        ({"new": 0, "converted": 0, "rest": 0}, {"layers.0.self_attn", "layers.3.self_attn"}),
    ):
        out = tmp_path / "-".join(scales)
        heal(converted, out, recipe(lr_scale=scales), device="cpu")
        before, after = stored(converted), stored(out)
        changed = {name for name in before if before[name] != after[name]}
        expected = {name for name in before if any(f"model.{part}" in name for part in parts)}
        assert changed == expected, scales


def test_mixed_precision_keeps_frozen_bytes_too(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chosen = recipe(precision="bf16", lr_scale={"full": 0, "rest": 0})
    report = heal(converted, out, chosen, device="cpu")
    assert report.after["kl"] < report.before["kl"]
    before, after = stored(converted), stored(out)
    assert before["model.embed_tokens.weight"] == after["model.embed_tokens.weight"]
    assert before["model.layers.0.mlp.up_proj.weight"] == after["model.layers.0.mlp.up_proj.weight"]


def test_frozen_weights_are_shared_with_the_teacher(converted: Path, recipe: Callable[..., Any]) -> None:
    source = open_source(hyconvert.Plan.load(converted / "plan.json").base)
    student = load_student(str(converted), recipe(lr_scale={"full": 0, "rest": 0}), CPU, torch.float32)
    teacher = load_teacher(source, student, CPU)
    alone = sum(
        p.nbytes for n, p in teacher.named_parameters() if "layers.1.self" in n or "layers.2.self" in n
    )
    assert shared_bytes(student, teacher) == sum(p.nbytes for p in teacher.parameters()) - alone > alone
    assert shared_bytes(load_student(str(converted), recipe(), CPU, torch.float32), teacher) == 0


def test_stages_run_in_order(converted: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    stage = STAGE | {"tokens": 512}
    chosen = recipe(layerwise=stage, distill=stage, long=stage | {"sequence_length": 64, "hidden": 0.1})
    report = heal(converted, tmp_path / "out", chosen, device="cpu")
    curve = report.record.curve
    assert [row["stage"] for row in curve] == ["layerwise"] * 4 + ["distill"] * 4 + ["long"] * 4
    assert curve[3]["error"] < curve[0]["error"]
    assert all("kl" in row for row in curve[4:])


def test_the_layerwise_stage_touches_converted_attention_only(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    heal(converted, tmp_path / "out", recipe(layerwise=STAGE, distill=None), device="cpu")
    before, after = stored(converted), stored(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all("layers.1.self_attn" in name or "layers.2.self_attn" in name for name in changed)


def test_adapters_are_merged(converted: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = heal(converted, out, recipe(lora={"rank": 4}), device="cpu")
    assert report.after["kl"] < report.before["kl"]
    before, after = stored(converted), stored(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.endswith("_proj.weight") or name.endswith(NEW)}
    text = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert hyconvert.load(out)(text).logits.isfinite().all()


def test_gradient_checkpointing_and_small_forward_passes_change_nothing(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    curves = []
    for name, options in (("a", {}), ("b", {"gradient_checkpointing": True, "micro_tokens": 32})):
        report = heal(converted, tmp_path / name, recipe(**options), device="cpu")
        curves.append([row["loss"] for row in report.record.curve])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_a_collapsing_branch_is_named(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([{1: 0.4}, {1: 0.2}, {1: 0.001}, {1: 0.001}])
    monkeypatch.setattr("hyconvert.heal.objective.GateShares.means", lambda self: next(shares))
    report = heal(converted, tmp_path / "out", recipe(), device="cpu")
    assert len(report.record.warnings) == 1
    assert "layer 1: its sparse branch collapsed, from 40.0% of the gate to 0.1%" in report.record.warnings[0]
    assert report.record.warnings[0] in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("gate", ["merge", "sigmoid"])
def test_other_families_heal(
    tiny_base: Callable[..., Path], recipe: Callable[..., Any], tmp_path: Path, gate: str
) -> None:
    family = {"merge": "qwen3_moe", "sigmoid": "olmo2"}[gate]
    hyconvert.convert(
        tiny_base(family), tmp_path / "converted", plan="F S0 R0 F", align_layers=False, block_size=4, topk=2,
        window=8, gate=gate,
    )  # fmt: skip
    report = heal(tmp_path / "converted", tmp_path / "out", recipe(), device="cpu")
    assert set(report.after["sparse_share"]) == {"1", "2"}
    before, after = stored(tmp_path / "converted"), stored(tmp_path / "out")
    assert before.keys() == after.keys() and all(
        before[name] != after[name] for name in before if "gate." in name
    )
    hyconvert.load(tmp_path / "out")
