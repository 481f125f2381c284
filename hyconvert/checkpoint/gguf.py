"""A base stored as one `.gguf` file. Its quantised weights are read as the floats they stand for."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from hyconvert.checkpoint.gguf_config import ROPE_FACTORS, make_config, tensor_name, token_ids
from hyconvert.checkpoint.gguf_header import GgufTensor, read_gguf_header
from hyconvert.checkpoint.gguf_tokenizer import load_gguf_tokenizer
from hyconvert.checkpoint.source import Shard, Source, TensorInfo, hash_samples
from hyconvert.errors import UnsupportedModelError

if TYPE_CHECKING:
    import hashlib

    from transformers import PreTrainedTokenizerBase

_SHARD_BYTES = 5 * 10**9


class GgufSource(Source):
    """A local `.gguf` file; see `hyconvert.checkpoint.open_source`.

    Tensors carry the names they have in a Transformers checkpoint, so a stack of experts comes as one tensor for each.
    """

    def __init__(self, path: Path, *, name: str, dtype: torch.dtype | None) -> None:
        """Validate the file's header and work out names and config.

        Args:
            path: The file.
            name: What the user typed.
            dtype: The dtype to read weights in; None means float32, which loses nothing.

        Raises:
            CheckpointError: The file is truncated or corrupt.
            UnsupportedModelError: The architecture, a tensor, or a quantisation type cannot be read.
        """
        self.name = name
        self.path = path
        self.dtype = dtype or torch.float32
        self._header = read_gguf_header(path)
        self._check_readable()
        self.format = f"gguf ({self._main_type()})"
        factors = self._header.tensors.get(ROPE_FACTORS)
        self.config = make_config(path, self._header, None if factors is None else self._dequantize(factors))
        self.config.dtype = self.dtype
        self._places = self._name_tensors()
        self.shards = self._plan_shards()
        self.tensors = {
            tensor: TensorInfo(self._shape(tensor), self.dtype, shard.name)
            for shard in self.shards
            for tensor in shard.tensor_names
        }

    def read(self, name: str) -> torch.Tensor:
        gguf_name, expert = self._places[name]
        values = self._dequantize(self._header.tensors[gguf_name], expert)
        if self.config.model_type == "llama" and ".attn_q." in gguf_name:
            values = _undo_permutation(values, self.config.num_attention_heads)
        if self.config.model_type == "llama" and ".attn_k." in gguf_name:
            values = _undo_permutation(values, self.config.num_key_value_heads)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self.dtype)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_gguf_tokenizer(self.path, self._header)

    def auxiliary_files(self) -> dict[str, bytes]:
        from transformers import GenerationConfig

        generation = GenerationConfig.from_dict(token_ids(self._header.metadata))
        with tempfile.TemporaryDirectory() as folder:
            self.load_tokenizer().save_pretrained(folder)
            generation.save_pretrained(folder)
            files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
            return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}

    def _hash(self, digest: hashlib._Hash) -> None:
        size, start = self.path.stat().st_size, self._header.data_start
        digest.update(json.dumps([size, start]).encode())
        with self.path.open("rb") as file:
            digest.update(file.read(start))
            hash_samples(digest, file, start, size)

    def _dequantize(self, tensor: GgufTensor, expert: int | None = None) -> npt.NDArray[Any]:
        """The float32 values of a tensor, or of one matrix of a stack of experts."""
        shape, start, nbytes = tensor.shape, tensor.start, tensor.nbytes
        if expert is not None:
            nbytes //= shape[0]
            shape, start = shape[1:], start + expert * nbytes
        raw = np.fromfile(self.path, dtype=np.uint8, count=nbytes, offset=start)
        if tensor.type == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)
        if tensor.type == GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32).reshape(shape)
        block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        rows = raw.reshape(*shape[:-1], shape[-1] // block * block_bytes)
        return dequantize(rows, tensor.type).reshape(shape)

    def _check_readable(self) -> None:
        metadata = self._header.metadata
        if metadata.get("split.count", 1) > 1:
            raise UnsupportedModelError(
                f"{self.path} is one part of a split GGUF; join the parts first (`llama-gguf-split --merge`)"
            )
        for kind in {tensor.type for tensor in self._header.tensors.values()}:
            _, block_bytes = GGML_QUANT_SIZES[kind]
            try:
                dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{self.path} uses the quantisation {kind.name}, which the gguf package cannot read; "
                    "convert the safetensors checkpoint or another quantisation"
                ) from error

    def _main_type(self) -> str:
        """The quantisation that holds most of the values."""
        elements: Counter[str] = Counter()
        for tensor in self._header.tensors.values():
            elements[tensor.type.name] += prod(tensor.shape)
        return elements.most_common(1)[0][0] if elements else "empty"

    def _name_tensors(self) -> dict[str, tuple[str, int | None]]:
        """Where each tensor lies: its GGUF name, and its place in that tensor's stack of experts if it is one."""
        places: dict[str, tuple[str, int | None]] = {}
        for gguf_name, tensor in self._header.tensors.items():
            if gguf_name == ROPE_FACTORS:
                continue
            name = tensor_name(self.path, gguf_name)
            if "{expert}" in name:
                places |= {name.format(expert=index): (gguf_name, index) for index in range(tensor.shape[0])}
            else:
                places[name] = (gguf_name, None)
        return places

    def _shape(self, name: str) -> tuple[int, ...]:
        gguf_name, expert = self._places[name]
        shape = self._header.tensors[gguf_name].shape
        return shape if expert is None else shape[1:]

    def _plan_shards(self) -> tuple[Shard, ...]:
        """Cut the file into shards of about 5 GB as they will be read."""
        groups: list[list[str]] = [[]]
        sizes = [0]
        for name in self._places:
            nbytes = prod(self._shape(name)) * self.dtype.itemsize
            if groups[-1] and sizes[-1] + nbytes > _SHARD_BYTES:
                groups.append([])
                sizes.append(0)
            groups[-1].append(name)
            sizes[-1] += nbytes
        total = len(groups)
        return tuple(
            Shard(shard_file_name(index, total), tuple(names), size)
            for index, (names, size) in enumerate(zip(groups, sizes, strict=True), start=1)
        )


def shard_file_name(index: int, total: int) -> str:
    """The file name of shard `index` (from 1) of `total`, as Transformers expects it."""
    return "model.safetensors" if total == 1 else f"model-{index:05d}-of-{total:05d}.safetensors"


def _undo_permutation(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's reordering of the rows of Q and K.

    llama.cpp rotates neighbouring pairs of a head's dimensions, Transformers dimension i with i + d/2; its converter
    therefore stores row (half, i) of each head at (i, half).
    """
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
