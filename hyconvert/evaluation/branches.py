"""Is the sparse branch at work: how much it carries in each layer, and what is lost without either branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyconvert.evaluation.models import hidden_states
from hyconvert.heal.objective import GateShares
from hyconvert.retrieval import Prompts, by_task, score_answers

Branch = Literal["sparse", "window"]


@dataclass(frozen=True)
class Ablation:
    """A converted model with one branch off.

    Attributes:
        off: which branch; None for the model as it is.
        layer: in which layer; None for all.
        nll: mean loss in nats on the prompts' running text, where there is something outside the window.
        copy_nll: mean NLL of the answers that repeat a passage.
        needle_nll, needle_exact: of those that look up facts, and the share of them that is exact.
    """

    off: Branch | None
    layer: int | None
    nll: float
    copy_nll: float | None
    needle_nll: float | None
    needle_exact: float | None


@dataclass(frozen=True)
class BranchResult:
    """What the sparse branch carries.

    Attributes:
        shares: mean gate share a of the sparse branch by layer, over heads and the queries that have a block to read.
        ablations: the model as it is first.
    """

    shares: dict[int, float]
    ablations: list[Ablation]

    @property
    def mean_share(self) -> float | None:
        """Over the layers that have a sparse branch."""
        return sum(self.shares.values()) / len(self.shares) if self.shares else None


def gated_layers(model: Any) -> list[int]:
    """Layers with a sparse branch."""
    return [i for i, layer in enumerate(model.model.layers) if hasattr(layer.self_attn, "gate")]


@contextmanager
def branch_off(model: Any, branch: Branch, layers: Iterable[int] | None = None) -> Iterator[None]:
    """Switch one branch off while the context is open, for whole sequences (decoding does not pass here).

    The gate is told that the branch is empty. Queries whose sparse branch is empty anyway keep their window.

    Args:
        model: a converted model.
        branch: which.
        layers: where; None is everywhere.
    """
    handles = [
        model.model.layers[index].self_attn.gate.register_forward_pre_hook(_emptied(branch), with_kwargs=True)
        for index in (gated_layers(model) if layers is None else layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _emptied(branch: Branch) -> Callable[..., Any]:
    def before(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], Any]:
        x, out_w, lse_w, out_s, lse_s = args
        if branch == "sparse":
            return (x, out_w, lse_w, torch.zeros_like(out_s), torch.full_like(lse_s, -torch.inf)), kwargs
        gone = lse_s > -torch.inf
        out_w, lse_w = out_w.masked_fill(gone[..., None], 0), lse_w.masked_fill(gone, -torch.inf)
        return (x, out_w, lse_w, out_s, lse_s), kwargs

    return before


@torch.no_grad()
def measure_branches(
    model: Any, prompts: Prompts, *, by_layer: bool, on_pass: Callable[[], None] | None = None
) -> BranchResult:
    """Read the gates, then switch branches off in all layers, and the sparse one in each layer alone.

    Args:
        model: a converted model.
        prompts: retrieval prompts; their text and their answers are measured.
        by_layer: whether to go through the layers.
        on_pass: called after each setting.
    """
    layers = gated_layers(model)
    settings: list[tuple[Branch | None, int | None]] = [(None, None)]
    if layers:
        settings += [("sparse", None), ("window", None)]
        settings += [("sparse", layer) for layer in layers if by_layer]
    ablations = []
    shares: dict[int, float] = {}
    for branch, layer in settings:
        if branch is None:
            with GateShares(model) as gates:
                ablations.append(_measure(model, prompts, branch, layer))
            shares = gates.means()
        else:
            with branch_off(model, branch, None if layer is None else [layer]):
                ablations.append(_measure(model, prompts, branch, layer))
        if on_pass:
            on_pass()
    return BranchResult({layer: shares.get(layer, 0.0) for layer in layers}, ablations)


def _measure(model: Any, prompts: Prompts, off: Branch | None, layer: int | None) -> Ablation:
    window, losses = model.config.get_plan().window, []

    def read(row: int) -> Tensor:
        tokens = prompts.tokens[row]
        hidden = hidden_states(model, tokens)
        losses.append(_text_loss(model, hidden, tokens, window, prompts.text_end[row]))
        return hidden

    tasks = by_task(prompts, score_answers(prompts, read, model.lm_head))
    needles = [score for task, score in tasks.items() if task != "copy"]
    return Ablation(
        off=off,
        layer=layer,
        nll=sum(losses) / len(losses) if losses else math.nan,
        copy_nll=tasks["copy"].nll if "copy" in tasks else None,
        needle_nll=sum(s.nll for s in needles) / len(needles) if needles else None,
        needle_exact=sum(s.exact for s in needles) / len(needles) if needles else None,
    )


def _text_loss(model: Any, hidden: Tensor, tokens: Tensor, first: int, end: int, chunk: int = 512) -> float:
    """Mean loss of the tokens `first + 1` to `end - 1`."""
    targets, total = tokens[first + 1 : end].to(hidden.device), 0.0
    for at in range(0, len(targets), chunk):
        wanted = targets[at : at + chunk]
        logits = model.lm_head(hidden[first + at : first + at + len(wanted)]).float()
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total / max(1, len(targets))
