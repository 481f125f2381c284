"""A converted model beside its base, on the same tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hyconvert.checkpoint import open_source
from hyconvert.conversion import load_base_as
from hyconvert.data import read_texts, token_blocks
from hyconvert.errors import CheckpointError
from hyconvert.evaluate import perplexity, pick_device
from hyconvert.inspection import read_config
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.loading import load, quiet_loading
from hyconvert.progress import Progress, silent


@dataclass(frozen=True)
class Comparison:
    """Perplexity of both models on the same tokens, and their KV caches.

    Attributes:
        data: where the text is from.
        tokens, sequence_length: how much was measured, in sequences of what length.
        base_perplexity, converted_perplexity: exp of the mean negative log-likelihood.
        base_kv_bytes, converted_kv_bytes: bfloat16 cache of one sequence of `sequence_length`.
    """

    data: str
    tokens: int
    sequence_length: int
    base_perplexity: float
    converted_perplexity: float
    base_kv_bytes: int
    converted_kv_bytes: int

    @property
    def ratio(self) -> float:
        """Converted perplexity over the base's."""
        return self.converted_perplexity / self.base_perplexity

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"ratio": self.ratio}

    def render(self, console: Console) -> None:
        """As a table."""
        table = Table(f"{self.tokens:,} tokens of {self.data}", "base", "converted", "converted / base")
        table.add_row(
            f"perplexity at {self.sequence_length:,}",
            f"{self.base_perplexity:.2f}",
            f"{self.converted_perplexity:.2f}",
            f"{self.ratio:.3f}",
        )
        share = self.converted_kv_bytes / self.base_kv_bytes
        table.add_row(
            "KV bytes, bf16", f"{self.base_kv_bytes:,}", f"{self.converted_kv_bytes:,}", f"{share:.3f}"
        )
        console.print(table)


def compare(
    path: str,
    *,
    base: str | None = None,
    data: str,
    column: str = "text",
    tokens: int,
    sequence_length: int,
    device: str = "auto",
    progress: Progress = silent,
) -> Comparison:
    """Measure a converted checkpoint and its base.

    Args:
        path: the converted checkpoint.
        base: the base; None means the one recorded in the plan.
        data, column: text, as `hyconvert.data.read_texts` takes it.
        tokens, sequence_length: how much to measure.
        device: where.
        progress: told about each stage.

    Raises:
        HyconvertError: a checkpoint or the text cannot be used.
    """
    config = read_config(path)
    name = base or config.get_plan().base
    if name is None:
        raise CheckpointError(f"{path} does not say what it was converted from; name the base with --base")
    source = open_source(name)
    where = pick_device(device)
    rows = token_blocks(
        read_texts(data, column=column),
        source.load_tokenizer(),
        sequences=max(1, tokens // sequence_length),
        length=sequence_length,
        name=data,
    )

    with progress("Measuring the base", total=len(rows)) as step:
        model = load_base_as(config, source, where)
        base_perplexity = perplexity(model, rows, as_base=True, on_sequence=step)
    del model
    with progress("Measuring the conversion", total=len(rows)) as step:
        with quiet_loading():
            ours = load(path, device=str(where))
        converted = perplexity(ours, rows, on_sequence=step)
    return Comparison(
        data=data,
        tokens=rows.numel(),
        sequence_length=rows.shape[1],
        base_perplexity=base_perplexity,
        converted_perplexity=converted,
        base_kv_bytes=sum(base_kv_bytes(config, rows.shape[1])),
        converted_kv_bytes=sum(kv_bytes(config, rows.shape[1])),
    )
