"""Two processes train as one does, and what they leave when one of them dies goes on in any number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hyconvert.conversion import convert
from hyconvert.heal import heal
from tests.heal.processes import Ended, forked, launched

DYING = """
import os, signal
from hyconvert.heal.engine import Engine
step = Engine._step
def dying(self, run, number):
    step(self, run, number)
    if number == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
Engine._step = dying
"""
ON_A_CPU = """
from accelerate import state
from accelerate.utils import DistributedType
from hyconvert.heal.engine import Engine
prepare, build = state.AcceleratorState.__init__, Engine.__init__
def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
def sharded(self, *args):
    build(self, *args)
    assert all(hasattr(parameter, "full_tensor") for parameter in self.parameters)
state.AcceleratorState.__init__, Engine.__init__ = with_fsdp, sharded
"""
"""Accelerate takes FSDP for a matter of GPUs, and DDP on a CPU without a word."""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # accelerate launch asks for it
}


def curves(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Assert that two reports agree."""
    for curve, key in (("curve", "loss"), ("curve", "gradient_norm"), ("heldout", "kl")):
        values = [[row[key] for row in report[curve]] for report in (one, two)]
        assert len(values[0]) >= 4
        assert values[1] == pytest.approx(values[0], rel=1e-4), (curve, key)


def weights(before: Path, one: Path, two: Path, rel: float) -> None:
    """Assert that two healed models were moved the same way from one converted model, but for `rel` of it."""
    old, mine, theirs = (load_file(path / "model.safetensors") for path in (before, one, two))
    assert mine.keys() == theirs.keys() == old.keys()
    moved, apart = (
        torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
        for a, b in ((mine, old), (mine, theirs))
    )
    assert moved > 0.1
    assert apart < rel * moved


@pytest.mark.parametrize(
    ("start", "before", "variables"),
    [(launched, "", {}), (forked, ON_A_CPU, FSDP)],
    ids=["DDP by torchrun", "FSDP2"],
)
def test_two_processes_have_the_loss_curve_of_one(
    converted: Path,
    recipe: Callable[..., Any],
    tmp_path: Path,
    start: Callable[..., Ended],
    before: str,
    variables: dict[str, str],
) -> None:
    chosen = recipe(micro_tokens=32)  # several forward passes per step and process
    arguments = [str(converted), str(tmp_path / "two"), chosen.model_dump_json()]
    done = start(arguments, tmp_path, variables, before)
    assert done.code == 0, done.output[-4000:]
    one = heal(converted, tmp_path / "one", chosen, device="cpu").to_dict()
    two = json.loads((tmp_path / "two" / "heal.json").read_text())
    assert two["processes"] == 2
    curves(one, two)
    weights(converted, tmp_path / "one", tmp_path / "two", 1e-3)


def test_fsdp2_trains_tied_embeddings_in_bfloat16_as_one_process_does(
    tiny_base: Callable[..., Path], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    converted = tmp_path / "converted"
    base = tiny_base("llama", tie_word_embeddings=True)
    convert(base, converted, plan="F S0 W F", align_layers=False, block_size=4, topk=2, window=8)
    chosen = recipe(precision="bf16", micro_tokens=32)
    arguments = [str(converted), str(tmp_path / "two"), chosen.model_dump_json()]
    done = forked(arguments, tmp_path, FSDP, ON_A_CPU)
    assert done.code == 0, done.output[-4000:]
    one = heal(converted, tmp_path / "one", chosen, device="cpu").to_dict()
    two = json.loads((tmp_path / "two" / "heal.json").read_text())
    losses = [[row["loss"] for row in report["curve"]] for report in (one, two)]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)  # 2e-3 apart in float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    weights(converted, tmp_path / "one", tmp_path / "two", 0.01)


def test_fsdp1_is_refused(converted: Path, recipe: Callable[..., Any], tmp_path: Path) -> None:
    arguments = [str(converted), str(tmp_path / "two"), recipe().model_dump_json()]
    older = FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
    done = forked(arguments, tmp_path, older, ON_A_CPU)
    assert done.code != 0
    assert "FSDP version 1 is not supported; launch with --fsdp_version 2" in done.output


@pytest.mark.parametrize(("before", "variables"), [("", {}), (ON_A_CPU, FSDP)], ids=["DDP", "FSDP2"])
def test_the_state_of_a_run_whose_process_died_goes_on_in_one_process_or_two(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path, before: str, variables: dict[str, str]
) -> None:
    chosen = recipe(micro_tokens=32)
    arguments = [str(converted), str(tmp_path / "two"), chosen.model_dump_json()]
    died = forked(arguments, tmp_path, variables, before + DYING)
    assert died.code != 0
    assert not (tmp_path / "two").exists()
    work = tmp_path / ".two.healing"
    assert [path.name for path in work.glob("state-*")] == ["state-0000004"]
    shutil.copytree(work, tmp_path / ".other.healing")
    straight = heal(converted, tmp_path / "straight", chosen, device="cpu").to_dict()
    other = heal(converted, tmp_path / "other", chosen, device="cpu").to_dict()
    assert len(other["curve"]) == len(straight["curve"]) == 12
    curves(straight, other)
    done = forked(arguments, tmp_path, variables, before)
    assert done.code == 0, done.output[-4000:]
    curves(straight, json.loads((tmp_path / "two" / "heal.json").read_text()))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
