"""Check the decode loop on one GPU: kernels and CUDA graph write the tokens that the CPU reference writes.

    python -m benchmarks.check_decode_loop

Tiny random models in float32. Each is checked alone and left-padded, and one decoder serves prompts of several lengths,
so that one graph replays over lengths that it was not captured at. `benchmarks.end_to_end` refuses to time what fails
here. Compiling takes most of the time.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from hyconvert.generation import Decoder
from tests.modeling.tiny import base_model, converted, plan_of, tokens

SHAPE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 7}
SETTINGS: dict[str, Any] = {"block_size": 16, "topk": 3, "window": 20}
MIXED = "F S0 R0 W F S4 F"
NEW = 24


def cases() -> Iterator[tuple[str, Any]]:
    """Names and models."""
    yield "qwen3, every kind", converted(base_model("qwen3", **SHAPE), plan_of(MIXED, **SETTINGS))
    yield "qwen3, dense", base_model("qwen3", **SHAPE)
    yield "olmo2", converted(base_model("olmo2", **SHAPE), plan_of(MIXED, **SETTINGS))
    yield "smollm3", converted(base_model("smollm3", **SHAPE), plan_of(MIXED, **SETTINGS))
    yield "qwen3_moe", converted(base_model("qwen3_moe", **SHAPE), plan_of(MIXED, **SETTINGS))
    odd = plan_of(MIXED, **SETTINGS, gate="sigmoid", sinks=True, maps=True)
    yield "llama, sigmoid gate and sinks", converted(base_model("llama", **SHAPE), odd)


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
        for ids, mask, want in prompts:
            got = decoder.generate(ids, mask, max_new_tokens=NEW).cpu()
            if not torch.equal(got, want):
                first = int((got != want).any(0).nonzero()[0])
                bad.append(
                    f"graph={graph}, {ids.shape[1]} tokens: differs from new token {first - ids.shape[1]} on"
                )
        again = decoder.generate(*prompts[0][:2], max_new_tokens=NEW)
        if not torch.equal(again, decoder.generate(*prompts[0][:2], max_new_tokens=NEW)):
            bad.append(f"graph={graph}: two runs differ")
    single = Decoder(on_gpu, batch=1, max_length=200)  # one row: our own product kernel
    ids = prompts[0][0][:1]
    want = model.generate(ids.cuda(), **greedy)
    if not torch.equal(single.generate(ids, max_new_tokens=NEW), want):
        bad.append("one row: differs from transformers' generate on this GPU")
    return bad


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    for name, model in cases():
        try:
            bad = check(model)
        except Exception:
            bad = [traceback.format_exc()]
        failed += bool(bad)
        print(f"{name}: {'ok' if not bad else ''}", *bad, sep="\n  " if bad else "", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
