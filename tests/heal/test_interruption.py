"""Whatever stops healing, it goes on bit for bit as if it had not been stopped, from the last good state."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from hyconvert.errors import HealError
from hyconvert.heal import heal, states
from hyconvert.heal.engine import Engine
from tests.heal.processes import forked
from tests.test_conversion import stored

KILLING = """
import os, signal
from hyconvert.heal.engine import Engine
step = Engine._step
def killing(self, run, number):
    step(self, run, number)
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Engine._step = killing
"""


def working_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.healing")


def test_a_killed_run_ends_as_if_it_had_not_been(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    chosen, out = recipe(), tmp_path / "killed"
    arguments = [str(converted), str(out), chosen.model_dump_json()]
    killed = forked(arguments, tmp_path, {}, KILLING, count=1)
    assert killed.code == -signal.SIGKILL, killed.output[-2000:]
    assert not out.exists() and (working_folder(out) / "state-0000004").is_dir()
    resumed = heal(converted, out, chosen, device="cpu")
    straight = heal(converted, tmp_path / "straight", chosen, device="cpu")
    assert stored(out) == stored(tmp_path / "straight")
    assert resumed.record.heldout == straight.record.heldout
    losses = [[row["loss"] for row in report.record.curve] for report in (resumed, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "options", [{"lora": {"rank": 2}}, {"precision": "bf16", "lr_scale": {"rest": 0}}], ids=str
)
def test_every_way_to_train_resumes_exactly(
    converted: Path,
    recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    chosen, step = recipe(**options, save_every=3), Engine._step

    def interrupted(self: Engine, run: Any, number: int) -> None:
        if number == 7:
            raise KeyboardInterrupt
        step(self, run, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            heal(converted, tmp_path / "stopped", chosen, device="cpu")
    torch.manual_seed(99)
    heal(converted, tmp_path / "stopped", chosen, device="cpu")
    heal(converted, tmp_path / "straight", chosen, device="cpu")
    assert stored(tmp_path / "stopped") == stored(tmp_path / "straight")


def test_a_loss_that_is_no_number_keeps_the_last_good_state(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, out, step = recipe(log_every=0), tmp_path / "out", Engine._step

    def spoilt(self: Engine, run: Any, number: int) -> None:
        if number == 7:  # the last step before a state is saved: its loss is finite, its gradient is not
            hook = self.parameters[0].register_hook(lambda grad: grad * torch.nan)
            step(self, run, number)
            hook.remove()
        else:
            step(self, run, number)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", spoilt)
        with pytest.raises(
            HealError, match=r"no longer finite at step 8; state-0000004 in .* is kept.* --lr"
        ):
            heal(converted, out, chosen, device="cpu")
    assert not out.exists()
    assert [p.name for p in working_folder(out).glob("state-*")] == ["state-0000004"]
    heal(converted, out, chosen, device="cpu")
    heal(converted, tmp_path / "straight", chosen, device="cpu")
    assert stored(out) == stored(tmp_path / "straight")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    CheckpointException("write", {1: (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), StackSummary())}),
], ids=["numbered", "torch's", "another process's"])  # fmt: skip
def test_a_full_disk_keeps_the_last_good_state(
    converted: Path,
    recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    chosen, out, write, calls = recipe(), tmp_path / "out", states._write, []

    def full(tensors: Any, folder: Path) -> None:
        calls.append(folder)
        write(tensors, folder)
        if len(calls) == 2:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(states, "_write", full)
        with pytest.raises(HealError, match=r"disk is full.*step 8.*state-0000004 is kept"):
            heal(converted, out, chosen, device="cpu")
    assert sorted(p.name for p in working_folder(out).iterdir()) == [
        "heldout",
        "run.json",
        "state-0000004",
        "train",
    ]
    heal(converted, out, chosen, device="cpu")
    assert out.is_dir()


def test_a_full_gpu_says_what_helps(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "_step", full)
    with pytest.raises(HealError, match="--micro-tokens"):
        heal(converted, tmp_path / "out", recipe(), device="cpu")


def test_another_command_does_not_go_on_with_an_unfinished_run(
    converted: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(converted, out, recipe(), device="cpu")
    with pytest.raises(HealError, match=r"another seed; .*--restart"):
        heal(converted, out, recipe(seed=1), device="cpu")
    heal(converted, out, recipe(seed=1), device="cpu", restart=True)
    assert out.is_dir() and not working_folder(out).exists()
