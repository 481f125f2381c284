"""The next token from logits, without a wait for the GPU, so that a CUDA graph can hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyconvert.errors import HyconvertError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens; None for all.
        top_p: only the likeliest tokens that together have this probability; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise HyconvertError(f"temperature {self.temperature} is below 0; use 0 for the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise HyconvertError(f"top_k {self.top_k} leaves no token; use at least 1, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise HyconvertError(f"top_p {self.top_p} is no share; use one above 0 and at most 1")

    def choose(self, logits: Tensor) -> Tensor:
        """One token [B] per row of logits [B, V]; random ones follow PyTorch's seed."""
        if not self.temperature:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            shares = ordered.softmax(-1)
            beyond = shares.cumsum(-1) - shares >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
        # The largest share over an exponential variable: a draw by the shares (torch.multinomial waits for the GPU).
        noise = torch.empty_like(logits).exponential_()
        return (logits.softmax(-1) / noise).argmax(-1)
