"""Measuring models on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyconvert.errors import HyconvertError
from hyconvert.modeling.state import dense_state


@torch.no_grad()
def perplexity(
    model: Any,
    tokens: Tensor,
    *,
    as_base: bool = False,
    on_sequence: Callable[[], None] | None = None,
) -> float:
    """Perplexity of a causal LM, every token but each sequence's first predicted from all before it.

    Args:
        model: any transformers causal LM.
        tokens: [N, T] int64.
        as_base: run a converted model that holds its base's weights as the base, every layer dense.
        on_sequence: called after each sequence.

    Returns:
        exp of the mean negative log-likelihood in nats.
    """
    device = next(model.parameters()).device
    total = 0.0
    for row in tokens:
        row = row.to(device)
        extra = {}
        if as_base:
            extra["hyconvert_state"] = dense_state(1, len(row), device)
        hidden = model.model(row[None], use_cache=False, **extra).last_hidden_state[0]
        total += nll_of_hidden(model, hidden, row) / len(tokens)
        if on_sequence:
            on_sequence()
    return math.exp(total)


def nll_of_hidden(model: Any, hidden: Tensor, row: Tensor, chunk: int = 512) -> float:
    """Mean negative log-likelihood; logits of `chunk` tokens at a time, so that long sequences fit."""
    losses = [
        torch.nn.functional.cross_entropy(
            model.lm_head(hidden[at : at + chunk]).float()[: len(row) - 1 - at],
            row[at + 1 : at + 1 + chunk],
            reduction="sum",
        )
        for at in range(0, len(row) - 1, chunk)
    ]
    return float(torch.stack(losses).sum()) / (len(row) - 1)


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU if there is one; anything else is a torch device.

    Raises:
        HyconvertError: no such device can be used here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that device
        raise HyconvertError(
            f"device '{device}' cannot be used here ({str(error).splitlines()[0]}); use auto, cpu, or cuda with a GPU"
        ) from error
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """What a device is called, for reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def human_bytes(count: float) -> str:
    """A number of bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
