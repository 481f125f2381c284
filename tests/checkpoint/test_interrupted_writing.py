"""Whatever stops the writing, OUT never looks complete and nothing is left behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyconvert.checkpoint import CheckpointWriter
from hyconvert.errors import CheckpointError

DEAD = 2**22 + 1  # beyond the largest process id that Linux gives out


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """From `limit` bytes on, every write fails as it does on a full disk, after a last partial one."""
    written = 0
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal written
        room = limit - written
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(descriptor, bytes(data[:room]))
        written += count
        return count

    monkeypatch.setattr("hyconvert.checkpoint.writer.os.write", write)


@pytest.mark.parametrize("limit", [0, 4, 100, 3000, 9000])
@pytest.mark.parametrize("old", [False, True])
def test_full_disk_is_one_clear_error_and_leaves_out_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, old: bool
) -> None:
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / "config.json").write_text("old")
    fill_disk_after(monkeypatch, limit)
    with (
        pytest.raises(CheckpointError) as caught,
        CheckpointWriter(out, force=True, max_shard_bytes=4000) as writer,
    ):
        for index in range(4):
            writer.add_tensor(f"t{index}", torch.zeros(900))
        writer.write_json("config.json", {})
        writer.finish()
    message = str(caught.value)
    assert message.startswith("the disk is full: ")
    assert str(out) in message
    assert "\n" not in message
    assert names_in(tmp_path) == (["out"] if old else [])
    if old:
        assert (out / "config.json").read_text() == "old"


def test_the_operating_systems_own_full_disk_is_recognised(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    with (
        pytest.raises(CheckpointError, match="the disk is full"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        (writer.folder / "config.json").symlink_to("/dev/full")
        writer._place = lambda name: writer.folder / name
        writer.write_json("config.json", {})
    assert names_in(tmp_path) == []


def test_too_little_space_is_refused_up_front(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CheckpointError, match=r"needs .* GB, but its disk has only .* GB free"):
        CheckpointWriter(tmp_path / "out", expected_bytes=free + 10**12)
    assert names_in(tmp_path) == []


def test_forbidden_folder_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so the refusal is made up
    with pytest.raises(CheckpointError, match=r"could not be written \(Permission denied\); choose a folder"):
        CheckpointWriter(tmp_path / "out")


def test_other_operating_system_errors_are_not_disguised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("hyconvert.checkpoint.writer.os.write", fail)
    with pytest.raises(OSError, match="Input/output"), CheckpointWriter(tmp_path / "out") as writer:
        writer.write_text("config.json", "x")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_any_exception_removes_what_was_written(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), CheckpointWriter(tmp_path / "out", max_shard_bytes=10) as writer:
        writer.add_tensor("a", torch.zeros(10))
        writer.add_tensor("b", torch.zeros(10))
        assert len(names_in(writer.folder)) == 1
        raise error
    assert names_in(tmp_path) == []


def test_leaving_without_finish_is_a_bug_and_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without finish"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add_tensor("a", torch.zeros(10))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_interrupt_during_the_final_rename_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    real = os.rename
    renames = 0

    def rename(source: Path, target: Path) -> None:
        nonlocal renames
        if ".safetensors" not in str(target):
            renames += 1
            if renames == failing:
                raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("hyconvert.checkpoint.staging.os.rename", rename)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(out, force=True) as writer:
        writer.add_tensor("a", torch.zeros(10))
        writer.finish()
    assert (out / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["out"]


CONVERSION = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background inherits it ignored
from hyconvert.checkpoint import CheckpointWriter
with CheckpointWriter(sys.argv[1], max_shard_bytes=100) as writer:
    writer.write_json("config.json", {})
    for index in range(10):
        writer.add_tensor(f"t{index}", torch.zeros(30))
    print("half-way", flush=True)
    time.sleep(60)
    writer.finish()
"""


def start_conversion(out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERSION, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half-way\n"
    return process


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = start_conversion(tmp_path / "out")
    assert names_in(tmp_path) == [f".out.partial-{process.pid}"]
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    assert names_in(tmp_path) == []


def test_a_killed_process_leaves_no_out_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    process = start_conversion(tmp_path / "out")
    process.kill()
    process.communicate(timeout=30)
    assert names_in(tmp_path) == [f".out.partial-{process.pid}"]
    with CheckpointWriter(tmp_path / "out") as writer:
        assert names_in(tmp_path) == [writer.folder.name]
        writer.finish()
    assert names_in(tmp_path) == ["out"]


def test_folders_of_living_processes_and_of_other_targets_are_left_alone(tmp_path: Path) -> None:
    others = [
        f".out.partial-{os.getppid()}",
        f".other.partial-{DEAD}",
        f".out.partial-{DEAD}x",
        "out.partial-1",
    ]
    for name in [*others, f".out.partial-{DEAD}"]:
        (tmp_path / name).mkdir()
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.finish()
    assert names_in(tmp_path) == sorted([*others, "out"])


def test_an_old_checkpoint_that_a_dead_process_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    aside = tmp_path / f".out.old-{DEAD}"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    with pytest.raises(CheckpointError, match="already exists"):
        CheckpointWriter(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["out"]
