"""Time the backward kernels on one GPU, beside PyTorch's dense attention, FlexAttention and fla-core's NSA.

    python -m benchmarks.kernels_backward [--lengths 8192 32768] [--sections backward training others] [--json FILE]

`backward` times gradients alone, at the shapes of Qwen3-8B (see `benchmarks.kernels`); `training` a step's forward and
backward of one full and one sparse layer of SmolLM2 (9 query and 3 KV heads of 64, 8 blocks per query, 4096 tokens);
`others` the same sparsity by FlexAttention, which reads one set of keys, and by NSA's selected attention, whose kernels
want 16 query heads per KV head (skipped without the package `fla-core`). Selections are synthetic, and correlated as
neighbouring queries' are. `--warm` runs everything once and times nothing, to fill the compilers' caches; several such
runs may go side by side, one a section. `--plot FILE` draws saved results (needs matplotlib, no GPU).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hyconvert_kernels as kernels
from benchmarks.kernels import BLOCK, WINDOW, D, G, H, selection

KEEP = 0.97
BACKENDS = (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION))
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


def backward(length: int, table: Any) -> None:
    """Gradients alone."""
    layer = Layer(1, H, G, length, D, 16)
    own = (layer.q, layer.k, layer.v)
    moved = 2 * length * D * (4 * H + 4 * G)
    dense = table.floor(5 * H * D * length**2, moved)  # five products of half the square
    for name, backend in BACKENDS:
        with sdpa_kernel(backend):
            out = layer.dense()
            table.record(f"SDPA {name} backward", length, dense, backward_of(out, own, layer.outer))
    del out
    table.record("oracle backward", length, dense, backward_of(layer.oracle(), own, layer.outer))
    window = table.floor(10 * H * D * length * WINDOW, moved)
    near = (layer.q, layer.k_near, layer.v_near)
    table.record("window backward", length, window, backward_of(layer.near()[0], near, layer.outer))
    sparse = table.floor(10 * H * D * length * 16 * BLOCK, moved)
    far = (layer.q_far, layer.k, layer.v)
    table.record("sparse branch backward", length, sparse, backward_of(layer.far()[0], far, layer.outer))
    table.record(
        "sparse layer backward",
        length,
        sparse + window,
        backward_of(layer.sparse(), layer.reads, layer.outer),
    )
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
    chosen = torch.zeros(groups, length, length // BLOCK + 1, dtype=torch.bool, device="cuda")
    chosen.scatter_(2, torch.where(layer.indices[0] < 0, length // BLOCK, layer.indices[0]).long(), True)
    chosen = chosen[..., :-1].contiguous()
    touched = chosen.view(groups, tiles, wide, tiles, wide // BLOCK).amax((2, 4))
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
    from torch.nn.attention.flex_attention import flex_attention

    layer = Layer(1, H, G, length, D, 16)
    own = (layer.q, layer.k, layer.v)
    mask, compiled = flex_mask(layer), torch.compile(flex_attention)

    def flex() -> torch.Tensor:
        return compiled(*own, block_mask=mask, scale=layer.scale, enable_gqa=True)

    with torch.no_grad():
        table.record("FlexAttention", length, 0.0, flex)
    out = flex()
    table.record("FlexAttention backward", length, 0.0, backward_of(out, own, layer.outer))
    del out
    try:
        from fla.ops.nsa.parallel import ParallelNSAFunction
    except ImportError as error:
        print(f"NSA is skipped: {error}", file=sys.stderr)
        return
    layer = Layer(1, 32, 2, length, D, 16)
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (layer.q, layer.k, layer.v))
    blocks = layer.indices.transpose(1, 2).long().sort(-1, descending=True).values  # the -1s come last
    counts = (blocks >= 0).sum(-1)
    blocks = blocks.clamp(min=0)

    def nsa() -> torch.Tensor:
        return ParallelNSAFunction.apply(q, k, v, blocks, counts, BLOCK, layer.scale, None)

    with torch.no_grad():
        table.record("NSA selected, 32/2 heads", length, 0.0, nsa)
        table.record("sparse branch, 32/2 heads", length, 0.0, lambda: layer.far()[0])
    outer = layer.outer.transpose(1, 2).contiguous()
    table.record("NSA selected backward, 32/2 heads", length, 0.0, backward_of(nsa(), (q, k, v), outer))
    far = (layer.q_far, layer.k, layer.v)
    table.record(
        "sparse branch backward, 32/2 heads", length, 0.0, backward_of(layer.far()[0], far, layer.outer)
    )


class Warm:
    """Stands in for a table: runs what it would time."""

    def floor(self, operations: float, moved: float) -> float:
        return 0.0

    def record(self, name: str, length: int, least: float, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


PLOTTED = (
    "SDPA flash", "SDPA cuDNN", "oracle with top-k", "sparse layer, independent", "sparse layer, correlated", "window",
    "SDPA flash backward", "SDPA cuDNN backward", "oracle backward", "sparse layer backward", "window backward",
    "FlexAttention", "FlexAttention backward",
)  # fmt: skip


def plot(source: Path, target: Path) -> None:
    """Time against length, on logarithmic axes, of the rows named in `PLOTTED` that were timed at several lengths."""
    from matplotlib import pyplot

    found = json.loads(source.read_text())
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in PLOTTED}
    for row in found["rows"]:
        if "ms" in row and row["name"] in lines:
            lines[row["name"]].append((row["length"], row["ms"]))
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, points in lines.items():
        if len(points) > 1:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    ticks = sorted({length for points in lines.values() for length, _ in points})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=found["device"])
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
    sections = ("backward", "training", "others")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8], help="rows of a training step")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels_backward.json")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.plot:
        plot(args.json, args.plot)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    if args.warm:
        table: Any = Warm()
        args.lengths, args.batches = args.lengths[:1], args.batches[:1]
    else:
        from benchmarks.check_kernels import Case, check_backward
        from benchmarks.kernels import Table

        shape = {"heads": H, "groups": G, "dim": D, "block": BLOCK, "window": WINDOW, "topk": 16}
        bad, _ = check_backward(Case(length=1500, kind="packed", **shape))
        if bad:
            print("a check failed, so nothing is timed:", *bad, sep="\n  ", file=sys.stderr)
            return 1
        table = Table(args.json)
    for section in args.sections:
        if section == "training":
            for batch in args.batches:
                training(batch, table)
            continue
        for length in args.lengths:
            (backward if section == "backward" else others)(length, table)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
