"""What a converted model looks like: its layer map, and its KV cache against the base's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hyconvert.errors import CheckpointError
from hyconvert.evaluate import human_bytes
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.modeling import HyConvertConfig

CONTEXTS = (8192, 32768, 131072)


@dataclass(frozen=True)
class LayerRow:
    """One layer; `kv_bytes_per_token` is what it adds to the cache per token, `kv_bytes` what it holds by context."""

    layer: int
    kind: str
    source: int | None
    kv_bytes_per_token: int
    kv_bytes: dict[int, int]


@dataclass(frozen=True)
class Inspection:
    """A converted model's layer map and KV cache, counted in bfloat16 for one sequence.

    Attributes:
        line: the layer map as one line.
        family: the base's model type.
        settings: block size, top-k, window, gate, sinks.
        layers: one row per layer.
        total, base_total: bytes of the whole cache by context length, converted and base.
    """

    line: str
    family: str
    settings: dict[str, Any]
    layers: list[LayerRow]
    total: dict[int, int]
    base_total: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def render(self, console: Console) -> None:
        """As tables."""
        console.print(self.line, style="bold", soft_wrap=True)
        console.print(", ".join(f"{key} {value}" for key, value in self.settings.items()))
        table = Table(
            "layer", "kind", "source", "KV bytes per token", *(f"at {c // 1024}k" for c in CONTEXTS)
        )
        for row in self.layers:
            growth = f"{row.kv_bytes_per_token:,}" if row.kv_bytes_per_token else "0 beyond the window"
            cells = [human_bytes(row.kv_bytes[c]) for c in CONTEXTS]
            table.add_row(
                str(row.layer), row.kind, "" if row.source is None else str(row.source), growth, *cells
            )
        console.print(table)
        summary = Table("KV cache, bf16", "base", "converted", "smaller by")
        for context in CONTEXTS:
            base, ours = self.base_total[context], self.total[context]
            summary.add_row(
                f"{context // 1024}k tokens", human_bytes(base), human_bytes(ours), f"{base / ours:.2f}x"
            )
        console.print(summary)


def layer_table(config: Any) -> Inspection:
    """Inspect a converted model's config."""
    plan = config.get_plan()
    per_context = {context: kv_bytes(config, context) for context in CONTEXTS}
    growth = [b - a for a, b in zip(kv_bytes(config, 10**6), kv_bytes(config, 10**6 + 1), strict=True)]
    rows = [
        LayerRow(i, layer.kind, layer.source, growth[i], {c: per_context[c][i] for c in CONTEXTS})
        for i, layer in enumerate(plan.layers)
    ]
    return Inspection(
        line=plan.line,
        family=config.family.title,
        settings=plan.model_dump(include={"block_size", "topk", "window", "gate", "sinks"}),
        layers=rows,
        total={c: sum(per_context[c]) for c in CONTEXTS},
        base_total={c: sum(base_kv_bytes(config, c)) for c in CONTEXTS},
    )


def read_config(path: str) -> Any:
    """The config of a converted model.

    Raises:
        CheckpointError: there is none at that path.
    """
    if Path(path).exists() and not Path(path, "config.json").is_file():
        raise CheckpointError(
            f"{path} holds no config.json, so no model; give the folder that `hyconvert convert` wrote"
        )
    try:
        data, _ = HyConvertConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no converted model at {path}: {str(error).splitlines()[0]}") from error
    if data.get("model_type") != "hyconvert":
        raise CheckpointError(
            f"{path} holds a model of type '{data.get('model_type')}', not a converted one; "
            "run `hyconvert convert` first"
        )
    return HyConvertConfig.from_dict(data)


def inspect_path(path: str) -> Inspection:
    """Inspect a converted checkpoint."""
    return layer_table(read_config(path))
