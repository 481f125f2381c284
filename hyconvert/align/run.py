"""Alignment of a whole model: walk the base once, fit every converted layer, write the results into the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyconvert.align.compensate import Compensation, last_readers
from hyconvert.align.fit import (
    FitSettings,
    OutputFit,
    QueryMapFit,
    Rows,
    SparseRows,
    ValueMapFit,
    fit_gate,
    read_rows,
    read_sparse,
    sample_rows,
)
from hyconvert.align.walk import LayerVisit, LayerWalk
from hyconvert.modeling.attention import HyConvertAttention, with_sink
from hyconvert.modeling.gates import MergeGate, SigmoidGate
from hyconvert.modeling.state import OracleState


@dataclass(frozen=True)
class LayerFit:
    """How well one layer was aligned.

    Attributes:
        layer: its index.
        kind: its kind.
        source: the full layer it reads, if any.
        outside_mass: mean share of attention the base puts outside the window here.
        explained: share of the base's outside-window output (weighted by its mass) that the sparse branch gives after
            alignment, 1 - squared error / energy; None for window layers.
        error: squared error of the layer's attention output as a share of the base's energy, on the base's activations
            and before compensation.
        error_before_refit: the same before the output projection was refitted.
        compensated: share of what the residual stream lacked behind this layer, weighted as it was fitted, that the
            output projection makes up for since, by cross-validation; None where that was not tried.
    """

    layer: int
    kind: str
    source: int | None
    outside_mass: float
    explained: float | None
    error: float
    error_before_refit: float
    compensated: float | None = None


def align(
    model: Any,
    tokens: Tensor,
    settings: FitSettings | None = None,
    asked: Tensor | None = None,
    on_layer: Callable[[int, LayerFit | None], None] | None = None,
) -> list[LayerFit]:
    """Align every converted layer of a model in closed form; the model's new parameters are set in place.

    Args:
        model: a converted model (`HyConvertForCausalLM`) that holds the base's weights.
        tokens: [N, T] int64 calibration tokens.
        settings: what to fit and how firmly.
        asked: [N, T] bool, where the token that follows is to be looked up far back (`hyconvert.retrieval.Mixed`).
        on_layer: called after each layer with its index and its fit (None where nothing was fitted).

    Returns:
        One `LayerFit` per converted layer.
    """
    settings = (settings or FitSettings()).suited(len(tokens))
    plan = model.config.get_plan()
    walk = LayerWalk(model, tokens, plan.sources)
    last_reader = last_readers(plan)
    compensation = Compensation(model.model, plan, tokens, settings, asked) if settings.compensation else None
    fits: list[LayerFit] = []
    for visit in walk:
        fit = None
        if plan.layers[visit.index].kind in ("sparse", "reuse", "window"):
            oracles = walk.oracle_states.get(plan.layers[visit.index].source, [])
            fit = align_layer(visit, oracles, settings)
        if compensation is not None:
            gained = compensation.follow(visit, refit=fit is not None and settings.refit_output)
            fit = fit and replace(fit, compensated=gained)
        if fit is not None:
            fits.append(fit)
        for source in [s for s in walk.oracle_states if last_reader.get(s, -1) <= visit.index]:
            del walk.oracle_states[source]
        if on_layer:
            on_layer(visit.index, fit)
    return fits


class RowReader:
    """The sampled rows of one layer, which every candidate for that layer is fitted on.

    Args:
        visit: the layer's base activations.
        settings: how many rows, and the seed of the sample.
        keep: read each sequence's rows once and keep them, for a layer with several candidates.
    """

    def __init__(self, visit: LayerVisit, settings: FitSettings, keep: bool = False) -> None:
        self.visit, self.window = visit, visit.attention.plan_window
        count, length = visit.inputs.shape[:2]
        generator = torch.Generator().manual_seed(settings.seed + visit.index)
        self.samples = {
            size: [sample_rows(length, self.window, size, generator) for _ in range(count)]
            for size in (settings.map_rows, settings.rows)
        }
        self.kept: dict[tuple[int, int], Rows] | None = {} if keep else None

    def __call__(self, sequence: int, size: int) -> Rows:
        """Rows of one sequence: `size` is the settings' `rows` or `map_rows`."""
        if self.kept is not None and (sequence, size) in self.kept:
            return self.kept[sequence, size]
        rows = read_rows(self.visit, sequence, self.samples[size][sequence], self.window)
        if self.kept is not None:
            self.kept[sequence, size] = rows
        return rows


@dataclass
class _Sample:
    """What the later fits of one sequence need of its rows."""

    rows: Rows
    sparse: SparseRows | None


@torch.no_grad()
def align_layer(
    visit: LayerVisit, oracles: list[OracleState], settings: FitSettings, reader: RowReader | None = None
) -> LayerFit:
    """Fit one layer's maps, gate and output projection, and set them on its attention module.

    Args:
        visit: the layer's base activations.
        oracles: its source's oracle state per sequence; empty for a window layer.
        settings: what to fit.
        reader: rows already read for this layer.
    """
    attention = visit.attention
    reader = reader or RowReader(visit, settings)
    count = len(visit.inputs)
    reads_source = attention.kind == "sparse"
    if attention.query_map is not None:
        fit = QueryMapFit(attention, settings)
        for sequence in range(count):
            fit.add(reader(sequence, settings.map_rows), oracles[sequence], visit.rope)
        attention.query_map.copy_(fit.solve())
    query_map = attention.query_map.float() if attention.query_map is not None else None
    samples: list[_Sample] = []
    values = ValueMapFit(settings)
    for sequence in range(count):
        rows = reader(sequence, settings.rows)
        sparse = None
        if attention.source is not None:
            oracle = oracles[sequence] if reads_source else _own_oracle(visit, sequence, oracles[sequence])
            sparse = read_sparse(attention, rows, oracle, query_map, visit.rope)
            values.add(rows, sparse)
        nothing = torch.empty(0)  # in place of what no later fit reads
        light = replace(rows, q=nothing, rotated=nothing, keys=nothing, outside=nothing)
        samples.append(_Sample(light, sparse))
    if attention.value_map is not None:
        attention.value_map.copy_(values.solve())
    if reads_source or isinstance(getattr(attention, "gate", None), SigmoidGate):
        _set_gate(attention, samples, settings)
    return _refit_output(visit, samples, settings)


def _own_oracle(visit: LayerVisit, sequence: int, source: OracleState) -> OracleState:
    attention = visit.attention
    _, k, v = attention.project(visit.inputs[sequence : sequence + 1])
    return OracleState(attention.rotate(k, visit.rope) if attention.use_rope else k, v, source.indices)


def _set_gate(attention: HyConvertAttention, samples: list[_Sample], settings: FitSettings) -> None:
    gate: Any = attention.gate
    if isinstance(gate, MergeGate):
        value_map = None if attention.value_map is None else attention.value_map.float()
        sparse = [sample.sparse for sample in samples if sample.sparse is not None]
        weight, bias = fit_gate([sample.rows for sample in samples], sparse, value_map, settings)
        gate.weight.copy_(weight)
        gate.bias.copy_(bias)
    elif isinstance(gate, SigmoidGate):
        mass = torch.cat([sample.rows.mass for sample in samples], 1).mean(1).clamp(0.01, 0.99)
        gate.bias.copy_(torch.cat((torch.logit(mass), torch.logit(1 - mass))))


def _refit_output(visit: LayerVisit, samples: list[_Sample], settings: FitSettings) -> LayerFit:
    attention = visit.attention
    projection: Any = attention.o_proj
    weight: Tensor = projection.weight.float()
    bias = 0.0 if projection.bias is None else projection.bias.float()
    fit = OutputFit(settings)
    energy = error = mass = 0.0
    for sample in samples:
        rows, sparse = sample.rows, sample.sparse
        mixed, sparse_part = _mix(attention, rows, sparse)
        fit.add(mixed.transpose(0, 1).flatten(1), rows.target - bias, weight)
        wanted = rows.mass[..., None] * rows.out_o
        mass += float(rows.mass.mean()) / len(samples)
        energy += float(wanted.square().sum())
        error += float((wanted - sparse_part).square().sum())
    if settings.refit_output:
        projection.weight.copy_(fit.solve(weight))
    return LayerFit(
        layer=visit.index,
        kind=attention.kind,
        source=attention.source,
        outside_mass=mass,
        explained=None if attention.source is None else 1 - error / max(energy, 1e-12),
        error=fit.error(projection.weight.float()),
        error_before_refit=fit.error_before / max(fit.energy, 1e-12),
    )


def _mix(attention: Any, rows: Rows, sparse: SparseRows | None) -> tuple[Tensor, Tensor]:
    """The layer's head outputs [H, n, d] as its forward mixes them, and the sparse branch's part of them."""
    out_w, lse_w = with_sink(rows.out_w[None], rows.lse_w[None], attention.window_sink)
    if sparse is None:
        return out_w[0], torch.zeros_like(out_w[0])
    out_s, lse_s = with_sink(sparse.out[None], sparse.lse[None], attention.sparse_sink)
    if attention.value_map is not None:
        out_s = torch.einsum("bhnd,hed->bhne", out_s, attention.value_map.float())
    gate, dtype = attention.gate, attention.o_proj.weight.dtype
    x = rows.x[None].to(dtype)
    mixed = gate(x, out_w, lse_w, out_s, lse_s)
    return mixed[0].float(), (mixed - gate(x, out_w, lse_w, torch.zeros_like(out_s), lse_s))[0].float()
