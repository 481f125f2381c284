"""Saved states of a run, each complete or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from hyconvert.errors import HealError

_NAME = re.compile(r"state-(\d+)")


class States:
    """Folders `state-<step>` with trained weights, optimiser and random state, written aside and renamed.

    The newest is the last good one: a state is saved only when everything in it is finite, and an older one is removed
    only after the newer one stands. Tensors go by the names of the parameters, each process writes its share of them,
    and any number of processes can read them, sharded or not.

    Args:
        folder: where.
        accelerator: says which process this is.
    """

    def __init__(self, folder: Path, accelerator: Any) -> None:
        self.folder, self.accelerator = folder, accelerator

    def latest(self) -> Path | None:
        """The newest complete state."""
        if not self.folder.is_dir():
            return None
        found = {int(m[1]): path for path in self.folder.iterdir() if (m := _NAME.fullmatch(path.name))}
        return found[max(found)] if found else None

    def save(
        self,
        step: int,
        record: dict[str, Any],
        parameters: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Save the state behind a step, on all processes together.

        Args:
            step: optimiser steps done.
            record: what goes along, as plain data.
            parameters: what is trained, by name.
            optimizer: of them.

        Raises:
            HealError: it cannot be written; the state before it is kept.
        """
        target = self.folder / f"state-{step:07d}"
        aside = self.folder / f".{target.name}.partial"
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                (aside / "record.json").write_text(json.dumps(record))
            self.accelerator.wait_for_everyone()
            tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = value
            _write(tensors, aside / "tensors")
            torch.save(_random_state(), self._random(aside))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                _sync(aside)
                os.rename(aside, target)
                for old in self.folder.iterdir():
                    if _NAME.fullmatch(old.name) and old != target:
                        shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError, CheckpointException) as error:
            reason = _refusal(error)
            if reason is None:
                raise
            shutil.rmtree(aside, ignore_errors=True)
            kept = self.latest()
            raise HealError(
                f"{reason}: the state of step {step} could not be saved in {self.folder}; "
                + (f"{kept.name} is kept" if kept else "none was saved before")
                + ", so free some space and give the same command to go on"
            ) from error
        self.accelerator.wait_for_everyone()

    def load(
        self, path: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Load a state into parameters and optimizer, whatever number of processes saved it; returns its record."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
        stored: dict[str, Any] = FileSystemReader(path / "tensors").read_metadata().state_dict_metadata
        optimizer.state.clear()
        for full, about in stored.items():
            kind, key, name = full.split(".", 2)
            if kind == "optimizer":
                parameter = parameters[name]
                moment = (
                    torch.zeros_like(parameter)
                    if about.size == parameter.shape
                    else torch.zeros(about.size, dtype=about.properties.dtype, device=parameter.device)
                )
                tensors[full] = optimizer.state[parameter][key] = moment
        _read(tensors, path / "tensors")
        if (random := self._random(path)).is_file():  # more processes than there were keep the seed's
            _set_random_state(torch.load(random))
        record: dict[str, Any] = json.loads((path / "record.json").read_text())
        return record

    def _random(self, folder: Path) -> Path:
        return folder / f"random-{self.accelerator.process_index}.pt"


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    with _one_process_is_fine():
        state_dict_saver.save(tensors, checkpoint_id=folder)


def _read(tensors: dict[str, Tensor], folder: Path) -> None:
    with _one_process_is_fine():
        state_dict_loader.load(tensors, checkpoint_id=folder)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _refusal(error: BaseException) -> str | None:
    """What the system refused, in words; None where the error is a bug. torch gives a full disk no number."""
    if isinstance(error, CheckpointException):  # of all processes
        reasons = [_refusal(cause) for cause, _ in error.failures.values()]
        return next(filter(None, reasons), None)
    if isinstance(error, OSError):
        full, refused = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EACCES, errno.EPERM, errno.EROFS)
        return (
            "the disk is full"
            if error.errno in full
            else "writing is not permitted"
            if error.errno in refused
            else None
        )
    writing = "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    return "the disk is full or cannot be written" if writing else None


def _sync(folder: Path) -> None:
    """Let everything in a folder reach the disk before it is renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
