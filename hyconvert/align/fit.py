"""Closed-form alignment of one layer, from what the base's own attention does on calibration text.

Notation follows the design: q is the layer's own query before RoPE, K and V belong to the source layer, W are the
base's attention weights over the selected keys. Each fit reads a sample of query rows; keys are always complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyconvert.align.solve import quadratic_map, ridge
from hyconvert.align.walk import LayerVisit
from hyconvert.modeling.attention import HyConvertAttention
from hyconvert.modeling.state import OracleState
from hyconvert_kernels.coordinates import chunk_length, hidden_unless, masked_softmax_attention

MOST_MAP_ROWS = 16_384
MOST_ROWS = 65_536
"""Most rows that query maps, and all the rest, are fitted on; more hardly help (docs/alignment.md)."""


@dataclass(frozen=True)
class FitSettings:
    """What alignment fits, and how firmly.

    Attributes:
        rows: query rows per sequence that values, gate and output projection are fitted on.
        map_rows: query rows per sequence that the query map is fitted on.
        uniform: share of a uniform weight over the selected keys, mixed into the base's attention weights.
        query_ridge, value_ridge, gate_ridge, output_ridge: ridge strengths, as shares of the mean diagonal.
        gate_weight: fit the gate's input-dependent part too, not the bias alone.
        gate_steps: Gauss-Newton steps on the mixed output's error, after the fit of the mass outside the window.
        refit_output: refit the output projection.
        compensation: how much of a second fit of output projections is applied, by which they make up for what earlier
            converted layers have changed (`compensate.py`); 0 leaves that out.
        emphasis: how many times as much as others those tokens count in it that have to be looked up far back.
        seed: of the row sample.
    """

    rows: int = 512
    map_rows: int = 128
    uniform: float = 0.8
    query_ridge: float = 1e-3
    value_ridge: float = 0.1
    gate_ridge: float = 1e-1
    output_ridge: float = 1e-2
    gate_weight: bool = True
    gate_steps: int = 2
    refit_output: bool = True
    compensation: float = 0.75
    emphasis: float = 8.0
    seed: int = 0

    def suited(self, sequences: int) -> FitSettings:
        """With fewer rows per sequence where there are many of them: all are held at a time."""
        map_rows, rows = (max(1, most // max(1, sequences)) for most in (MOST_MAP_ROWS, MOST_ROWS))
        return replace(self, map_rows=min(self.map_rows, map_rows), rows=min(self.rows, rows))


@dataclass
class Rows:
    """Sampled query rows of one sequence at one layer, float32.

    Attributes:
        at: [n] positions.
        x: [n, D] attention inputs.
        q: [H, n, d] queries before RoPE.
        rotated: [H, n, d] the same after it, times the softmax scale.
        keys: [G, T, d] the layer's own keys, all of them.
        outside: [n, T] bool, causal keys outside the window.
        out_w, out_o: [H, n, d] the base's attention over the window and over all keys outside it.
        lse_w, lse_o: [H, n] their log-sum-exps.
        target: [n, D] the base's attention output.
    """

    at: Tensor
    x: Tensor
    q: Tensor
    rotated: Tensor
    keys: Tensor
    outside: Tensor
    out_w: Tensor
    out_o: Tensor
    lse_w: Tensor
    lse_o: Tensor
    target: Tensor

    @property
    def mass(self) -> Tensor:
        """[H, n] share of attention the base puts outside the window."""
        return torch.sigmoid(self.lse_o - self.lse_w)


def sample_rows(length: int, window: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` sorted positions, drawn where a sparse branch can see something (the whole text if it is short)."""
    first = window if length > 2 * window else 0
    picked = torch.randperm(length - first, generator=generator)[:count] + first
    return picked.sort().values


def read_rows(visit: LayerVisit, sequence: int, at: Tensor, window: int) -> Rows:
    """Everything the base's attention computes at some query rows of one sequence."""
    attention = visit.attention
    x = visit.inputs[sequence : sequence + 1]
    q, k, v = attention.project(x)
    q_rot, k = (attention.rotate(t, visit.rope) if attention.use_rope else t for t in (q, k))
    at = at.to(x.device)
    positions = torch.arange(x.shape[1], device=x.device)
    causal, outside = positions <= at[:, None], positions <= at[:, None] - window
    rotated = q_rot[0, :, at].float() * attention.scaling
    keys, values = k[0].float(), v[0].float()
    out_w, lse_w = attend(rotated, keys, values, (causal & ~outside)[None])
    out_o, lse_o = attend(rotated, keys, values, outside[None])
    return Rows(
        at, x[0, at].float(), q[0, :, at].float(), rotated, keys, outside, out_w, out_o, lse_w, lse_o,
        visit.outputs[sequence, at].float(),
    )  # fmt: skip


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries [H, n, d] over keys and values [G, T, d] where a mask [1 or G, n, T] is true.

    Keys that no query of a chunk sees are left out, so neighbouring queries with short masks cost little.

    Returns:
        Output [H, n, d] and log-sum-exp [H, n]; 0 and -inf where the mask is empty.
    """
    step = chunk_length(queries[None], keys.shape[1])
    outs, lses = [], []
    for at in range(0, queries.shape[1], step):
        part = mask[:, at : at + step]
        seen = part.any(1).any(0).nonzero()[:, 0]
        if not len(seen):
            seen = seen.new_zeros(1)
        q, k, v = queries[None, :, at : at + step], keys[None, :, seen], values[None, :, seen]
        out, lse, *_ = masked_softmax_attention(q, k, v, part[None, :, None, :, seen], 1.0)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs, 1), torch.cat(lses, 1)


def selected_keys(attention: HyConvertAttention, oracle: OracleState, rows: Rows) -> Tensor:
    """[G, n, T] bool: keys in the blocks that the source's oracle picked for each row, outside the window."""
    indices = oracle.indices[0, :, rows.at].long()
    length = rows.outside.shape[-1]
    blocks = -(-length // attention.block_size)
    chosen = torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(2, indices.where(indices >= 0, torch.full_like(indices, blocks)), True)
    return chosen[..., :blocks].repeat_interleave(attention.block_size, 2)[..., :length] & rows.outside


class QueryMapFit:
    """M_h: makes the source's keys give the logits that the layer's own keys give, weighted by the base's attention.

    Minimises, over M, the squared error of q' M' R_t' k_s against the base's logit z_ts (up to one constant per query,
    which the gate bias absorbs) with weights W_ts. The design solves each query's best q* first and regresses it on q;
    here the same weighted error is minimised over M directly, so that directions of q* that no key sees cost nothing.
    """

    def __init__(self, attention: HyConvertAttention, settings: FitSettings) -> None:
        self.attention, self.settings = attention, settings
        self.curvature: list[list[Tensor]] = [[] for _ in range(attention.num_kv_heads)]
        self.linear: list[list[Tensor]] = [[] for _ in range(attention.num_kv_heads)]
        self.inputs: list[Tensor] = []

    def add(self, rows: Rows, oracle: OracleState, rope: tuple[Tensor, Tensor]) -> None:
        """Take in one sequence's rows."""
        attention, uniform = self.attention, self.settings.uniform
        dim, ratio = attention.head_dim, attention.num_heads // attention.num_kv_heads
        upper = torch.triu_indices(dim, dim, device=rows.q.device)
        place = torch.empty(dim, dim, dtype=torch.int64, device=upper.device)  # of a matrix in its upper half
        place[*upper] = place[*upper.flip(0)] = torch.arange(upper.shape[1], device=upper.device)
        place = place.flatten()
        for group, mask in enumerate(selected_keys(attention, oracle, rows)):
            heads = slice(group * ratio, (group + 1) * ratio)
            columns = mask.any(0).nonzero()[:, 0]  # all heads of a group read the same blocks
            mask = mask[:, columns]
            z = rows.rotated[heads] @ rows.keys[group, columns].mT
            weights = torch.softmax(z + hidden_unless(mask | ~mask.any(-1, keepdim=True)), -1)
            weights = ((1 - uniform) * weights + uniform / mask.sum(-1, keepdim=True).clamp(min=1)) * mask
            z -= (weights * z).sum(-1, keepdim=True)
            keys = oracle.keys[0, group, columns].float() * attention.scaling
            mean, first = weights @ keys, (weights * z) @ keys
            across = keys.mT.contiguous()
            packed = (across[upper[0]] * across[upper[1]]) @ weights.flatten(0, 1).mT  # half of each K' W K
            second = packed[place].mT.contiguous().view(*weights.shape[:2], dim, dim)
            second -= mean[..., :, None] * mean[..., None, :]
            if attention.source_uses_rope:
                first, second = _unrotate(first, rows.at, rope), _unrotate(second, rows.at, rope)
                second = _unrotate(second.mT, rows.at, rope)
            mass = rows.mass[heads, :, None]
            self.curvature[group].append(second * mass[..., None])
            self.linear[group].append(first * mass)
        self.inputs.append(rows.q)

    def solve(self) -> Tensor:
        """M, [H, d, d]."""
        return quadratic_map(
            torch.cat([torch.cat(group, 1) for group in self.curvature]),
            torch.cat([torch.cat(group, 1) for group in self.linear]),
            torch.cat(self.inputs, 1),
            self.settings.query_ridge,
        )


def _unrotate(x: Tensor, at: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """R_t' x for [H, n, d] vectors, or for the last axis of [H, n, d, d] matrices."""
    cos, sin = (table[0, at].float() for table in rope)
    if x.ndim == 4:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, -first), -1) * sin


@dataclass
class SparseRows:
    """The sparse branch at sampled rows: `out` [H, n, d] before the value map, and `lse` [H, n]."""

    out: Tensor
    lse: Tensor


def read_sparse(
    attention: HyConvertAttention,
    rows: Rows,
    oracle: OracleState,
    query_map: Tensor | None,
    rope: tuple[Tensor, Tensor],
) -> SparseRows:
    """Run the sparse branch of a candidate query map at some rows."""
    q = rows.q if query_map is None else torch.einsum("hnd,hed->hne", rows.q, query_map)
    if attention.source_uses_rope:
        cos, sin = (table[0, rows.at].float() for table in rope)
        first, second = q.chunk(2, -1)
        q = q * cos + torch.cat((-second, first), -1) * sin
    keys, values = oracle.keys[0].float(), oracle.values[0].float()
    return SparseRows(*attend(q * attention.scaling, keys, values, selected_keys(attention, oracle, rows)))


class ValueMapFit:
    """N_h: turns the sparse branch's output into the base's output over all keys outside the window, mass-weighted."""

    def __init__(self, settings: FitSettings) -> None:
        self.settings = settings
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, rows: Rows, sparse: SparseRows) -> None:
        """Take in one sequence's rows."""
        weight = rows.mass.square().masked_fill(sparse.lse == -torch.inf, 0)[..., None]
        self.gram = self.gram + (sparse.out * weight).mT @ sparse.out
        self.cross = self.cross + (rows.out_o * weight).mT @ sparse.out

    def solve(self) -> Tensor:
        """N, [H, d, d] float32."""
        return ridge(
            torch.as_tensor(self.gram), torch.as_tensor(self.cross), self.settings.value_ridge
        ).float()


def fit_gate(
    rows: Sequence[Rows], sparse: Sequence[SparseRows], value_map: Tensor | None, settings: FitSettings
) -> tuple[Tensor, Tensor]:
    """u_h and b_h of the merge gate, so that it mixes the branches into the base's output.

    The start predicts log-sum-exp outside the window minus that of the sparse branch from x, weighted by
    (m (1 - m))^2, the squared sensitivity of the mixing share m to the gate's logit. Gauss-Newton steps then minimise
    the squared error of the mixed output itself: a sparse branch that is not quite right deserves less than the
    base's share.

    Args:
        rows, sparse: of each sequence.
        value_map: [H, d, d] that the sparse branch's output passes through, or None.
        settings: ridge, steps, and whether there is a part that depends on x.

    Returns:
        u [H, D] and b [H], float32.
    """
    x = torch.cat([r.x for r in rows])
    parts = [_mixing(r, s, value_map) for r, s in zip(rows, sparse, strict=True)]
    offset, gap, mass, want, energy = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    slopes, biases = [], []
    for head in range(len(gap)):
        u, b = _weighted_ridge(x, gap[head], mass[head], settings)
        for _ in range(settings.gate_steps):
            u, b = _gate_step(x, offset[head], want[head], energy[head], u, b, settings)
        slopes.append(u)
        biases.append(b)
    return torch.stack(slopes), torch.stack(biases)


def _mixing(rows: Rows, sparse: SparseRows, value_map: Tensor | None) -> tuple[Tensor, ...]:
    """Of each row, [H, n]: the gate's logit but for b + u x, the gap to predict and its weight, the share a of the
    sparse branch with which a o_s + (1 - a) o_w comes closest to the base's output, and what an error of a costs."""
    out = sparse.out if value_map is None else torch.einsum("hnd,hed->hne", sparse.out, value_map)
    usable = sparse.lse.isfinite() & rows.lse_w.isfinite() & rows.lse_o.isfinite()
    offset = (sparse.lse - rows.lse_w).masked_fill(~usable, 0)
    gap = (rows.lse_o - sparse.lse).masked_fill(~usable, 0)
    sensitivity = (rows.mass * (1 - rows.mass)).square().masked_fill(~usable, 0)
    apart, wanted = out - rows.out_w, rows.mass[..., None] * (rows.out_o - rows.out_w)
    energy = apart.square().sum(-1).masked_fill(~usable, 0)
    want = (apart * wanted).sum(-1).masked_fill(~usable, 0) / energy.clamp(min=1e-12)
    return offset, gap, sensitivity, want, energy


def _gate_step(
    x: Tensor, offset: Tensor, want: Tensor, energy: Tensor, u: Tensor, b: Tensor, settings: FitSettings
) -> tuple[Tensor, Tensor]:
    """One step for one head, shortened where the whole one does not help."""
    slope = x @ u
    share = torch.sigmoid(offset + b + slope)
    steep = (share * (1 - share)).clamp(min=1e-4)
    aim = ((want - share) / steep + slope).clamp(-20, 20)
    new_u, change = _weighted_ridge(x, aim, energy * steep.square(), settings)
    lengths = torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0], device=x.device)
    turn = x @ new_u - slope
    errors = torch.stack(
        [
            (energy * (torch.sigmoid(offset + b + slope + t * (change + turn)) - want).square()).sum()
            for t in lengths
        ]
    )
    t = lengths[errors.argmin()]
    return u + t * (new_u - u), b + t * change


def _weighted_ridge(x: Tensor, y: Tensor, weight: Tensor, settings: FitSettings) -> tuple[Tensor, Tensor]:
    """u [D] and b with u x + b near y [n]; b carries no ridge."""
    total = weight.sum().clamp(min=1e-9)
    level = (weight * y).sum() / total
    if not settings.gate_weight:
        return torch.zeros_like(x[0]), level
    mean = (weight[:, None] * x).sum(0) / total
    centred = x - mean
    weighted = weight[:, None] * centred
    u = ridge(weighted.mT @ centred, (y - level)[None] @ weighted, settings.gate_ridge)[0].float()
    return u, level - u @ mean


class OutputFit:
    """Refit of o_proj, from the converted layer's heads to the base's attention output; the old weight is the prior."""

    def __init__(self, settings: FitSettings) -> None:
        self.settings = settings
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.energy = 0.0
        self.error_before = 0.0

    def add(self, heads: Tensor, target: Tensor, weight: Tensor) -> None:
        """Take in rows: `heads` [n, H d] mixed head outputs, `target` [n, D] without bias, `weight` [D, H d]."""
        self.gram = self.gram + heads.mT @ heads
        self.cross = self.cross + target.mT @ heads
        self.energy += float(target.square().sum())
        self.error_before += float((heads @ weight.mT - target).square().sum())

    def solve(self, weight: Tensor) -> Tensor:
        """The new weight, [D, H d] float32."""
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        return ridge(gram, cross, self.settings.output_ridge, prior=weight).float()

    def error(self, weight: Tensor) -> float:
        """Squared error of a weight on the rows taken in, as a share of the target's energy."""
        gram, cross, weight = (torch.as_tensor(t).double() for t in (self.gram, self.cross, weight))
        squared = ((weight @ gram) * weight).sum() - 2 * (weight * cross).sum() + self.energy
        return float(squared) / max(self.energy, 1e-12)
