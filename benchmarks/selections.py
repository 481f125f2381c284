"""How much neighbouring queries of a converted model agree on their blocks, which is what the tile union lives on.

    python -m benchmarks.selections converted/ --data heldout.jsonl.xz [--length 8192] [--rows 4]

One JSON row per full layer that is read, and their means: the Jaccard index of the blocks of two neighbouring queries,
and blocks in the union of 8, 16, 32 and 64 neighbouring queries as multiples of top-k. Only the second half of each row
counts, where every query has `eligible` blocks to choose from on average. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hyconvert.modeling.attention as attention
from benchmarks.check_kernels import taken
from hyconvert.data import read_texts, token_blocks
from hyconvert.evaluate import device_name, pick_device
from hyconvert.loading import load, quiet_loading

TILES = (8, 16, 32, 64)


def agreement(indices: Tensor, blocks: int) -> dict[str, float]:
    """Of selections ``[G,T,k]`` (-1 is none) among so many blocks; T is a multiple of the largest tile."""
    groups, length, k = indices.shape
    chosen = taken(indices, blocks)
    both, either = (chosen[:, 1:] & chosen[:, :-1]).sum(-1), (chosen[:, 1:] | chosen[:, :-1]).sum(-1)
    found = {"jaccard": (both / either.clamp(min=1)).mean().item()}
    for tile in TILES:
        union = chosen.reshape(groups, length // tile, tile, blocks).any(2).sum(-1)
        found[f"union of {tile}"] = union.float().mean().item() / k
    return found


@torch.inference_mode()
def measure(model: Any, rows: Tensor) -> list[dict[str, Any]]:
    """One row per full layer that is read, over rows [N, T]."""
    readers = [layer.self_attn for layer in model.model.layers if layer.self_attn.kind in ("sparse", "reuse")]
    layers = sorted({reader.source for reader in readers})
    block, length, half = readers[0].block_size, rows.shape[1], rows.shape[1] // 2
    collected: list[list[Tensor]] = [[] for _ in layers]
    own = attention.oracle_attention_topk

    def watched(*args: Any, **options: Any) -> Any:
        outputs = own(*args, **options)
        selections.append(outputs[2][0, :, half:].cpu())
        return outputs

    attention.oracle_attention_topk = watched
    try:
        for row in rows:
            selections: list[Tensor] = []
            model.model(row[None].to(model.device), use_cache=False)
            for place, selection in zip(collected, selections, strict=True):
                place.append(selection)
    finally:
        attention.oracle_attention_topk = own
    blocks = -(-length // block)
    return [
        {"layer": layer, **agreement(torch.cat(found), blocks)}
        for layer, found in zip(layers, collected, strict=True)
    ]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a converted checkpoint")
    parser.add_argument("--data", help="text  [default: the built-in one]")
    parser.add_argument("--length", type=int, default=8192, help="T, a multiple of 128")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--topk", type=int, nargs="+", help="blocks per query  [default: the model's]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "selections.json")
    options = parser.parse_args()
    if options.length % (2 * TILES[-1]):
        parser.error(f"--length must be a multiple of {2 * TILES[-1]}")
    device = pick_device(options.device)
    with quiet_loading():
        model = load(options.model, device=str(device), dtype=torch.float32)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = token_blocks(
        read_texts(options.data), tokenizer, sequences=options.rows, length=options.length, name="the text"
    )
    plan = model.config.get_plan()
    about = {
        "plan": plan.line, "block_size": plan.block_size, "window": plan.window, "length": options.length,
        "rows": len(rows), "eligible": (0.75 * options.length - plan.window) / plan.block_size,
        "device": device_name(device),
    }  # fmt: skip
    results = []
    for topk in options.topk or [plan.topk]:
        for layer in model.model.layers:
            layer.self_attn.topk = topk
        found = measure(model, rows)
        names = [name for name in found[0] if name != "layer"]
        means = {name: sum(row[name] for row in found) / len(found) for name in names}
        results.append({"topk": topk, "mean": means, "layers": found})
        print(json.dumps({"topk": topk} | means), flush=True)
        options.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
