"""An evaluation from end to end."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hyconvert.data import read_texts, token_blocks
from hyconvert.errors import DataError
from hyconvert.evaluate import device_name
from hyconvert.evaluation.branches import BranchResult, gated_layers, measure_branches
from hyconvert.evaluation.generation import GenerationResult, measure_generation
from hyconvert.evaluation.lookup import LookupResult, make_suites, measure_lookup
from hyconvert.evaluation.models import Pair, load_pair, recorded_fingerprint
from hyconvert.evaluation.settings import EvalSettings
from hyconvert.evaluation.speed import KvResult, SpeedResult, count_kv, measure_speed
from hyconvert.evaluation.tasks import check_tasks, run_tasks
from hyconvert.evaluation.text import TextResult, measure_text
from hyconvert.evaluation.verdict import Verdict
from hyconvert.progress import Progress, silent

FORMAT = 1


@dataclass
class Evaluation:
    """A converted model beside its base. A part that was not measured is None.

    Attributes:
        model, base: where they are from.
        fingerprint: of the base's contents.
        line: the layer map.
        plan: block size, top-k, window, gate, sinks.
        device, dtype: what computed, and in what.
        settings: what was asked for.
        kv: the KV cache by arithmetic.
        text, lookup, generation, branches, speed: what was measured.
        tasks: results of standard tasks, by model and task.
        verdict: limits kept and broken, if limits were given.
        notes: what the reader should know.
        seconds: wall-clock time.
        command: the command line, if there was one.
    """

    model: str
    base: str
    fingerprint: str
    line: str
    plan: dict[str, Any]
    device: str
    dtype: str
    settings: EvalSettings
    kv: KvResult
    text: TextResult | None = None
    lookup: LookupResult | None = None
    generation: GenerationResult | None = None
    branches: BranchResult | None = None
    speed: SpeedResult | None = None
    tasks: dict[str, Any] | None = None
    verdict: Verdict | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    command: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with what follows from it for scripts that want one number."""
        data: dict[str, Any] = {"format": FORMAT} | asdict(self)
        data["settings"] = self.settings.model_dump(mode="json")
        if self.text:
            for bucket, row in zip(
                (self.text.whole, *self.text.buckets),
                (data["text"]["whole"], *data["text"]["buckets"]),
                strict=True,
            ):
                row["ratio"] = bucket.ratio
            whole = data["text"]["whole"]
            data |= {"base_perplexity": whole["base"], "converted_perplexity": whole["converted"]}
            data |= {"tokens": self.text.tokens, "ratio": whole["ratio"]}
        if self.branches:
            data["branches"]["mean_share"] = self.branches.mean_share
        if self.lookup and self.lookup.needles:
            data["lookup"]["needles"] = asdict(self.lookup.needles)
        if self.verdict:
            data["verdict"] |= {"passed": self.verdict.passed, "reasons": self.verdict.reasons}
        return data

    def render(self, console: Any) -> None:
        """As tables."""
        from hyconvert.evaluation.console import render

        render(self, console)


def evaluate(
    path: str,
    *,
    base: str | None = None,
    settings: EvalSettings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    command: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a converted checkpoint and its base on the same tokens.

    Args:
        path: the converted checkpoint.
        base: the base; None is the one recorded in the plan.
        settings: what to measure, on how much.
        device, dtype: of both models; see `load_pair`.
        command: to be recorded.
        progress: told about each part.

    Raises:
        HyconvertError: a checkpoint or the text cannot be used.
    """
    began, settings = time.monotonic(), settings or EvalSettings()
    if settings.tasks:
        check_tasks(settings.tasks)
    with progress("Loading both models", total=1) as step:
        pair = load_pair(path, base=base, device=device, dtype=dtype)
        step()
    return evaluate_pair(pair, settings, command=command, progress=progress, began=began)


def evaluate_pair(
    pair: Pair,
    settings: EvalSettings,
    *,
    command: str | None = None,
    progress: Progress = silent,
    began: float | None = None,
) -> Evaluation:
    """The same for models that are loaded."""
    began = time.monotonic() if began is None else began
    config = pair.converted.config
    plan = config.get_plan()
    text = Texts(pair.tokenizer, settings)
    result = Evaluation(
        model=pair.path,
        base=pair.base_name,
        fingerprint=pair.fingerprint,
        line=plan.line,
        plan=plan.model_dump(include={"block_size", "topk", "window", "gate", "sinks"}),
        device=device_name(pair.device),
        dtype=str(pair.converted.dtype).removeprefix("torch."),
        settings=settings,
        kv=count_kv(config),
        notes=_notes(pair, settings),
        command=command,
    )
    if "text" in settings.parts:
        rows = text.rows
        with progress("Reading text", total=len(rows)) as step:
            result.text = measure_text(pair, rows, plan.window, step)
    suites = (
        list(make_suites(text.more, pair.tokenizer, settings))
        if {"retrieval", "branches"} & {*settings.parts}
        else []
    )
    if "retrieval" in settings.parts and suites:
        with progress("Retrieving", total=sum(len(prompts.tokens) for _, prompts, _ in suites)) as step:
            result.lookup = measure_lookup(pair, suites, step)
    if "branches" in settings.parts and suites:
        layers = gated_layers(pair.converted)
        total = 1 + bool(layers) * (2 + settings.by_layer * len(layers))
        prompts = max(
            (p for _, p, kinds in suites if "multikey" in kinds.values()), key=lambda p: p.tokens.shape[1]
        )
        with progress("Switching branches off", total=total) as step:
            result.branches = measure_branches(
                pair.converted, prompts, by_layer=settings.by_layer, on_pass=step
            )
    if "generation" in settings.parts:
        starts = text.starts(settings.generations, settings.prompt_tokens)
        with progress("Generating", total=2) as step:
            result.generation = measure_generation(pair, starts, settings.new_tokens, step)
    if "speed" in settings.parts:
        length = min(settings.speed_tokens or settings.sequence_length, text.rows.shape[1])
        with progress("Timing", total=2) as step:
            result.speed = measure_speed(pair, text.rows[0, :length], settings.decode_tokens, step)
    if settings.tasks:
        with progress("Running tasks", total=2) as step:
            result.tasks = run_tasks(
                pair, settings.tasks, limit=settings.task_limit, batch_size=settings.batch_size, on_model=step
            )
    result.seconds = time.monotonic() - began
    return result


class Texts:
    """Tokens of the text, read once.

    Attributes:
        rows: [N, T] to measure on.
        more: [M, T'] rows for prompts, others than those where there is enough text.
    """

    def __init__(self, tokenizer: Any, settings: EvalSettings) -> None:
        length = max(settings.sequence_length, *settings.prompt_lengths(), 0)
        wanted = max(1, settings.tokens // settings.sequence_length)
        per_row = length // settings.sequence_length
        extra = settings.prompts + settings.singles
        rows = token_blocks(
            read_texts(settings.data, column=settings.column), tokenizer,
            sequences=-(-wanted // per_row) + extra, length=length, name=settings.data,
        )  # fmt: skip
        kept = min(-(-wanted // per_row), len(rows))
        usable = rows[:kept, : per_row * settings.sequence_length]
        self.rows = usable.reshape(-1, settings.sequence_length)[:wanted]
        self.more = rows[kept:] if len(rows) > kept else rows

    def starts(self, count: int, length: int) -> Tensor:
        """Up to `count` prompts [m, P] spread over the text.

        Raises:
            DataError: the text has no stretch of that length.
        """
        flat = self.rows.reshape(-1)
        count = min(count, len(flat) // length)
        if not count:
            raise DataError(
                f"the text has {len(flat)} tokens, too few for a prompt of {length}; give more text"
            )
        step = (len(flat) - length) // count or 1
        return torch.stack([flat[i * step : i * step + length] for i in range(count)])


def _notes(pair: Pair, settings: EvalSettings) -> list[str]:
    notes = []
    recorded = recorded_fingerprint(pair.path)
    if recorded not in (None, pair.fingerprint):
        notes.append(f"{pair.base_name} is not the base that {pair.path} was converted from.")
    if not settings.prompt_lengths() and {"retrieval", "branches"} & {*settings.parts}:
        notes.append(
            f"No retrieval and no ablation: sequences of {settings.sequence_length} tokens are too short."
        )
    limit = getattr(pair.base.config, "max_position_embeddings", None)
    longest = max(settings.sequence_length, *settings.prompt_lengths(), 0)
    if limit and longest > limit:
        notes.append(f"{longest:,} tokens are more than the {limit:,} positions that the base was made for.")
    return notes
