"""The recipe: convert and heal as data, one YAML file that can be read, diffed and run again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hyconvert.errors import RecipeError
from hyconvert.evaluation.limits import Limits
from hyconvert.yaml_files import read_yaml

StageName = Literal["layerwise", "distill", "long"]
Group = Literal["new", "converted", "full", "rest"]
STAGES: tuple[StageName, ...] = ("layerwise", "distill", "long")
GROUPS: tuple[Group, ...] = ("new", "converted", "full", "rest")


def parse_count(value: Any) -> Any:
    """A count as people write it.

    `8M` and `1.5B` are decimal, `32k` is 32,768 as for context lengths, `8,000,000` and `8_000_000` are as they stand.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().replace("_", "").replace(",", "")
    factor = {"k": 1 << 10, "m": 10**6, "b": 10**9}.get(text[-1:].lower())
    try:
        return round(float(text[:-1]) * factor) if factor else int(text)
    except ValueError:
        raise ValueError(f"'{value}' is no count; write 8M, 64k or 8000000") from None


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataRecipe(_Frozen):
    """Where training text comes from.

    Attributes:
        source: a file, a folder, a Hub dataset id or a built-in text, as `hyconvert.data.read_rows` takes it.
        column: the text column.
        chat: a column of chat messages instead; only the assistant's tokens are trained on.
        subset, split: of a Hub dataset.
        shuffle: documents are drawn from a buffer of this many; 1 keeps their order.
        retrieval: share of the rows whose text becomes one document with facts, questions about them and repeats
            (`hyconvert.retrieval`), so that looking things up far back is trained too.
    """

    source: str
    column: str = "text"
    chat: str | None = None
    subset: str | None = None
    split: str = "train"
    shuffle: int = Field(default=10_000, ge=1)
    retrieval: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _chats_stay_chats(self) -> DataRecipe:
        if self.chat is not None and self.retrieval:
            raise ValueError("retrieval is mixed into running text, not into chats; leave it or chat out")
        return self


class Stage(_Frozen):
    """One stage of healing.

    Attributes:
        tokens: tokens to train on; the text is repeated if it is shorter.
        sequence_length: tokens per row, T.
        batch_tokens: tokens per optimiser step, over all processes.
        lr: learning rate of converted attention; `HealRecipe.lr_scale` gives the others.
        warmup: share of the steps over which the rate rises linearly.
        final_lr: what is left of it at the end of the cosine, as a share.
        temperature: of both models' softmax in the KL term, which is multiplied by its square.
        cross_entropy: weight of the cross-entropy on the text itself, beside the KL.
        hidden: weight of the squared relative difference of the layers' hidden states, beside the KL.
    """

    tokens: Count
    sequence_length: Count = 4096
    batch_tokens: Count = 32_768
    lr: float = Field(default=2e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    final_lr: float = Field(default=0.1, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    cross_entropy: float = Field(default=0.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _a_step_holds_rows(self) -> Stage:
        if self.sequence_length < 2:
            raise ValueError("sequence_length must be at least 2")
        if self.batch_tokens < self.sequence_length:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is less than one sequence of {self.sequence_length} tokens"
            )
        return self

    @property
    def rows(self) -> int:
        """Rows per optimiser step."""
        return self.batch_tokens // self.sequence_length

    @property
    def steps(self) -> int:
        """Optimiser steps, at least one."""
        return max(1, self.tokens // (self.rows * self.sequence_length))

    @property
    def tokens_read(self) -> int:
        """Tokens of all steps: `tokens`, but for what does not fill one."""
        return self.steps * self.rows * self.sequence_length


class Lora(_Frozen):
    """Low-rank adapters in place of training the base's matrices; merged when the model is saved."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)


class Scales(_Frozen):
    """Learning rates as multiples of the stage's; 0 freezes.

    Attributes:
        new: maps, gates and sinks.
        converted: the base's projections and norms within converted attention.
        full: the attention of full and sliding layers.
        rest: MLPs or experts, norms, embeddings, output head.
    """

    new: float = Field(default=2.0, ge=0)
    converted: float = Field(default=1.0, ge=0)
    full: float = Field(default=0.5, ge=0)
    rest: float = Field(default=0.5, ge=0)


class HealRecipe(_Frozen):
    """How a converted model is healed.

    Attributes:
        data: the text.
        layerwise, distill, long: the stages, run in this order; each may be left out.
        lr_scale: learning rates of the parameter groups.
        lora: train adapters in the groups `converted`, `full` and `rest`, whose matrices then stay frozen.
        teacher: the base; None is the one recorded at conversion.
        heldout_tokens: tokens of the same text, from documents that are not trained on, to measure on.
        seed: of the order of documents and rows.
        precision: `bf16` is mixed precision with float32 master weights; `auto` takes it on a GPU.
        micro_tokens: tokens per forward pass and device; None is 32,768 on a GPU and 2,048 on a CPU.
        gradient_checkpointing: recompute activations in the backward pass.
        weight_decay, betas, clip: of AdamW, and the largest norm of the gradient.
        log_every, eval_every, save_every: steps between two log lines, two measurements and two saved states; None
            is about 50, 10 and 5 times in the run, 0 is never.
        tracker: where to log besides; needs that package.
    """

    data: DataRecipe
    layerwise: Stage | None = None
    distill: Stage | None = None
    long: Stage | None = None
    lr_scale: Scales = Scales()
    lora: Lora | None = None
    teacher: str | None = None
    heldout_tokens: Count = 32_768
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    micro_tokens: Count | None = None
    gradient_checkpointing: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0)
    log_every: int | None = Field(default=None, ge=0)
    eval_every: int | None = Field(default=None, ge=0)
    save_every: int | None = Field(default=None, ge=0)
    tracker: Literal["tensorboard", "wandb"] | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> HealRecipe:
        if not any(True for _ in self.stages()):
            raise ValueError("no stage is set; give at least one of layerwise, distill and long")
        if self.lora is None and not any(getattr(self.lr_scale, group) for group in GROUPS):
            raise ValueError("every lr_scale is 0, so nothing would be trained")
        return self

    def stages(self) -> Iterator[tuple[StageName, Stage]]:
        """The stages that are set, in order."""
        for name in STAGES:
            stage = getattr(self, name)
            if stage is not None:
                yield name, stage

    def placed_stages(self) -> Iterator[tuple[StageName, Stage, int]]:
        """The stages, each with the row, of its own length, at which it begins to read the text."""
        used = 0
        for name, stage in self.stages():
            yield name, stage, used // stage.sequence_length
            used += stage.tokens_read

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for _, stage in self.stages())

    @property
    def tokens(self) -> int:
        """Tokens that all stages train on."""
        return sum(stage.tokens_read for _, stage in self.stages())


class CalibrationRecipe(_Frozen):
    """Text to align on; see `hyconvert.Calibration`."""

    source: str | None = None
    tokens: Count = 65_536
    sequence_length: Count | None = None
    column: str = "text"
    retrieval: float = Field(default=1.0, ge=0, le=1)
    repeats: float = Field(default=0.2, ge=0, le=0.5)


class ConvertRecipe(_Frozen):
    """How a base is converted; the keys are the options of `hyconvert convert`."""

    plan: str | None = None
    uniform: int | None = None
    full_layers: tuple[int, ...] | None = None
    kv_budget: float | None = Field(default=None, gt=0, le=1)
    costs: str | None = None
    block_size: int | None = None
    topk: int | None = None
    window: int | None = None
    gate: Literal["merge", "sigmoid"] | None = None
    sinks: bool | None = None
    align_layers: bool = Field(default=True, alias="align")
    calibration: CalibrationRecipe = CalibrationRecipe()
    dtype: str = "auto"


class Recipe(_Frozen):
    """A base, how to convert it and how to heal the result.

    Attributes:
        base: a Hub id, a folder or a `.gguf`; the command line may name another.
        convert: None if the recipe only heals.
        heal: how to heal.
        gate: how far the result may be from its base, for `hyconvert eval --gate --limits RECIPE`.
    """

    base: str | None = None
    convert: ConvertRecipe | None = None
    heal: HealRecipe
    gate: Limits | None = None

    @classmethod
    def load(cls, path: str | Path, **heal: Any) -> Recipe:
        """Read a recipe, with settings of the command line over its `heal` section.

        Args:
            path: a YAML (or JSON) file.
            **heal: settings to change, nested dictionaries merged; None leaves a setting as it is.

        Raises:
            RecipeError: the file is missing or no YAML, or does not describe a valid recipe.
        """
        data = read_yaml(path, f"recipe {path}")
        if not isinstance(data, dict):
            raise RecipeError(f"recipe {path} holds no settings; it needs a section 'heal'")
        if isinstance(data.get("heal"), dict):
            data["heal"] = merged(data["heal"], heal)
        result: Recipe = validated(cls, data, f"recipe {path}")
        return result


def validated(model: type[Any], data: dict[str, Any], where: str) -> Any:
    """`data` as a recipe model; every mistake is reported at once, with a suggestion for mistyped keys.

    Raises:
        RecipeError: the data is not valid.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from error


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`, nested dictionaries merged; None in `high` leaves what `low` says."""
    result = dict(low)
    for key, value in high.items():
        if isinstance(value, dict):
            result[key] = merged(result.get(key) or {}, value)
        elif value is not None:
            result[key] = value
    return result


def _explain(error: ValidationError) -> str:
    import difflib

    models = (Recipe, ConvertRecipe, CalibrationRecipe, HealRecipe, DataRecipe, Stage, Scales, Lora, Limits)
    known = {field.alias or name for model in models for name, field in model.model_fields.items()}
    parts = []
    for item in error.errors():
        where, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            message = "unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
        elif not isinstance(item.get("input"), dict) and item["type"] != "value_error":
            message += f" (got {item['input']!r})"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)
