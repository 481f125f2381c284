"""Check every Triton kernel on a CUDA device against its float64 reference.

    python -m benchmarks.check_kernels [--quick] [--groups GROUP ..] [--json FILE]

Errors are relative root-mean-square over all elements. float32 products are IEEE (TF32 is off). The reference runs in
float64 on the same, already rounded inputs. Buffers are poisoned with NaN through PyTorch's deterministic fill, every
op runs twice and must repeat itself bit for bit, and slots behind the last query hold NaN. Exit status 1 on failure.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

import hyconvert_kernels as kernels
from hyconvert_kernels.dispatch import on_device
from hyconvert_kernels.oracle import backward as oracle_backward
from hyconvert_kernels.oracle import forward as oracle_forward
from hyconvert_kernels.sparse import forward as sparse_forward
from hyconvert_kernels.window import forward as window_forward

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
GROUPS = ("registrations", "refusals", "prefill", "backward", "decode")
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One situation; ``kind`` says how sequences lie in the batch."""

    kind: str = "plain"
    dim: int = 128
    heads: int = 8
    groups: int = 2
    length: int = 333
    block: int = 64
    window: int = 128
    topk: int = 4
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return (
            f"{NAMES[self.dtype]} d{self.dim} {self.heads}/{self.groups} T{self.length} b{self.block} "
            f"w{self.window} k{self.topk} {self.kind}"
        )


class Failures(list):
    """Messages of one case."""

    def close(
        self, name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float, size: float = 0.0
    ) -> float:
        """Compare and return the relative RMS error; infinities must lie in the same places.

        What is nothing beside `size` is held against that: a difference of such numbers that cancel.
        """
        got, want = got.double(), want.double()
        if torch.isnan(got).any():
            self.append(f"{name}: {int(torch.isnan(got).sum())} NaN of {got.numel()}")
            return math.nan
        infinite = torch.isinf(want)
        if not torch.equal(torch.isinf(got), infinite):
            self.append(f"{name}: -inf in other places ({int((torch.isinf(got) != infinite).sum())})")
            return math.nan
        got, want = got.masked_fill(infinite, 0), want.masked_fill(infinite, 0)
        scale = want.norm().item()
        scale = size if scale < 1e-9 * size else scale
        error = (got - want).norm().item() / scale if scale else got.norm().item()
        if not error <= tolerance:
            self.append(f"{name}: relative RMS {error:.1e} > {tolerance:.0e}")
        return error

    def same(self, name: str, first: object, second: object) -> None:
        """Two runs must agree bit for bit."""
        for a, b in zip(_tuple(first), _tuple(second), strict=True):
            if a is not None and not torch.equal(a, b):
                self.append(f"{name}: two runs differ")


def _tuple(x: object) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def layout(case: Case) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """q_offset, start, T and S."""
    length = case.length
    zero = torch.zeros(2, dtype=torch.int64)
    if case.kind == "plain":
        return zero, torch.zeros(2, length, dtype=torch.int64), length, length
    if case.kind == "left padded":
        start = torch.arange(length).repeat(2, 1)
        for row, pad in enumerate((min(length - 1, 77), min(length - 1, 5))):
            start[row, pad:] = pad
        return zero, start, length, length
    if case.kind == "packed":
        start = torch.zeros(2, length, dtype=torch.int32)
        for row, cuts in enumerate(((13, 61, length // 2), (3 * length // 4,))):
            for cut in cuts:
                start[row, cut:] = cut
        return zero.int(), start, length, length
    if case.kind == "static cache":
        start = torch.tensor([[3], [0]]).expand(2, length).contiguous()
        return torch.tensor([251, 17]), start, length, length + 400
    if case.kind == "decode":
        start = torch.tensor([[7], [0]])
        return torch.tensor([case.length - 1, case.length // 3]), start, 1, case.length + 65
    raise ValueError(case.kind)


def inputs(case: Case, seed: int = 0):
    """Random inputs on the device, NaN behind each row's last query."""
    offset, start, length, slots = layout(case)
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to("cuda", case.dtype)

    q, q2 = normal(2, case.heads, length, case.dim) * 1.5, normal(2, case.heads, length, case.dim)
    keys = [normal(2, case.groups, slots, case.dim) for _ in range(4)]
    for row in range(2):
        for x in keys:
            x[row, :, int(offset[row]) + length :] = math.nan
    gate = normal(2, case.heads, length)
    return q, q2, keys, gate, offset.cuda(), start.cuda()


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() for x in tensors]


def taken(indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """Which blocks ``[..., blocks]`` are among indices ``[..., k]``, of which -1 is none."""
    found = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, torch.where(indices < 0, blocks, indices).long(), True)[..., :blocks]


def check_indices(
    bad: Failures, name: str, got: torch.Tensor, scores: torch.Tensor, tolerance: float
) -> None:
    """Indices are well formed, and the chosen scores are the best ones up to rounding."""
    topk = got.shape[-1]
    eligible = (scores > -math.inf).sum(-1)
    count = (got >= 0).sum(-1)
    if not torch.equal(count, eligible.clamp(max=topk)):
        bad.append(f"{name}: wrong number of blocks")
        return
    ascending = (got[..., 1:] > got[..., :-1]) | (got[..., 1:] == -1)
    if not bool(ascending.all()) or bool((got >= scores.shape[-1]).any()):
        bad.append(f"{name}: not ascending, left-packed and in range")
        return
    chosen = scores.gather(-1, got.clamp(min=0).long()).masked_fill(got < 0, math.inf)
    lowest = chosen.amin(-1)
    best_left = scores.masked_fill(taken(got, scores.shape[-1]), -math.inf).amax(-1)
    if bool((best_left > lowest * (1 + tolerance) + 1e-30).any()):
        bad.append(
            f"{name}: a better block was left out ({int((best_left > lowest * (1 + tolerance)).sum())})"
        )


def twice(bad: Failures, name: str, function, *args, **settings):
    first = function(*args, **settings, implementation="triton")
    bad.same(name, first, function(*args, **settings, implementation="triton"))
    return first


def check_hopper(
    bad: Failures, case: Case, tensors: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]
) -> dict[str, float]:
    """The kernel that takes over oracle attention on Hopper at length, here at any, in both orders of its tiles."""
    scale = case.dim**-0.5
    with patch.object(oracle_forward, "HOPPER_SLOTS", 0):
        hopper = oracle_forward.on_hopper(*tensors[:3], scale)
    if hopper is None:
        return {}
    settings = {
        "block_size": case.block, "window": case.window, "scale": scale, "first": 0, "end": case.length,
    }  # fmt: skip
    error = 0.0
    # Three programs and no room for maxima beyond their round, so that scores come in several launches.
    narrow = {"processors": lambda _: 3, "hopper_maxima": lambda *_: 0}
    for by_length, scored in itertools.product((True, False), repeat=2):
        runs = []
        for _ in range(2):
            out, lse, scores = (torch.full_like(x, math.nan, dtype=torch.float32) for x in want)
            out = out.to(case.dtype)
            indices = scores.new_full((*scores.shape[:3], case.topk), -7, dtype=torch.int32)
            filled = (scores, indices) if scored else (None, None)
            with patch.multiple(hopper, **narrow) if by_length else contextlib.nullcontext():
                hopper.forward(*tensors, out, lse, *filled, **settings, by_length=by_length)
            runs.append((out, lse, *filled))
        name = f"oracle on Hopper, by {'length' if by_length else 'line'}{', scores' * scored}"
        bad.same(name, *runs)
        error = max(error, bad.close(f"{name}: out", runs[0][0], want[0], TOLERANCE[case.dtype]))
        bad.close(f"{name}: lse", runs[0][1], want[1], LSE_TOLERANCE[case.dtype])
        if scored:
            bad.close(f"{name}: scores", runs[0][2], want[2], max(1e-4, LSE_TOLERANCE[case.dtype]))
            check_indices(bad, f"{name}: indices", runs[0][3], want[2], 1e-3)
    return {"oracle on Hopper": error}


def check_sparse(
    bad: Failures,
    case: Case,
    tensors: tuple[torch.Tensor, ...],
    selections: dict[str, tuple],
    where: str = "",
) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    """Block-sparse attention of ``selections``, by name with what they should give, and of none.

    Returns:
        What the first one gave, and the largest error of an output.
    """
    q, k, v, offset, start = tensors
    settings = {"block_size": case.block, "window": case.window, "scale": case.dim**-0.5}
    results, errors = [], []
    for name, (indices, want) in selections.items():
        name += where
        results.append(
            twice(bad, name, kernels.block_sparse_attention, q, k, v, indices, offset, start, **settings)
        )
        errors.append(bad.close(f"{name} out", results[-1][0], want[0], TOLERANCE[case.dtype]))
        bad.close(f"{name} lse", results[-1][1], want[1], LSE_TOLERANCE[case.dtype])
    nothing = torch.full_like(indices, -1)
    empty = kernels.block_sparse_attention(
        q, k, v, nothing, offset, start, **settings, implementation="triton"
    )
    if bool((empty[0] != 0).any()) or bool((empty[1] != -math.inf).any()):
        bad.append(f"sparse{where}: an empty selection must give 0 and -inf")
    return results[0], max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def check_hopper_sparse(
    bad: Failures, case: Case, tensors: tuple[torch.Tensor, ...], selections: dict[str, tuple]
) -> dict[str, float]:
    """The kernel that takes over block-sparse attention on Hopper at length, here at any."""
    q, k, v = tensors[:3]
    with patch.object(sparse_forward, "HOPPER_ROWS", 0):
        if sparse_forward.on_hopper(q, k, v, torch.empty_like(q), case.dim**-0.5, case.block) is None:
            return {}
        return {"sparse on Hopper": check_sparse(bad, case, tensors, selections, " on Hopper")[1]}


def check_prefill(case: Case) -> tuple[Failures, dict[str, float]]:
    """All prefill ops of one case."""
    bad, errors = Failures(), {}
    tol, lse_tol = TOLERANCE[case.dtype], LSE_TOLERANCE[case.dtype]
    q, q2, (k, v, kw, vw), gate, offset, start = inputs(case)
    scale = case.dim**-0.5
    shared = {"window": case.window, "scale": scale}
    blocked = {**shared, "block_size": case.block}

    got = twice(bad, "oracle", kernels.oracle_attention, q, k, v, offset, start, **blocked)
    want = kernels.oracle_attention(*double(q, k, v), offset, start, **blocked, implementation="reference")
    errors["oracle"] = bad.close("oracle out", got[0], want[0], tol)
    bad.close("oracle lse", got[1], want[1], lse_tol)
    errors["scores"] = bad.close("oracle scores", got[2], want[2], max(1e-4, lse_tol))
    plain = twice(
        bad,
        "oracle without scores",
        kernels.oracle_attention,
        q,
        k,
        v,
        offset,
        start,
        with_scores=False,
        **blocked,
    )
    bad.close("oracle out without scores", plain[0], want[0], tol)

    errors |= check_hopper(bad, case, (q, k, v, offset, start), want)

    for topk in {case.topk, 1}:
        chosen = twice(bad, "topk", kernels.block_topk, got[2], topk)
        if not torch.equal(chosen, kernels.block_topk(got[2], topk, implementation="reference")):
            bad.append(f"topk {topk}: differs from the reference on the same scores")
    with_topk = twice(
        bad, "oracle topk", kernels.oracle_attention_topk, q, k, v, offset, start, topk=case.topk, **blocked
    )
    bad.close("oracle topk out", with_topk[0], want[0], tol)
    check_indices(bad, "oracle topk indices", with_topk[2], want[2], 1e-3)

    indices = with_topk[2]
    shuffled = torch.cat([indices.flip(-1), indices[..., :1]], -1)  # any order, and one block named twice
    many = torch.arange(128, dtype=torch.int32, device="cuda").expand(*indices.shape[:3], 128)
    want_s, want_m = (
        kernels.block_sparse_attention(
            *double(q2, k, v), chosen, offset, start, **blocked, implementation="reference"
        )
        for chosen in (indices, many)
    )
    selections = {
        "sparse": (indices, want_s), "sparse shuffled": (shuffled, want_s), "sparse all blocks": (many, want_m),
    }  # fmt: skip
    sparse_inputs = (q2, k, v, offset, start)
    got_s, errors["sparse"] = check_sparse(bad, case, sparse_inputs, selections)
    errors |= check_hopper_sparse(bad, case, sparse_inputs, selections)

    got_w = twice(bad, "window", kernels.window_attention, q, kw, vw, offset, start, **shared)
    want_w = kernels.window_attention(*double(q, kw, vw), offset, start, **shared, implementation="reference")
    errors["window"] = bad.close("window out", got_w[0], want_w[0], tol)
    bad.close("window lse", got_w[1], want_w[1], lse_tol)

    pieces = (*got_w, *got_s, gate)
    got_g = twice(bad, "merge", kernels.merge_branches, *pieces)
    want_g = kernels.merge_branches(*double(*pieces), implementation="reference")
    errors["merge"] = bad.close("merge", got_g, want_g, tol)
    fused = torch.full_like(q, math.nan)
    with on_device(q):
        window_forward.forward(q, kw, vw, offset, start, fused, None, merge=(*got_s, gate), **shared)
    bad.close("window fused with merge", fused, want_g, tol)
    return bad, errors


def check_decode(case: Case) -> tuple[Failures, dict[str, float]]:
    """Both decode ops of one case."""
    bad, errors = Failures(), {}
    tol, lse_tol = TOLERANCE[case.dtype], LSE_TOLERANCE[case.dtype]
    q, q2, (k, v, kw, vw), gate, offset, start = inputs(case)
    settings = {"window": case.window, "scale": case.dim**-0.5, "block_size": case.block}
    got = twice(bad, "decode", kernels.oracle_decode, q, k, v, offset, start, topk=case.topk, **settings)
    want = kernels.oracle_attention(*double(q, k, v), offset, start, **settings, implementation="reference")
    errors["decode"] = bad.close("oracle decode out", got[0], want[0], tol)
    bad.close("oracle decode lse", got[1], want[1], lse_tol)
    check_indices(bad, "oracle decode indices", got[2], want[2], 1e-3)

    value_map = (
        torch.randn(case.heads, case.dim, case.dim, generator=torch.Generator().manual_seed(1)).to(
            "cuda", case.dtype
        )
        * case.dim**-0.5
    )
    ring_k, ring_v = (torch.full_like(x[:, :, : case.window], math.nan) for x in (kw, vw))
    for row in range(2):
        for slot in range(max(0, int(offset[row]) + 1 - case.window), int(offset[row]) + 1):
            ring_k[row, :, slot % case.window] = kw[row, :, slot]
            ring_v[row, :, slot % case.window] = vw[row, :, slot]
    tail = (q2, k, v, got[2], offset, start, gate)
    tail64 = (*double(q2, k, v), got[2], offset, start, gate.double())
    for mapped in (None, value_map):
        mapped64 = None if mapped is None else mapped.double()
        want_s = kernels.sparse_decode(
            q.double(), *double(kw, vw), *tail64, value_map=mapped64, window_offset=offset, window_start=start,
            implementation="reference", **settings,
        )  # fmt: skip
        whole = twice(
            bad, "sparse decode", kernels.sparse_decode, q, kw, vw, *tail, value_map=mapped, window_offset=offset,
            window_start=start, **settings,
        )  # fmt: skip
        ring = twice(
            bad, "sparse decode of a ring", kernels.sparse_decode, q, ring_k, ring_v, *tail, value_map=mapped,
            **settings,
        )  # fmt: skip
        errors["sparse decode"] = bad.close("sparse decode", whole, want_s, tol)
        bad.close("sparse decode of a ring", ring, want_s, tol)
    return bad, errors


def gradients(case: Case, indices: torch.Tensor, implementation: str, dtype: torch.dtype) -> dict[str, tuple]:
    """Gradients of every op at ``case``, through its output and its log-sum-exp, by name."""
    q, q2, (k, v, kw, vw), gate, offset, start = inputs(case)
    gen = torch.Generator().manual_seed(2)
    outer = [torch.randn(q.shape, generator=gen).to("cuda", case.dtype).to(dtype) for _ in range(3)]
    outer_lse = [torch.randn(q.shape[:3], generator=gen).cuda().to(dtype) for _ in range(3)]
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, q2, k, v, kw, vw, gate)]
    q, q2, k, v, kw, vw, gate = leaves
    shared = {"window": case.window, "scale": case.dim**-0.5, "implementation": implementation}
    blocked = {**shared, "block_size": case.block}
    tensors = (offset, start)
    ops = {
        "oracle": (kernels.oracle_attention(q, k, v, *tensors, with_scores=False, **blocked)[:2], (q, k, v)),
        "sparse": (kernels.block_sparse_attention(q2, k, v, indices, *tensors, **blocked), (q2, k, v)),
        "window": (kernels.window_attention(q, kw, vw, *tensors, **shared), (q, kw, vw)),
    }
    found = {}
    for at, (name, (outputs, wanted)) in enumerate(ops.items()):
        found[name] = torch.autograd.grad(outputs, wanted, (outer[at], outer_lse[at]), retain_graph=True)
    merged = kernels.merge_branches(*ops["window"][0], *ops["sparse"][0], gate, implementation=implementation)
    found["layer"] = torch.autograd.grad(merged, leaves, outer[0])
    return found


def check_backward(case: Case) -> tuple[Failures, dict[str, float]]:
    """Gradients of all prefill ops, and of a sparse layer made of them, of one case."""
    bad, errors = Failures(), {}
    q, _, (k, v, *_), _, offset, start = inputs(case)
    blocked = {"window": case.window, "scale": case.dim**-0.5, "block_size": case.block, "topk": case.topk}
    _, _, indices = kernels.oracle_attention_topk(q, k, v, offset, start, **blocked)
    got, again = (gradients(case, indices, "triton", case.dtype) for _ in range(2))
    want = gradients(case, indices, "reference", torch.float64)
    with patch.object(oracle_backward, "HOPPER_SLOTS", 0):  # they take over at length, and run here at any
        if oracle_backward.on_hopper(q, k):
            for found in (got, again):
                found["oracle on Hopper"] = gradients(case, indices, "triton", case.dtype)["oracle"]
            want["oracle on Hopper"] = want["oracle"]
    for name, wanted in want.items():
        bad.same(f"{name} backward", got[name], again[name])
        size = max(gradient.norm().item() for gradient in wanted)  # of one key the weights' gradients cancel
        worst = [
            bad.close(f"{name} gradient {at}", a, b, TOLERANCE[case.dtype], size)
            for at, (a, b) in enumerate(zip(got[name], wanted, strict=True))
        ]
        errors[name] = max(worst, key=lambda error: math.inf if math.isnan(error) else error)
    return bad, errors


def check_registrations() -> Failures:
    """`opcheck` of the ops, `torch.compile` of a whole layer with its backward, and a CUDA graph of it."""
    bad = Failures()
    case = Case(dtype=torch.float32, length=150, dim=32, block=16, window=20, topk=3)
    q, q2, (k, v, kw, vw), gate, offset, start = inputs(case)
    settings = {"window": case.window, "scale": 0.2, "block_size": case.block}
    leaves = [x.detach().requires_grad_() for x in (q, q2, k, v, kw, vw, gate)]

    def layer(q, q2, k, v, kw, vw, gate):
        dense, _, indices = kernels.oracle_attention_topk(q, k, v, offset, start, topk=case.topk, **settings)
        near = kernels.window_attention(q, kw, vw, offset, start, window=case.window, scale=0.2)
        far = kernels.block_sparse_attention(q2, k, v, indices, offset, start, **settings)
        return dense + kernels.merge_branches(*near, *far, gate)

    def step(function):
        out = function(*leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        return out.detach(), *grads  # a graph kept alive would tie the leaves to its stream

    eager = step(layer)
    bad.same("torch.compile", eager, step(torch.compile(layer, fullgraph=True, backend="aot_eager")))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(layer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer)
    graph.replay()
    torch.cuda.synchronize()
    bad.same("CUDA graph", eager, captured)
    args = {
        torch.ops.hyconvert.window_attention: (q, kw, vw, offset, start, case.window, 0.2),
        torch.ops.hyconvert.oracle_attention: (q, k, v, offset, start, case.block, case.window, True, 0.2),
        torch.ops.hyconvert.oracle_attention_topk: (q, k, v, offset, start, case.block, case.window, 3, 0.2),
        torch.ops.hyconvert.merge_branches: (q, gate, q2, gate, gate),
    }
    for op, inputs_ in args.items():
        leaf = (inputs_[0].detach().requires_grad_(), *inputs_[1:])
        try:
            torch.library.opcheck(op.default, leaf)
        except Exception as error:
            bad.append(f"opcheck {op}: {str(error).strip().splitlines()[-1][:200]}")
    return bad


def check_refusals() -> Failures:
    """What the kernels cannot do must be refused by a ValueError."""
    bad = Failures()
    offset, start = torch.zeros(1, dtype=torch.int64).cuda(), torch.zeros(1, 32, dtype=torch.int64).cuda()

    def refused(
        name: str, dim: int = 64, heads: int = 4, dtype: torch.dtype = torch.float32, **changed: int
    ) -> None:
        q = torch.randn(1, heads, 32, dim, device="cuda").to(dtype)
        k = torch.randn(1, 1, 32, dim, device="cuda").to(dtype)
        settings = {"block_size": 16, "window": 8, "scale": 1.0, "topk": 2, **changed}
        try:
            kernels.oracle_attention_topk(q, k, k, offset, start, **settings)
        except ValueError as error:
            if "no Triton kernel" not in str(error):
                bad.append(f"{name}: refused for another reason: {error}")
        else:
            bad.append(f"{name}: not refused")

    refused("float64", dtype=torch.float64)
    refused("head dim 8", dim=8)
    refused("head dim 320", dim=320)
    refused("head dim 68", dim=68)
    refused("32 heads per KV head", heads=32)
    refused("block size 48", block_size=48)
    refused("block size 256", block_size=256)
    refused("top-k 256", topk=256)
    return bad


def cases(quick: bool) -> list[tuple[str, Case]]:
    """Every dimension of the table once in every dtype, rather than the full product."""
    kinds = ("plain", "left padded", "packed", "static cache")
    found: list[tuple[str, Case]] = []
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        shapes = [{"kind": kind} for kind in kinds]
        shapes += [
            {"dim": 64},
            {"dim": 96, "kind": "packed"},
            {"dim": 256, "kind": "left padded"},
            {"dim": 16},
        ]
        shapes += [
            {"heads": ratio * 2, "kind": kinds[at % 4], "dim": 64}
            for at, ratio in enumerate((1, 3, 7, 8, 16))
        ]
        shapes += [
            {"block": block, "window": window, "topk": topk, "kind": kinds[at % 4], "dim": 64}
            for at, (block, window, topk) in enumerate(
                ((16, 20, 16), (32, 1, 8), (128, 100, 2), (16, 64, 64))
            )
        ]
        shapes += [{"length": length, "dim": 64, "window": 20} for length in (1, 2, 65, 127)]
        shapes += [{"length": 2051, "dim": 128, "topk": 16, "kind": "packed"}]
        found += [("prefill", Case(dtype=dtype, **shape)) for shape in shapes]
        trained = [{"kind": kind} for kind in kinds] + [
            {"dim": dim, "kind": "packed"} for dim in (16, 96, 256)
        ]
        trained += [{"heads": ratio * 2, "dim": 64} for ratio in (1, 3, 7, 16)]
        trained += [{"dim": 64, "block": 16, "window": 20, "topk": 8, "kind": "packed"}]
        trained += [{"dim": 64, "block": 128, "window": 100, "topk": 2, "kind": "left padded"}]
        trained += [{"dim": 64, "block": 32, "window": 1, "length": 1}]
        trained += [{"dim": 64, "heads": 6, "length": 2051, "topk": 8, "kind": "packed"}]
        found += [("backward", Case(dtype=dtype, **shape)) for shape in trained]
        steps = [{"dim": dim} for dim in (16, 64, 96, 128, 256)] + [
            {"heads": ratio * 2} for ratio in (1, 3, 7, 8, 16)
        ]
        steps += [{"block": block, "topk": 8} for block in (16, 32, 128)]
        steps += [{"length": length, "window": 20} for length in (9, 40, 130)]
        steps += [{"length": 5003, "topk": 16}, {"length": 5003, "topk": 64, "block": 16}]
        steps += [{"length": 5003, "topk": 16, "heads": 272, "groups": 68}]  # tiles and splits of many rows
        found += [("decode", Case(kind="decode", dtype=dtype, **{"length": 999, **shape})) for shape in steps]
    return found


def one(job: tuple[str, Case | None]) -> dict:
    """One row of the table; runs in a worker process."""
    group, case = job
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.simplefilter("ignore")  # deterministic fill warns of ops that need it no further
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # NaN in every torch.empty
    begun = time.perf_counter()
    errors: dict[str, float] = {}
    try:
        if case is None:
            bad = {"registrations": check_registrations, "refusals": check_refusals}[group]()
        else:
            check = {"prefill": check_prefill, "backward": check_backward, "decode": check_decode}[group]
            bad, errors = check(case)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).strip().splitlines() or [""]
        bad = [
            f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {lines[0]} .. {lines[-1]}"
        ]
    seconds = round(time.perf_counter() - begun, 1)
    return {
        "group": group, "case": str(case or ""), "errors": errors, "failures": list(bad), "seconds": seconds,
    }  # fmt: skip


def cost(job: tuple[str, Case | None]) -> int:
    """Rank of a check's compile time: unrolled float32 products of large heads take half a minute."""
    group, case = job
    wide = case is not None and case.dtype == torch.float32
    return (group == "backward") + (group == "registrations") + (case.dim if wide and case else 0)


def run(
    work: Sequence[tuple[str, Case | None]], jobs: int, limit: float, save: Callable[[list[dict], bool], None]
) -> bool:
    """Check ``work`` in ``jobs`` processes (most of the time is compiling), print and save the table row by row.

    Returns:
        Whether all is well.
    """
    begun = time.perf_counter()
    rows: list[dict] = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(one, job) for job in sorted(work, key=cost, reverse=True)]
        for future in as_completed(pending):
            if future.cancelled():
                continue
            row = future.result()
            rows.append(row)
            numbers = " ".join(f"{name} {value:.1e}" for name, value in row["errors"].items())
            verdict = "FAIL" if row["failures"] else "ok"
            print(f"{verdict:4} {row['group']:9} {row['case']:50} {numbers} ({row['seconds']} s)", flush=True)
            for message in row["failures"][:8]:
                print(f"       {message}", flush=True)
            save(rows, False)
            if time.perf_counter() - begun > limit:
                for left in pending:
                    left.cancel()
    failed = sum(bool(row["failures"]) for row in rows)
    print(
        f"{len(rows) - failed} of {len(work)} checks passed, {failed} failed, {len(work) - len(rows)} not reached, "
        f"{time.perf_counter() - begun:.0f} s, {torch.cuda.get_device_name()}"
    )
    passed = not failed and len(rows) == len(work)
    save(rows, passed)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="bfloat16 only")
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=GROUPS, help="what to check (default all)"
    )
    parser.add_argument("--jobs", type=int, default=8, help="processes (default 8)")
    parser.add_argument("--limit", type=float, default=math.inf, help="start no check after so many seconds")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "check_kernels.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def save(rows: list[dict], passed: bool) -> None:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "passed": passed}
        args.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")

    work = [("registrations", None), ("refusals", None), *cases(args.quick)]
    work = [job for job in work if job[0] in args.groups]
    return 0 if run(work, args.jobs, args.limit, save) else 1


if __name__ == "__main__":
    sys.exit(main())
