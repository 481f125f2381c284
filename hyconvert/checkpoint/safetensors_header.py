"""Reading and checking the header of a safetensors file, without touching its tensors.

Layout of the format: 8 bytes with the length N of the header (little endian), N bytes of JSON that maps each tensor's
name to its dtype, shape and byte range, then the tensors' bytes.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from hyconvert.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "U64": torch.uint64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""The format's dtype names; `hyconvert.checkpoint.writer` writes the same ones."""

_MAX_HEADER = 100_000_000  # the safetensors library refuses longer ones too
_GIT_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor as a safetensors header describes it.

    Attributes:
        shape: The tensor's shape; `()` for a scalar.
        dtype: The dtype it is stored in.
        start: Offset of its first byte in the file.
        nbytes: Its size.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Parse a safetensors header and check it against the file's size.

    Args:
        path: The `.safetensors` file.

    Returns:
        The tensors, in the order of their bytes in the file.

    Raises:
        CheckpointError: The file is not safetensors, is truncated or its header contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(max(8, len(_GIT_LFS)))
        if start.startswith(_GIT_LFS):
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            )
        if len(start) < 8:
            raise CheckpointError(f"{path} is truncated: it has only {size} bytes; download it again")
        (length,) = struct.unpack("<Q", start[:8])
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path} has a corrupt safetensors header (length {length:,}); download or save it again"
            )
        if size < 8 + length:
            raise CheckpointError(
                f"{path} is truncated: its header needs {8 + length:,} bytes, the file has {size:,}; download it again"
            )
        file.seek(8)
        raw = file.read(length)
    entries = _parse(path, raw)
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if size < end:
        raise CheckpointError(
            f"{path} is truncated: its header promises {end:,} bytes, the file has {size:,}; download it again"
        )
    if size > end:
        raise CheckpointError(
            f"{path} has {size - end:,} bytes after its last tensor, so it is corrupt; download it again"
        )
    return entries


def _parse(path: Path, raw: bytes) -> dict[str, HeaderEntry]:
    """The header's tensors by their place in the file; raises `CheckpointError` for anything inconsistent."""
    data_start = 8 + len(raw)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        header.pop("__metadata__", None)
        entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} has a corrupt safetensors header ({error}); download or save it again"
        ) from error
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    position = data_start
    for name, entry in ordered.items():
        if entry.start != position:
            raise CheckpointError(
                f"{path} has a corrupt safetensors header (tensor {name!r} starts at byte {entry.start:,}, "
                f"not at {position:,}); download or save it again"
            )
        position += entry.nbytes
    return ordered


def _entry(name: str, value: dict[str, Any], data_start: int) -> HeaderEntry:
    """One parsed header entry; raises `ValueError`, `KeyError` or `TypeError` if it makes no sense."""
    dtype = DTYPES.get(value["dtype"])
    if dtype is None:
        raise ValueError(f"tensor {name!r} has the unknown dtype {value['dtype']!r}")
    shape = tuple(int(size) for size in value["shape"])
    start, end = value["data_offsets"]
    nbytes = prod(shape) * dtype.itemsize
    if start < 0 or end - start != nbytes:
        raise ValueError(
            f"tensor {name!r} of shape {list(shape)} needs {nbytes:,} bytes, but has {end - start:,}"
        )
    return HeaderEntry(shape, dtype, data_start + start, nbytes)
