"""hyconvert's own decode loop, for the speed that `model.generate` leaves: see `Decoder` and `generate`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyconvert.generation.decoder import Decoder
from hyconvert.generation.sampling import Sampling

__all__ = ["Decoder", "Sampling", "generate"]


def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    kv_dtype: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Continue prompts on the decode loop; one call of `Decoder`, which many prompts should share.

    Args:
        model: a converted model, or a base of a supported family.
        input_ids: [B, T] int64.
        attention_mask: [B, T], 0 for padding on the left.
        max_new_tokens: most new tokens per row.
        temperature: 0 takes the likeliest token.
        top_k, top_p: what sampling is limited to; see `Sampling`.
        eos_token_id: what ends a sequence; None is the model's own, an empty list is nothing.
        pad_token_id: what follows the end; None is the model's own, or the first end token.
        kv_dtype: "fp8" for the long caches in FP8; None is the model's dtype.
        implementation: of the kernels; None for whichever runs on the model's device.

    Returns:
        [B, T + N] prompts and new tokens, as transformers' `generate` returns them.

    Raises:
        HyconvertError: the model or the prompts do not fit; see `Decoder`.
    """
    own = model.generation_config
    eos = own.eos_token_id if eos_token_id is None else eos_token_id
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    pad = own.pad_token_id if pad_token_id is None else pad_token_id
    decoder = Decoder(
        model,
        batch=input_ids.shape[0],
        max_length=input_ids.shape[1] + max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        eos=ends,
        pad=pad if pad is not None else ends[0] if ends else 0,
        kv_dtype=kv_dtype,
        implementation=implementation,
    )
    decoder.graphs_prompts = False  # they are not read again
    return decoder.generate(input_ids, attention_mask, max_new_tokens=max_new_tokens)
