"""Time the kernels on one GPU at the shapes of Qwen3-8B, beside PyTorch's dense attention.

    python -m benchmarks.kernels [--lengths 8192 32768 131072] [--json FILE]

32 query and 8 KV heads of 128, blocks of 64, 16 blocks per query, window 128, bfloat16, batch 1 unless said. Medians of
CUDA-event timings (`triton.testing.do_bench`), decode under a CUDA graph. If a check fails, nothing is timed. `floor`
is the larger of operations over the measured rate of a large bfloat16 product and least bytes over the measured
bandwidth of a copy. Selections are synthetic: `independent` is the worst case; with `as text at 8k` 32 neighbouring
queries of 32k tokens want 2.1 times top-k blocks, about as SmolLM2's do at 8k (2.5, `benchmarks.selections`); with
`correlated` 1.7 times, as at 4k.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hyconvert_kernels as kernels
from benchmarks.check_kernels import Case, check_decode, check_prefill
from hyconvert_kernels.oracle import forward as oracle_forward
from hyconvert_kernels.sparse import forward as sparse_forward
from hyconvert_kernels.window import forward as window_forward

H, G, D, BLOCK, TOPK, WINDOW = 32, 8, 128, 64, 16, 128
SCALE = D**-0.5
SETTINGS = {"block_size": BLOCK, "window": WINDOW, "scale": SCALE}


def timed(function: Callable[[], object], graph: bool = False) -> float:
    """Median milliseconds."""
    if graph:
        function()
        with torch.cuda.stream(torch.cuda.Stream()):
            return triton.testing.do_bench_cudagraph(function, rep=100, return_mode="median")
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def ceilings() -> tuple[float, float]:
    """Measured bytes per second of a device copy (read plus written) and FLOP/s of a bfloat16 product."""
    x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / timed(lambda: y.copy_(x)) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return copy, 2 * 8192**3 / timed(lambda: a @ b) * 1e3


def selection(
    length: int, keep: float, seed: int = 0, *, batch: int = 1, groups: int = G, topk: int = TOPK
) -> torch.Tensor:
    """Random eligible blocks ``[B,G,T,K]``; each slot keeps its predecessor's block with probability ``keep``.

    Kept blocks model neighbouring queries that want the same blocks; ``keep = 0`` is the worst case of the tile union.
    """
    gen = torch.Generator(device="cuda").manual_seed(seed)
    fresh = torch.rand(batch, groups, length, topk, device="cuda", generator=gen)
    renew = torch.rand(batch, groups, length, topk, device="cuda", generator=gen) >= keep
    t = torch.arange(length, device="cuda")[:, None]
    origin = torch.where(renew, t, 0).cummax(2).values
    eligible = ((t - WINDOW) // BLOCK + 1).clamp(min=0)
    eligible_then = eligible[:, 0][origin]
    blocks = (fresh.gather(2, origin) * eligible_then).long()
    blocks = torch.where(eligible_then > 0, blocks, -1)
    return blocks.sort(-1).values.to(torch.int32)


def both_kernels(module: ModuleType, threshold: str, taken_over: object) -> Iterator[str]:
    """What to add to a row's name: nothing, and if Hopper's kernel has taken over, a word for the portable one."""
    yield ""
    if taken_over:
        with patch.object(module, threshold, math.inf):
            yield ", portable kernel"


def prefill(length: int, floor: Callable[[float, float], float], record: Callable[..., None]) -> None:
    """Oracle attention, the sparse layer's parts, and dense attention at one length."""
    gen = torch.Generator(device="cuda").manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, length, D, device="cuda", dtype=torch.bfloat16, generator=gen)

    q, k, v, kw, vw = normal(H), normal(G), normal(G), normal(G), normal(G)
    offset, start = torch.zeros(1, dtype=torch.int64).cuda(), torch.zeros(1, length, dtype=torch.int64).cuda()
    dense = floor(2 * H * D * length**2, 4 * length * (H + G) * D)
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            record(
                f"SDPA {name}", length, dense,
                lambda: scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True),
            )  # fmt: skip
    for name in both_kernels(oracle_forward, "HOPPER_SLOTS", oracle_forward.on_hopper(q, k, v, SCALE)):
        record(
            f"oracle without scores{name}", length, dense,
            lambda: kernels.oracle_attention(q, k, v, offset, start, with_scores=False, **SETTINGS),
        )  # fmt: skip
        record(
            f"oracle with top-k{name}", length, dense,
            lambda: kernels.oracle_attention_topk(q, k, v, offset, start, topk=TOPK, **SETTINGS),
        )  # fmt: skip
    window = floor(4 * H * D * length * WINDOW, 4 * length * (H + G) * D)
    record(
        "window",
        length,
        window,
        lambda: kernels.window_attention(q, kw, vw, offset, start, window=WINDOW, scale=SCALE),
    )
    gate = torch.zeros(H, 1, device="cuda")
    shared = {"slots": length, "block_size": BLOCK, "window": WINDOW, "ratio": H // G}
    out = torch.empty_like(q)
    taken_over = sparse_forward.on_hopper(q, k, v, out, SCALE, BLOCK)
    for name, keep in (("independent", 0.0), ("as text at 8k", 0.953), ("correlated", 0.97)):
        indices = selection(length, keep)
        union = kernels.tile_union(indices, offset, start, **shared)
        size = union.counts.float().mean().item()
        record(
            f"union, {name}", length, floor(0, 2 * indices.nbytes),
            lambda i=indices: kernels.tile_union(i, offset, start, **shared), union=size,
        )  # fmt: skip
        sparse = floor(4 * H * D * length * TOPK * BLOCK, 4 * length * (H + G) * D)

        def fused(i: torch.Tensor = indices, u: object = union) -> None:
            far = kernels.block_sparse_attention(q, k, v, i, offset, start, union=u, **SETTINGS)
            window_forward.forward(
                q, kw, vw, offset, start, out, None, window=WINDOW, scale=SCALE,
                merge=(*far, gate.expand(1, H, length)),
            )  # fmt: skip

        def apart(i: torch.Tensor = indices) -> torch.Tensor:
            far = kernels.block_sparse_attention(q, k, v, i, offset, start, **SETTINGS)
            near = kernels.window_attention(q, kw, vw, offset, start, window=WINDOW, scale=SCALE)
            return kernels.merge_branches(*near, *far, gate)

        for which in both_kernels(sparse_forward, "HOPPER_ROWS", taken_over):
            record(
                f"sparse branch, {name}{which}", length, sparse,
                lambda i=indices, u=union: kernels.block_sparse_attention(
                    q, k, v, i, offset, start, union=u, **SETTINGS
                ),
            )  # fmt: skip
            record(f"sparse layer, {name}{which}", length, sparse + window, fused)
            record(f"sparse layer, own union, {name}{which}", length, sparse + window, apart)


def decode(
    length: int, batch: int, floor: Callable[[float, float], float], record: Callable[..., None]
) -> None:
    """Both decode ops at one context length and batch."""
    slots = length
    k, v = (torch.randn(batch, G, slots, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q, q2 = (torch.randn(batch, H, 1, D, device="cuda", dtype=torch.bfloat16) for _ in "qs")
    offset = torch.full((batch,), length - 1, device="cuda")
    start = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    full = floor(0, k.nbytes + v.nbytes)
    record(
        f"full decode, B={batch}", length, full,
        lambda: kernels.oracle_decode(q, k, v, offset, start, topk=TOPK, **SETTINGS), graph=True,
    )  # fmt: skip
    ring_k, ring_v = (torch.randn(batch, G, WINDOW, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    indices = torch.stack(
        [torch.randperm((length - WINDOW) // BLOCK, device="cuda")[:TOPK] for _ in range(batch * G)]
    )
    indices = indices.sort(-1).values.int().view(batch, G, 1, TOPK)
    gate = torch.zeros(batch, H, 1, device="cuda")
    value_map = torch.randn(H, D, D, device="cuda", dtype=torch.bfloat16)
    read = 2 * 2 * batch * G * D * (TOPK * BLOCK + WINDOW)
    for name, mapped, extra in (("", None, 0), (" with value map", value_map, value_map.nbytes)):
        record(
            f"sparse decode{name}, B={batch}", length, floor(0, read + extra),
            lambda m=mapped: kernels.sparse_decode(
                q, ring_k, ring_v, q2, k, v, indices, offset, start, gate, value_map=m, **SETTINGS
            ), graph=True,
        )  # fmt: skip


class Table:
    """Timings beside this card's ceilings, printed and saved row by row, so that a run that is cut loses nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bandwidth, self.rate = ceilings()
        self.rows: list[dict] = []
        self.header = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "copy_bytes_per_s": self.bandwidth, "bf16_flops_per_s": self.rate,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        print(
            f"{self.header['device']}: copy {self.bandwidth / 1e12:.2f} TB/s, bfloat16 product "
            f"{self.rate / 1e12:.0f} TFLOP/s"
        )

    def floor(self, operations: float, moved: float) -> float:
        """Least milliseconds for so many operations and bytes."""
        return 1e3 * max(operations / self.rate, moved / self.bandwidth)

    def record(
        self, name: str, length: int, least: float, function: Callable, graph: bool = False, **more: float
    ) -> None:
        """Time ``function``; a failure is a row too."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            function()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            ms = timed(function, graph)
        except Exception as error:
            print(f"{name:34} {length:7} failed: {type(error).__name__}: {str(error)[:100]}", flush=True)
            self.rows.append({"name": name, "length": length, "error": str(error)[:300]})
            self.save()
            return
        self.rows.append(
            {"name": name, "length": length, "ms": ms, "floor_ms": least, "peak_bytes": peak, **more}
        )
        extra = " ".join(f"{key} {value:.1f}" for key, value in more.items())
        share = least / ms if ms else math.nan
        print(
            f"{name:34} {length:7} {ms:9.4f} ms  floor {least:8.4f} ({share:4.0%})  {peak / 1e6:7.0f} MB {extra}",
            flush=True,
        )
        self.save()

    def save(self) -> None:
        self.path.write_text(json.dumps({**self.header, "rows": self.rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    shape = {"heads": H, "groups": G, "dim": D, "block": BLOCK, "window": WINDOW, "topk": TOPK}
    bad = check_prefill(Case(length=1500, kind="packed", **shape))[0]
    bad += check_decode(Case(length=5003, kind="decode", **shape))[0]
    if bad:
        print("a check failed, so nothing is timed:", *bad, sep="\n  ", file=sys.stderr)
        return 1
    table = Table(args.json)
    floor, record = table.floor, table.record
    for length in args.lengths:
        prefill(length, floor, record)
        torch.cuda.empty_cache()
    for length, batch in ((8192, 1), (32768, 1), (32768, 8), (131072, 1), (131072, 4), (32768, 64)):
        if length in args.lengths:
            decode(length, batch, floor, record)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
