"""A base checkpoint to convert, whatever it is stored as."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TensorInfo:
    """What `Source.read` returns for a tensor, known without reading it.

    Attributes:
        shape: Its shape.
        dtype: Its dtype as it will be read, after the conversion that `open_source` was asked for.
        shard: The name of the shard it belongs to.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: str

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A group of tensors that are read, converted and written together.

    Attributes:
        name: A file name such as `model-00001-of-00002.safetensors`. For a `.gguf` base it names no real file.
        tensor_names: Its tensors, in the order in which reading them is sequential.
        nbytes: The sum of its tensors' sizes in memory.
    """

    name: str
    tensor_names: tuple[str, ...]
    nbytes: int


class Source(ABC):
    """A validated base checkpoint. Nothing heavy has been read yet; tensors are read when asked for.

    Attributes:
        name: What the user typed.
        path: The local folder, or the `.gguf` file.
        format: For people: `safetensors`, or for example `gguf (Q4_1)`.
        config: The base's Transformers config.
        dtype: The dtype of most of the weights, as they will be read.
        tensors: Every tensor by its Transformers checkpoint name, shard by shard.
        shards: The shards in order.
    """

    name: str
    path: Path
    format: str
    config: "PretrainedConfig"
    dtype: torch.dtype
    tensors: Mapping[str, TensorInfo]
    shards: tuple[Shard, ...]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor's name, shard by shard."""
        return tuple(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """The size of all tensors in memory."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """A cheap, stable name for the contents: `sha256:` and 64 hex digits.

        Covers the config, the layout of the weights and a sample of their bytes; depends neither on where the
        checkpoint lies nor on the dtype it was opened with. It tells bases apart, it does not prove integrity.
        """
        digest = hashlib.sha256()
        self._hash(digest)
        return f"sha256:{digest.hexdigest()}"

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own.

        Args:
            name: One of `tensor_names`.

        Returns:
            The tensor on the CPU, with the shape and dtype that `tensors[name]` promises.

        Raises:
            KeyError: There is no such tensor.
        """

    @abstractmethod
    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base's tokenizer, with its chat template."""

    @abstractmethod
    def auxiliary_files(self) -> dict[str, bytes]:
        """The files that belong to a converted checkpoint unchanged, by their relative name.

        Tokenizer, chat templates, generation config and licence; no weights, config, model card or code. Copied
        verbatim from a folder; made by Transformers for a `.gguf` base.
        """

    @abstractmethod
    def _hash(self, digest: "hashlib._Hash") -> None:
        """Feed what `fingerprint` covers to the digest."""

    def iter_shards(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield `(shard name, its tensors by name)`, one shard at a time.

        A shard's memory is free once the caller has dropped its tensors.
        """
        for shard in self.shards:
            yield shard.name, {name: self.read(name) for name in shard.tensor_names}

    def iter_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield `(shard name, tensor name, tensor)`, one tensor at a time, in shard order."""
        for shard in self.shards:
            for name in shard.tensor_names:
                yield shard.name, name, self.read(name)


def hash_samples(digest: "hashlib._Hash", file: BinaryIO, start: int, end: int, pieces: int = 64) -> None:
    """Feed evenly spaced pieces of 4 KiB of `file[start:end]`, the first and the last among them, to the digest."""
    piece = 4096
    span = max(0, end - start - piece)
    for index in range(pieces):
        file.seek(start + span * index // (pieces - 1))
        digest.update(file.read(min(piece, end - start)))


def majority_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """The floating-point dtype that holds the most elements; float32 if there is none."""
    counts: dict[torch.dtype, int] = {}
    for info in tensors.values():
        if info.dtype.is_floating_point:
            counts[info.dtype] = counts.get(info.dtype, 0) + prod(info.shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32
