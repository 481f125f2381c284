"""The table of measured costs, and the folder it lives in: `costs.json` says of what, `costs.jsonl` holds the rows."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hyconvert.errors import PlanError
from hyconvert.plan import LayerKind, Plan, explain

FORMAT = 1


class MeasureSettings(BaseModel):
    """What is measured, on how much text.

    Attributes:
        kinds: kinds tried per layer beside full; windows are measured in any case, since they rank the sources.
        block_size, topk, window, gate, sinks: as in `Plan`.
        span: farthest source of a sparse or reuse layer, in layers; None for any.
        oracles: only this many layers, those that lose most with a window alone, are tried as sources; None for all.
        sequence_length: tokens per sequence, T.
        fit_tokens: calibration tokens that every candidate is aligned on.
        prompts: sequences that damage is measured on, each running text with facts, questions and a repeat in it.
        positions: tokens per sequence at which the KL divergence is taken.
        questions, decoys, copies: per prompt, as in `hyconvert.retrieval.make_prompts`.
        retrieval: share of the fitted sequences that have facts, questions and repeats in them too.
        map_rows, rows: as in `hyconvert.align.FitSettings`.
        calibration, column: text, as `hyconvert.data.read_texts` takes it.
        seed: of prompts, positions and rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: tuple[Literal["window", "sparse", "reuse"], ...] = ("window", "sparse")
    block_size: int = 64
    topk: int = 16
    window: int = 128
    gate: Literal["merge", "sigmoid"] = "merge"
    sinks: bool = False
    span: int | None = Field(default=None, ge=1)
    oracles: int | None = Field(default=None, ge=1)
    sequence_length: int = Field(default=4096, ge=256)
    fit_tokens: int = Field(default=16_384, ge=256)
    prompts: int = Field(default=16, ge=1)
    positions: int = Field(default=512, ge=1)
    questions: int = Field(default=4, ge=0)
    decoys: int = Field(default=8, ge=0)
    copies: int = Field(default=4, ge=0)
    retrieval: float = Field(default=0.5, ge=0, le=1)
    map_rows: int = Field(default=128, ge=1)
    rows: int = Field(default=512, ge=1)
    calibration: str | None = None
    column: str = "text"
    seed: int = 0

    @classmethod
    def create(cls, **settings: Any) -> MeasureSettings:
        """Validated settings; None values are left at their defaults.

        Raises:
            PlanError: a value is out of range.
        """
        try:
            created = cls(**{key: value for key, value in settings.items() if value is not None})
        except ValidationError as error:
            raise PlanError(f"settings of the measurement: {explain(error, cls)}") from error
        layers = [{"kind": "full"}]  # a plan knows what block size, top-k and window can be
        Plan.from_dict({"layers": layers} | created.plan_settings(), where="settings of the measurement")
        return created

    @classmethod
    def suited(cls, device: str, limit: int | None = None, **settings: Any) -> MeasureSettings:
        """Settings that suit a device: on `cpu`, a model of 135M parameters takes less than ten minutes on two cores.

        Args:
            device: type of the device, such as `cuda`.
            limit: longest sequence that the base was trained for.
            **settings: what is given and not None stays as it is.
        """
        small: dict[str, Any] = {
            "sequence_length": 1024, "fit_tokens": 4096, "prompts": 2, "oracles": 6, "map_rows": 96, "rows": 256,
            "questions": 3, "copies": 2, "positions": 192,
        }  # fmt: skip
        suited = small if device == "cpu" else {"sequence_length": 4096}
        if limit is not None:
            suited["sequence_length"] = min(limit, suited["sequence_length"])
        return cls.create(**(suited | {key: value for key, value in settings.items() if value is not None}))

    def plan_settings(self) -> dict[str, Any]:
        """The settings that a plan made from these costs must share."""
        return {key: getattr(self, key) for key in ("block_size", "topk", "window", "gate", "sinks")}


def counted(measured: Collection[str], tasks: Collection[str] | None) -> tuple[str, ...]:
    """The retrieval tasks whose answers count, in the order of `measured`.

    Args:
        measured: tasks that were measured.
        tasks: those that are asked for; None for all that were measured.

    Raises:
        PlanError: one of them was not measured, or there is none.
    """
    if tasks is None:
        return tuple(measured)
    if not tasks:
        raise PlanError(
            "--tasks names no task; leave it out to count all, or give --retrieval 0 to count none"
        )
    missing = ", ".join(sorted(task for task in tasks if task not in measured))
    if missing:
        found = f"{', '.join(measured)}; name some of these" if measured else "no retrieval; leave it out"
        raise PlanError(f"--tasks {missing}: not measured in these costs, which have {found}")
    return tuple(task for task in measured if task in tasks)


def weigh(
    kl: float, rises: Mapping[str, float], retrieval: float = 1.0, tasks: Collection[str] | None = None
) -> float:
    """Damage: KL plus the mean rise of the answers' NLL (where it rises), weighted.

    Args:
        kl: mean KL divergence on running text, in nats.
        rises: rise of the answers' mean NLL per retrieval task, in nats.
        retrieval: weight of the rises.
        tasks: those that count; None for all.

    Raises:
        PlanError: a task was not measured.
    """
    counts = [max(0.0, rises[task]) for task in counted(rises, tasks)]
    return kl + retrieval * (sum(counts) / len(counts) if counts else 0.0)


@dataclass(frozen=True)
class Cost:
    """Damage when one layer alone is replaced, aligned in closed form.

    Attributes:
        layer, kind, source: the candidate; `source` is None for window.
        kl: mean KL divergence of the model's next-token distribution from the base's on running text, in nats.
        nll: rise of the answers' mean NLL per retrieval task, in nats; negative where the candidate does better.
        error: squared error of the layer's attention output on the fitted rows, as a share of the base's energy.
    """

    layer: int
    kind: LayerKind
    source: int | None
    kl: float
    nll: dict[str, float] = field(default_factory=dict)
    error: float = 0.0

    def to_json(self) -> str:
        """The row as one line of `costs.jsonl`."""
        return json.dumps(asdict(self))

    def damage(self, retrieval: float = 1.0, tasks: Collection[str] | None = None) -> float:
        """What the candidate costs, as `weigh` weighs it."""
        return weigh(self.kl, self.nll, retrieval, tasks)


@dataclass
class Costs:
    """Measured costs of one base.

    Attributes:
        base: where the base is.
        revision: of a Hub id; None for the default branch.
        fingerprint: of the base's contents.
        model: `model_type` of the base.
        settings: how they were measured.
        num_layers: decoder layers.
        sliding: the base's own sliding layers, which stay.
        reference: the base's own mean NLL per retrieval task.
        device: what measured it.
        rows: the costs so far.
        expected: rows of a complete measurement; None as long as that is not known.
        seconds: wall-clock time spent measuring.
    """

    base: str
    fingerprint: str
    model: str
    settings: MeasureSettings
    num_layers: int
    sliding: tuple[int, ...] = ()
    reference: dict[str, float] = field(default_factory=dict)
    device: str = ""
    rows: list[Cost] = field(default_factory=list)
    expected: int | None = None
    seconds: float = 0.0
    revision: str | None = None

    def __post_init__(self) -> None:
        self.table: dict[tuple[int, str, int | None], Cost] = {
            (row.layer, row.kind, row.source): row for row in self.rows
        }

    def __iter__(self) -> Iterator[Cost]:
        return iter(self.rows)

    def get(self, layer: int, kind: str, source: int | None = None) -> Cost | None:
        """The cost of one candidate, if it was measured."""
        return self.table.get((layer, kind, source))

    def add(self, row: Cost) -> None:
        """Take in one more row."""
        self.rows.append(row)
        self.table[row.layer, row.kind, row.source] = row

    def counted(self, tasks: Collection[str] | None = None) -> tuple[str, ...]:
        """The measured retrieval tasks that count, as `counted` has it."""
        return counted(dict.fromkeys(task for row in self.rows for task in row.nll), tasks)

    def predicted(self, plan: Plan, retrieval: float = 1.0, tasks: Collection[str] | None = None) -> float:
        """Summed damage of a plan's layers, each as `weigh` weighs it.

        Raises:
            PlanError: a layer of the plan or a task was not measured.
        """
        total = 0.0
        for index, layer in enumerate(plan.layers):
            if layer.kind in ("full", "sliding"):
                continue
            cost = self.get(index, layer.kind, layer.source)
            if cost is None:
                raise PlanError(
                    f"layer {index} as {layer} was not measured; the costs cannot predict this plan"
                )
            total += cost.damage(retrieval, tasks)
        return total

    def header(self) -> dict[str, Any]:
        """All but the rows, as plain data."""
        return {
            "format": FORMAT,
            "base": self.base,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "num_layers": self.num_layers,
            "sliding": list(self.sliding),
            "settings": self.settings.model_dump(mode="json"),
            "reference": self.reference,
            "device": self.device,
            "expected": self.expected,
            "seconds": round(self.seconds, 1),
        }

    def save_header(self, folder: Path) -> None:
        """Write `costs.json`, at once or not at all."""
        aside = folder / "costs.json.partial"
        aside.write_text(json.dumps(self.header(), indent=2) + "\n")
        os.replace(aside, folder / "costs.json")

    def save_rows(self, folder: Path) -> None:
        """Write `costs.jsonl` anew, at once or not at all."""
        aside = folder / "costs.jsonl.partial"
        aside.write_text("".join(row.to_json() + "\n" for row in self.rows))
        os.replace(aside, folder / "costs.jsonl")

    @classmethod
    def load(cls, folder: str | Path, *, unfinished: bool = False) -> Costs:
        """Read a costs folder.

        Args:
            folder: what `hyconvert measure` wrote.
            unfinished: accept a measurement that was interrupted.

        Raises:
            PlanError: there are no costs, they cannot be read, or they are not complete.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / "costs.json").read_text())
            version = header["format"]
            lines = (folder / "costs.jsonl").read_text().splitlines()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PlanError(
                f"no costs can be read in {folder} ({type(error).__name__}); make them with hyconvert measure BASE "
                f"-o {folder}"
            ) from error
        if version != FORMAT:
            raise PlanError(
                f"{folder} holds costs of format {version}, and this version reads {FORMAT}; measure again"
            )
        rows = []
        for line in lines:
            try:
                rows.append(Cost(**json.loads(line)))
            except (json.JSONDecodeError, TypeError):  # cut off while it was written
                break
        given = {key: value for key, value in header.items() if key not in ("format", "settings", "sliding")}
        try:
            settings, sliding = MeasureSettings.create(**header["settings"]), tuple(header["sliding"])
            costs = cls(**given, settings=settings, sliding=sliding, rows=rows)
        except (TypeError, KeyError) as error:
            raise PlanError(
                f"{folder}/costs.json is damaged ({error}); measure again into another folder"
            ) from error
        if not unfinished and (costs.expected is None or len(costs.table) < costs.expected):
            raise PlanError(
                f"the measurement in {folder} stopped after {len(rows)} of {costs.expected or 'its'} candidates; run "
                "the same hyconvert measure command again to go on with it"
            )
        return costs

    def check_base(self, fingerprint: str, name: str) -> None:
        """Refuse another base than the one that was measured.

        Raises:
            PlanError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise PlanError(
                f"these costs were measured on {self.base} ({self.fingerprint[:12]}), and {name} is another model "
                f"({fingerprint[:12]}); measure it with hyconvert measure"
            )
