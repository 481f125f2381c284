"""One pass over the base, layer by layer, for many calibration sequences at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyconvert.modeling.attention import HyConvertAttention
from hyconvert.modeling.state import ForwardState, OracleState, dense_state


@dataclass
class LayerVisit:
    """What the walk saw at one layer.

    Attributes:
        index: the layer.
        attention: its attention module.
        entering: [N, T, D] hidden states that enter the layer.
        inputs: [N, T, D] inputs of the attention, on base activations.
        outputs: [N, T, D] what the base's attention made of them, output projection included.
        rope: cos and sin tables, [1, T, d].
    """

    index: int
    attention: HyConvertAttention
    entering: Tensor
    inputs: Tensor
    outputs: Tensor
    rope: tuple[Tensor, Tensor]


class LayerWalk:
    """Runs all calibration sequences through one decoder layer at a time, every layer as dense as in the base.

    Hidden states at one layer's two boundaries and the oracle states of the full layers are all that is kept.

    Args:
        model: a converted model whose base weights are loaded; what its sparse layers hold does not matter.
        tokens: [N, T] int64, all real tokens.
        oracles: layers whose oracle states are kept for the layers that read them.
    """

    def __init__(self, model: Any, tokens: Tensor, oracles: frozenset[int]) -> None:
        self.model = model
        self.tokens = tokens
        self.oracles = oracles
        self.oracle_states: dict[int, list[OracleState]] = {}
        self.hidden = torch.empty(0)

    @torch.no_grad()
    def __iter__(self) -> Iterator[LayerVisit]:
        """Visit the layers in order; the caller may change a layer's new parameters, which the walk never runs."""
        decoder = self.model.model
        device = decoder.embed_tokens.weight.device
        count, length = self.tokens.shape
        self.hidden = torch.stack([decoder.embed_tokens(row.to(device)) for row in self.tokens])
        positions = torch.arange(length, device=device)[None]
        rope = decoder.rotary_emb(self.hidden[:1], position_ids=positions)
        for index, layer in enumerate(decoder.layers):
            inputs, outputs, leaving = (torch.empty_like(self.hidden) for _ in range(3))
            for row in range(count):
                state = dense_state(1, length, device, self.oracles)
                leaving[row] = self._run(layer, row, rope, state, inputs, outputs)
                if index in self.oracles:
                    self.oracle_states.setdefault(index, []).append(state.oracle[index])
            entering, self.hidden = self.hidden, leaving
            yield LayerVisit(index, layer.self_attn, entering, inputs, outputs, rope)

    def _run(
        self, layer: Any, row: int, rope: Any, state: ForwardState, inputs: Tensor, outputs: Tensor
    ) -> Tensor:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            inputs[row] = (args[0] if args else kwargs["hidden_states"])[0]

        def after(module: Any, args: Any, result: Any) -> None:
            outputs[row] = result[0][0]

        handles = [
            layer.self_attn.register_forward_pre_hook(before, with_kwargs=True),
            layer.self_attn.register_forward_hook(after),
        ]
        try:
            return run_layer(layer, self.hidden[row : row + 1], rope, state)[0]
        finally:
            for handle in handles:
                handle.remove()


def state_for(attention: HyConvertAttention, dense: ForwardState) -> ForwardState:
    """The state to run a layer of a plan with, in whichever model it stands; shares its oracle states with `dense`.

    Args:
        attention: of the layer.
        dense: from `dense_state`, with the plan's sources.
    """
    return dense if attention.kind in ("full", "sliding") else replace(dense, dense=False)


def run_layer(layer: Any, hidden: Tensor, rope: Any, state: ForwardState) -> Tensor:
    """One decoder layer on [B, T, D]."""
    result = layer(hidden, position_embeddings=rope, hyconvert_state=state)
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
