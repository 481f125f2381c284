"""Output projections that make up for what earlier converted layers have changed.

Each layer is fitted to the base's attention on the base's activations. In the converted model it gets others, and all
errors so far lie in the residual stream. Here the converted model runs beside the base, layer by layer on the same
tokens. Behind each converted layer's attention the streams differ by E, and the layer's heads o predict a part of it:

    min_D  sum_t w_t || D o_t - E_t ||^2 + l || D ||^2,        W_o <- W_o + c D

w_t is 1, and more where the next token has to be looked up far back (`hyconvert.retrieval`): few tokens do, and what
they need is what a conversion loses first. l is chosen for each layer by two-fold cross-validation, from the same Gram
matrices; where no l gains anything on the other fold, the layer stays as it is. The folds are alternate sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyconvert.align.fit import FitSettings
from hyconvert.align.solve import ridge
from hyconvert.align.walk import LayerVisit, run_layer, state_for
from hyconvert.modeling.state import dense_state
from hyconvert.plan import Plan

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths that are tried, as shares of the mean diagonal."""


class Compensation:
    """The converted model's residual stream, which follows a walk over the base.

    Args:
        decoder: of the converted model, whose layers the walk's caller fits one by one.
        plan: its plan.
        tokens: [N, T] int64, those of the walk.
        settings: `compensation` is c, what of the fitted correction is applied: all of it is best for the residual
            stream, and somewhat less for perplexity. `emphasis` is the weight of tokens that are asked for.
        asked: [N, T] bool, where the token that follows is to be looked up far back; None for nowhere.
    """

    @torch.no_grad()
    def __init__(
        self, decoder: Any, plan: Plan, tokens: Tensor, settings: FitSettings, asked: Tensor | None = None
    ) -> None:
        self.decoder, self.share = decoder, settings.compensation
        self.last_reader = last_readers(plan)
        weight = self.decoder.embed_tokens.weight
        asked = torch.zeros_like(tokens, dtype=torch.bool) if asked is None else asked
        self.weights = (1.0 + (settings.emphasis - 1) * asked).to(weight.device)
        size = 8 if weight.is_cuda else 1
        self.rows = [slice(at, min(at + size, len(tokens))) for at in range(0, len(tokens), size)]
        self.states = [
            dense_state(r.stop - r.start, tokens.shape[1], weight.device, plan.sources) for r in self.rows
        ]
        self.hidden = [self.decoder.embed_tokens(tokens[r].to(weight.device)) for r in self.rows]

    @torch.no_grad()
    def follow(self, visit: LayerVisit, *, refit: bool) -> float | None:
        """Take the stream through one layer, as it is now.

        Args:
            visit: the base at this layer.
            refit: fit its output projection first. Layers that normalise what attention puts out stay as they are, and
                so does everything if there is one sequence.

        Returns:
            By how much the squared error of the residual stream behind the layer's attention falls on the fold that is
            not fitted, as a share of it: 0 where it would rise, and nothing was changed. None if that was not tried.
        """
        layer = self.decoder.layers[visit.index]
        attention = layer.self_attn
        before = getattr(layer, "input_layernorm", None)
        if before is None:
            for hidden, state in zip(self.hidden, self.states, strict=True):
                hidden.copy_(run_layer(layer, hidden, visit.rope, state_for(attention, state)))
            self._forget(visit.index)
            return None
        fit = _Correction(attention) if refit and len(visit.entering) > 1 else None
        heads: list[Tensor] = []
        hook = attention.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
        try:
            for rows, hidden, state in zip(self.rows, self.hidden, self.states, strict=True):
                mine = state_for(attention, state)
                output = attention(before(hidden), position_embeddings=visit.rope, hyconvert_state=mine)[0]
                if fit is not None:
                    wanted = visit.entering[rows].float() + visit.outputs[rows].float()
                    missing = wanted - hidden.float() - output.float()
                    fit.add(rows, heads[-1], missing, self.weights[rows])
        finally:
            hook.remove()
        gain = None
        if fit is not None:
            correction, gain = fit.solve()
            if gain > 0:
                projection: Any = attention.o_proj
                projection.weight.add_((self.share * correction).to(projection.weight.dtype))
            gain = max(gain, 0.0)
        own = layer.self_attn
        try:
            for hidden, head, state in zip(self.hidden, heads, self.states, strict=True):
                layer.self_attn = _Given(attention.o_proj(head))
                hidden.copy_(run_layer(layer, hidden, visit.rope, state))
        finally:
            layer.self_attn = own
        self._forget(visit.index)
        return gain

    def _forget(self, index: int) -> None:
        """Let go of full layers' keys and values that no later layer reads."""
        for state in self.states:
            for source in [s for s in state.oracle if self.last_reader.get(s, -1) <= index]:
                del state.oracle[source]


class _Correction:
    """D [D, H d] by ridge regression, from Gram matrices of both folds."""

    def __init__(self, attention: Any) -> None:
        weight = attention.o_proj.weight
        width, wide = weight.shape
        self.gram = weight.new_zeros(2, wide, wide, dtype=torch.float32)
        self.cross = weight.new_zeros(2, width, wide, dtype=torch.float32)
        self.energy = weight.new_zeros((), dtype=torch.float32)

    def add(self, rows: slice, heads: Tensor, error: Tensor, weights: Tensor) -> None:
        """Take in heads [n, T, H d], what is missing [n, T, D] and weights [n, T], of sequences `rows`."""
        self.energy += (error.square().sum(-1) * weights).sum()
        for fold in range(2):
            part = slice((rows.start + fold) % 2, None, 2)
            o, e = heads[part].flatten(0, 1).float(), error[part].flatten(0, 1)
            weighted = o * weights[part].flatten()[:, None]
            self.gram[fold] += o.mT @ weighted
            self.cross[fold] += e.mT @ weighted

    def solve(self) -> tuple[Tensor, float]:
        """D, and what it gains on the fold that it is not fitted on, as a share of the error there."""
        gains = {}
        for strength in RIDGES:
            gain = 0.0
            for fold, other in ((0, 1), (1, 0)):
                fitted = ridge(self.gram[fold], self.cross[fold], strength).float()
                gain += float((2 * fitted * self.cross[other] - (fitted @ self.gram[other]) * fitted).sum())
            gains[strength] = gain
        best = max(gains, key=gains.__getitem__)
        fitted = ridge(self.gram.sum(0), self.cross.sum(0), best).float()
        return fitted, gains[best] / max(float(self.energy), 1e-12)


class _Given(nn.Module):
    """Attention whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """That output."""
        return self.output, None


def last_readers(plan: Plan) -> dict[int, int]:
    """By full layer, the last layer that reads it; without those that nobody reads."""
    return {layer.source: index for index, layer in enumerate(plan.layers) if layer.source is not None}
