"""Keys and values in place: full layers up to a maximum length, the others in rings of their window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyconvert.generation.network import Network


@dataclass
class Caches:
    """Preallocated keys and values of every layer, [B, G, S, d].

    S is the maximum length where a layer keeps everything, and its window (or the maximum length, if that is less)
    where it has a ring: the key of slot s lies at s modulo S. These are the bytes that `hyconvert.kv.kv_bytes` counts
    with `static=True`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    allocated: int | None = None
    """Bytes that a GPU's allocator counted for them."""

    @classmethod
    def allocate(cls, network: Network, batch: int, length: int) -> Caches:
        """Room for `batch` sequences of up to `length` tokens."""
        on_gpu = network.device.type == "cuda"
        before = torch.cuda.memory_allocated(network.device) if on_gpu else 0
        keys, values = [], []
        for block in network.blocks:
            slots = length if block.ring is None else min(block.ring, length)
            shape = (batch, block.groups, slots, block.dim)
            keys.append(torch.zeros(shape, dtype=network.dtype, device=network.device))
            values.append(torch.zeros(shape, dtype=network.dtype, device=network.device))
        counted = torch.cuda.memory_allocated(network.device) - before if on_gpu else None
        return cls(keys, values, counted)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def fill(self, seed: int = 0) -> None:
        """Put random numbers everywhere, to time decoding at a length without reading a text of it."""
        generator = torch.Generator(self.keys[0].device).manual_seed(seed)
        for x in (*self.keys, *self.values):
            x.normal_(generator=generator)
