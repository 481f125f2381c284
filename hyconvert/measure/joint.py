"""The true damage of whole plans: layers fitted once each, plans put together from them, compensated and measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyconvert.align.compensate import Compensation
from hyconvert.align.fit import FitSettings
from hyconvert.align.run import RowReader
from hyconvert.align.walk import LayerVisit, LayerWalk, run_layer, state_for
from hyconvert.checkpoint import Source, open_source
from hyconvert.conversion import Calibration, dense_plan, load_base_as
from hyconvert.evaluate import pick_device
from hyconvert.measure.candidates import fit_candidate, make_candidate
from hyconvert.measure.costs import Costs, MeasureSettings, weigh
from hyconvert.measure.run import measuring_dtype, read_sequences
from hyconvert.measure.yardstick import Reading, Yardstick
from hyconvert.modeling.attention import HyConvertAttention
from hyconvert.modeling.configuration import HyConvertConfig
from hyconvert.modeling.state import OracleState, dense_state
from hyconvert.plan import LayerPlan, Plan
from hyconvert.progress import Progress, silent
from hyconvert.retrieval import Mixed, Prompts

ACTIVATION_BYTES = 16 << 30
"""What activations of all layers may take where nobody says how many tokens to align on."""


class JointEvaluator:
    """Measures whole plans on the prompts that the costs were measured on.

    Fits depend on base activations alone, so a layer's fit is made once and serves every plan that has it; what output
    projections make up for is fitted for each plan. Holds the base's activations at all layers on the fitted tokens.

    Args:
        source: the base.
        settings: block size and so on, rows to fit on, positions to compare.
        text: what to fit on.
        prompts: what plans are measured on.
        device: where to compute.
        progress: told about the base's layers.
    """

    def __init__(
        self,
        source: Source,
        settings: MeasureSettings,
        text: Mixed,
        prompts: Prompts,
        device: torch.device,
        progress: Progress = silent,
    ) -> None:
        self.settings, self.prompts, self.device = settings, prompts, device
        fit = FitSettings(rows=settings.rows, map_rows=settings.map_rows, seed=settings.seed)
        self.fit = fit.suited(len(text))
        plan = dense_plan(source.config, **settings.plan_settings())
        self.model: Any = load_base_as(HyConvertConfig.from_base(source.config, plan), source, device)
        walk = LayerWalk(self.model, text.tokens, frozenset(plan.full_layers))
        self.visits: dict[int, LayerVisit] = {}
        with progress("Running the base", total=len(plan.layers)) as step:
            for visit in walk:
                self.visits[visit.index] = visit
                step()
        self.oracles: dict[int, list[OracleState]] = walk.oracle_states
        self.text = text
        self.fitted: dict[tuple[int, str, int | None], HyConvertAttention] = {}
        self.compensated: tuple[str, list[Tensor]] = ("", [])
        self.yardstick = Yardstick(self.model, prompts, self.hidden(None, prompts.tokens), settings)

    @classmethod
    def for_costs(
        cls,
        base: str | Path,
        costs: Costs,
        *,
        device: str = "auto",
        dtype: str = "auto",
        fit_tokens: int | None = None,
        progress: Progress = silent,
    ) -> JointEvaluator:
        """The evaluator that measures on what the costs were measured on.

        Args:
            base: Hugging Face id, folder or `.gguf` file.
            costs: of that base.
            device, dtype: where and in what to compute, as `measure` takes them.
            fit_tokens: tokens to align on. By default those of the costs, on a GPU as many as `convert` takes at least
                where all layers' activations on them take no more than `ACTIVATION_BYTES`: compensation wants many.
            progress: told about the base's layers.

        Raises:
            PlanError: the costs belong to another base.
        """
        where = pick_device(device)
        source = open_source(base, revision=costs.revision, dtype=measuring_dtype(dtype, where))
        costs.check_base(source.fingerprint, str(base))
        if fit_tokens is None and where.type == "cuda":
            each = 3 * source.config.num_hidden_layers * source.config.hidden_size * source.dtype.itemsize
            fit_tokens = min(Calibration.tokens, ACTIVATION_BYTES // each)
        text, prompts = read_sequences(source, costs.settings, fit_tokens, Calibration.retrieval)
        return cls(source, costs.settings, text, prompts, where, progress)

    def attention(self, layer: int, choice: LayerPlan) -> nn.Module:
        """A layer in some kind, fitted."""
        if choice.kind in ("full", "sliding"):
            return self.model.model.layers[layer].self_attn  # type: ignore[no-any-return]
        key = (layer, choice.kind, choice.source)
        if key not in self.fitted:
            candidate = make_candidate(self.model, layer, choice)
            visit = self.visits[layer]
            oracles = self.oracles[choice.source] if choice.source is not None else []
            fit_candidate(candidate, visit, oracles, self.fit, RowReader(visit, self.fit))
            self.fitted[key] = candidate
        return self.fitted[key]

    def read(self, plan: Plan) -> Reading:
        """KL divergence and answers of a plan as a whole."""
        return self.yardstick.read(self.hidden(plan, self.prompts.tokens))

    def weigh(self, reading: Reading, retrieval: float = 1.0, tasks: Collection[str] | None = None) -> float:
        """Damage of a whole plan, weighed as a `Cost` is."""
        rises = {task: nll - self.yardstick.reference[task] for task, nll in reading.nll.items()}
        return weigh(reading.kl, rises, retrieval, tasks)

    @torch.no_grad()
    def hidden(self, plan: Plan | None, tokens: Tensor) -> Tensor:
        """Final hidden states [N, T, D] on tokens [N, T] under a plan; the base's if there is none."""
        if plan is None:
            return self._run(tokens, frozenset())
        with self._assembled(plan):
            layers = [layer.self_attn for layer in self.model.model.layers]
            projections = [layer.o_proj for layer in layers if layer.kind not in ("full", "sliding")]
            fitted = [projection.weight.clone() for projection in projections]
            try:
                if self.compensated[0] != plan.line:
                    self._compensate(plan)
                    self.compensated = plan.line, [projection.weight.clone() for projection in projections]
                for projection, weight in zip(projections, self.compensated[1], strict=True):
                    projection.weight.copy_(weight)
                return self._run(tokens, plan.sources)
            finally:
                for projection, weight in zip(projections, fitted, strict=True):
                    projection.weight.copy_(weight)

    @contextmanager
    def _assembled(self, plan: Plan) -> Iterator[None]:
        """The model with the plan's layers in place of its own."""
        layers = self.model.model.layers
        own = [layer.self_attn for layer in layers]
        used = [self.attention(i, choice) for i, choice in enumerate(plan.layers)]
        try:
            for layer, module in zip(layers, used, strict=True):
                layer.self_attn = module
            yield
        finally:
            for layer, module in zip(layers, own, strict=True):
                layer.self_attn = module

    def _compensate(self, plan: Plan) -> None:
        """Let the assembled model's output projections make up for what its earlier layers have changed."""
        if not self.fit.compensation:
            return
        compensation = Compensation(self.model.model, plan, self.text.tokens, self.fit, self.text.asked)
        for index, layer in enumerate(plan.layers):
            compensation.follow(self.visits[index], refit=layer.kind not in ("full", "sliding"))

    def _run(self, tokens: Tensor, sources: frozenset[int]) -> Tensor:
        """Final hidden states [N, T, D] of the model as it is assembled."""
        decoder, outputs = self.model.model, []
        batch = 8 if self.device.type == "cuda" else 1
        for at in range(0, len(tokens), batch):
            rows = tokens[at : at + batch].to(self.device)
            hidden = decoder.embed_tokens(rows)
            positions = torch.arange(rows.shape[1], device=self.device)[None]
            rope = decoder.rotary_emb(hidden[:1], position_ids=positions)
            dense = dense_state(rows.shape[0], rows.shape[1], self.device, sources)
            for layer in decoder.layers:
                hidden = run_layer(layer, hidden, rope, state_for(layer.self_attn, dense))
            outputs.append(decoder.norm(hidden))
        return torch.cat(outputs)


@dataclass(frozen=True)
class Refinement:
    """What `refine` did.

    Attributes:
        plan: the best plan found.
        before, after: measured damage of the plan it began with and of the best.
        reading: of the best plan.
        tried: plans measured.
        moves: what was changed, in order.
    """

    plan: Plan
    before: float
    after: float
    reading: Reading
    tried: int
    moves: tuple[str, ...]


def refine(
    evaluator: JointEvaluator,
    costs: Costs,
    plan: Plan,
    *,
    tries: int = 40,
    retrieval: float = 1.0,
    tasks: Collection[str] | None = None,
    pinned: frozenset[int] = frozenset(),
    allowed: Callable[[Plan], bool] = lambda plan: True,
    others: Sequence[Plan] = (),
    progress: Progress = silent,
) -> Refinement:
    """Improve a plan by its measured damage: greedy moves, the most promising by predicted damage first.

    Moves begin at the best of the plan and its rivals. A move gives one layer another kind or source, or makes one full
    layer give its place to another; the number of full layers stays. The first move that lowers the measured damage is
    taken.

    Args:
        evaluator: measures plans.
        costs: says which moves are promising.
        plan: where to begin.
        tries: plans measured at most.
        retrieval: weight of retrieval in the damage.
        tasks: retrieval tasks that count; None for all that were measured.
        pinned: layers that keep their kind.
        allowed: further conditions on a plan.
        others: rivals of the plan, each measured before there are moves.
        progress: told about every plan measured.

    Raises:
        PlanError: a task was not measured.
    """
    costs.counted(tasks)
    best, reading = plan, evaluator.read(plan)
    before = after = evaluator.weigh(reading, retrieval, tasks)
    moves: list[str] = []
    seen, tried = {plan.line}, 0

    def improves(move: str, candidate: Plan) -> bool:
        nonlocal best, reading, after, tried
        seen.add(candidate.line)
        tried += 1
        found = evaluator.read(candidate)
        damage = evaluator.weigh(found, retrieval, tasks)
        step(f"{move}: {damage:.4f} against {after:.4f}")
        if damage < after:
            best, reading, after = candidate, found, damage
            moves.append(move)
            return True
        return False

    def new(candidate: Plan) -> bool:
        return tried < tries and candidate.line not in seen and allowed(candidate)

    with progress("Trying rivals and swaps", total=tries) as step:
        for rival in filter(new, others):
            improves(f"begun at {rival.line}", rival)
        moves = moves[-1:]
        while any(improves(*pair) for pair in _moves(best, costs, retrieval, tasks, pinned) if new(pair[1])):
            pass
    return Refinement(best, before, after, reading, tried, tuple(moves))


def _moves(
    plan: Plan, costs: Costs, retrieval: float, tasks: Collection[str] | None, pinned: frozenset[int]
) -> Iterator[tuple[str, Plan]]:
    """Neighbours of a plan, least predicted damage first."""
    neighbours: list[tuple[float, str, Plan]] = []

    def offer(move: str, full: set[int], changed: dict[int, LayerPlan]) -> None:
        neighbour = _assign(plan, costs, retrieval, tasks, full, changed)
        if neighbour is not None:
            neighbours.append((costs.predicted(neighbour, retrieval, tasks), move, neighbour))

    full = set(plan.full_layers)
    for row in costs:
        now = plan.layers[row.layer]
        if (
            now.kind in ("full", "sliding")
            or row.layer in pinned
            or (row.kind, row.source) == (now.kind, now.source)
        ):
            continue
        if row.kind != "reuse" and (row.source is None or row.source in full):
            choice = LayerPlan(kind=row.kind, source=row.source)
            offer(f"{row.layer}: {now} to {choice}", full, {row.layer: choice})
    for gone in full - pinned:
        for come in range(costs.num_layers):
            if come not in full and come not in pinned and come not in costs.sliding:
                offer(f"full {gone} to {come}", full - {gone} | {come}, {})
    neighbours.sort(key=lambda item: item[0])
    for _, move, neighbour in neighbours:
        yield move, neighbour


def _assign(
    plan: Plan,
    costs: Costs,
    retrieval: float,
    tasks: Collection[str] | None,
    full: set[int],
    changed: dict[int, LayerPlan],
) -> Plan | None:
    """A plan with these full layers; layers whose choice is still possible keep it, the others take their best."""
    layers = []
    for index, now in enumerate(plan.layers):
        if index in changed or now.kind == "sliding":
            layers.append(changed.get(index, now))
        elif index in full:
            layers.append(LayerPlan(kind="full"))
        elif now.kind != "full" and (now.source is None or now.source in full):
            layers.append(now)
        else:
            options = [
                row for row in costs
                if row.layer == index and row.kind != "reuse" and (row.source is None or row.source in full)
            ]  # fmt: skip
            if not options:
                return None
            row = min(options, key=lambda row: row.damage(retrieval, tasks))
            layers.append(LayerPlan(kind=row.kind, source=row.source))
    return plan.model_copy(update={"layers": tuple(layers)})
