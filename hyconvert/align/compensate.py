"""Output projections that make up for what earlier converted layers have changed.

Each layer is fitted to the base's attention on the base's activations. In the converted model it gets others, and all
errors so far lie in the residual stream. Here the converted model runs beside the base, layer by layer on the same
tokens. Behind each converted layer's attention the streams differ by E, and the layer's heads o predict a part of it:

    min_D  sum_t || D o_t - E_t ||^2 + l || D ||^2,        W_o <- W_o + c D

l is chosen for each layer by two-fold cross-validation over sequences, from the same Gram matrices; where no l gains
anything on the other fold, the layer stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyconvert.align.solve import ridge
from hyconvert.align.walk import LayerVisit
from hyconvert.modeling.state import prepare_state

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths that are tried, as shares of the mean diagonal."""


class Compensation:
    """The converted model's residual stream, which follows a walk over the base.

    Args:
        model: the converted model, whose layers the walk's caller fits one by one.
        tokens: [N, T] int64, those of the walk.
        share: c, what of the fitted correction is applied. All of it is best for the residual stream, and somewhat less
            for perplexity.
    """

    def __init__(self, model: Any, tokens: Tensor, share: float) -> None:
        self.decoder, self.share = model.model, share
        plan = model.config.get_plan()
        self.last_reader = {layer.source: index for index, layer in enumerate(plan.layers)}
        weight = self.decoder.embed_tokens.weight
        size = 8 if weight.is_cuda else 1
        self.rows = [slice(at, min(at + size, len(tokens))) for at in range(0, len(tokens), size)]
        self.states = [prepare_state(r.stop - r.start, tokens.shape[1], weight.device) for r in self.rows]
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
        layer, attention = self.decoder.layers[visit.index], visit.attention
        before = getattr(layer, "input_layernorm", None)
        if before is None:
            for hidden, state in zip(self.hidden, self.states, strict=True):
                hidden.copy_(_run(layer, hidden, visit.rope, state))
            self._forget(visit.index)
            return None
        heads, outputs = [], []
        gathered: list[Tensor] = []
        hook = attention.o_proj.register_forward_pre_hook(lambda _, args: gathered.append(args[0]))
        try:
            for hidden, state in zip(self.hidden, self.states, strict=True):
                outputs.append(
                    attention(before(hidden), position_embeddings=visit.rope, hyconvert_state=state)[0]
                )
                heads.append(gathered.pop())
        finally:
            hook.remove()
        gain = None
        if refit and len(visit.entering) > 1:
            correction, gain = self._fit(visit, heads, outputs)
            if gain > 0:
                projection: Any = attention.o_proj
                old = projection.weight.clone()
                projection.weight.add_((self.share * correction).to(old.dtype))
                change = projection.weight - old
                for output, head in zip(outputs, heads, strict=True):
                    output.add_(head @ change.mT)
            gain = max(gain, 0.0)
        own = layer.self_attn
        try:
            for hidden, output, state in zip(self.hidden, outputs, self.states, strict=True):
                layer.self_attn = _Given(output)
                hidden.copy_(_run(layer, hidden, visit.rope, state))
        finally:
            layer.self_attn = own
        self._forget(visit.index)
        return gain

    def _fit(self, visit: LayerVisit, heads: list[Tensor], outputs: list[Tensor]) -> tuple[Tensor, float]:
        """D [D, H d], and what it gains on the fold that it is not fitted on, as a share of the error there."""
        width, wide = outputs[0].shape[-1], heads[0].shape[-1]
        gram = heads[0].new_zeros(2, wide, wide, dtype=torch.float32)
        cross = heads[0].new_zeros(2, width, wide, dtype=torch.float32)
        energy = torch.zeros((), device=gram.device)
        for rows, hidden, head, output in zip(self.rows, self.hidden, heads, outputs, strict=True):
            wanted = visit.entering[rows].float() + visit.outputs[rows].float()
            error = wanted - hidden.float() - output.float()
            energy += error.square().sum()
            for fold in range(2):
                part = slice((rows.start + fold) % 2, None, 2)
                o, e = head[part].flatten(0, 1).float(), error[part].flatten(0, 1)
                gram[fold] += o.mT @ o
                cross[fold] += e.mT @ o
        gains = {}
        for strength in RIDGES:
            gain = 0.0
            for fold, other in ((0, 1), (1, 0)):
                fitted = ridge(gram[fold], cross[fold], strength).float()
                gain += float((2 * fitted * cross[other] - (fitted @ gram[other]) * fitted).sum())
            gains[strength] = gain
        best = max(gains, key=gains.__getitem__)
        return ridge(gram.sum(0), cross.sum(0), best).float(), gains[best] / max(float(energy), 1e-12)

    def _forget(self, index: int) -> None:
        """Let go of full layers' keys and values that no later layer reads."""
        for state in self.states:
            for source in [s for s in state.oracle if self.last_reader.get(s, -1) <= index]:
                del state.oracle[source]


class _Given(nn.Module):
    """Attention whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """That output."""
        return self.output, None


def _run(layer: Any, hidden: Tensor, rope: Any, state: Any) -> Tensor:
    result = layer(hidden, position_embeddings=rope, hyconvert_state=state)
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
