"""A whole benchmark: every model over the grids of batches and contexts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyconvert.bench.measure import Bench, Row, correlated
from hyconvert.bench.report import WHATS, BenchReport
from hyconvert.bench.roofline import Ceilings
from hyconvert.bench.targets import Subject
from hyconvert.checkpoint.opening import DTYPES
from hyconvert.errors import CheckpointError, DataError, HyconvertError
from hyconvert.evaluate import pick_device
from hyconvert.generation.caches import check_kv_dtype
from hyconvert.generation.network import read_network
from hyconvert.progress import Progress, silent


@dataclass(frozen=True)
class Grid:
    """What to measure.

    Attributes:
        batches, contexts: prompts and steps are timed at every pair.
        what: of prefill, decode and throughput; the last at every context, at the largest batch that fits.
        steps, repeats: see `Bench`.
        prompt_tokens: prompts of more tokens than this, all rows together, are left out.
        overlap: how selections of neighbouring tokens go together in prompts: `own` leaves them to the model,
            `text` puts synthetic ones there that overlap as in real text. For random weights, which select at random.
    """

    batches: Sequence[int] = (1, 8)
    contexts: Sequence[int] = (8192, 32_768)
    what: Sequence[str] = WHATS
    steps: int = 32
    repeats: int = 3
    prompt_tokens: int = 262_144
    overlap: str = "own"

    def __post_init__(self) -> None:
        if wrong := [name for name in self.what if name not in WHATS]:
            raise HyconvertError(f"'{wrong[0]}' is nothing to measure; choose from {', '.join(WHATS)}")
        if self.overlap not in ("own", "text"):
            raise HyconvertError(f"overlap '{self.overlap}' is not known; use own or text")
        if min((*self.batches, *self.contexts, self.steps, self.repeats), default=0) < 1:
            raise HyconvertError("batches, contexts, steps and repeats must be at least 1")


def bench(
    target: str,
    subjects: Sequence[Subject],
    grid: Grid,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_dtype: str | None = None,
    file: Path | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measure models one after the other.

    Args:
        target: name for the report.
        subjects: from `find_subjects`.
        grid: what to measure.
        device: where; auto is a GPU if there is one. Elsewhere than on a GPU everything runs on the references, which
            are written to be right: such times say nothing.
        dtype: of weights and caches; auto is bfloat16 on a GPU, float32 elsewhere.
        kv_dtype: "fp8" for long caches in FP8, as for `Decoder`; None is `dtype`.
        file: JSON file, written row by row.
        progress: one step per row.

    Raises:
        CheckpointError: the weights do not fit, or cannot be read.
        HyconvertError: the device cannot read FP8; or the grid asks for more tokens than the model has positions for.
    """
    where = pick_device(device)
    chosen = _dtype(dtype, where)
    check_kv_dtype(kv_dtype, where)
    limit = min(subject.config.max_position_embeddings for subject in subjects)
    longest = max(grid.contexts)
    if longest > limit:
        raise HyconvertError(
            f"contexts of {longest} tokens are more than {target}'s {limit} positions; use fewer"
        )
    on_gpu = where.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(where)
    ceilings = Ceilings.measure() if on_gpu else None
    report = BenchReport(
        target, torch.cuda.get_device_name(where) if on_gpu else "cpu, on the references",
        str(chosen).removeprefix("torch.") + (f", long caches in {kv_dtype}" if kv_dtype else ""),
        {subject.name: subject.plan.line for subject in subjects if subject.plan}, versions(),
        None if ceilings is None else {"bytes_per_s": ceilings.bandwidth, "flops_per_s": ceilings.rate}, file=file,
    )  # fmt: skip
    pairs = len(grid.batches) * len(grid.contexts)
    count = {"prefill": pairs, "decode": pairs, "throughput": len(grid.contexts)}
    with progress("bench", len(subjects) * sum(count[what] for what in grid.what)) as step:
        for subject in subjects:
            model = subject.build(where, chosen)
            written = text_prompts(subject.path)
            measured = Bench(
                subject.name, read_network(model), ceilings, steps=grid.steps, repeats=grid.repeats,
                kv_dtype=kv_dtype,
            )  # fmt: skip
            _measure(measured, grid, report, step, written)
            del model, measured
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    return report


def _measure(
    measured: Bench, grid: Grid, report: BenchReport, step: Any, written: Callable[[int, int], Tensor | None]
) -> None:
    for what in grid.what:
        for context in grid.contexts:
            if what == "throughput":
                report.add(measured.throughput(context, most=4096 if measured.on_gpu else max(grid.batches)))
                step(f"{measured.name} {what} {context}")
                continue
            for batch in grid.batches:
                if what == "decode":
                    report.add(measured.decode(batch, context))
                elif batch * context <= grid.prompt_tokens:
                    report.add(_prefill(measured, batch, context, grid.overlap, written(batch, context)))
                step(f"{measured.name} {what} {batch} x {context}")


def _prefill(measured: Bench, batch: int, context: int, overlap: str, written: Tensor | None) -> Row:
    network = measured.network
    if written is not None:
        return measured.prefill(written, note="built-in text")
    ids = prompts(network.embedding.shape[0], batch, context)
    if overlap == "own" or not any(block.scored for block in network.blocks):
        return measured.prefill(ids)
    select = correlated(network, batch, context)
    return measured.prefill(ids, select=select, note="synthetic selections that overlap as in text")


def prompts(vocabulary: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [B, T]."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def text_prompts(path: str | None) -> Callable[[int, int], Tensor | None]:
    """Token ids [B, T] of the built-in text for a model with weights; None without, or where there is too little."""

    def written(batch: int, length: int) -> Tensor | None:
        if path is None or not Path(path, "tokenizer.json").is_file():
            return None
        from transformers import AutoTokenizer

        from hyconvert.data import read_texts, token_blocks

        tokenizer = AutoTokenizer.from_pretrained(path)
        try:
            rows = token_blocks(
                read_texts(None), tokenizer, sequences=batch, length=length, name="built-in text"
            )
        except DataError:
            return None
        return rows if len(rows) == batch else None

    return written


def versions() -> dict[str, str]:
    """Of what the times depend on."""
    import transformers

    import hyconvert

    found = {"hyconvert": hyconvert.__version__, "torch": torch.__version__}
    found["transformers"] = transformers.__version__
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise CheckpointError(f"dtype '{name}' is not known; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]
