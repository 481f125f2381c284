"""How far a changed model is from its base: KL divergence on running text, and NLL of answers to be looked up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyconvert.measure.costs import MeasureSettings
from hyconvert.retrieval import Prompts, by_task, score_answers

_CHUNK = 2048
_KEPT_BYTES = 1 << 28
"""The base's log-probabilities are kept if they take no more than this, and worked out again each time otherwise."""


@dataclass(frozen=True)
class Reading:
    """What a yardstick read off a model.

    Attributes:
        kl: mean KL(base || model) per token of running text, in nats.
        nll: mean NLL per retrieval task, in nats.
    """

    kl: float
    nll: dict[str, float]


class Yardstick:
    """Holds the base's answers, and compares a changed model's final hidden states with them.

    Args:
        model: gives the output projection.
        prompts: what is measured on.
        base_hidden: [N, T, D] the base's final hidden states on the prompts.
        settings: how many positions of the text are compared, and the seed that draws them.
    """

    def __init__(self, model: Any, prompts: Prompts, base_hidden: Tensor, settings: MeasureSettings) -> None:
        self.lm_head, self.prompts = model.lm_head, prompts
        generator = torch.Generator().manual_seed(settings.seed)
        first = settings.window  # before that a window layer sees all there is
        self.rows, self.positions = [], []
        for row, end in enumerate(prompts.text_end):
            picked = torch.randperm(end - first, generator=generator)[: settings.positions] + first
            self.positions.append(picked.sort().values)
            self.rows.append(torch.full_like(picked, row))
        device = base_hidden.device
        self.at = torch.cat(self.rows).to(device), torch.cat(self.positions).to(device)
        self.base = base_hidden[self.at].clone()
        self.reference = self._answers(base_hidden)
        kept = len(self.base) * self.lm_head.weight.shape[0] * 4 <= _KEPT_BYTES
        with torch.no_grad():
            self.log_chances = self._log_chances(self.base) if kept else None

    @torch.no_grad()
    def read(self, hidden: Tensor) -> Reading:
        """Compare final hidden states [N, T, D] with the base's."""
        mine, total = hidden[self.at], torch.zeros((), device=hidden.device)
        for at in range(0, len(mine), _CHUNK):
            piece = slice(at, at + _CHUNK)
            base = (
                self._log_chances(self.base[piece]) if self.log_chances is None else self.log_chances[piece]
            )
            ours = self._log_chances(mine[piece])
            total += torch.nn.functional.kl_div(ours, base, reduction="sum", log_target=True)
        return Reading(float(total) / len(mine), self._answers(hidden))

    def _log_chances(self, hidden: Tensor) -> Tensor:
        """Log-probabilities [n, V] in float32."""
        return torch.log_softmax(self.lm_head(hidden).float(), -1)

    def _answers(self, hidden: Tensor) -> dict[str, float]:
        scores = score_answers(self.prompts, lambda row: hidden[row], self.lm_head)
        return {task: score.nll for task, score in by_task(self.prompts, scores).items()}
