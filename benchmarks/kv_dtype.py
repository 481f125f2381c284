"""What keys and values in FP8 cost in quality: one text through the decode loop with either cache.

    python -m benchmarks.kv_dtype converted/ --data heldout.jsonl.xz

Half of each row is read as a prompt; the rest is fed token by token, so that all of it is predicted by decoding steps
from the cache. Both caches get the same tokens, and selections of blocks may differ between them as they would in use.
One JSON row per model: perplexity with the model's own dtype and with FP8, their ratio with its standard error over
rows, the KL divergence of FP8's distribution from the other one, how often both would write the same token, and the
caches' bytes per row.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyconvert.checkpoint.opening import DTYPES
from hyconvert.data import read_texts, token_blocks
from hyconvert.evaluate import device_name, pick_device
from hyconvert.generation import Decoder
from hyconvert.generation.network import Network, read_network
from hyconvert.loading import load, quiet_loading


@torch.inference_mode()
def compare(model: Any, rows: Tensor, batch: int = 32) -> dict[str, Any]:
    """Decode rows [N, T] with both caches; see the module's text for what is returned."""
    network = model if isinstance(model, Network) else read_network(model)
    parts, sizes = [], (0, 0)
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        decoders = [
            Decoder(network, batch=len(part), max_length=part.shape[1], kv_dtype=kind)
            for kind in (None, "fp8")
        ]
        parts.append(_lockstep(decoders, part.to(network.device)))
        if not at:
            sizes = decoders[0].caches.nbytes // len(part), decoders[1].caches.nbytes // len(part)
        del decoders
    own, fp8, kl, same = torch.cat(parts, 1).cpu().unbind()
    gap = fp8 - own
    ratio = math.exp(float(gap.mean()))
    return {
        "perplexity": math.exp(float(own.mean())),
        "perplexity_fp8": math.exp(float(fp8.mean())),
        "ratio": ratio,
        "ratio_error": ratio * float(gap.std()) / math.sqrt(len(gap)) if len(gap) > 1 else None,
        "kl": float(kl.mean()),
        "agreement": float(same.mean()),
        "kv_bytes": sizes[0],
        "kv_bytes_fp8": sizes[1],
    }


def _lockstep(decoders: list[Decoder], rows: Tensor) -> Tensor:
    """Means over each row's second half, float64 [4, B]: both losses, KL(own || FP8), and agreement."""
    length = rows.shape[1]
    half = length // 2
    for decoder in decoders:
        decoder.prefill(rows[:, :half])
    totals = torch.zeros(4, len(rows), dtype=torch.float64, device=rows.device)
    for at in range(half, length - 1):  # the prompt's own prediction comes before any cached key is read
        own, fp8 = (decoder.feed(rows[:, at]).float().log_softmax(-1) for decoder in decoders)
        target = rows[:, at + 1, None]
        totals[0] -= own.gather(1, target)[:, 0]
        totals[1] -= fp8.gather(1, target)[:, 0]
        totals[2] += (own.exp() * (own - fp8)).sum(-1)
        totals[3] += own.argmax(-1) == fp8.argmax(-1)
    return totals / (length - 1 - half)


def main() -> None:
    """Compare both caches on every model, print a row for each and save them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="converted models")
    parser.add_argument("--data", default="stdlib-docstrings", help="text to measure on")
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens of a row; the second half is predicted"
    )
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens to predict")
    parser.add_argument("--batch", type=int, default=32, help="rows at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto is bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--out", default="benchmarks/results/kv_dtype.json")
    options = parser.parse_args()
    if options.length < 4:
        parser.error(f"--length {options.length} leaves nothing to predict; use at least 4")
    device = pick_device(options.device)
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = auto if options.dtype == "auto" else DTYPES[options.dtype]
    found: list[dict[str, Any]] = []
    for path in options.models:
        from transformers import AutoTokenizer

        with quiet_loading():
            model = load(path, dtype=dtype).to(device)
        rows = token_blocks(
            read_texts(options.data), AutoTokenizer.from_pretrained(path),
            sequences=-(-options.tokens // (options.length // 2)), length=options.length, name=options.data,
        )  # fmt: skip
        began = time.monotonic()
        measured = compare(model, rows, options.batch)
        found.append(
            {
                "model": Path(path).resolve().name,
                "plan": model.config.get_plan().line,
                "data": Path(options.data).name,
                "length": options.length,
                "predicted": len(rows) * (options.length - 1 - options.length // 2),
                **measured,
                "seconds": round(time.monotonic() - began, 1),
                "device": device_name(device),
                "dtype": str(dtype).removeprefix("torch."),
                "torch": torch.__version__,
            }
        )
        print(json.dumps(found[-1]), flush=True)
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
        del model


if __name__ == "__main__":
    main()
