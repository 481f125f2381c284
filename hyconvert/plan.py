"""The plan: which attention each layer gets, as data that can be read, edited and diffed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hyconvert.errors import PlanError

LayerKind = Literal["full", "sparse", "reuse", "window", "sliding"]

_LETTERS: dict[LayerKind, str] = {"full": "F", "sparse": "S", "reuse": "R", "window": "W", "sliding": "L"}
_KINDS: dict[str, LayerKind] = {letter: kind for kind, letter in _LETTERS.items()}
_TOKEN = re.compile(r"^([FSRWL])(\d+)?(?:\*([1-9]\d*))?$")


class LayerPlan(BaseModel):
    """What one layer becomes.

    Attributes:
        kind: `full` keeps full attention and serves as an oracle; `sparse` attends to the source's blocks in
            the source's KV cache plus its own window; `reuse` attends to the source's blocks in its own KV
            cache plus its own window; `window` has the window alone; `sliding` is a sliding-window layer of
            the base, kept as it is.
        source: index of the full layer whose blocks a `sparse` or `reuse` layer reads, else None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: LayerKind
    source: int | None = None

    @model_validator(mode="after")
    def _source_fits_kind(self) -> LayerPlan:
        if (self.kind in ("sparse", "reuse")) != (self.source is not None):
            need = "needs a source layer" if self.source is None else "takes no source layer"
            raise ValueError(f"a {self.kind} layer {need}")
        return self

    def __str__(self) -> str:
        return _LETTERS[self.kind] + ("" if self.source is None else str(self.source))


class Plan(BaseModel):
    """A whole model's plan.

    Attributes:
        layers: one `LayerPlan` per decoder layer, in order.
        block_size: keys per block.
        topk: blocks a sparse or reuse layer reads per query token and KV head.
        window: most recent keys (the query's own among them) of the window branch, at least 2.
        gate: how the two branches are mixed, a key of `hyconvert.modeling.gates.GATES`.
        sinks: whether each branch has a learnable per-head sink in its denominator.
        maps: whether sparse layers have a query and a value map; None means "with the merge gate only".
        base: name of the model the plan was made for, for the reader.
        note: where the plan comes from, for the reader.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[LayerPlan, ...]
    block_size: int = Field(default=64, ge=1)
    topk: int = Field(default=16, ge=1)
    window: int = Field(default=128, ge=2)
    gate: Literal["merge", "sigmoid"] = "merge"
    sinks: bool = False
    maps: bool | None = None
    base: str | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _layers_are_consistent(self) -> Plan:
        if not self.layers:
            raise ValueError("a plan needs at least one layer")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size {self.block_size} is not a power of two; use 16, 32, 64 or 128")
        for index, layer in enumerate(self.layers):
            if layer.source is None:
                continue
            if index == 0:
                raise ValueError(
                    f"layer 0 is {layer.kind}, but no full layer comes before it; make it full or window"
                )
            if not 0 <= layer.source < len(self.layers):
                raise ValueError(
                    f"layer {index} names source {layer.source}, which is not a layer; this plan has layers 0 to "
                    f"{len(self.layers) - 1}"
                )
            if layer.source >= index:
                raise ValueError(
                    f"layer {index} names source {layer.source}, but a source must come before the layer that reads it"
                )
            if self.layers[layer.source].kind != "full":
                raise ValueError(
                    f"layer {index} names source {layer.source}, which is a {self.layers[layer.source].kind} layer; "
                    f"sources must be full (full layers: {_ranges(self.full_layers) or 'none'})"
                )
        return self

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the full layers."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.kind == "full")

    @property
    def sources(self) -> frozenset[int]:
        """Indices of the full layers that some layer reads."""
        return frozenset(layer.source for layer in self.layers if layer.source is not None)

    @property
    def has_maps(self) -> bool:
        """Whether sparse layers carry a query map and a value map."""
        return self.maps if self.maps is not None else self.gate == "merge"

    @property
    def line(self) -> str:
        """The layer map as one typable line, such as `F*3 S2*4 F W*2`; `parse_line` reads it back."""
        runs: list[tuple[str, int]] = []
        for token in map(str, self.layers):
            if runs and runs[-1][0] == token:
                runs[-1] = (token, runs[-1][1] + 1)
            else:
                runs.append((token, 1))
        return " ".join(token if count == 1 else f"{token}*{count}" for token, count in runs)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, one layer per line so that plans diff well."""
        Path(path).write_text(self.to_json())

    def to_json(self) -> str:
        """The plan as JSON text, one layer per line."""
        data = self.model_dump(exclude_none=True)
        layers = ",\n".join("    " + json.dumps(layer) for layer in data.pop("layers"))
        head = json.dumps(data, indent=2)[:-2]
        return f'{head},\n  "layers": [\n{layers}\n  ]\n}}\n'

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a `plan.json`.

        Raises:
            PlanError: the file is missing or unreadable, is no JSON, or does not describe a valid plan.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise PlanError(f"no plan at {path}; write one, or use --uniform 1:N or --full-layers") from error
        except OSError as error:
            what = (
                "is a folder; name the plan.json in it"
                if path.is_dir()
                else f"cannot be read ({error.strerror})"
            )
            raise PlanError(f"{path} {what}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{path} is not valid JSON ({error}); correct it or make the plan anew"
            ) from error
        return cls.from_dict(data, where=str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Plan:
        """Validate plan data; every mistake is reported at once, with a suggestion for mistyped keys.

        Raises:
            PlanError: the data does not describe a valid plan.
        """
        if not isinstance(data, dict):
            raise PlanError(f"{where} holds a {type(data).__name__}, not a JSON object with 'layers'")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(f"{where}: {explain(error, cls)}") from error

    def with_settings(self, **settings: Any) -> Plan:
        """A copy with other settings, validated (None values are ignored)."""
        changed = {key: value for key, value in settings.items() if value is not None}
        return Plan.from_dict(self.model_dump() | changed) if changed else self


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All mistakes of a pydantic validation as one line."""
    import difflib

    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = set(model.model_fields) | set(LayerPlan.model_fields)
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            message = "unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
        elif "input" in item and not isinstance(item["input"], dict):
            message += f" (got {item['input']!r})"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)


def parse_line(line: str) -> tuple[LayerPlan, ...]:
    """Read a layer map such as `F*3 S2*4 F W*2` (F full, Sn sparse from n, Rn reuse from n, W window, L sliding).

    Raises:
        PlanError: a token is not understood, or there is none.
    """
    layers: list[LayerPlan] = []
    for token in line.split():
        match = _TOKEN.match(token)
        if not match:
            raise PlanError(f"'{token}' in the layer map is not understood; write F, S<source>, R<source>, W or L, "
                            "with *<count> to repeat, such as 'F*3 S2*4 F W*2'")  # fmt: skip
        kind = _KINDS[match[1]]
        source = int(match[2]) if match[2] else None
        try:
            layer = LayerPlan(kind=kind, source=source)
        except ValidationError as error:
            raise PlanError(f"'{token}' in the layer map: {explain(error, LayerPlan)}") from error
        layers.extend([layer] * int(match[3] or 1))
    if not layers:
        raise PlanError("the layer map is empty; write one token per layer, such as 'F*3 S2*4 F W*2'")
    return tuple(layers)


def nearest_sources(
    num_layers: int, full_layers: Iterable[int], sliding: Iterable[int] = ()
) -> tuple[LayerPlan, ...]:
    """Sparse layers between the given full layers, each reading the nearest full layer before it.

    Args:
        num_layers: decoder layers of the base.
        full_layers: indices that stay full.
        sliding: indices of the base's own sliding-window layers, which are kept.

    Returns:
        One `LayerPlan` per layer. A layer with no full layer before it becomes `window`.

    Raises:
        PlanError: an index is not a layer of the base, or is one of its sliding layers.
    """
    full, kept = set(full_layers), set(sliding)
    if wrong := sorted(i for i in full if not 0 <= i < num_layers):
        raise PlanError(f"full layers {wrong} do not exist; the base has layers 0 to {num_layers - 1}")
    if wrong := sorted(full & kept):
        raise PlanError(f"layers {wrong} are sliding-window layers of the base and cannot be full")
    if not full:
        raise PlanError("a plan needs at least one full layer; name it with --full-layers")
    layers: list[LayerPlan] = []
    source = None
    for index in range(num_layers):
        if index in kept:
            layers.append(LayerPlan(kind="sliding"))
        elif index in full:
            source = index
            layers.append(LayerPlan(kind="full"))
        elif source is None:
            layers.append(LayerPlan(kind="window"))
        else:
            layers.append(LayerPlan(kind="sparse", source=source))
    return tuple(layers)


def uniform_full_layers(num_layers: int, ratio: int, sliding: Sequence[int] = ()) -> tuple[int, ...]:
    """Full layers of the paper's uniform 1:ratio plan: one, then `ratio` sparse ones, and a final full layer.

    Args:
        num_layers: decoder layers of the base.
        ratio: sparse layers per full layer.
        sliding: the base's own sliding layers, which are neither.

    Returns:
        Indices of the full layers (arXiv 2602.03560, section 3: 49 layers at 1:11 gives 0, 12, 24, 36, 48).
    """
    if ratio < 1:
        raise PlanError(f"--uniform 1:{ratio} is not a ratio; use 1:N with N of at least 1, such as 1:3")
    candidates = [i for i in range(num_layers) if i not in set(sliding)]
    if len(candidates) < 2:
        raise PlanError(
            f"the base has {len(candidates)} full-attention layers, too few to make any of them sparse"
        )
    return tuple(sorted({*candidates[:: ratio + 1], candidates[-1]}))


def _ranges(indices: Sequence[int]) -> str:
    return ",".join(map(str, indices))
