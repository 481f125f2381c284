"""Free running: a model can look fine on the likelihood of other people's text and fail when it writes its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyconvert.evaluation.models import Pair, hidden_states


@dataclass(frozen=True)
class GenerationResult:
    """Greedy continuations of the same prompts by both models.

    Attributes:
        prompts, prompt_tokens, new_tokens: how many, of how many tokens, continued by how many.
        common_prefix: mean number of tokens before the continuations part.
        equal: share of positions with the same token.
        base_nll, converted_nll: mean NLL in nats per token that the base gives to its own continuations, and to the
            converted model's.
        base_repeated, converted_repeated: share of a continuation's 4-grams that stood in it before.
        samples: texts of the first prompts: `prompt` (its end), `base`, `converted`.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    common_prefix: float
    equal: float
    base_nll: float
    converted_nll: float
    base_repeated: float
    converted_repeated: float
    samples: list[dict[str, str]]


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, count: int, end: set[int]) -> Tensor:
    """Greedy continuations [B, count] of prompts [B, T]; once a row has ended, its end token is repeated."""
    tokens: list[Tensor] = []
    out = model(prompts, use_cache=True, logits_to_keep=1)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    ends = torch.tensor(sorted(end), device=prompts.device, dtype=prompts.dtype)
    for _ in range(count):
        latest = out.logits[:, -1].argmax(-1)
        if tokens:
            latest = torch.where(ended, tokens[-1], latest)
        tokens.append(latest)
        ended |= torch.isin(latest, ends)
        if len(tokens) < count:
            out = model(latest[:, None], past_key_values=out.past_key_values, use_cache=True)
    return torch.stack(tokens, 1)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text, by the model's generation config and its tokenizer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return {int(token) for token in (*found, tokenizer.eos_token_id) if token is not None}


@torch.no_grad()
def measure_generation(
    pair: Pair, prompts: Tensor, count: int, on_model: Callable[[], None] | None = None
) -> GenerationResult:
    """Let both models continue prompts [m, P] by `count` tokens, and let the base judge."""
    prompts = prompts.to(pair.device)
    ends = end_tokens(pair.base, pair.tokenizer)
    written = {}
    for name, model in pair.models.items():
        written[name] = greedy(model, prompts, count, ends)
        if on_model:
            on_model()
    base, ours = written["base"], written["converted"]
    same = base == ours
    judged = {name: _nll(pair.base, prompts, text, ends) for name, text in written.items()}
    repeated = {name: _repeated(text, ends) for name, text in written.items()}
    decode = pair.tokenizer.decode
    return GenerationResult(
        prompts=len(prompts),
        prompt_tokens=prompts.shape[1],
        new_tokens=count,
        common_prefix=float(same.int().cumprod(1).sum(1).float().mean()),
        equal=float(same.float().mean()),
        base_nll=judged["base"],
        converted_nll=judged["converted"],
        base_repeated=repeated["base"],
        converted_repeated=repeated["converted"],
        samples=[
            {
                "prompt": decode(prompts[i, -24:]),
                "base": decode(until_end(base[i].tolist(), ends)),
                "converted": decode(until_end(ours[i].tolist(), ends)),
            }
            for i in range(min(3, len(prompts)))
        ],
    )


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """A continuation up to its end token, which is included."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens)) + 1]


def _nll(model: Any, prompts: Tensor, text: Tensor, ends: set[int]) -> float:
    """Mean NLL per token of the continuations, each up to its end."""
    total, count = 0.0, 0
    for prompt, continuation in zip(prompts, text, strict=True):
        kept = continuation[: len(until_end(continuation.tolist(), ends))]
        hidden = hidden_states(model, torch.cat((prompt, kept)))[len(prompt) - 1 : -1]
        logits = model.lm_head(hidden).float()
        total += float(torch.nn.functional.cross_entropy(logits, kept, reduction="sum"))
        count += len(kept)
    return total / count


def _repeated(text: Tensor, ends: set[int], n: int = 4) -> float:
    seen = again = 0
    for row in text.tolist():
        row = until_end(row, ends)
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        seen, again = seen + len(grams), again + len(grams) - len(set(grams))
    return again / seen if seen else 0.0
