"""Reading a GGUF file's metadata and tensor table.

The `gguf` package's own reader makes a NumPy array of every vocabulary entry (3 s for 49,152 tokens); conversion needs
neither vocabulary nor merges, so this one steps over string arrays (0.1 s) and checks sizes as it goes.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from hyconvert.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_STRING = 1 << 26  # longer ones mean that the file is corrupt


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        shape: Its shape in torch's order, slowest dimension first.
        type: How its values are stored.
        start: Offset of its first byte in the file.
        nbytes: Its size in the file.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file's contents but for the tensors' values.

    Attributes:
        metadata: The key-value pairs; an array of strings is given as its length.
        tensors: The tensors by their GGUF names, in file order.
        data_start: Where the tensors begin in the file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_start: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse a GGUF file's header and check it against the file's size.

    Raises:
        CheckpointError: The file is not GGUF, is truncated, or uses a type or version that is not known.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is no GGUF file: it does not start with the bytes GGUF")
        try:
            header = _Reader(file, path).header()
        except (struct.error, EOFError, UnicodeDecodeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} is truncated or has a corrupt GGUF header ({error}); download it again"
            ) from error
    end = max((tensor.start + tensor.nbytes for tensor in header.tensors.values()), default=0)
    if size < end:
        raise CheckpointError(
            f"{path} is truncated: its header promises {end:,} bytes, the file has {size:,}; download it again"
        )
    return header


class _Reader:
    """A cursor over the header of an open GGUF file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path

    def header(self) -> GgufHeader:
        version, tensor_count, pair_count = self.unpack("<IQQ")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} is GGUF version {version}; only versions 2 and 3 can be read")
        metadata = {}
        for _ in range(pair_count):
            key = self.string()
            (kind,) = self.unpack("<I")
            metadata[key] = self.value(kind)
        table = [self.table_row() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        data_start = -(-self.file.tell() // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in table:
            quantization = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quantization]
            if name in tensors or not shape or shape[-1] % block:
                raise ValueError(f"tensor {name!r} is listed twice or has the impossible shape {list(shape)}")
            nbytes = prod(shape) // block * block_bytes
            tensors[name] = GgufTensor(shape, quantization, data_start + offset, nbytes)
        return GgufHeader(metadata, tensors, data_start)

    def table_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (dimensions,) = self.unpack("<I")
        if dimensions > 8:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = self.unpack(f"<{dimensions}Q")
        kind, offset = self.unpack("<IQ")
        return name, tuple(reversed(shape)), kind, offset

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack("<" + _SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"unknown value type {kind}")
        element, count = self.unpack("<IQ")
        if element in _SCALARS:
            return list(self.unpack(f"<{count}{_SCALARS[element]}"))
        if element != _STRING:
            raise ValueError(f"unknown array type {element}")
        for _ in range(count):
            self.file.seek(self.string_length(), 1)
        return count

    def string(self) -> str:
        return self.take(self.string_length()).decode("utf-8")

    def string_length(self) -> int:
        length = int(self.unpack("<Q")[0])
        if length > _MAX_STRING:
            raise ValueError(f"a string of {length:,} bytes")
        return length

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, length: int) -> bytes:
        data = self.file.read(length)
        if len(data) != length:
            raise EOFError("it ends inside the header")
        return data
