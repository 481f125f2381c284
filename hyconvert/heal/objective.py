"""Student, teacher and losses as one module, so that DDP and FSDP see one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyconvert.heal.loss import Sums, distillation
from hyconvert.heal.models import CONVERTED_KINDS
from hyconvert.heal.tokens import Batch
from hyconvert.modeling.gates import MergeGate
from hyconvert.modeling.state import prepare_state
from hyconvert.recipe import Stage


class Healing(nn.Module):
    """The loss of a batch, summed over its tokens.

    Args:
        student: a converted model.
        teacher: its base as a converted model with full layers only; None for cross-entropy alone. It is no submodule:
            its weights are neither trained, nor sharded, nor saved.
    """

    def __init__(self, student: Any, teacher: Any | None) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self._no_split_modules = student._no_split_modules

    @property
    def teacher(self) -> Any:
        """The base, or None."""
        return self._teacher[0]

    def forward(self, batch: Batch, stage: Stage, layerwise: bool = False, measure: bool = False) -> Sums:
        """Sums over the batch's predictions.

        Args:
            batch: on the models' device.
            stage: temperature and weights of the terms.
            layerwise: each converted layer's attention against the base's instead, on base activations; `kl` then is
                the mean of their relative squared errors.
            measure: give the teacher's likelihood too.
        """
        if layerwise:
            return self._layerwise(batch)
        hidden, layers = self._run(self.student, batch, stage.hidden > 0)
        target = target_layers = None
        if self.teacher is not None:
            with _inference(hidden.device):
                target, target_layers = self._run(self.teacher, batch, stage.hidden > 0)
        sums = distillation(
            hidden,
            self.student.lm_head.weight,
            target,
            None if target is None else self.teacher.lm_head.weight,
            batch.labels,
            temperature=stage.temperature,
            cross_entropy=stage.cross_entropy,
            measure_teacher=measure,
        )
        if layers and target_layers:
            errors = [_relative_error(x, y) for x, y in zip(layers, target_layers, strict=True)]
            sums = sums._replace(loss=sums.loss + stage.hidden * torch.stack(errors).mean())
        return sums

    def _run(self, model: Any, batch: Batch, layers: bool) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [N, D] at the tokens that count, of the last layer and, if wanted, behind every layer."""
        out = model.model(
            batch.ids, position_ids=batch.positions, use_cache=False, output_hidden_states=layers
        )
        every = out.hidden_states[1:] if layers else ()
        return _pick(out.last_hidden_state, batch), [_pick(h, batch) for h in every]

    def _layerwise(self, batch: Batch) -> Sums:
        layers = self.student.model.layers
        visits: list[tuple[Tensor, Any, Tensor]] = []

        def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            visits.append((x, kwargs["position_embeddings"], output[0]))

        handles = [
            layer.self_attn.register_forward_hook(watch, with_kwargs=True)
            for layer in self.teacher.model.layers
        ]
        try:
            with _inference(batch.ids.device):
                self._run(self.teacher, batch, False)
        finally:
            for handle in handles:
                handle.remove()
        state = prepare_state(
            len(batch.ids), batch.ids.shape[1], batch.ids.device, position_ids=batch.positions
        )
        errors: list[Tensor] = []
        for layer, (x, rope, wanted) in zip(layers, visits, strict=True):
            attention = layer.self_attn
            if attention.kind in CONVERTED_KINDS:
                out, _ = attention(x, rope, hyconvert_state=state)
                errors.append(_relative_error(_pick(out, batch), _pick(wanted, batch)))
            elif attention.layer_idx in attention.sources:
                with torch.no_grad():
                    attention(x, rope, hyconvert_state=state)
        loss = torch.stack(errors).mean()
        none = torch.zeros_like(loss.detach())
        return Sums(loss, loss.detach(), none, none)


def _pick(x: Tensor, batch: Batch) -> Tensor:
    return x.flatten(0, 1)[batch.at]


def _relative_error(x: Tensor, y: Tensor) -> Tensor:
    """Sum over tokens of |x - y|^2 / |y|^2."""
    y = y.float()
    return ((x.float() - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12)).sum()


@contextmanager
def _inference(device: torch.device) -> Iterator[None]:
    """No gradient, and no autocast: the teacher already has the dtype to compute in."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class GateShares:
    """The share of the sparse branch in what each gate lets through, watched while the model runs.

    A merge gate's share is its a; a sigmoid gate's is that of the sparse gate in the sum of both.
    """

    def __init__(self, student: Any) -> None:
        self.student = student
        self._sums: dict[int, Tensor] = {}

    def __enter__(self) -> GateShares:
        self._handles = [
            layer.self_attn.gate.register_forward_pre_hook(self._watch(index), with_kwargs=True)
            for index, layer in enumerate(self.student.model.layers)
            if hasattr(layer.self_attn, "gate")
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, index: int) -> Any:
        def before(gate: Any, args: Any, kwargs: Any) -> None:
            x, _, lse_w, _, lse_s = args[:5]
            logits = (
                nn.functional.linear(x, gate.weight.to(x.dtype), gate.bias.to(x.dtype))
                .transpose(1, 2)
                .float()
            )
            seen = lse_s > -torch.inf  # queries that have a block to read
            if isinstance(gate, MergeGate):
                share = torch.sigmoid(logits + lse_s.float() - lse_w.float())
            else:
                sparse, window = logits.sigmoid().chunk(2, dim=1)
                share = sparse / (sparse + window)
            sums = torch.stack([share.masked_fill(~seen, 0).sum(), seen.sum().float()])
            self._sums[index] = self._sums.get(index, 0) + sums

        return before

    def means(self) -> dict[int, float]:
        """Mean share by layer, over heads and the queries that have a block to read."""
        read = {index: sums.tolist() for index, sums in self._sums.items()}
        return {index: total / count if count else 0.0 for index, (total, count) in read.items()}
