"""Check the decode loop on one GPU: kernels and CUDA graph write the tokens that the CPU reference writes.

    python -m benchmarks.check_decode_loop

Tiny random models in float32. Each is checked alone and left-padded, and one decoder serves prompts of several lengths,
so that one graph replays over lengths that it was not captured at; prompts are read once more in pieces. Before that,
what a step launches is checked in bfloat16 against the float32 reference. `benchmarks.end_to_end` refuses to time what
fails here. Compiling takes most of the time.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.check_kernels import taken
from hyconvert.generation import Decoder, attention
from hyconvert.generation import decoder as decoding
from hyconvert.generation.caches import KV, Caches
from hyconvert.generation.network import read_network
from hyconvert_kernels import add_norm, linear, oracle_attention, silu_mul, split_heads
from hyconvert_kernels.decode import reference
from hyconvert_kernels.decode.sparse import sparse_decode
from tests.modeling.tiny import base_model, converted, plan_of, tokens

SHAPE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 7}
SETTINGS: dict[str, Any] = {"block_size": 16, "topk": 3, "window": 20}
MIXED = "F S0 R0 W F S4 F"
NEW = 24
LENGTHS = (90, 150)
CLOSE = 0.01
"""Relative gap of two blocks' scores that one key rounded to the other neighbour in float8 may turn round."""


def cases() -> Iterator[tuple[str, Any]]:
    """Names and models."""
    yield "qwen3, every kind", converted(base_model("qwen3", **SHAPE), plan_of(MIXED, **SETTINGS))
    yield "qwen3, dense", base_model("qwen3", **SHAPE)
    yield "olmo2", converted(base_model("olmo2", **SHAPE), plan_of(MIXED, **SETTINGS))
    yield "smollm3", converted(base_model("smollm3", **SHAPE), plan_of(MIXED, **SETTINGS))
    yield "qwen3_moe", converted(base_model("qwen3_moe", **SHAPE), plan_of(MIXED, **SETTINGS))
    odd = plan_of(MIXED, **SETTINGS, gate="sigmoid", sinks=True, maps=True)
    yield "llama, sigmoid gate and sinks", converted(base_model("llama", **SHAPE), odd)


def unlike(name: str, got: torch.Tensor, want: torch.Tensor) -> Iterator[str]:
    """What is wrong with a result: nothing up to a relative RMS of 1 %."""
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error <= 1e-2:
        yield f"{name}: relative RMS {error:.1e}"


def check_step(
    heads: int = 32,
    groups: int = 8,
    dim: int = 128,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """What a step launches around its products, against the references in float32: what is wrong."""
    generator = torch.Generator().manual_seed(0)
    bad = []

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def compare(name: str, got: Any, want: Any) -> None:
        for at, (a, b) in enumerate(zip(got, want, strict=True)):
            bad.extend(unlike(f"{name}, output {at}", a, b))

    def wide(x: Any) -> Any:
        return x.float() if getattr(x, "dtype", None) == dtype else x

    def kernel_and_reference(function: Any, *tensors: Any, **settings: Any) -> tuple[Any, Any]:
        most = {"most_rows": 16} if function is linear else {}
        want = function(*map(wide, tensors), **settings, implementation="reference")
        return function(*tensors, **settings, **most, implementation="triton"), want

    x, weight, bias = normal(8, 1, 384), normal(512, 384) / 16, normal(512)
    for rows, gated in ((1, False), (1, True), (8, False), (8, True)):
        got, want = kernel_and_reference(linear, x[:rows], weight, bias, gated=gated)
        compare(f"linear, {rows} rows, gated={gated}", [got], [want])
    compare("silu_mul", *([y] for y in kernel_and_reference(silu_mul, x)))
    for after in (False, True):
        both = kernel_and_reference(add_norm, x, normal(8, 1, 384), normal(384), 1e-6, after=after)
        compare(f"add_norm, after={after}", *both)
    norms = {"q_norm": normal(dim), "k_norm": normal(dim), "eps": 1e-6}
    angles = torch.randn(400, dim // 2, generator=generator).to(device)
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    query_map = normal(heads, dim, dim) * dim**-0.5
    for batch, length, ring in ((8, 1, True), (1, 1, False), (2, 70, False)):
        fused = normal(batch, length, (heads + 2 * groups) * dim + heads)
        offset = torch.full((batch,), 300 if length == 1 else 0, device=device)
        start = torch.arange(batch, device=device) * 3
        slots = (batch, groups, 128 if ring else 400, dim)
        for mapped in (None, query_map):
            made = []
            for kind, implementation in ((dtype, "triton"), (torch.float32, "reference")):
                cache = [torch.zeros(slots, dtype=kind, device=device) for _ in "kv"]
                settings = {
                    name: y.to(kind) if isinstance(y, torch.Tensor) else y
                    for name, y in (norms | {"query_map": mapped}).items()
                }
                queries = split_heads(
                    fused.to(kind), offset, start, *cache, heads=heads, ring=ring, **tables, **settings,
                    implementation=implementation,
                )  # fmt: skip
                made.append([y for y in (*queries, *cache) if y is not None])
            compare(f"split_heads, {batch} x {length}, ring={ring}, mapped={mapped is not None}", *made)
    for batch in (1, 8):
        q, far_q, gate = normal(batch, heads, 1, dim), normal(batch, heads, 1, dim), normal(batch, heads, 1)
        near, far = normal(batch, groups, 128, dim), normal(batch, groups, 1000, dim)
        indices = torch.arange(0, 12, 3, device=device, dtype=torch.int32).expand(batch, groups, 1, 4)
        offset = torch.full((batch,), 990, device=device)
        start = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        tensors = (q, near, near.flip(2), far_q, far, far.flip(2), indices.contiguous(), offset, start, gate)
        shared = {"block_size": 64, "window": 128, "scale": dim**-0.5}
        want = reference.sparse_decode(*map(wide, tensors), value_map=wide(query_map), **shared)
        for rows in (1, 16):
            out = torch.full_like(q, float("nan"))
            sparse_decode(*tensors, out, value_map=query_map, rows_per_program=rows, **shared)
            compare(f"sparse_decode, {batch} rows, {rows} per program", [out], [want])
    return bad


def check(model: Any) -> list[str]:
    """What is wrong; nothing if all is well."""
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    prompts = []
    for length in (90, 33, 150):
        ids = tokens(3, length, seed=length)
        mask = torch.ones_like(ids)
        mask[1, :9] = mask[2, : length // 2] = 0
        prompts.append((ids, mask, model.generate(ids, attention_mask=mask, **greedy)))
    on_gpu = model.cuda()
    bad = []
    for graph in (True, False):
        decoder = Decoder(on_gpu, batch=3, max_length=200, graph=graph)
        for time in range(3 if graph else 1):  # the second captures how prompts are read, the third replays
            for ids, mask, want in prompts:
                got = decoder.generate(ids, mask, max_new_tokens=NEW).cpu()
                if not torch.equal(got, want):
                    first = int((got != want).any(0).nonzero()[0]) - ids.shape[1]
                    name = f"graph={graph}, time {time}, {ids.shape[1]} tokens"
                    bad.append(f"{name}: differs from new token {first} on")
        for length in (85, 96, 85):  # less than the graph has room for, all of it, less again
            ids = tokens(3, length, seed=length)
            logits = decoder.prefill(ids).clone()
            with patch.object(decoder, "graphs_prompts", False):
                bad.extend(unlike(f"graph={graph}, {length} tokens", logits, decoder.prefill(ids)))
    with patch.object(decoding, "PASS_TOKENS", 40):  # two or four pieces
        decoder = Decoder(on_gpu, batch=3, max_length=200)
        for ids, mask, want in prompts:
            if not torch.equal(decoder.generate(ids, mask, max_new_tokens=NEW).cpu(), want):
                bad.append(f"{ids.shape[1]} tokens in pieces: other tokens")
    with patch.object(decoding, "PASS_TOKENS", 100):  # two rows of 33 tokens at a time, so two graphs
        decoder = Decoder(on_gpu, batch=3, max_length=200)
        ids, mask, want = prompts[1]
        for time in range(3):
            if not torch.equal(decoder.generate(ids, mask, max_new_tokens=NEW).cpu(), want):
                bad.append(f"time {time}, {ids.shape[1]} tokens in two passes: other tokens")
    single = Decoder(on_gpu, batch=1, max_length=200)  # one row: our own product kernel
    ids = prompts[0][0][:1]
    want = model.generate(ids.cuda(), **greedy)
    if not torch.equal(single.generate(ids, max_new_tokens=NEW), want):
        bad.append("one row: differs from transformers' generate on this GPU")
    return bad


class Selections:
    """What full layers select while it is entered, the newest last, in loops on kernels and on references.

    Attributes:
        indices: by implementation, [B, G, k]; what a CUDA graph wrote follows its replays.
        scores: of the references' blocks, [B, G, blocks].
    """

    def __init__(self) -> None:
        self.indices: dict[str, list[torch.Tensor]] = {"triton": [], "reference": []}
        self.scores: list[torch.Tensor] = []

    def __enter__(self) -> Selections:
        self._decode = attention.oracle_decode
        attention.oracle_decode = self._record
        return self

    def __exit__(self, *_: Any) -> None:
        attention.oracle_decode = self._decode

    def _record(self, q: Any, k: Any, v: Any, *where: Any, topk: int, scales: Any, **settings: Any) -> Any:
        found = self._decode(q, k, v, *where, topk=topk, scales=scales, **settings)
        self.indices[settings["implementation"]].append(found[2][:, :, 0])
        if settings["implementation"] == "reference":
            plain = KV(k, v, scales).plain(torch.float32)[:2]
            self.scores.append(oracle_attention(q, *plain, *where, with_scores=True, **settings)[2][:, :, 0])
        return found

    def differ(self, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [B] whose latest selections differ, and those where they do though it was no close call.

        It is one where all blocks that only one side chose score within `CLOSE` of the last one that the reference
        chose. What comes behind a row's first layer with other blocks follows from that.
        """
        other, wrong = [], []
        latest = (self.indices["triton"], self.indices["reference"], self.scores)
        for mine, theirs, scores in zip(*(found[-layers:] for found in latest), strict=True):
            sides = [taken(indices, scores.shape[-1]) for indices in (mine, theirs)]
            apart = sides[0] != sides[1]
            last = scores.masked_fill(~sides[1], torch.inf).amin(-1, keepdim=True)
            far = apart & ~((scores - last).abs() <= CLOSE * last)
            other.append(apart.any(-1).any(-1))
            wrong.append(far.any(-1).any(-1))
        different = torch.stack(other)
        first = different.cumsum(0) == 1
        return different.any(0), (torch.stack(wrong) & first & different).any(0)


def unlike_caches(name: str, mine: Caches, theirs: Caches, rows: torch.Tensor, slots: range) -> Iterator[str]:
    """What is wrong with what a prompt, or a step in its slot, has written; no step may change another slot.

    Args:
        name: of the prompt or step.
        mine, theirs: of the kernels and the references, alike before it.
        rows: [B] bool, to compare.
        slots: of the prompt's tokens, or of the step's one.
    """
    for index in range(len(mine.keys)):
        caches = [each.of(index, slice(None)) for each in (mine, theirs)]
        size = mine.keys[index].shape[2]
        written = torch.isin(torch.arange(size), torch.tensor(slots) % size)
        if len(slots) == 1:
            old = [[x.float()[:, :, ~written] for x in (*kv[:2], *(kv.scales or ()))] for kv in caches]
            if not all(map(torch.equal, *old)):
                yield f"{name}: another slot of layer {index} changed"
        plain = [kv.plain(torch.float32) for kv in caches]
        for kind, got, want in zip(("keys", "values"), plain[0], plain[1], strict=False):
            yield from unlike(
                f"{name}, {kind} of layer {index}", got[rows][:, :, written], want[rows][:, :, written]
            )


def check_fp8(model: Any) -> list[str]:
    """The same with keys and values in FP8, kernels against references: what is wrong.

    Both loops begin every step from the kernels' caches. A new key on the edge between two float8 may fall to either
    side, and then another block may be chosen where two are nearly as good: that row is not compared in that step, and
    of all rows and steps at most one in twenty may be such.
    """
    bad: list[str] = []
    left_out, rows = 0, len(LENGTHS) * NEW * 3
    layers = sum(block.scored for block in read_network(model).blocks)
    with Selections() as selections:
        mine, theirs = (
            Decoder(model.cuda(), batch=3, max_length=200, kv_dtype="fp8", graph=graph, implementation=name)
            for graph, name in ((True, "triton"), (False, "reference"))
        )
        for length in LENGTHS:
            ids = tokens(3, length, seed=length)
            mask = torch.ones_like(ids)
            mask[1, :9] = mask[2, : length // 2] = 0

            every = torch.ones(3, dtype=torch.bool, device=mine.network.device)
            name = f"FP8, {length} tokens"
            for _ in range(2):  # the third time by a graph
                mine.prefill(ids, mask)
            bad += unlike(f"{name}, prompt", mine.prefill(ids, mask), theirs.prefill(ids, mask))
            bad += unlike_caches(f"{name}, prompt", mine.caches, theirs.caches, every, range(length))
            for step in range(NEW):
                theirs.caches.copy_(mine.caches)
                fed = tokens(3, 1, seed=step)[:, 0].to(mine.network.device)
                got, want = (loop.feed(fed).clone() for loop in (mine, theirs))
                same = every
                if layers:
                    other, wrong = selections.differ(layers)
                    same, left_out = ~other, left_out + int(other.sum())
                    if wrong.any():
                        bad.append(f"{name}, step {step}: other blocks, and no close call")
                if same.any():
                    bad += unlike(f"{name}, step {step}", got[same], want[same])
                    bad += unlike_caches(
                        f"{name}, step {step}", mine.caches, theirs.caches, same,
                        range(length + step, length + step + 1),
                    )  # fmt: skip
    if left_out:
        print(f"FP8: {left_out} of {rows} rows were not compared, their blocks a close call")
    if 20 * left_out > rows:
        bad.append(f"FP8: {left_out} rows with other blocks are too many to be close calls")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    for name, model in (("bfloat16 kernels of a step", None), *cases()):
        try:
            bad = check_step() if model is None else [*check(model), *check_fp8(model)]
        except Exception:
            bad = [traceback.format_exc()]
        failed += bool(bad)
        print(f"{name}: {'ok' if not bad else ''}", *bad, sep="\n  " if bad else "", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
