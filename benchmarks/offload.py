"""What keeping full layers' keys and values in pinned host memory would cost, by the measured bus to the host.

    python -m benchmarks.offload [--shape Qwen3-8B] [--out FILE]      # under a minute

hyconvert has no such option; this says where one would pay. Measured: copies from pinned memory alone and beside
products that read the GPU's memory, what the copies cost those, and a kernel that gathers selected blocks straight from
pinned memory. From that, the least a step could take: every oracle reads all its keys at every token, so all full
layers' keys and values cross the bus once per step. Copies are taken to be hidden behind the step perfectly, staged in
two buffers of one layer each, and sparse layers to read their blocks from the buffer at no cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from hyconvert.bench.measure import RESERVE
from hyconvert.bench.roofline import Ceilings, step_work
from hyconvert.bench.targets import Subject, find_subjects
from hyconvert.errors import HyconvertError
from hyconvert.generation.network import read_network
from hyconvert.kv import kv_bytes

K = 1024
GROUPS, DIM, BLOCK, TOPK, TOKENS, ROWS = 8, 128, 64, 16, 32 * K, 8  # of the gather: a full layer of Qwen3-8B
RATIOS, CONTEXTS, BATCHES = (3, 11), (32 * K, 128 * K), (1, 8)


@dataclass(frozen=True)
class Bus:
    """Measured bytes per second from pinned memory to the GPU, alone and beside a load; what that does to the load."""

    alone: float
    loaded: float
    slowdown: float
    """Time of the load beside copies over its time alone."""
    overlapped: bool
    """Whether what ran beside each timing lasted until its end; if not, the two numbers above flatter."""


@triton.jit
def _gather(source, indices, target, per_head, COUNT: tl.constexpr, SIZE: tl.constexpr, PIECE: tl.constexpr):
    """Copy block `indices[h, i]` of `source [heads, blocks, SIZE]` to `target [heads, COUNT, SIZE]`, piece by piece."""
    at = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    block = tl.load(indices + at).to(tl.int64)
    numbers = tl.load(source + at // COUNT * per_head + block * SIZE + offsets)
    tl.store(target + at * SIZE + offsets, numbers)


def gather(source: torch.Tensor, indices: torch.Tensor, target: torch.Tensor) -> None:
    """Blocks of `source [heads, blocks, SIZE]` (pinned memory will do) by `indices [heads, COUNT]` into `target`."""
    (heads, count), size, piece = indices.shape, source.shape[2], min(2048, source.shape[2])
    _gather[(heads * count, size // piece)](
        source, indices, target, source.stride(0), COUNT=count, SIZE=size, PIECE=piece
    )


@cache
def streams() -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two, always the same: a product's first run on a stream sets memory aside."""
    return torch.cuda.Stream(), torch.cuda.Stream()


def seconds(work: Callable[[], object], beside: Callable[[], object] | None = None) -> tuple[float, bool]:
    """Seconds of `work` while `beside` runs on a stream of its own, and whether that outlasted it."""
    aside, main = streams()
    begin, end, other = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(aside):
        if beside is not None:
            beside()
        other.record()
    with torch.cuda.stream(main):
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3, bool(end.elapsed_time(other) > 0)


def measure_bus(pinned: torch.Tensor) -> Bus:
    """Copies of `pinned`, which is filled, and products of a vector with a 2 GiB matrix, alone and side by side."""
    landing = torch.empty_like(pinned, device="cuda").normal_()
    pinned.copy_(landing)
    matrix = torch.empty(32 * K, 32 * K, device="cuda", dtype=torch.bfloat16).normal_()
    vector = torch.randn(1, 32 * K, device="cuda", dtype=torch.bfloat16)

    def copies(count: int) -> None:
        for _ in range(count):
            landing.copy_(pinned, non_blocking=True)

    def products(count: int) -> None:
        for _ in range(count):
            torch.nn.functional.linear(vector, matrix)

    def run(work: Callable[[int], None], count: int) -> Callable[[], None]:
        return partial(work, count)

    seconds(run(copies, 1), run(products, 3))
    seconds(run(products, 3), run(copies, 1))
    copy, product = seconds(run(copies, 8))[0] / 8, seconds(run(products, 100))[0] / 100
    # Beside goes about twice as much; but fewer than a thousand launches may wait on a stream.
    loaded, covered = seconds(run(copies, 8), run(products, min(800, int(16 * copy / product) + 1)))
    slowed, too = seconds(run(products, 100), run(copies, int(200 * product / copy) + 2))
    size = pinned.nbytes
    return Bus(size / copy, 8 * size / loaded, slowed / (100 * product), covered and too)


def measure_gather(pinned: torch.Tensor, rows: int) -> dict[str, float]:
    """Seconds to gather the selected blocks of one sparse layer's keys and values for `rows` sequences."""
    heads, blocks, size = 2 * rows * GROUPS, TOKENS // BLOCK, BLOCK * DIM
    source = pinned[: heads * blocks * size].view(heads, blocks, size)
    draws = [torch.rand(heads, blocks).topk(TOPK).indices.sort(-1).values.int() for _ in range(20)]
    target = torch.empty(heads, TOPK, size, device="cuda", dtype=pinned.dtype)
    on_device = [draw.cuda() for draw in draws]
    gather(source, on_device[0], target)
    want = source[torch.arange(heads)[:, None], draws[0].long()]
    if not torch.equal(target.cpu(), want):
        raise RuntimeError("the gather from pinned memory read something else")

    def every() -> None:
        for draw in on_device:
            gather(source, draw, target)

    each = seconds(every)[0] / len(draws)
    return {"rows": rows, "seconds": each, "bytes_per_s": target.nbytes / each}


class Plan:
    """One converted model's memory and least times, by a card's and its bus's rates."""

    def __init__(self, subject: Subject, memory: float) -> None:
        model = subject.build(torch.device("meta"), torch.bfloat16)
        self.name, self.config, self.plan = subject.name, subject.config, subject.plan
        self.weights = sum(x.nbytes for x in model.parameters())
        self.room = memory - RESERVE - self.weights
        self.network = read_network(model)

    def bytes(self, batch: int, context: int) -> tuple[int, int, int]:
        """Of one step's caches: all full layers' together, one full layer's, and all the others'."""
        assert self.plan is not None
        every = kv_bytes(self.config, context + 1, batch=batch, static=True)
        long = [
            x for x, layer in zip(every, self.plan.layers, strict=True) if layer.kind in ("full", "reuse")
        ]
        return sum(long), max(long, default=0), sum(every) - sum(long)

    def fits(self, batch: int, context: int, offload: bool = False) -> bool:
        """Whether the caches fit on the GPU; with `offload` the rings and two buffers of one full layer each."""
        full, layer, rings = self.bytes(batch, context)
        return bool((min(full, 2 * layer) if offload else full) + rings <= self.room)

    def step(self, ceilings: Ceilings, batch: int, context: int) -> float:
        """Least seconds of a step from caches on the GPU."""
        return ceilings.floor(step_work(self.network, batch, context))

    def row(self, ceilings: Ceilings, bus: Bus, batch: int, context: int) -> dict[str, Any]:
        """A step with and without offload."""
        full, _, _ = self.bytes(batch, context)
        least, copy = self.step(ceilings, batch, context), full / bus.loaded
        return {
            "plan": self.name, "context": context, "batch": batch, "device_s": least, "bus_s": copy,
            "offload_s": max(least, copy), "fits": self.fits(batch, context), "full_bytes": full,
        }  # fmt: skip

    def hidden(self, ceilings: Ceilings, bus: Bus, batch: int, context: int) -> int:
        """The most rows whose caches beyond the GPU's memory cross the bus within the step: offload of part of them."""

        def late(rows: int) -> bool:
            full, _, rings = self.bytes(rows, context)
            return bool((full + rings - self.room) / bus.loaded > self.step(ceilings, rows, context))

        return largest(lambda rows: not late(rows), batch)


def largest(true_of: Callable[..., bool], known: int = 0) -> int:
    """The largest number that this is true of, if it is of all up to there, `known` among them."""
    above = known + 1
    while true_of(above):
        known, above = above, 2 * above
    while above - known > 1:
        middle = (known + above) // 2
        known, above = (middle, above) if true_of(middle) else (known, middle)
    return known


def estimate(plan: Plan, ceilings: Ceilings, bus: Bus) -> list[dict[str, Any]]:
    """Rows of one plan: `step` at fixed batches and the two largest, `limit` of contexts."""
    found = []
    for context in CONTEXTS:
        most = largest(partial(plan.fits, context=context))
        more = largest(partial(plan.fits, context=context, offload=True), most)
        batches = {**{str(batch): batch for batch in BATCHES}, "largest": most, "largest offloaded": more}
        best = most / plan.step(ceilings, most, context) if most else 0.0
        for label, batch in batches.items():
            if not batch:
                continue
            row = plan.row(ceilings, bus, batch, context)
            row["gain"] = batch / row["offload_s"] / best if best else None
            found.append({"what": "step", "label": label, **row})
        rows = plan.hidden(ceilings, bus, most, context)
        gain = rows / plan.step(ceilings, rows, context) / best if best and rows else None
        found.append(
            {
                "what": "part",
                "plan": plan.name,
                "context": context,
                "batch": rows,
                "on_device": most,
                "gain": gain,
            }
        )
    for batch in BATCHES:
        near = largest(partial(plan.fits, batch))
        far = largest(partial(plan.fits, batch, offload=True), near)
        row = plan.row(ceilings, bus, batch, near + 1)
        found.append({"what": "limit", **row, "offload_context": far})
    return found


def show(row: dict[str, Any]) -> str:
    """One line of a row."""
    gain = f"{row['gain']:.3f}" if row.get("gain") is not None else "-"
    if row["what"] == "part":
        return (
            f"{row['plan']:>5} {row['context'] // K:4}k  only what the bus can hide: {row['batch']} instead of "
            f"{row['on_device']} rows, at best {gain} times the tokens per second"
        )
    if row["what"] == "limit":
        return (
            f"{row['plan']:>5}  {row['batch']} row(s): from {row['context']:,} tokens on not on the GPU (to "
            f"{row['offload_context']:,} with offload); a step then takes at least {row['offload_s']:.2f} s"
        )
    return (
        f"{row['plan']:>5} {row['context'] // K:4}k {row['batch']:5} {row['label']:18} {row['device_s'] * 1e3:9.2f} ms"
        f"{'' if row['fits'] else ' (does not fit)':15} bus {row['bus_s'] * 1e3:10.2f} ms"
        f"  offload {row['offload_s'] / row['device_s']:6.1f} times as long, {gain} of the best tokens per second"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="Qwen3-8B")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "offload.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    try:
        subjects = find_subjects(args.shape, uniform=RATIOS)
    except HyconvertError as error:
        print(error, file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ceilings = Ceilings.measure()
    torch.cuda.empty_cache()
    pinned = torch.empty(2 * ROWS * GROUPS * TOKENS * DIM, dtype=torch.bfloat16, pin_memory=True)  # 1 GiB
    bus = measure_bus(pinned)
    torch.cuda.empty_cache()
    memory = torch.cuda.get_device_properties().total_memory
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "shape": args.shape, "memory": memory, "copy_bytes_per_s": ceilings.bandwidth,
        "bf16_flops_per_s": ceilings.rate, "bus": asdict(bus), "gather": [], "rows": [],
    }  # fmt: skip

    def save() -> None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    save()
    print(
        f"{report['device']}: copy {ceilings.bandwidth / 1e12:.2f} TB/s, pinned to GPU {bus.alone / 1e9:.1f} GB/s, "
        f"beside a load {bus.loaded / 1e9:.1f} GB/s, which takes {bus.slowdown:.3f} times as long"
        f"{'' if bus.overlapped else ' (did not overlap to the end)'}", flush=True,
    )  # fmt: skip
    for rows in (1, ROWS):
        try:
            found: dict[str, Any] = measure_gather(pinned, rows)
            speed = f"{found['seconds'] * 1e6:.0f} us, {found['bytes_per_s'] / 1e9:.1f} GB/s"
        except Exception as error:
            found = {"rows": rows, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            speed = found["error"]
        report["gather"].append(found)
        save()
        print(
            f"{TOPK} blocks of {BLOCK} per KV head gathered from pinned memory, {rows} row(s): {speed}",
            flush=True,
        )
    for subject in subjects:
        for row in estimate(Plan(subject, memory), ceilings, bus):
            report["rows"].append(row)
            save()
            print(show(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
