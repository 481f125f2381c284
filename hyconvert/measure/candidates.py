"""One layer in another kind, fitted and run, with everything else of the base left as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hyconvert.align.fit import FitSettings
from hyconvert.align.run import LayerFit, RowReader, align_layer
from hyconvert.align.walk import LayerVisit, run_layer
from hyconvert.modeling.attention import HyConvertAttention
from hyconvert.modeling.state import OracleState, dense_state, prepare_state
from hyconvert.plan import LayerPlan


def make_candidate(model: Any, layer: int, choice: LayerPlan) -> HyConvertAttention:
    """Attention of one layer in another kind, with the layer's own weights and an output projection to refit.

    Args:
        model: a model whose plan is `dense_plan`.
        layer: which layer.
        choice: its kind and source.
    """
    own = model.model.layers[layer].self_attn
    plan = model.config.get_plan()
    layers = (*plan.layers[:layer], choice, *plan.layers[layer + 1 :])
    weight = own.q_proj.weight
    candidate = HyConvertAttention(own, model.config, plan.model_copy(update={"layers": layers}), layer)
    if choice.source is not None:
        candidate.source_uses_rope = model.model.layers[choice.source].self_attn.use_rope
    candidate.to(device=weight.device, dtype=weight.dtype)
    candidate.reset_parameters()
    candidate.o_proj = copy.deepcopy(own.o_proj)
    return candidate.eval().requires_grad_(False)


def fit_candidate(
    candidate: HyConvertAttention,
    visit: LayerVisit,
    oracles: list[OracleState],
    settings: FitSettings,
    reader: RowReader,
) -> LayerFit:
    """Align a candidate on a layer's base activations."""
    mine = LayerVisit(visit.index, candidate, visit.entering, visit.inputs, visit.outputs, visit.rope)
    return align_layer(mine, oracles, settings, reader)


def stack_oracles(states: list[OracleState]) -> OracleState:
    """Oracle states of single sequences as those of a batch."""
    keys, values, indices = (
        torch.cat([getattr(s, n) for s in states]) for n in ("keys", "values", "indices")
    )
    return OracleState(keys, values, indices)


@torch.no_grad()
def run_from(
    model: Any,
    layer: int,
    candidate: HyConvertAttention,
    entering: Tensor,
    oracles: list[OracleState],
    rope: Any,
    batch: int,
) -> Tensor:
    """Final hidden states [N, T, D] when one layer is replaced and all after it are the base's.

    Args:
        model: the base, every layer full.
        layer: the layer that `candidate` stands in for.
        candidate: its attention.
        entering: [N, T, D] hidden states that enter the layer.
        oracles: its source's oracle states, one per sequence; empty for a window layer.
        rope: cos and sin tables.
        batch: sequences at a time.
    """
    decoder = model.model
    outputs = []
    for at in range(0, len(entering), batch):
        hidden = entering[at : at + batch]
        count, length = hidden.shape[:2]
        state = prepare_state(count, length, hidden.device)
        if candidate.source is not None:
            state.oracle[candidate.source] = stack_oracles(oracles[at : at + batch])
        own = decoder.layers[layer].self_attn
        decoder.layers[layer].self_attn = candidate
        try:
            hidden = run_layer(decoder.layers[layer], hidden, rope, state)
        finally:
            decoder.layers[layer].self_attn = own
        dense = dense_state(count, length, hidden.device)
        for later in decoder.layers[layer + 1 :]:
            hidden = run_layer(later, hidden, rope, dense)
        outputs.append(decoder.norm(hidden))
    return torch.cat(outputs)
