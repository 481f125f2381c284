"""Writing a checkpoint as a stream of tensors, so that it is complete or not there at all."""

import json
import os
import shutil
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from hyconvert.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from hyconvert.checkpoint.gguf import shard_file_name
from hyconvert.checkpoint.safetensors_header import DTYPES
from hyconvert.checkpoint.staging import StagedFolder, explained_os_errors

MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointWriter:
    """Write a checkpoint folder; use as a context manager and call `finish` at its end.

    Tensors are kept until their shard is full and then written, so that memory holds one shard. Leaving the context
    without `finish`, be it through an error, a full disk or Ctrl-C, removes everything that was written.

    Attributes:
        out: Where the checkpoint will appear.
        folder: Where its files are written until then, for code that saves into a folder itself.
        total_bytes: The size of all tensors added so far.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        force: bool = False,
        base: str | Path | None = None,
        expected_bytes: int | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Check that `out` may be written and create the working folder beside it.

        Args:
            out: The folder to create. It may exist if it is empty.
            force: Replace an existing checkpoint, after the new one is complete.
            base: The folder or file of the checkpoint that is read meanwhile; `out` must not overlap it.
            expected_bytes: The checkpoint's size, if known; refused up front if the disk has no room for it.
            max_shard_bytes: Start a new shard before one grows larger than this.

        Raises:
            CheckpointError: `out` exists, overlaps the base, cannot be created, or would not fit.
        """
        self._staged = StagedFolder(
            Path(out), force=force, base=None if base is None else Path(base), expected_bytes=expected_bytes
        )
        self.out = self._staged.target
        self.folder = self._staged.path
        self.total_bytes = 0
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._pending_name: str | None = None
        self._written: list[tuple[str | None, Path, list[str]]] = []
        self._names: set[str] = set()
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._pending.clear()
            self._staged.discard()
            if kind is None:
                raise RuntimeError("CheckpointWriter was left without finish(); nothing was kept")

    def start_shard(self, name: str) -> None:
        """Write what is pending and put the next tensors into a shard of their own.

        The shard ends at the next `start_shard` or at `finish`, whatever its size. Once every shard has been started by
        name, those names are kept.

        Args:
            name: Its file name, such as `model-00001-of-00002.safetensors`.
        """
        if Path(name).name != name or name in {self._pending_name, *(shard for shard, _, _ in self._written)}:
            raise ValueError(f"not a new plain file name: {name!r}")
        self._flush()
        self._pending_name = name

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor; its bytes are written as they are.

        Args:
            name: Its name in the checkpoint; each may be added once.
            tensor: A dense tensor of any shape, device and dtype that safetensors has. It must not change before its
                shard is written.

        Raises:
            CheckpointError: The disk is full or may not be written.
        """
        if name in self._names:
            raise ValueError(f"tensor {name!r} was added twice")
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot store")
        tensor = tensor.detach().to("cpu").contiguous()
        full = self._pending_bytes + tensor.nbytes > self._max_shard_bytes
        if full and self._pending and self._pending_name is None:
            self._flush()
        self._names.add(name)
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file; `name` is relative and may lie in a subfolder."""
        path = self._place(name)
        with explained_os_errors(self.out / name), path.open("wb") as file:
            _write(file.fileno(), data)
            os.fsync(file.fileno())

    def write_text(self, name: str, text: str) -> None:
        """Write a text file as UTF-8."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, indented by two, in the order of the value's own keys."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def copy_file(self, source: str | Path, name: str | None = None) -> None:
        """Copy a file verbatim, under its own name unless another is given."""
        path = self._place(name or Path(source).name)
        with explained_os_errors(self.out / path.name):
            shutil.copyfile(source, path)

    def finish(self) -> Path:
        """Write the last shard and the index, and let the checkpoint appear.

        Returns:
            The checkpoint's folder, `out`.

        Raises:
            CheckpointError: The disk is full, or `out` has come into being since the start.
        """
        self._flush()
        weight_map = self._name_shards()
        if set(weight_map.values()) - {SINGLE_FILE}:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            self.write_json(INDEX_FILE, index)
        self._staged.commit()
        self._finished = True
        return self.out

    def _name_shards(self) -> dict[str, str]:
        """Give the shards their final names; returns each tensor's shard."""
        chosen = [name for name, _, _ in self._written]
        if any(name is None for name in chosen):
            total = len(chosen)
            chosen = [shard_file_name(index, total) for index in range(1, total + 1)]
        weight_map: dict[str, str] = {}
        for final, (_, path, tensors) in zip(chosen, self._written, strict=True):
            assert final is not None
            os.rename(path, self.folder / final)
            weight_map |= dict.fromkeys(tensors, final)
        return weight_map

    def _flush(self) -> None:
        """Write the pending tensors as a shard under a provisional name."""
        if not self._pending:
            return
        path = self.folder / f"shard-{len(self._written):05d}.tmp"
        with explained_os_errors(self.out):
            names = _write_safetensors(path, self._pending)
        self._written.append((self._pending_name, path, names))
        self._pending = {}
        self._pending_bytes = 0
        self._pending_name = None

    def _place(self, name: str) -> Path:
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{name!r} leads out of the checkpoint's folder")
        with explained_os_errors(self.out):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Write one safetensors file without copying its tensors; returns their names in file order.

    The safetensors library's own writer is not used because it reports a full disk as an error without a number.
    """
    # Widest dtype first keeps every tensor aligned, as the library does.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        _write(file.fileno(), struct.pack("<Q", len(raw)) + raw)
        for name in names:
            if tensors[name].nbytes:
                _write(file.fileno(), tensors[name].reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return names


def _write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`; one system call may take only part of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
