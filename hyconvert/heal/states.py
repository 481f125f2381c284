"""Saved states of a run, each complete or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from hyconvert.errors import HealError

_NAME = re.compile(r"state-(\d+)")


class States:
    """Folders `state-<step>` with model, optimiser and random state, written aside and renamed.

    The newest is the last good one: a state is saved only when everything in it is finite, and an older one is removed
    only after the newer one stands.

    Args:
        folder: where.
        accelerator: saves and loads what it was given to prepare.
    """

    def __init__(self, folder: Path, accelerator: Any) -> None:
        self.folder, self.accelerator = folder, accelerator

    def latest(self) -> Path | None:
        """The newest complete state."""
        if not self.folder.is_dir():
            return None
        found = {int(m[1]): path for path in self.folder.iterdir() if (m := _NAME.fullmatch(path.name))}
        return found[max(found)] if found else None

    def save(self, step: int, record: dict[str, Any]) -> None:
        """Save the state behind a step, on all processes together.

        Args:
            step: optimiser steps done.
            record: what goes along, as plain data.

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
            self.accelerator.save_state(str(aside), safe_serialization=False)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                _sync(aside)
                os.rename(aside, target)
                for old in self.folder.iterdir():
                    if _NAME.fullmatch(old.name) and old != target:
                        shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError) as error:
            reason = _refusal(error, self.folder)
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

    def load(self, path: Path) -> dict[str, Any]:
        """Load a state into what the accelerator prepared; returns its record."""
        self.accelerator.load_state(str(path))
        record: dict[str, Any] = json.loads((path / "record.json").read_text())
        return record


def _refusal(error: Exception, folder: Path) -> str | None:
    """What the system refused, in words; None where the error is a bug. torch gives a full disk no number."""
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
