"""Two processes train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyconvert.heal import heal
from tests.conftest import ROOT

HEAL = """
import sys
from hyconvert.heal import heal
from hyconvert.recipe import HealRecipe
heal(sys.argv[1], sys.argv[2], HealRecipe.model_validate_json(sys.argv[3]), device="cpu")
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def two_processes(arguments: list[str], tmp_path: Path, extra: dict[str, str]) -> None:
    script = tmp_path / "heal.py"
    script.write_text(HEAL)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | extra
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), *arguments], env=environment, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]


@pytest.mark.parametrize("extra", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_have_the_loss_curve_of_one(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path, extra: dict[str, str]
) -> None:
    chosen = recipe(micro_tokens=32)  # several forward passes per step and process
    two_processes([str(converted), str(tmp_path / "two"), chosen.model_dump_json()], tmp_path, extra)
    one = heal(converted, tmp_path / "one", chosen, device="cpu").to_dict()
    two = json.loads((tmp_path / "two" / "heal.json").read_text())
    assert two["processes"] == 2
    for curve, key in (("curve", "loss"), ("curve", "gradient_norm"), ("heldout", "kl")):
        values = [[row[key] for row in report[curve]] for report in (one, two)]
        assert len(values[0]) >= 4
        assert values[1] == pytest.approx(values[0], rel=1e-4), (curve, key)
