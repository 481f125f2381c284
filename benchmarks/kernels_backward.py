"""Time the backward kernels on one GPU, beside PyTorch's dense attention, FlexAttention and fla-core's NSA.

    python -m benchmarks.kernels_backward [--lengths 8192 32768] [--sections check backward training others]

`check` compares gradients with the references, and nothing is timed if it fails; `backward` times gradients alone, at
the shapes of Qwen3-8B (see `benchmarks.kernels`), and those of PyTorch's backends also under its deterministic setting;
`training` a step's forward and backward of one full and one sparse layer of SmolLM2 (9 query and 3 KV heads of 64, 8
blocks per query, 4096 tokens); `others` the same sparsity by FlexAttention, which reads one set of keys, and by NSA's
selected attention, whose kernels want 16 query heads per KV head (skipped without the package `fla-core`). Selections
are synthetic, and correlated as neighbouring queries' are. In rows of gradients, `same` is 1 if two runs agreed bit for
bit. A failure is a row too, and the run goes on; rows of an earlier run on such a card stay until they are timed again.

First every section runs once with `--warm`, which times nothing, in a process of its own, side by side, to fill the
compilers' caches; `--cold` leaves that out. `--plot FILE` draws saved results, those of `benchmarks.kernels` too (needs
matplotlib, no GPU).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hyconvert_kernels as kernels
from benchmarks.check_kernels import taken
from benchmarks.kernels import BLOCK, WINDOW, D, G, H, selection
from hyconvert_kernels.oracle import backward as oracle_backward

KEEP = 0.97
BACKENDS = (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION))
SECTIONS = ("check", "backward", "training", "others")
WARM_SECONDS = 90
RESULTS = Path(__file__).parent / "results"


class Layer:
    """Inputs of a full and of a sparse layer, and the ops as functions of them."""

    def __init__(self, batch: int, heads: int, groups: int, length: int, dim: int, topk: int) -> None:
        gen = torch.Generator(device="cuda").manual_seed(0)

        def normal(count: int) -> torch.Tensor:
            shape = (batch, count, length, dim)
            x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=gen)
            return x.requires_grad_()

        self.q, self.q_far, self.k, self.v = normal(heads), normal(heads), normal(groups), normal(groups)
        self.k_near, self.v_near = normal(groups), normal(groups)
        self.gate = torch.zeros(batch, heads, length, device="cuda", requires_grad=True)
        self.outer = normal(heads).detach()
        self.topk, self.ratio, self.scale = topk, heads // groups, dim**-0.5
        self.place = (
            torch.zeros(batch, dtype=torch.int64, device="cuda"),
            torch.zeros(batch, length, dtype=torch.int64, device="cuda"),
        )
        self.indices = selection(length, KEEP, batch=batch, groups=groups, topk=topk)
        self.union = self.shared(self.indices)
        self.settings = {"block_size": BLOCK, "window": WINDOW, "scale": self.scale}
        self.reads = (self.q, self.q_far, self.k, self.v, self.k_near, self.v_near, self.gate)

    def shared(self, indices: torch.Tensor) -> kernels.BlockUnion:
        return kernels.tile_union(
            indices, *self.place, slots=self.k.shape[2], block_size=BLOCK, window=WINDOW, ratio=self.ratio,
            transposed=True,
        )  # fmt: skip

    def dense(self) -> torch.Tensor:
        return scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True
        )

    def oracle(self) -> torch.Tensor:
        out, _, _ = kernels.oracle_attention(
            self.q, self.k, self.v, *self.place, with_scores=False, **self.settings
        )
        return out

    def full(self) -> torch.Tensor:
        """A full layer as it trains: attention, selection, and the union for its readers."""
        out, _, indices = kernels.oracle_attention_topk(
            self.q, self.k, self.v, *self.place, topk=self.topk, **self.settings
        )
        self.shared(indices)
        return out

    def far(self) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.block_sparse_attention(
            self.q_far, self.k, self.v, self.indices, *self.place, union=self.union, **self.settings
        )

    def near(self) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.window_attention(
            self.q, self.k_near, self.v_near, *self.place, window=WINDOW, scale=self.scale
        )

    def sparse(self) -> torch.Tensor:
        return kernels.merge_branches(*self.near(), *self.far(), self.gate)


def backward_of(out: torch.Tensor, inputs: Iterable[torch.Tensor], outer: torch.Tensor) -> Callable[[], Any]:
    inputs = tuple(inputs)
    return lambda: torch.autograd.grad(out, inputs, outer, retain_graph=True)


def step_of(function: Callable[[], torch.Tensor], inputs: Iterable[torch.Tensor], outer: torch.Tensor):
    inputs = tuple(inputs)
    return lambda: torch.autograd.grad(function(), inputs, outer)


def failing(error: Exception) -> Callable[[], object]:
    """A function that fails like this, to record."""
    error = error.with_traceback(None)  # which holds tensors

    def fail() -> object:
        raise error

    return fail


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms; without its filling of new memory, which would be timed too."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def gradients(
    table: Any,
    name: str,
    length: int,
    least: float,
    forward: Callable[[], torch.Tensor],
    inputs: Iterable[torch.Tensor],
    outer: torch.Tensor,
    *settings: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    """Record the backward of what `forward` returns, both under `settings`; a forward that fails is a row too."""
    with contextlib.ExitStack() as stack:
        try:
            for setting in settings:
                stack.enter_context(setting())
            run = backward_of(forward(), inputs, outer)
            same = all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
        except Exception as error:
            table.record(name, length, least, failing(error))
            return
        table.record(name, length, least, run, same=float(same))


def backward(length: int, table: Any) -> None:
    """Gradients alone."""
    layer = Layer(1, H, G, length, D, 16)
    own, outer = (layer.q, layer.k, layer.v), layer.outer
    moved = 2 * length * D * (4 * H + 4 * G)
    dense = table.floor(5 * H * D * length**2, moved)  # five products of half the square
    for name, backend in BACKENDS:
        chosen = partial(sdpa_kernel, backend)
        gradients(table, f"SDPA {name} backward", length, dense, layer.dense, own, outer, chosen)
    gradients(table, "oracle backward", length, dense, layer.oracle, own, outer)
    if oracle_backward.on_hopper(layer.q, layer.k):
        name = "oracle backward, portable kernels"
        portable = partial(patch.object, oracle_backward, "HOPPER_SLOTS", math.inf)
        gradients(table, name, length, dense, layer.oracle, own, outer, portable)
    sparse = table.floor(10 * H * D * length * 16 * BLOCK, moved)
    window = table.floor(10 * H * D * length * WINDOW, moved)
    both = sparse + window
    gradients(table, "sparse layer backward", length, both, layer.sparse, layer.reads, outer)
    for name, backend in BACKENDS:
        chosen, name = partial(sdpa_kernel, backend), f"SDPA {name} backward, deterministic"
        gradients(table, name, length, dense, layer.dense, own, outer, chosen, deterministic)
    near, far = (layer.q, layer.k_near, layer.v_near), (layer.q_far, layer.k, layer.v)
    gradients(table, "window backward", length, window, lambda: layer.near()[0], near, outer)
    gradients(table, "sparse branch backward", length, sparse, lambda: layer.far()[0], far, outer)
    table.record("union, transposed", length, 0.0, lambda: layer.shared(layer.indices))


def training(batch: int, table: Any) -> None:
    """A step's forward and backward of SmolLM2's layers at 4096 tokens."""
    heads, groups, dim, length, topk = 9, 3, 64, 4096, 8
    layer = Layer(batch, heads, groups, length, dim, topk)
    own = (layer.q, layer.k, layer.v)
    moved = 2 * batch * length * dim * (6 * heads + 6 * groups)
    dense = table.floor(7 * batch * heads * dim * length**2, moved)
    for name, backend in BACKENDS:
        with sdpa_kernel(backend):
            table.record(
                f"SDPA {name} step, B={batch}", length, dense, step_of(layer.dense, own, layer.outer)
            )
    table.record(f"full layer step, B={batch}", length, dense, step_of(layer.full, own, layer.outer))
    sparse = table.floor(14 * batch * heads * dim * length * (topk * BLOCK + WINDOW), 2 * moved)
    step = step_of(layer.sparse, layer.reads, layer.outer)
    table.record(f"sparse layer step, B={batch}", length, sparse, step)


def flex_mask(layer: Layer) -> Any:
    """The layer's window and selected blocks as a FlexAttention mask of 128-wide tiles, made without the dense mask."""
    from torch.nn.attention.flex_attention import BlockMask

    groups, length = layer.k.shape[1], layer.k.shape[2]
    wide, tiles = 128, length // 128
    if length % wide:
        raise ValueError(f"FlexAttention is timed at multiples of {wide} tokens only, not at {length}")
    chosen = taken(layer.indices[0], length // BLOCK).contiguous()
    touched = chosen.view(groups, tiles, wide, tiles, wide // BLOCK).any(4).any(2)
    at = torch.arange(tiles, device="cuda")
    back = at[:, None] - at
    touched |= (back >= 0) & (back <= -(-WINDOW // wide))
    counts = touched.sum(-1, dtype=torch.int32)
    order = torch.argsort(touched.int(), dim=-1, descending=True, stable=True).int()
    counts, order = (x.repeat_interleave(layer.ratio, 0)[None].contiguous() for x in (counts, order))
    ratio = layer.ratio

    def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
        near = query - key < WINDOW
        return (key <= query) & (near | chosen[h // ratio, query, key // BLOCK])

    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=wide, mask_mod=seen)


def others(length: int, table: Any) -> None:
    """The same sparsity by other libraries."""
    for library in (flex, nsa):
        try:
            library(length, table)
        except Exception as error:
            traceback.print_exc(limit=-6)
            table.record(f"all of {library.__name__}", length, 0.0, failing(error))
        torch.cuda.empty_cache()


def keep_buffers() -> None:
    """Let compiled backwards run more than once on one forward: they would give its saved tensors away."""
    from torch._functorch import config

    config.donated_buffer = False


def flex(length: int, table: Any) -> None:
    """FlexAttention over the window and the selected blocks of one set of keys."""
    from torch.nn.attention.flex_attention import flex_attention

    keep_buffers()
    layer = Layer(1, H, G, length, D, 16)
    own = (layer.q, layer.k, layer.v)
    mask, compiled = flex_mask(layer), torch.compile(flex_attention, dynamic=False)

    def forward() -> torch.Tensor:
        return compiled(*own, block_mask=mask, scale=layer.scale, enable_gqa=True)

    table.record("FlexAttention", length, 0.0, forward)  # with gradients wanted: one compilation fewer
    gradients(table, "FlexAttention backward", length, 0.0, forward, own, layer.outer)


def nsa(length: int, table: Any) -> None:
    """NSA's selected attention beside our sparse branch, where `fla-core` is installed."""
    try:
        from fla.ops.nsa.parallel import ParallelNSAFunction
    except Exception as error:  # missing, or it cannot live with this Triton
        print(f"NSA is skipped: fla-core cannot be imported ({type(error).__name__}: {error})", flush=True)
        return
    keep_buffers()
    layer = Layer(1, 32, 2, length, D, 16)
    far, outer = (layer.q_far, layer.k, layer.v), layer.outer
    own = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (layer.q, layer.k, layer.v))
    blocks = layer.indices.transpose(1, 2).long().sort(-1, descending=True).values  # the -1s come last
    counts, blocks = (blocks >= 0).sum(-1), blocks.clamp(min=0)

    def forward() -> torch.Tensor:
        return ParallelNSAFunction.apply(*own, blocks, counts, BLOCK, layer.scale, None)

    with torch.no_grad():
        table.record("NSA selected, 32/2 heads", length, 0.0, forward)
        table.record("sparse branch, 32/2 heads", length, 0.0, lambda: layer.far()[0])
    theirs = outer.transpose(1, 2).contiguous()
    gradients(table, "NSA selected backward, 32/2 heads", length, 0.0, forward, own, theirs)
    gradients(table, "sparse branch backward, 32/2 heads", length, 0.0, lambda: layer.far()[0], far, outer)


def check() -> bool:
    """Whether gradients at these shapes (of fewer heads) are the references'; prints what is not."""
    from benchmarks.check_kernels import Case, check_backward

    shape = {"heads": 8, "groups": 2, "dim": D, "block": BLOCK, "window": WINDOW, "topk": 16}
    bad, _ = check_backward(Case(length=1500, kind="packed", **shape))
    if bad:
        print("a check failed, so nothing is timed:", *bad, sep="\n  ", file=sys.stderr)
    return not bad


class Warm:
    """Stands in for a table: runs what it would time."""

    def floor(self, operations: float, moved: float) -> float:
        return 0.0

    def record(
        self, name: str, length: int, least: float, function: Callable[[], object], **more: float
    ) -> None:
        try:
            function()
        except Exception as error:
            print(f"{name}, warming: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def results(path: Path) -> Any:
    """A table that keeps rows of an earlier run on such a card and such libraries, until they are timed again."""
    from benchmarks.kernels import Table

    class Results(Table):
        kept: tuple[dict[str, Any], ...] = ()

        def save(self) -> None:
            timed = {(row["name"], row["length"]) for row in self.rows}
            rest = [row for row in self.kept if (row["name"], row["length"]) not in timed]
            found = {**self.header, "rows": [*rest, *self.rows]}
            self.path.write_text(json.dumps(found, indent=1) + "\n")

    table = Results(path)
    if path.is_file():
        old = json.loads(path.read_text())
        if all(old.get(key) == table.header[key] for key in ("device", "torch", "triton")):
            table.kept = tuple(row for row in old["rows"] if "ms" in row)
    return table


def verdict(rows: list[dict[str, Any]], lengths: Iterable[int]) -> None:
    """Print what was asked of the backward beside what was found."""
    times = {(row["name"], row["length"]): row["ms"] for row in rows if "ms" in row}
    for length in lengths:
        theirs = [times.get((f"SDPA {name} backward", length)) for name, _ in BACKENDS]
        best = min((ms for ms in theirs if ms), default=None)
        oracle, sparse = (times.get((f"{name} backward", length)) for name in ("oracle", "sparse layer"))
        if best and oracle:
            print(
                f"{length}: oracle backward {oracle / best:.2f} times the better SDPA's (asked: at most 1.3)"
            )
        if best and sparse:
            print(f"{length}: sparse layer backward {best / sparse:.2f} times as fast (asked: 2 at 32768)")


def warm_up(args: argparse.Namespace) -> dict[str, int]:
    """Run every section once, each in a process of its own; exit statuses by section."""
    jobs = {}
    for section in args.sections:
        numbers = {"--lengths": args.lengths, "--batches": args.batches}
        options = [str(x) for option, values in numbers.items() for x in (option, *values)]
        command = [sys.executable, "-m", "benchmarks.kernels_backward", "--warm", "--sections", section]
        jobs[section] = subprocess.Popen([*command, *options])
    codes, end = {}, time.monotonic() + WARM_SECONDS
    for section, job in jobs.items():
        try:  # the check must finish; what the others leave out compiles later
            codes[section] = job.wait(None if section == "check" else max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.kill()
            codes[section] = job.wait()
            print(f"{section}: warming took more than {WARM_SECONDS} s and was ended", file=sys.stderr)
    return codes


def measure(section: str, size: int, table: Any) -> None:
    """One section at one length (or batch); if it breaks down outside of its rows, that is a row."""
    try:
        {"backward": backward, "training": training, "others": others}[section](size, table)
    except Exception as error:
        traceback.print_exc(limit=-6)
        table.record(f"all of {section}", size, 0.0, failing(error))
    with contextlib.suppress(RuntimeError):  # after an illegal access nothing works; the rows are saved
        torch.cuda.empty_cache()


PLOTTED = {
    "forward": (
        "SDPA flash", "SDPA cuDNN", "oracle with top-k", "oracle with top-k, portable kernel", "FlexAttention",
        "NSA selected, 32/2 heads", "sparse branch, 32/2 heads", "sparse layer, independent",
        "sparse layer, as text at 8k", "window",
    ),
    "backward": (
        "SDPA flash backward", "SDPA cuDNN backward", "oracle backward", "FlexAttention backward",
        "NSA selected backward, 32/2 heads", "sparse branch backward, 32/2 heads", "sparse layer backward",
        "window backward",
    ),
}  # fmt: skip


def plot(sources: Iterable[Path], target: Path) -> None:
    """Time against length, on logarithmic axes, of the rows named in `PLOTTED` that were timed at several lengths."""
    from matplotlib import pyplot

    found = [json.loads(source.read_text()) for source in sources]
    times: dict[str, dict[int, float]] = {}
    for row in (row for table in found for row in table["rows"] if "ms" in row):
        times.setdefault(row["name"], {})[row["length"]] = row["ms"]
    figure, panels = pyplot.subplots(2, 1, figsize=(8, 9))
    for axes, (title, names) in zip(panels, PLOTTED.items(), strict=True):
        for name in names:
            if len(times.get(name, ())) > 1:
                axes.plot(*zip(*sorted(times[name].items()), strict=True), marker="o", label=name)
        ticks = sorted({length for name in names for length in times.get(name, ())})
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
        axes.set_title(f"{title}, {' and '.join(sorted({table['device'] for table in found}))}")
        axes.set_xticks(ticks, [f"{length // 1024}k" for length in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False)
    figure.tight_layout()
    figure.savefig(target)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8], help="rows of a training step")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--warm", action="store_true", help="run once, time nothing")
    parser.add_argument("--cold", action="store_true", help="compile as it goes, in one process")
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels_backward.json")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.plot:
        plot((RESULTS / "kernels.json", args.json), args.plot)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    sections = [section for section in args.sections if section != "check"]
    if args.warm or args.cold:
        if "check" in args.sections and not check():
            return 1
    elif warm_up(args).get("check"):
        print("the check failed or broke down, so nothing is timed", file=sys.stderr)
        return 1
    if not sections:
        return 0
    table: Any = Warm() if args.warm else results(args.json)
    for section in sections:
        sizes = args.batches if section == "training" else args.lengths
        for size in sizes[:1] if args.warm and section != "others" else sizes:
            measure(section, size, table)
    if not args.warm:
        verdict(table.rows, args.lengths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
