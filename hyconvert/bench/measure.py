"""Timing one model on the decode loop: prompts, steps, and the largest batch that fits."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from hyconvert.bench.roofline import Ceilings, prefill_work, step_work
from hyconvert.generation import Decoder
from hyconvert.generation.attention import DenseWay
from hyconvert.generation.network import Network
from hyconvert.kv import base_kv_bytes, kv_bytes

RESERVE = 768 << 20
"""Bytes that the largest batch is expected to leave free on a GPU: for a prompt's piece, and for a step."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        model: `dense`, or the converted model's name.
        what: `prefill`, `decode`, or `throughput` (decoding at the largest batch that fits).
        batch, context: sequences, and tokens of each before what is timed.
        seconds: of the prompt, or of one step; the median.
        tokens_per_second: read, or written.
        kv_bytes: of the caches, by the allocator's own count on a GPU.
        peak_bytes: the most that was allocated, weights among it; None off the GPU.
        floor_seconds: the least that this card would take by its measured rates; None without.
        note: how; which attention a dense layer decoded with, for one.
        error: why there is no number.
    """

    model: str
    what: str
    batch: int
    context: int
    seconds: float | None = None
    tokens_per_second: float | None = None
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    floor_seconds: float | None = None
    note: str | None = None
    error: str | None = None

    @property
    def roofline(self) -> float | None:
        """The floor over the time."""
        return self.floor_seconds / self.seconds if self.floor_seconds and self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"roofline": self.roofline}


class Bench:
    """Measurements of one model.

    Args:
        name: for the rows.
        network: the model.
        ceilings: of the card, for floors; None for none.
        steps: steps per timing.
        repeats: timings, whose median counts.
        kv_dtype: of the long caches, as for `Decoder`.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        ceilings: Ceilings | None = None,
        *,
        steps: int = 32,
        repeats: int = 3,
        kv_dtype: str | None = None,
    ) -> None:
        self.name, self.network, self.ceilings = name, network, ceilings
        self.steps, self.repeats, self.kv_dtype = steps, repeats, kv_dtype
        self.fastest: dict[tuple[int, int], DenseWay | None] = {}
        """How a full layer without readers decoded fastest, by batch and context."""

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on one."""
        return self.network.device.type == "cuda"

    def prefill(
        self,
        ids: Tensor,
        *,
        select: Callable[[Tensor, int], Tensor] | None = None,
        note: str | None = None,
    ) -> Row:
        """Time reading prompts ids [B, T]; `select` as in `Pass`."""
        batch, length = ids.shape
        with self._row("prefill", batch, length, note) as row:
            decoder = self._decoder(batch, length, row)
            decoder.select = select
            ids = ids.to(self.network.device)
            if self.on_gpu or length <= 4096:
                decoder.prefill(ids)  # compiles kernels and sets memory aside
                if decoder.reads_by_graph(length):
                    decoder.prefill(ids)  # captures it
            times: list[float] = []
            while len(times) < self.repeats and sum(times) < 4:  # seconds
                times.append(self._time(lambda: decoder.prefill(ids)))
            seconds = statistics.median(times)
            floor = self._floor(prefill_work, batch, length)
            row |= {"seconds": seconds, "tokens_per_second": batch * length / seconds, "floor_seconds": floor}
        return self._finish(row)

    def decode(self, batch: int, context: int, *, what: str = "decode") -> Row:
        """Time steps of `batch` rows after `context` tokens of random keys and values.

        Where a full layer has no readers (in a dense model, all of them) its attention is PyTorch's best or our own
        split-key kernel, whichever is faster.
        """
        with self._row(what, batch, context) as row:
            decoder = self._decoder(batch, context + self.steps + 1, row)
            ways: dict[str, DenseWay | None] = {"split keys": None}
            own = self.kv_dtype is None  # PyTorch's attention reads no FP8
            if own and self.on_gpu and any(b.kind == "full" and not b.scored for b in self.network.blocks):
                ways["cuDNN"] = DenseWay(context, [SDPBackend.CUDNN_ATTENTION])
                ways["flash"] = DenseWay(context, [SDPBackend.FLASH_ATTENTION])
            if what == "throughput" and self.on_gpu:
                # A batch fits if its prompts can be read beside a step's graph.
                decoder.assume(context)
                decoder.step()
                decoder.try_prompts(context)
            times: dict[str, float] = {}
            slower: list[str] = []
            for way, decoder.dense in ways.items():
                decoder.forget_graph()
                try:
                    times[way] = self._steps(decoder, context)
                except (
                    RuntimeError
                ) as error:  # this backend cannot; the first one can, unless memory runs out
                    if not times:
                        raise
                    slower.append(f"{way} failed: {_first_line(error)}")
            way = min(times, key=times.__getitem__)
            slower += [f"{name} {took * 1e3:.3f} ms" for name, took in times.items() if name != way]
            self.fastest[batch, context] = ways[way]
            note = way + (f" ({', '.join(slower)})" if slower else "")
            row |= {"seconds": times[way], "tokens_per_second": batch / times[way], "note": note}
            row["floor_seconds"] = self._floor(partial(step_work, kv_dtype=self.kv_dtype), batch, context)
        return self._finish(row)

    def throughput(self, context: int, *, most: int = 4096) -> Row:
        """Time steps at the largest batch that fits on the GPU at `context` tokens; off it, at `most` rows.

        One fits if steps run and a prompt of so many tokens can be read beside them: the expected batch is tried, and
        smaller ones until one does.
        """
        batch = min(most, self.largest_batch(context)) if self.on_gpu else most
        for _ in range(16):
            row = self.decode(max(1, batch), context, what="throughput")
            if row.error is None or batch <= 1 or "memory" not in row.error:
                return row
            batch -= max(1, batch // 64)
        return row

    def largest_batch(self, context: int) -> int:
        """Sequences whose caches should fit into the GPU's memory beside the weights and a reserve."""
        self._collect()
        device = self.network.device
        free, _ = torch.cuda.mem_get_info(device)
        holes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # between weights
        return int((free + holes - RESERVE) // self.row_bytes(context + self.steps + 1))

    def row_bytes(self, length: int) -> int:
        """Bytes of one sequence's preallocated cache."""
        count = kv_bytes if hasattr(self.network.config, "get_plan") else base_kv_bytes
        size = torch.empty((), dtype=self.network.dtype).element_size()
        fp8 = self.kv_dtype is not None
        return sum(count(self.network.config, length, dtype_bytes=size, static=True, fp8=fp8))

    def profile(
        self, batch: int, context: int, *, dense: DenseWay | None = None, top: int = 25
    ) -> list[dict[str, Any]]:
        """Kernels of a decoding step by time: name, calls per step, microseconds per step and their share.

        Steps that are timed after this in the same process may be slowed by the profiler.
        """
        from torch.profiler import ProfilerActivity, profile

        self._collect()
        decoder = Decoder(
            self.network, batch=batch, max_length=context + self.steps + 1, kv_dtype=self.kv_dtype
        )
        decoder.dense = dense
        decoder.assume(context)
        decoder.step()
        steps = 5
        activities = [ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU]
        with profile(activities=activities) as trace:
            for _ in range(steps):
                decoder.step()
            self._wait()
        rows = []
        for event in trace.key_averages():
            if self.on_gpu and "CPU" in str(event.device_type):
                continue  # what launches kernels would count them again
            spent = event.self_device_time_total if self.on_gpu else event.self_cpu_time_total
            if spent:
                rows.append({"kernel": event.key, "calls": event.count / steps, "us": spent / steps})
        total = sum(row["us"] for row in rows)
        rows.sort(key=lambda row: -row["us"])
        return [{**row, "share": row["us"] / total} for row in rows[:top]]

    def _steps(self, decoder: Decoder, context: int) -> float:
        """Seconds per step."""
        times = []
        for _ in range(self.repeats):
            decoder.assume(context)
            decoder.step()  # compiles and captures the first time
            began = self._time(lambda: [decoder.step() for _ in range(self.steps)])
            times.append(began / self.steps)
        return statistics.median(times)

    def _decoder(self, batch: int, length: int, row: dict[str, Any]) -> Decoder:
        decoder = Decoder(self.network, batch=batch, max_length=length, kv_dtype=self.kv_dtype)
        counted = decoder.caches.allocated
        row["kv_bytes"] = decoder.caches.nbytes if counted is None else counted
        return decoder

    def _floor(self, count: Callable[..., Any], batch: int, context: int) -> float | None:
        return self.ceilings.floor(count(self.network, batch, context)) if self.ceilings else None

    @contextmanager
    def _row(self, what: str, batch: int, context: int, note: str | None = None) -> Iterator[dict[str, Any]]:
        """A row to fill; memory that runs out is a row too."""
        self._collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.network.device)
        row = {"model": self.name, "what": what, "batch": batch, "context": context, "note": note}
        try:
            yield row
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            row["error"] = f"out of memory: {_first_line(error)}"
        if self.on_gpu:
            row["peak_bytes"] = torch.cuda.max_memory_allocated(self.network.device)

    def _finish(self, row: dict[str, Any]) -> Row:
        self._collect()
        return Row(**row)

    def _collect(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.network.device)

    def _time(self, function: Callable[[], object]) -> float:
        self._wait()
        if not self.on_gpu:
            began = time.perf_counter()
            function()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize(self.network.device)
        return float(begin.elapsed_time(end)) / 1e3


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, of the allocator or of a library that takes its own."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def correlated(
    network: Network, batch: int, length: int, keep: float = 0.953, seed: int = 0
) -> Callable[[Tensor, int], Tensor]:
    """A `select` that puts synthetic selections in the place of a random model's.

    A model with random weights picks blocks almost independently from one token to the next, which is the worst case
    for prompts; in a trained one neighbours share most of them. Each selected block is, with probability `keep`, the
    one that the query before had there, else drawn anew from those that the query may see. With the default 32 queries
    of 32k or 128k tokens want 2.1 or 2.3 times k blocks; Q4 SmolLM2's wanted 2.5 on text of 8k (`selections.json`).
    """
    device = network.device
    block = next(b for b in network.blocks if b.scored)
    made: list[Tensor] = []

    def select(indices: Tensor, at: int) -> Tensor:
        if not made:
            generator = torch.Generator(device).manual_seed(seed)
            shape = (1, block.groups, length, network.topk)
            fresh = torch.rand(shape, device=device, generator=generator)
            renew = torch.rand(shape, device=device, generator=generator) >= keep
            t = torch.arange(length, device=device)[:, None]
            origin = torch.where(renew, t, 0).cummax(2).values
            count = ((t - block.window).div(network.block_size, rounding_mode="floor") + 1).clamp(min=0)[:, 0]
            seen = count[origin]
            drawn = torch.where(seen > 0, (fresh.gather(2, origin) * seen).long(), -1)
            made.append(drawn.sort(-1).values.to(torch.int32))
        return made[0][:, :, at : at + indices.shape[2]].expand(len(indices), -1, -1, -1).contiguous()

    assert batch >= 1
    return select
