"""Running text: perplexity by position, KL divergence from the base, and how often both would say the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyconvert.evaluation.models import Pair, hidden_states

_CHUNK = 512
_BINS = 48


@dataclass(frozen=True)
class Bucket:
    """What was measured at predictions from `start` to `end - 1` tokens of context.

    Attributes:
        start, end: range of positions, `end` not included.
        base, converted: perplexity.
        kl, kl_p95: KL(base || converted) per token in nats, mean and 95th percentile.
        agreement: share of positions where both models' most likely token is the same.
    """

    start: int
    end: int
    base: float
    converted: float
    kl: float
    kl_p95: float
    agreement: float

    @property
    def ratio(self) -> float:
        """Converted perplexity over the base's."""
        return self.converted / self.base


@dataclass(frozen=True)
class TextResult:
    """Both models on the same running text.

    Attributes:
        tokens, sequence_length: how much was measured, in rows of what length.
        whole: over all positions.
        ratio_error: standard error of the perplexity ratio over rows; None for a single row.
        buckets: by position.
        curve: mean loss in nats by position, averaged over stretches: `position`, `base`, `converted`, `kl`.
    """

    tokens: int
    sequence_length: int
    whole: Bucket
    ratio_error: float | None
    buckets: list[Bucket]
    curve: dict[str, list[float]]


@torch.no_grad()
def measure_text(
    pair: Pair, rows: Tensor, window: int, on_row: Callable[[], None] | None = None
) -> TextResult:
    """Measure both models on [N, T] tokens, every token but each row's first predicted from all before it.

    Args:
        pair: the models.
        rows: [N, T] int64.
        window: of the plan; the first bucket ends where it does.
        on_row: called after each row.
    """
    losses: dict[str, list[Tensor]] = {"base": [], "converted": [], "kl": [], "same": []}
    for row in rows:
        hidden = {name: hidden_states(model, row) for name, model in pair.models.items()}
        for name, values in _compare(pair, hidden, row).items():
            losses[name].append(values)
        if on_row:
            on_row()
    found = {name: torch.stack(values) for name, values in losses.items()}
    length = rows.shape[1]
    return TextResult(
        tokens=rows.numel(),
        sequence_length=length,
        whole=_bucket(found, 0, length - 1),
        ratio_error=_ratio_error(found),
        buckets=[_bucket(found, a, b) for a, b in bucket_ranges(length - 1, window)],
        curve=_curve(found),
    )


def bucket_ranges(length: int, window: int) -> list[tuple[int, int]]:
    """Ranges of positions: what the window sees whole, then doubling, the last one cut off or joined if it is small."""
    edges = [0, min(window, length)]
    while edges[-1] < length:
        edges.append(min(length, 2 * edges[-1]))
    if len(edges) > 3 and edges[-1] - edges[-2] < (edges[-2] - edges[-3]) // 2:
        del edges[-2]
    return list(itertools.pairwise(edges))


def _compare(pair: Pair, hidden: dict[str, Tensor], row: Tensor) -> dict[str, Tensor]:
    """Per predicted position [T - 1] on the CPU: loss of both, KL, and whether the top token is the same."""
    targets = row[1:].to(pair.device)
    parts: dict[str, list[Tensor]] = {"base": [], "converted": [], "kl": [], "same": []}
    for at in range(0, len(targets), _CHUNK):
        wanted = targets[at : at + _CHUNK, None]
        logs = {
            name: model.lm_head(hidden[name][at : at + len(wanted)]).float().log_softmax(-1)
            for name, model in pair.models.items()
        }
        base, ours = logs["base"], logs["converted"]
        parts["base"].append(-base.gather(1, wanted)[:, 0])
        parts["converted"].append(-ours.gather(1, wanted)[:, 0])
        parts["same"].append((base.argmax(-1) == ours.argmax(-1)).float())
        parts["kl"].append((base.exp() * (base - ours)).sum(-1))
    return {name: torch.cat(values).cpu() for name, values in parts.items()}


def _bucket(found: dict[str, Tensor], start: int, end: int) -> Bucket:
    part = {name: values[:, start:end] for name, values in found.items()}
    kl = part["kl"].flatten().sort().values
    return Bucket(
        start=start,
        end=end,
        base=_exp(part["base"]),
        converted=_exp(part["converted"]),
        kl=float(kl.mean()),
        kl_p95=float(kl[min(len(kl) - 1, int(0.95 * len(kl)))]),
        agreement=float(part["same"].mean()),
    )


def _exp(losses: Tensor) -> float:
    return math.exp(float(losses.double().mean()))


def _ratio_error(found: dict[str, Tensor]) -> float | None:
    rises = (found["converted"] - found["base"]).double().mean(1)
    if len(rises) < 2:
        return None
    return float(rises.mean().exp() * rises.std() / len(rises) ** 0.5)


def _curve(found: dict[str, Tensor]) -> dict[str, list[float]]:
    """Means over stretches that grow with the position."""
    length = found["base"].shape[1]
    edges = sorted({0, length, *(round(length ** (i / _BINS)) for i in range(_BINS))})
    curve: dict[str, list[Any]] = {"position": [], "base": [], "converted": [], "kl": []}
    for start, end in itertools.pairwise(edges):
        curve["position"].append((start + end + 1) / 2)
        for name in ("base", "converted", "kl"):
            curve[name].append(round(float(found[name][:, start:end].double().mean()), 5))
    return curve
