"""What a card can do, measured, and the least time that a pass could take on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hyconvert.generation.network import Block, FusedMlp, Network


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes per second of a copy on the device (read plus written), FLOP/s of a large product."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
        """On the current GPU."""
        x = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16)
        y = torch.empty_like(x)
        copy = 2 * x.nbytes / _seconds(lambda: y.copy_(x))
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in "ab")
        return cls(copy, 2 * 8192**3 / _seconds(lambda: torch.mm(a, b)))

    def floor(self, work: Work) -> float:
        """Least seconds: by bytes or by operations, whichever is more."""
        return float(max(work.bytes / self.bandwidth, work.operations / self.rate))


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and operations that must be done, however it is done."""

    bytes: float
    operations: float


def _seconds(function: Any, repeats: int = 20) -> float:
    for _ in range(3):
        function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / repeats / 1e3


def step_work(network: Network, batch: int, context: int, kv_dtype: str | None = None) -> Work:
    """One decoding step of `batch` rows after `context` tokens each, from caches of `kv_dtype` as `Decoder` has it."""
    weights, active = _weights(network, batch)
    size = torch.empty((), dtype=network.dtype).element_size()
    moved, operations = weights * size, 2 * active * batch
    for block in network.blocks:
        keys = batch * _keys(network, block, context)
        near = keys if kv_dtype is None else 0
        if kv_dtype is not None and block.ring is not None:
            near = batch * min(block.window, context + 1)
        row = near * block.dim * size + (keys - near) * (block.dim + 4)  # in FP8 with a scale
        moved += 2 * row * block.groups
        operations += 4 * keys * block.heads * block.dim
    return Work(moved, operations)


def prefill_work(network: Network, batch: int, length: int) -> Work:
    """Reading `batch` prompts of `length` tokens; of the last layer only what the next token needs."""
    weights, active = _weights(network, batch * length)
    tokens = batch * length
    size = torch.empty((), dtype=network.dtype).element_size()
    head = network.head.weight.numel()
    last = _mlp_numbers(network, network.blocks[-1], 1)[1]
    operations = 2.0 * (active - head - last) * tokens + 2 * (head + last) * batch
    for block in network.blocks:
        if block.kind == "full" and block is network.blocks[-1]:
            keys = float(length)
        elif block.kind == "full":
            keys = length * length / 2
        else:
            keys = length * _keys(network, block, length)
        operations += 4 * batch * keys * block.heads * block.dim
    return Work(weights * size, operations)


def _keys(network: Network, block: Block, context: int) -> int:
    """Keys that one query reads after `context` tokens."""
    if block.kind == "full":
        return context + 1
    near = min(block.window, context + 1)
    if block.source is None:
        return near
    return min(near + network.topk * network.block_size, context + 1)


def _weights(network: Network, tokens: int) -> tuple[float, float]:
    """Weights that a pass of so many tokens reads, and those that one token is multiplied with."""
    read = active = float(network.head.weight.numel())
    for block in network.blocks:
        inputs = block.inputs.weight
        own = inputs.numel() - block.inputs.fill * inputs.shape[1] + block.output.weight.numel()
        if block.attention is not None and block.attention.query_map is not None:
            own += 2 * block.attention.query_map.numel()
        loaded, used = _mlp_numbers(network, block, tokens)
        read, active = read + own + loaded, active + own + used
    return read, active


def _mlp_numbers(network: Network, block: Block, tokens: int) -> tuple[float, float]:
    total = float(sum(weight.numel() for weight in block.mlp.weights()))
    experts = getattr(network.config, "num_experts", None)
    if isinstance(block.mlp, FusedMlp) or not experts:
        return total, total
    share = network.config.num_experts_per_tok / experts
    return total * (1 - (1 - share) ** tokens), total * share  # experts drawn alike and independently
