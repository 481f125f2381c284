"""A folder that appears under its name only when it is complete."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyconvert.errors import CheckpointError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_MARKERS = ("config.json", "plan.json")


class StagedFolder:
    """Write beside the target, then rename.

    The work goes to a hidden sibling, `.<name>.partial-<pid>`. `commit` renames it to the target, `discard` removes it.
    An old target is moved aside for the moment of the rename and removed only after it. Siblings that a dead process
    left are cleaned up on start; if it died between the two renames, its old target is put back.

    Attributes:
        target: Where the folder will appear, absolute.
        path: Where to write until then.
    """

    def __init__(self, target: Path, *, force: bool, base: Path | None, expected_bytes: int | None) -> None:
        """Check that the target may be written, clean up and create the working folder.

        Args:
            target: The folder to create.
            force: Replace the target if it exists; only a checkpoint folder is ever replaced.
            base: The checkpoint being read; the target may be neither it, nor in it, nor around it.
            expected_bytes: Refuse to start if the disk has less free space than this.

        Raises:
            CheckpointError: The target exists, overlaps the base, cannot be created, or would not fit.
        """
        self.target = target.expanduser().resolve()
        self.force = force
        self.path = self.target.with_name(f".{self.target.name}.partial-{os.getpid()}")
        self._aside = self.target.with_name(f".{self.target.name}.old-{os.getpid()}")
        self._check_overlap(base)
        with explained_os_errors(self.target):
            self._check_parents()
            self._clean_up_after_dead_processes()
            self._check_target()
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if expected_bytes is not None:
                self._check_space(expected_bytes)
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir()

    def commit(self) -> None:
        """Make the folder appear under its name.

        Raises:
            CheckpointError: The target has come into being meanwhile, or cannot be replaced.
        """
        self._check_target()
        with explained_os_errors(self.target):
            try:
                if self.target.exists():
                    os.rename(self.target, self._aside)
                os.rename(self.path, self.target)
                _sync_folder(self.target.parent)
            finally:
                if self._aside.exists() and not self.target.exists():
                    os.rename(self._aside, self.target)
        shutil.rmtree(self._aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove the working folder; the target stays as it was."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _check_overlap(self, base: Path | None) -> None:
        if base is None:
            return
        base = base.expanduser().resolve()
        inside = self.target == base or base in self.target.parents
        if inside or self.target in base.parents:
            relation = "is or lies in" if inside else "contains"
            raise CheckpointError(
                f"OUT {self.target} {relation} BASE {base}; choose a folder outside the base"
            )

    def _check_parents(self) -> None:
        nearest = next(parent for parent in self.target.parents if parent.exists())
        if not nearest.is_dir():
            raise CheckpointError(
                f"OUT {self.target} lies under {nearest}, which is no folder; choose another name"
            )

    def _check_target(self) -> None:
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise CheckpointError(f"OUT {self.target} exists and is no folder; choose another name")
        if not any(self.target.iterdir()):
            return
        if not self.force:
            raise CheckpointError(
                f"OUT {self.target} already exists and is not empty; choose another name, or pass --force to replace it"
            )
        if not any((self.target / marker).is_file() for marker in _MARKERS):
            raise CheckpointError(
                f"OUT {self.target} holds no checkpoint (it has no {_MARKERS[0]}), so --force will not replace it; "
                "choose another name"
            )

    def _check_space(self, expected_bytes: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if free < expected_bytes:
            raise CheckpointError(
                f"OUT {self.target} needs {expected_bytes / 1e9:.2f} GB, but its disk has only {free / 1e9:.2f} GB "
                "free; free some space or choose another disk"
            )

    def _clean_up_after_dead_processes(self) -> None:
        pattern = re.compile(rf"\.{re.escape(self.target.name)}\.(partial|old)-(\d+)")
        if not self.target.parent.is_dir():
            return
        for sibling in sorted(self.target.parent.iterdir()):
            match = pattern.fullmatch(sibling.name)
            if match is None or _is_running(int(match[2])):
                continue
            if match[1] == "old" and not self.target.exists():
                os.rename(sibling, self.target)
            else:
                shutil.rmtree(sibling, ignore_errors=True)


@contextmanager
def explained_os_errors(place: Path) -> Iterator[None]:
    """Turn what a user can mend into a `CheckpointError` that names `place`: a full disk, a lack of permission, a name
    that is too long. All else passes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(
                f"the disk is full: {place} could not be written; free some space or choose another disk"
            ) from error
        if error.errno in _REFUSED:
            raise CheckpointError(
                f"{place} could not be written ({error.strerror}); choose a folder that you may write to"
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise CheckpointError(
                f"{place} cannot be created ({error.strerror}); choose a shorter name"
            ) from error
        raise


def _is_running(pid: int) -> bool:
    """Whether a process of this id is alive (on this machine)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
