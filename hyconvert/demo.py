"""`make demo`: convert and heal a real model on this machine, and set it beside its base.

    python -m hyconvert.demo MODEL.gguf

Converts SmolLM2-135M-Instruct (4-bit GGUF) with 7 of its 30 layers full, aligned and then healed for about a minute on
text that every Python carries, and prints perplexity on other text, KV bytes, and an answer from each model.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-135m-cpu.yaml"
QUESTION = "What is the capital of France? Answer in one sentence."


def main(model: str) -> None:
    """Run the demo on a `.gguf` of SmolLM2."""
    import torch
    from rich.console import Console

    import hyconvert.modeling  # noqa: F401  (registers the auto classes)
    from hyconvert.checkpoint import open_source
    from hyconvert.comparison import compare
    from hyconvert.conversion import dense_plan, load_base_as
    from hyconvert.data import BUILTIN_HELDOUT
    from hyconvert.heal import heal
    from hyconvert.heal.options import convert_by
    from hyconvert.inspection import inspect_path
    from hyconvert.loading import load
    from hyconvert.modeling import HyConvertConfig
    from hyconvert.progress import on_stderr
    from hyconvert.recipe import Recipe

    began = time.monotonic()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "smollm2-hysparse"))
        console.rule("1. Convert")
        recipe = Recipe.load(RECIPE)
        convert_by(recipe, model, Path(out), progress=on_stderr)
        console.rule("2. What the KV cache weighs")
        inspect_path(out).render(console)
        console.rule("3. What it costs, on text that no fit has seen")
        result = compare(out, data=BUILTIN_HELDOUT, tokens=4096, sequence_length=2048, progress=on_stderr)
        result.render(console)
        console.rule("4. Heal: about a minute of training, taught by the base")
        healed = str(Path(folder, "smollm2-healed"))
        console.print(
            heal(out, healed, recipe.heal, device="cpu", progress=on_stderr).summary, highlight=False
        )
        after = compare(healed, data=BUILTIN_HELDOUT, tokens=4096, sequence_length=2048, progress=on_stderr)
        after.render(console)
        console.rule("5. An answer from each")
        source = open_source(model)
        tokenizer = source.load_tokenizer()
        dense = HyConvertConfig.from_base(source.config, dense_plan(source.config))
        base = load_base_as(dense, source, torch.device("cpu"))
        console.print(f"[bold]{QUESTION}[/bold]")
        console.print(f"base:      {answer(base, tokenizer)}", highlight=False)
        console.print(f"converted: {answer(load(out), tokenizer)}", highlight=False)
        console.print(f"healed:    {answer(load(healed), tokenizer)}", highlight=False)
    console.rule()
    smaller = result.base_kv_bytes / result.converted_kv_bytes
    console.print(
        f"Perplexity {result.base_perplexity:.2f} -> {result.converted_perplexity:.2f} ({result.ratio:.3f}x) without "
        f"training, {after.converted_perplexity:.2f} ({after.ratio:.3f}x) after {recipe.heal.tokens:,} tokens of "
        f"healing; KV cache at {result.sequence_length:,} tokens {smaller:.1f}x smaller. "
        f"{time.monotonic() - began:.0f} s in all."
    )


def answer(model: Any, tokenizer: Any) -> str:
    """The model's greedy reply to the demo's question."""
    import torch

    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
