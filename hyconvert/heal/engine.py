"""The training loop, on Accelerate: one GPU, DDP and FSDP2 through `accelerate launch` or `torchrun`."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from hyconvert.errors import HealError
from hyconvert.heal.checks import is_fsdp
from hyconvert.heal.models import parameter_groups
from hyconvert.heal.objective import GateShares, Healing
from hyconvert.heal.states import States
from hyconvert.heal.tokens import Batch, TokenStream, row_order
from hyconvert.plan import Plan
from hyconvert.progress import Progress
from hyconvert.recipe import HealRecipe, Stage

COLLAPSED = 0.01
"""A sparse branch that carries less than this share of its gate, having carried four times as much, is warned about."""
_LOGS, _EVALS, _SAVES = 50, 10, 5


@dataclass
class Record:
    """What a run has done so far; saved with every state.

    Attributes:
        step, tokens: done.
        seconds: of training, without measuring and saving.
        curve: what was logged while training: step, tokens, stage, loss, kl, perplexity, tokens_per_second.
        heldout: what was measured: step, tokens, kl, perplexity, base_perplexity, sparse_share by layer.
        warnings: sparse branches that collapsed.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    heldout: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    """A stage with its place in the whole."""

    name: str
    stage: Stage
    first: int
    order: np.ndarray


class Engine:
    """Heals a student.

    Args:
        accelerator: prepares, reduces, saves.
        healing: student and teacher.
        recipe: how.
        plan: the student's, which says what belongs to which learning-rate group.
        train, held: text to train on and to measure on.
        states: where to save; None never saves.
    """

    def __init__(
        self,
        accelerator: Any,
        healing: Healing,
        recipe: HealRecipe,
        plan: Plan,
        train: TokenStream,
        held: TokenStream,
        states: States | None,
    ) -> None:
        self.accelerator, self.recipe, self.states = accelerator, recipe, states
        self.train, self.held = train, held
        self.student = healing.student
        optimizer = torch.optim.AdamW(
            parameter_groups(healing, plan, recipe.lr_scale),
            lr=0.0,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(healing, optimizer)
        self.named = {
            name: parameter
            for name, parameter in accelerator.unwrap_model(self.model).named_parameters()
            if parameter.requires_grad
        }
        self.parameters = list(self.named.values())
        self.runs = list(_plan_runs(recipe, len(train)))
        self.record = Record()
        self._sums = torch.zeros(5, device=accelerator.device)
        self._clock = 0.0

    def run(self, progress: Progress) -> Record:
        """Train from where the last saved state ended to the end of the last stage.

        Raises:
            HealError: the loss is no longer finite, or a state cannot be saved; the last saved state is kept.
        """
        if self.states is not None and (saved := self.states.latest()):
            self.record = Record(**self.states.load(saved, self.named, self.optimizer.optimizer))
        recipe, total = self.recipe, self.recipe.steps
        stops = {
            name: _every(chosen, total, times)
            for name, chosen, times in (
                ("log", recipe.log_every, _LOGS),
                ("eval", recipe.eval_every, _EVALS),
                ("save", recipe.save_every, _SAVES),
            )
        }
        if not self.record.heldout:
            with progress("Measuring before", total=1) as tell:
                tell(self._measure(self.runs[0].stage))
        begin = self.record.step
        reads = [
            step for step in range(begin + 1, total + 1) if any(_due(step, n, total) for n in stops.values())
        ]
        self.model.train()
        self._start_clock()
        with progress("Healing", total=len(reads)) as tell:
            for run in self.runs:
                for step in range(max(begin, run.first), run.first + run.stage.steps):
                    self._step(run, step)
                    done = step + 1
                    if done in reads:
                        note = self._read(run)
                        if _due(done, stops["eval"], total):
                            note += f"; {self._measure(run.stage)}"
                        if _due(done, stops["save"], total) and done < total:
                            self._save(done)
                        tell(note)
                        self._start_clock()
        return self.record

    def _forward(self, batch: Batch, stage: Stage, **options: Any) -> Any:
        """The model's sums; in mixed precision under FSDP2 too, which Accelerate, unlike all else, leaves without.

        There without a cache, which would keep a cast copy of every layer's weights on every GPU.
        """
        if not is_fsdp(self.accelerator):
            return self.model(batch, stage, **options)
        from accelerate.utils import AutocastKwargs

        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            return self.model(batch, stage, **options)

    def _save(self, step: int) -> None:
        if self.states is not None:
            self.states.save(step, asdict(self.record), self.named, self.optimizer.optimizer)

    def _step(self, run: _Run, step: int) -> None:
        """One optimiser step. Nothing in it waits for the device."""
        stage, at = run.stage, step - run.first
        rows = run.order[at * stage.rows : (at + 1) * stage.rows]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        # The loss is divided by the predictions of the whole step, which every process can count by itself.
        scale = world / max(1, self.train.trained_in(rows, stage.sequence_length))
        mine = np.array_split(rows, world)[rank]
        pieces = self._pieces(mine, stage.sequence_length)
        if at == 0 and step:
            self.optimizer.optimizer.state.clear()  # moments of another loss
        rate = stage.lr * _schedule(at, stage)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        for index, piece in enumerate(pieces):
            batch = self._to_device(self.train.batch(piece, stage.sequence_length))
            with _maybe_no_sync(self.accelerator, self.model, index + 1 < len(pieces)):
                sums = self._forward(batch, stage, layerwise=run.name == "layerwise")
                self.accelerator.backward(sums.loss * scale)
            self._sums[:3] += torch.stack([part.detach() for part in sums[:3]])
            self._sums[3] += len(batch.labels)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip)
        self._sums[4] += norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.record.step += 1
        self.record.tokens += stage.rows * stage.sequence_length

    def _read(self, run: _Run) -> str:
        """Fetch and note the means since the last time.

        Raises:
            HealError: they are not finite.
        """
        loss, kl, nll, count, norm = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        record, stage = self.record, run.stage
        count = max(1.0, count)
        if not math.isfinite(
            loss + norm
        ):  # the norm too: the loss shows only what the weights were before the step
            saved = self.states.latest() if self.states else None
            raise HealError(
                f"the loss is no longer finite at step {record.step}; "
                + (f"{saved.name} in {saved.parent} is kept. " if saved else "no state was saved before. ")
                + "Use a lower --lr (and --restart)"
            )
        seconds = time.monotonic() - self._clock
        record.seconds += seconds
        last = record.curve[-1] if record.curve else {"step": 0, "tokens": 0}
        before = last["tokens"]
        row = {
            "step": record.step,
            "tokens": record.tokens,
            "stage": run.name,
            "loss": loss / count,
            "error" if run.name == "layerwise" else "kl": kl / count,
            "gradient_norm": norm / self.accelerator.num_processes / (record.step - last["step"]),
            "lr": stage.lr * _schedule(record.step - 1 - run.first, stage),
            "tokens_per_second": round((record.tokens - before) / seconds, 1),
        }
        if run.name != "layerwise":
            row["perplexity"] = math.exp(min(nll / count, 700))
        record.curve.append(row)
        self.accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=record.step)
        what = "error" if run.name == "layerwise" else "KL"
        return (
            f"{run.name}, {record.tokens:,} tokens, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{what} {kl / count:.4f}"
        )

    @torch.no_grad()
    def _measure(self, stage: Stage) -> str:
        """Measure on held-out text and note it."""
        length = min(stage.sequence_length, len(self.held))
        plain = Stage(tokens=length, sequence_length=length, batch_tokens=length)
        sums, count = torch.zeros(4, device=self.accelerator.device), 0
        self.model.eval()
        with GateShares(self.student) as shares:
            for rows in self._pieces(np.arange(len(self.held) // length), length):
                batch = self._to_device(self.held.batch(rows, length))
                sums += torch.stack([*self._forward(batch, plain, measure=True)])
                count += len(batch.labels)
        self.model.train()
        _, kl, nll, base = (float(value) / max(1, count) for value in sums.tolist())
        record = self.record
        row: dict[str, Any] = {"step": record.step, "tokens": record.tokens, "kl": kl}
        row["perplexity"] = math.exp(min(nll, 700))
        if self.model_teacher is not None:
            row["base_perplexity"] = math.exp(base)
        row["sparse_share"] = {str(layer): round(share, 5) for layer, share in shares.means().items()}
        if not math.isfinite(nll):
            raise HealError(
                f"the held-out loss is not finite at step {record.step}; use a lower --lr (and --restart)"
            )
        told = len(record.warnings)
        self._warn_of_collapse(row)
        record.heldout.append(row)
        self.accelerator.log({"heldout_kl": kl, "heldout_perplexity": row["perplexity"]}, step=record.step)
        note = f"held out KL {kl:.4f}, perplexity {row['perplexity']:.2f}"
        if shown := row["sparse_share"].values():
            note += f", sparse share {min(shown):.0%} to {max(shown):.0%}"
        return "; ".join([note, *record.warnings[told:]])

    def _warn_of_collapse(self, row: dict[str, Any]) -> None:
        if not self.record.heldout:
            return
        first = self.record.heldout[0]["sparse_share"]
        told = {warning.split(":")[0] for warning in self.record.warnings}
        for layer, share in row["sparse_share"].items():
            name = f"layer {layer}"
            if share < COLLAPSED and first.get(layer, 0) >= 4 * COLLAPSED and name not in told:
                self.record.warnings.append(
                    f"{name}: its sparse branch collapsed, from {first[layer]:.1%} of the gate to {share:.1%} after "
                    f"{row['tokens']:,} tokens; the layer may as well be a window layer"
                )

    @property
    def model_teacher(self) -> Any:
        """The base, or None."""
        return self.accelerator.unwrap_model(self.model).teacher

    def _pieces(self, rows: np.ndarray, length: int) -> list[np.ndarray]:
        """Rows in groups that fit one forward pass on this device."""
        tokens = self.recipe.micro_tokens or (32_768 if self.accelerator.device.type == "cuda" else 2048)
        return np.array_split(rows, math.ceil(len(rows) / max(1, tokens // length)))

    def _start_clock(self) -> None:
        self._clock = time.monotonic()

    def _to_device(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        parts = (batch.ids, batch.positions, batch.at, batch.labels)
        if device.type == "cuda":
            return Batch(*(part.pin_memory().to(device, non_blocking=True) for part in parts))
        return batch


def _plan_runs(recipe: HealRecipe, available: int) -> Any:
    step = 0
    for name, stage, first in recipe.placed_stages():
        available_rows, wanted = available // stage.sequence_length, stage.steps * stage.rows
        yield _Run(name, stage, step, row_order(available_rows, wanted, first, recipe.seed + step))
        step += stage.steps


def _schedule(step: int, stage: Stage) -> float:
    """Linear warm-up, then a cosine down to `final_lr`; a function of the step alone."""
    warm = max(1, round(stage.warmup * stage.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, stage.steps - warm)
    return stage.final_lr + (1 - stage.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def _every(chosen: int | None, total: int, times: int) -> int:
    return math.ceil(total / times) if chosen is None else chosen


def _due(step: int, every: int, total: int) -> bool:
    return bool(every) and (step % every == 0 or step == total)


def _maybe_no_sync(accelerator: Any, model: Any, hold: bool) -> Any:
    return accelerator.no_sync(model) if hold else nullcontext()
