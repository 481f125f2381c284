"""Keys and values in place: full layers up to a maximum length, the others in rings of their window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hyconvert.errors import HyconvertError
from hyconvert.generation.network import Network
from hyconvert_kernels.fp8 import FP8, dequantise_rows, fp8_problem, store_rows


class KV(NamedTuple):
    """One layer's keys and values [B, G, S, d]; in FP8 with a float32 scale [B, G, S] for each row of either."""

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Put keys and values of the first tokens [B, G, T, d] into FP8."""
        assert self.scales is not None
        store_rows(keys, self.keys, self.scales[0])
        store_rows(values, self.values, self.scales[1])

    def plain(self, dtype: torch.dtype) -> KV:
        """All of it in this dtype, without scales."""
        if self.scales is None:
            return self
        keys, values = self.scales
        return KV(dequantise_rows(self.keys, keys, dtype), dequantise_rows(self.values, values, dtype))


@dataclass
class Caches:
    """Preallocated keys and values of every layer, [B, G, S, d].

    S is the maximum length where a layer keeps everything, and its window (or the maximum length, if that is less)
    where it has a ring: the key of slot s lies at s modulo S. These are the bytes that `hyconvert.kv.kv_bytes` counts
    with `static=True`.

    With `kv_dtype="fp8"` the layers that keep everything hold float8_e4m3fn and `scales` of keys and of values; rings
    stay in the model's dtype, and have None there.
    """

    keys: list[Tensor]
    values: list[Tensor]
    scales: list[tuple[Tensor, Tensor] | None]
    allocated: int | None = None
    """Bytes that a GPU's allocator counted for them."""

    @classmethod
    def allocate(cls, network: Network, batch: int, length: int, kv_dtype: str | None = None) -> Caches:
        """Room for `batch` sequences of up to `length` tokens.

        Raises:
            HyconvertError: there is no such `kv_dtype`, or the GPU cannot read it.
        """
        check_kv_dtype(kv_dtype, network.device)
        on_gpu = network.device.type == "cuda"
        before = torch.cuda.memory_allocated(network.device) if on_gpu else 0
        keys, values = [], []
        scales: list[tuple[Tensor, Tensor] | None] = []
        for block in network.blocks:
            slots = length if block.ring is None else min(block.ring, length)
            shape = (batch, block.groups, slots, block.dim)
            scaled = kv_dtype is not None and block.ring is None
            dtype = FP8 if scaled else network.dtype
            keys.append(torch.zeros(shape, dtype=dtype, device=network.device))
            values.append(torch.zeros(shape, dtype=dtype, device=network.device))
            pair = [torch.zeros(shape[:3], device=network.device) for _ in range(2 * scaled)]
            scales.append((pair[0], pair[1]) if scaled else None)
        counted = torch.cuda.memory_allocated(network.device) - before if on_gpu else None
        return cls(keys, values, scales, counted)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.layer_bytes)

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer's, scales included."""
        every = zip(self.keys, self.values, self.scales, strict=True)
        return [sum(x.nbytes for x in (keys, values, *(scales or ()))) for keys, values, scales in every]

    def of(self, index: int, rows: slice) -> KV:
        """Some rows of layer `index`."""
        scales = self.scales[index]
        part = None if scales is None else (scales[0][rows], scales[1][rows])
        return KV(self.keys[index][rows], self.values[index][rows], part)

    def copy_(self, other: Caches) -> None:
        """Take over what other caches of the same shapes hold."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)

    def _tensors(self) -> list[Tensor]:
        scales = [scale for pair in self.scales for scale in pair or ()]
        return [*self.keys, *self.values, *scales]

    def fill(self, seed: int = 0) -> None:
        """Put random numbers everywhere, to time decoding at a length without reading a text of it."""
        generator = torch.Generator(self.keys[0].device).manual_seed(seed)
        for x in (*self.keys, *self.values):
            if x.dtype != FP8:
                x.normal_(generator=generator)
                continue
            for row in x:  # PyTorch draws no float8
                drawn = torch.empty(row.shape, dtype=torch.bfloat16, device=row.device)
                row.copy_(drawn.normal_(std=64.0, generator=generator).clamp_(-448, 448))
        for scales in self.scales:
            for scale in scales or ():
                scale.fill_(1 / 64)


def check_kv_dtype(kv_dtype: str | None, device: torch.device) -> None:
    """See `Caches.allocate`."""
    if kv_dtype not in (None, "fp8"):
        raise HyconvertError(
            f"kv_dtype '{kv_dtype}' is not known; use fp8, or leave it out for the model's own dtype"
        )
    if kv_dtype is not None and (problem := fp8_problem(device)):
        raise HyconvertError(f"keys and values in fp8 cannot be read here: {problem}; leave kv_dtype out")
