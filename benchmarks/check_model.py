"""Check a small converted model on a CUDA device: the Triton kernels against the reference attention.

    python -m benchmarks.check_model [--model CONVERTED] [--json FILE]

The model is a random Llama with every layer kind (full, sparse, reuse, window), 6/2 heads of 64. In float32 (TF32 off)
the logits must equal those of the reference on the CPU to 1e-4 relative RMS, and greedy tokens must be the same. In
bfloat16 the Triton logits must be as near to the float32 logits as the bfloat16 reference's are, within a quarter.

`--model` adds a real converted model, both implementations on the GPU: on text, bfloat16 logits within 2e-2 relative
RMS of the float32 reference's, and the same 64 greedy tokens after each of eight prompts in float32, wherever the
reference's best two logits are more than 1e-3 apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hyconvert.data import read_texts, token_blocks
from hyconvert.loading import load
from hyconvert.modeling import HyConvertConfig, HyConvertForCausalLM
from hyconvert.plan import Plan, parse_line

VOCAB = 97


def small_model(device: str) -> Any:
    """A converted random Llama whose gates and maps are away from their neutral start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=7, hidden_size=192, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        vocab_size=VOCAB, intermediate_size=256, max_position_embeddings=2048, initializer_range=0.08,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    plan = Plan(layers=parse_line("F S0 R0 W F S4 F"), block_size=16, topk=3, window=20)
    model = HyConvertForCausalLM._from_config(HyConvertConfig.from_base(config, plan)).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate." in name or name.endswith("_map"):
                parameter += 0.05 * torch.randn_like(parameter)
    return model.to(device)


def using(model: Any, implementation: str, dtype: torch.dtype, device: str) -> Any:
    """A copy of the model with another attention implementation."""
    model = copy.deepcopy(model).to(device, dtype)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = implementation
    return model


def situations(length: int) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of one forward pass each."""
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, length), generator=gen)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    packed = torch.cat([torch.arange(length // 3), torch.arange(length - length // 3)]).expand(2, -1)
    return {
        "prefill": {"input_ids": ids},
        "left padding": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids, "position_ids": packed},
    }


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor], cached: bool = False) -> torch.Tensor:
    """Float64 logits of the real tokens on the CPU; ``cached`` feeds the last 8 tokens one by one."""
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in batch.items()}
    if not cached:
        out = model(**batch, use_cache=False).logits
    else:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        cut, cache, pieces = ids.shape[1] - 8, None, []
        for begin, end in [(0, cut), *((at, at + 1) for at in range(cut, ids.shape[1]))]:
            extra = {} if mask is None else {"attention_mask": mask[:, :end]}
            step = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **extra)
            cache = step.past_key_values
            pieces.append(step.logits)
        out = torch.cat(pieces, 1)
    out = out.double().cpu()
    mask = batch.get("attention_mask")
    return out if mask is None else out[mask.cpu().bool()]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def check(device: str = "cuda", length: int = 400, steps: int = 40) -> list[dict]:
    """Rows of the table: name, numbers, and whether it passed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = small_model("cpu")
    truth = using(model, "hyconvert_reference", torch.float32, "cpu")
    fast = using(model, "hyconvert_triton", torch.float32, device)
    rows = []

    def row(name: str, passed: bool, **numbers: float) -> None:
        rows.append({"name": name, "passed": bool(passed), **numbers})
        print(
            f"{'ok' if passed else 'FAIL':4} {name:28}",
            *(f"{k} {v:.2e}" for k, v in numbers.items()),
            flush=True,
        )

    batches = situations(length)
    variants = [(name, batch, False) for name, batch in batches.items()]
    variants += [(f"cached {name}", batches[name], True) for name in ("prefill", "left padding")]
    wants = {}
    for name, batch, cached in variants:
        want = wants[name] = logits(truth, batch, cached)
        found = error(logits(fast, batch, cached), want)
        row(f"fp32 {name}", found < 1e-4, triton=found)
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")) if device == "cuda" else ():
        slow = using(model, "hyconvert_reference", dtype, device)
        quick = using(model, "hyconvert_triton", dtype, device)
        for name, batch, cached in variants:
            ours, reference = logits(quick, batch, cached), logits(slow, batch, cached)
            a, b = error(ours, wants[name]), error(reference, wants[name])
            row(f"{label} {name}", a < 1.25 * b, triton=a, reference=b, between=error(ours, reference))
    for name in ("prefill", "left padding"):
        batch = {k: v[:, :120] for k, v in batches[name].items()}
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        for kind in ("dynamic", "static"):
            options: dict[str, Any] = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None}
            if kind == "static":
                options |= {"cache_implementation": "static", "disable_compile": True}
            want = truth.generate(**batch, **options)
            got = fast.generate(**{k: v.to(device) for k, v in batch.items()}, **options).cpu()
            row(f"greedy {name}, {kind} cache", torch.equal(got, want), differing=float((got != want).sum()))
    gradients(truth, fast, batches["prefill"], row, device)
    return rows


def gradients(truth: Any, fast: Any, batch: dict[str, torch.Tensor], row: Any, device: str) -> None:
    """A training step on the device gives the CPU's gradients."""
    found = []
    for model, where in ((truth, "cpu"), (fast, device)):
        ids = batch["input_ids"].to(where)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(
            {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
        )
    want, got = found
    worst = max(error(got[name], want[name]) for name in want if want[name].norm() > 0)
    row("fp32 gradients", want.keys() == got.keys() and worst < 1e-3, worst=worst)


@torch.no_grad()
def check_real(path: str, length: int = 2048, prompt: int = 512, new: int = 64) -> list[dict]:
    """Rows for a converted checkpoint, on the built-in text to measure on."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = load(path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = token_blocks(read_texts("stdlib-docstrings"), tokenizer, sequences=8, length=length, name="text")
    truth = using(model, "hyconvert_reference", torch.float32, "cuda")
    want = torch.cat([truth(row[None].cuda(), use_cache=False).logits.cpu() for row in ids[:2]])
    rows = []
    for dtype, label, most in ((torch.float32, "fp32", 1e-4), (torch.bfloat16, "bf16", 2e-2)):
        found = {}
        for name in ("triton", "reference"):
            other = using(model, f"hyconvert_{name}", dtype, "cuda")
            got = torch.cat(
                [other(row[None].cuda(), use_cache=False).logits.float().cpu() for row in ids[:2]]
            )
            found[name] = error(got, want)
        rows.append({"name": f"{label} logits, {length} tokens", "passed": found["triton"] < most, **found})
    fast = using(model, "hyconvert_triton", torch.float32, "cuda")
    prompts = ids[:, :prompt].cuda()
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = fast.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    scores = truth(ours, use_cache=False).logits[
        :, prompt - 1 : -1
    ]  # the reference reads what the kernels wrote
    best = scores.topk(2, -1)
    gap = best.values[..., 0] - best.values[..., 1]
    other = best.indices[..., 0] != ours[:, prompt:]
    rows.append({
        "name": f"greedy, 8 prompts of {prompt} and {new} tokens",
        "passed": not bool((other & (gap > 1e-3)).any()),
        "differing": float(other.sum()),
        "ties": float((gap <= 1e-3).sum()),
    })  # fmt: skip
    for row in rows:
        print(row, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", help="a converted checkpoint, checked as well (CUDA only)")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "check_model.json")
    args = parser.parse_args()
    rows = check(args.device, args.length, args.steps)
    if args.model and args.device == "cuda":
        rows += check_real(args.model)
    passed = all(row["passed"] for row in rows)
    if args.device == "cuda":
        record = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "passed": passed,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
