"""Whole models on one GPU: decoding, prompts, throughput and memory, dense beside converted on the same decode loop.

    python -m benchmarks.end_to_end                       # everything, about eight minutes on an H100
    python -m benchmarks.end_to_end --only decode prefill # parts: decode, prefill, small, linear
    python -m benchmarks.end_to_end --only decode --profile

Qwen3-8B's shape with random weights in bfloat16, dense, 1:3 and 1:11; and SmolLM2-135M's shape at 8k with seven
full layers (`--model FOLDER` for a real converted one). Decoding starts from caches of random numbers. A random model
selects blocks almost independently from token to token, the worst case for prompts, so prompts are timed with synthetic
selections that overlap about as a trained model's did at 8k (`correlated`), and with the model's own. Every row is
saved at once, the most important first. The dense model decodes by the fastest of cuDNN, flash attention and our
split-key kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.check_decode_loop import check
from hyconvert.bench.measure import Bench, Row, correlated
from hyconvert.bench.report import BenchReport
from hyconvert.bench.roofline import Ceilings
from hyconvert.bench.run import prompts, text_prompts, versions
from hyconvert.bench.targets import DENSE, Subject, find_subjects
from hyconvert.generation.attention import DenseWay
from hyconvert.generation.network import read_network
from hyconvert_kernels import linear
from hyconvert_kernels.decode.sparse import sparse_decode
from tests.modeling.tiny import base_model, converted, plan_of

K = 1024
PARTS = ("decode", "prefill", "small", "linear")
SMALL_PLAN = "F*3 S2*4 F S7*8 F S16 F S18 F S20*9"
ASKED = {
    ("decode", 8, 32 * K, "1:3"): 1.8, ("decode", 8, 32 * K, "1:11"): 2.3,
    ("decode", 1, 128 * K, "1:3"): 1.5, ("decode", 1, 128 * K, "1:11"): 1.8,
    ("throughput", 0, 32 * K, "1:3"): 3.0, ("throughput", 0, 32 * K, "1:11"): 7.0,
    ("prefill", 1, 128 * K, "1:3"): 1.7, ("prefill", 1, 128 * K, "1:11"): 2.3,
}  # fmt: skip


class Run:
    """One model after the other on the GPU, and their rows in one report."""

    def __init__(self, report: BenchReport, ceilings: Ceilings, profiles: Path | None) -> None:
        self.report, self.ceilings, self.profiles = report, ceilings, profiles
        self.fastest: dict[tuple[str, int, int], DenseWay | None] = {}
        self.began = time.monotonic()

    def with_model(self, subject: Subject, measure: Callable[[Bench], None], **options: Any) -> None:
        """Build a model, measure it, and let go of it; a failure is printed, and the run goes on."""
        if subject.plan:
            self.report.plans[subject.name] = subject.plan.line
        try:
            model = subject.build(torch.device("cuda"), torch.bfloat16)
            bench = Bench(subject.name, read_network(model), self.ceilings, **options)
            measure(bench)
            self.fastest |= {(subject.name, *key): way for key, way in bench.fastest.items()}
        except Exception as error:
            self.fail(error, subject.name, 0, 0)
        model = bench = None
        gc.collect()
        with contextlib.suppress(RuntimeError):  # after an illegal access nothing works; the rows are saved
            torch.cuda.empty_cache()

    def fail(self, error: Exception, model: str, batch: int, context: int) -> None:
        """Print a failure with where it happened, and save it as a row."""
        print(*traceback.format_exception(error)[-12:], sep="", flush=True)
        self.add(Row(model, "failed", batch, context, error=f"{type(error).__name__}: {str(error)[:300]}"))

    def row(self, bench: Bench, batch: int, context: int, measure: Callable[[], Row]) -> None:
        """Measure one row; if that fails, the next one is measured all the same."""
        try:
            self.add(measure())
        except Exception as error:
            self.fail(error, bench.name, batch, context)

    def decode(self, bench: Bench, batch: int, context: int) -> None:
        """A row of steps."""
        self.row(bench, batch, context, lambda: bench.decode(batch, context))

    def add(self, row: Row) -> None:
        """Save and print a row."""
        self.report.add(row)
        head = f"[{time.monotonic() - self.began:4.0f} s] {row.what:10} {row.model:9} {row.batch:4} x {row.context:7,}"
        if row.seconds is None or row.tokens_per_second is None:
            print(head, row.error, flush=True)
            return
        gain, share = self.report.gain(row), row.roofline
        kv, peak = (row.kv_bytes or 0) / 2**30, (row.peak_bytes or 0) / 2**30
        print(
            f"{head} {row.seconds * 1e3:10.3f} ms {row.tokens_per_second:10.0f}/s"
            f"{f'  {gain:5.2f}x' if gain else '':8}{f'  {share:4.0%} of roofline' if share else ''}"
            f"  KV {kv:6.2f}  peak {peak:6.2f} GiB  {row.note or ''}", flush=True,
        )  # fmt: skip

    def profile(self, subjects: list[Subject], *pairs: tuple[int, int]) -> None:
        """Kernels of a step by time, if that was asked for: at the end, for the profiler may slow what comes after.

        The largest batches are among them.
        """
        if self.profiles is None:
            return

        def measure(bench: Bench) -> None:
            largest = [
                (row.batch, row.context)
                for row in self.report.rows
                if (row.model, row.what) == (bench.name, "throughput") and row.error is None
            ]
            for batch, context in (*pairs, *largest):
                self._profile(bench, batch, context)

        for subject in subjects:
            self.with_model(subject, measure)

    def _profile(self, bench: Bench, batch: int, context: int) -> None:
        try:
            rows = bench.profile(batch, context, dense=self.fastest.get((bench.name, batch, context)))
        except Exception as error:
            self.fail(error, bench.name, batch, context)
            return
        name = f"{self.report.target} {bench.name}, {batch} x {context}"
        known = json.loads(self.profiles.read_text()) if self.profiles.is_file() else {}
        self.profiles.write_text(json.dumps({**known, name: rows}, indent=1) + "\n")
        print(f"  {name}: {sum(row['us'] for row in rows):.0f} us per step in these kernels")
        print(f"  {'us/step':>9} {'share':>5} {'calls':>6}  kernel")
        for row in rows[:14]:
            print(
                f"  {row['us']:9.1f} {row['share']:5.0%} {row['calls']:6.1f}  {row['kernel'][:80]}",
                flush=True,
            )


def decode(run: Run, subjects: list[Subject]) -> None:
    """Steps at 32k of eight rows and at 128k of one, and at the largest batch."""

    def measure(bench: Bench) -> None:
        run.decode(bench, 8, 32 * K)
        run.decode(bench, 1, 128 * K)
        run.row(bench, 0, 32 * K, lambda: bench.throughput(32 * K))
        run.decode(bench, 1, 32 * K)

    for subject in subjects:
        run.with_model(subject, measure)
    run.profile(subjects, (8, 32 * K), (1, 128 * K))


def prefill(run: Run, subjects: list[Subject]) -> None:
    """Prompts of 128k and 32k tokens."""

    def measure(bench: Bench) -> None:
        scored = any(block.scored for block in bench.network.blocks)
        for length in (128 * K, 32 * K):
            ids = prompts(bench.network.embedding.shape[0], 1, length)
            ways: dict[str | None, Any] = {None: None}
            if scored:
                ways = {"selections overlap as in text": correlated(bench.network, 1, length)}
                ways["selections of random weights: nearly independent"] = None
            for note, select in ways.items():
                measured = functools.partial(bench.prefill, ids, select=select, note=note)
                run.row(bench, 1, length, measured)

    for subject in subjects:
        run.with_model(subject, measure, repeats=2)


def small(run: Run, model: str | None) -> None:
    """A small model at 8k, every batch from 1 to 64."""
    settings = {} if model else {"plans": [SMALL_PLAN], "topk": 8}
    found = find_subjects(model or "SmolLM2-135M", base=True, **settings)
    subjects = [Subject(x.name if x.name == DENSE else "converted", x.config, x.path) for x in found]
    text = text_prompts(model)

    def measure(bench: Bench) -> None:
        for batch in (1, 2, 4, 8, 16, 32, 64):
            run.decode(bench, batch, 8 * K - 256)
        for batch in (1, 2, 4, 8):
            for length in (2 * K, 8 * K):
                ids = text(batch, length)
                note = "random tokens" if ids is None else "built-in text"
                if ids is None:
                    ids = prompts(bench.network.embedding.shape[0], batch, length)
                run.row(bench, batch, length, functools.partial(bench.prefill, ids, note=note))

    for subject in subjects:
        run.with_model(subject, measure)
    run.profile(subjects, (1, 8 * K - 256))
    gains = [(run.report.gain(row) or 0.0, row.batch) for row in run.report.rows if row.what == "decode"]
    gains = [pair for pair in gains if pair[0]]
    if gains:
        print("decode at 8k, least gain and its batch: {:.2f} x dense, {}".format(*min(gains)))


def products(path: Path, bandwidth: float) -> None:
    """Our product kernel beside cuBLAS at few rows, on weights too many for the L2 cache, as a graph."""
    rows = []
    shapes = {"q|k|v": (6144, 4096), "o": (4096, 4096), "gate|up": (24576, 4096), "down": (4096, 12288),
              "head": (151936, 4096)}  # fmt: skip
    for name, (count, width) in shapes.items():
        copies = max(1, 400_000_000 // (2 * count * width))
        weights = [torch.randn(count, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for batch in (1, 2, 4, 8, 16):
            x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
            gated = name == "gate|up"

            def run(
                most: int, x: torch.Tensor = x, weights: Any = tuple(weights), gated: bool = gated
            ) -> None:
                for weight in weights:
                    linear(x, weight, gated=gated, most_rows=most)

            ways = {"cuBLAS": 0, "kernel": 16}
            try:
                times = {way: _graphed(lambda m=most, f=run: f(m)) / copies for way, most in ways.items()}
            except Exception:
                traceback.print_exc(limit=-6)
                continue
            least = 2 * count * width / bandwidth
            rows.append({"product": name, "rows": batch, **times, "floor": least})
            print(
                f"{name:8} {batch:3} rows  cuBLAS {times['cuBLAS'] * 1e6:7.1f} us ({least / times['cuBLAS']:4.0%})"
                f"  kernel {times['kernel'] * 1e6:7.1f} us ({least / times['kernel']:4.0%})", flush=True,
            )  # fmt: skip
        path.write_text(json.dumps(rows, indent=1) + "\n")


def value_maps(path: Path) -> None:
    """Sparse decode without and with its value map, at Qwen3-8B's shape and 32k tokens, by splits and by rows."""
    rows: list[dict[str, Any]] = []
    heads, groups, dim, length = 32, 8, 128, 32 * K
    for batch in (1, 2, 4, 8, 16, 64):
        q = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
        near = torch.randn(batch, groups, 128, dim, device="cuda", dtype=torch.bfloat16)
        far = torch.randn(min(batch, 8), groups, length, dim, device="cuda", dtype=torch.bfloat16)
        far = far[torch.arange(batch, device="cuda") % len(far)] if batch > 8 else far
        indices = torch.stack([torch.randperm(500, device="cuda")[:16] for _ in range(batch * groups)])
        indices = indices.sort(-1).values.int().view(batch, groups, 1, 16)
        offset = torch.full((batch,), length - 1, device="cuda")
        start = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
        gate = torch.zeros(batch, heads, 1, device="cuda")
        maps = [torch.randn(heads, dim, dim, device="cuda", dtype=torch.bfloat16) for _ in range(26)]
        out = torch.empty_like(q)
        arguments = (q, near, near, q, far, far, indices, offset, start, gate, out)

        def run(
            rows_per_program: int | None, splits: Any, arguments: Any = arguments, maps: Any = maps
        ) -> None:
            for value_map in maps:
                sparse_decode(
                    *arguments, block_size=64, window=128, scale=dim**-0.5, rows_per_program=rows_per_program,
                    splits=splits, value_map=value_map if rows_per_program else None,
                )  # fmt: skip

        ways = {"no map": (None, None), "map, row by row": (1, None), "map, 16 rows": (16, None)}
        ways |= {f"splits {2 // n or 1} + {16 // n}": (16 if batch >= 8 else 1, (2 // n or 1, 16 // n))
                 for n in (1, 2, 4, 8, 16)}  # fmt: skip
        row: dict[str, Any] = {"rows": batch}
        rows.append(row)
        for way, (per, splits) in ways.items():
            try:
                row[way] = _graphed(lambda f=run, p=per, s=splits: f(p, s)) / len(maps)
            except Exception:
                traceback.print_exc(limit=-6)
        times = "  ".join(f"{way} {time * 1e6:.1f}" for way, time in row.items() if way != "rows")
        print(f"sparse decode, {batch:2} rows, us: {times}", flush=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")


def _graphed(function: Callable[[], object], repeats: int = 20) -> float:
    """Seconds per call under a CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    graph.replay()
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats / 1e3


def verdict(report: BenchReport) -> None:
    """Print what was asked beside what was found."""
    for (what, batch, context, model), asked in ASKED.items():
        for row in report.rows:
            same = (row.what, row.context, row.model) == (what, context, model) and row.batch == (
                batch or row.batch
            )
            gain = report.gain(row)
            if same and gain:
                print(f"{what} {model} at {context // K}k: asked {asked}, found {gain:.2f}  {row.note or ''}")
    dense = {(r.batch, r.context): r.kv_bytes for r in report.rows if r.model == DENSE and r.what == "decode"}
    for row in report.rows:
        theirs = dense.get((row.batch, row.context))
        if row.what == "decode" and row.model != DENSE and theirs and row.kv_bytes:
            print(f"KV {row.model}, {row.batch} x {row.context}: {theirs / row.kv_bytes:.2f} times smaller")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--profile", action="store_true", help="kernels of the decoding steps by time")
    parser.add_argument("--model", help="a converted SmolLM2 for the small part; random weights without")
    parser.add_argument("--shape", default="Qwen3-8B")
    parser.add_argument(
        "--skip-check", action="store_true", help="time without checking the decode loop first"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    args.results.mkdir(parents=True, exist_ok=True)
    if not args.skip_check:
        shape = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 7}
        plan = plan_of("F S0 R0 W F S4 F", block_size=16, topk=3, window=20)
        if bad := check(converted(base_model("qwen3", **shape), plan)):
            print("the decode loop is wrong, so nothing is timed:", *bad, sep="\n  ", file=sys.stderr)
            return 1
    ceilings = Ceilings.measure()
    name = torch.cuda.get_device_name()
    rates = {"bytes_per_s": ceilings.bandwidth, "flops_per_s": ceilings.rate}
    print(
        f"{name}: copy {ceilings.bandwidth / 1e12:.2f} TB/s, product {ceilings.rate / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    profiles = args.results / "profiles.json" if args.profile else None

    def report(target: str, file: str, fresh: set[str]) -> BenchReport:
        """A report that keeps what an earlier run on such a card found of other parts."""
        path = args.results / file
        kept: list[Row] = []
        if path.is_file():
            old = json.loads(path.read_text())
            fields = {field.name for field in dataclasses.fields(Row)}
            kept = [
                Row(**{key: value for key, value in row.items() if key in fields})
                for row in old["rows"]
                if old["device"] == name and row["what"] not in fresh | {"failed"}
            ]
        return BenchReport(target, name, "bfloat16", {}, versions(), rates, rows=kept, file=path)

    fresh = {"decode": {"decode", "throughput"}, "prefill": {"prefill"}}
    large = Run(
        report(args.shape, "end_to_end.json", set().union(*(fresh.get(part, set()) for part in args.only))),
        ceilings, profiles,
    )  # fmt: skip
    subjects = find_subjects(args.shape, uniform=[3, 11], base=True)
    large.report.plans |= {subject.name: subject.plan.line for subject in subjects if subject.plan}
    if "decode" in args.only:
        decode(large, subjects)
    if "prefill" in args.only:
        prefill(large, subjects)
    if "small" in args.only:
        small(
            Run(report("SmolLM2-135M", "end_to_end_small.json", {"decode", "prefill"}), ceilings, profiles),
            args.model,
        )
    if "linear" in args.only:
        products(args.results / "products.json", ceilings.bandwidth)
        value_maps(args.results / "value_maps.json")
    verdict(large.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
