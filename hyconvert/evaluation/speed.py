"""Tokens per second, and the bytes that the cache really holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyconvert.evaluation.models import Pair
from hyconvert.kv import base_kv_bytes, kv_bytes

CONTEXTS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)


@dataclass(frozen=True)
class Speed:
    """One model on one sequence, token by token in plain PyTorch: no CUDA graph, no compilation, no batch.

    Attributes:
        prefill, decode: tokens per second of reading the sequence at once, and of writing after it.
        cache_bytes: what the cache holds after it, in the model's dtype.
    """

    prefill: float
    decode: float
    cache_bytes: int


@dataclass(frozen=True)
class SpeedResult:
    """Both models' speed on a sequence of `tokens` tokens with `decoded` more after it."""

    tokens: int
    decoded: int
    base: Speed
    converted: Speed


@dataclass(frozen=True)
class KvResult:
    """The KV cache of one sequence in bfloat16, by the plan's arithmetic.

    Attributes:
        contexts: tokens cached.
        base, converted: bytes of the whole cache at each.
        base_per_token, converted_per_token: bytes that one more token adds once every window is full.
        layers: bytes per token that each layer of the converted model adds.
    """

    contexts: list[int]
    base: list[int]
    converted: list[int]
    base_per_token: int
    converted_per_token: int
    layers: list[int]


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a Transformers cache."""
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))


def count_kv(config: Any) -> KvResult:
    """The KV cache of a converted model and of its base, from its config."""
    far = 1 << 30
    growth = [b - a for a, b in zip(kv_bytes(config, far), kv_bytes(config, far + 1), strict=True)]
    return KvResult(
        contexts=list(CONTEXTS),
        base=[sum(base_kv_bytes(config, context)) for context in CONTEXTS],
        converted=[sum(kv_bytes(config, context)) for context in CONTEXTS],
        base_per_token=sum(base_kv_bytes(config, far + 1)) - sum(base_kv_bytes(config, far)),
        converted_per_token=sum(growth),
        layers=growth,
    )


@torch.no_grad()
def measure_speed(
    pair: Pair, row: Tensor, decoded: int, on_model: Callable[[], None] | None = None
) -> SpeedResult:
    """Time both models on one sequence [T]."""
    found = {}
    for name, model in pair.models.items():
        found[name] = _time(model, row.to(pair.device), decoded)
        if on_model:
            on_model()
    return SpeedResult(len(row), decoded, **found)


def _time(model: Any, row: Tensor, decoded: int) -> Speed:
    if row.is_cuda:  # kernels are compiled and memory is set aside on the first run
        _run(model, row, 4)
    read, wrote, cache = _run(model, row, decoded)
    return Speed(len(row) / read, decoded / wrote, cache_bytes(cache))


def _run(model: Any, row: Tensor, decoded: int) -> tuple[float, float, Any]:
    began = _now(row)
    out = model(row[None], use_cache=True, logits_to_keep=1)
    after = _now(row)
    for _ in range(decoded):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return after - began, _now(row) - after, out.past_key_values


def _now(row: Tensor) -> float:
    if row.is_cuda:
        torch.cuda.synchronize(row.device)
    return time.perf_counter()
