"""From a GGUF file's metadata to a Transformers config and to Transformers tensor names.

Transformers' own `load_gguf_checkpoint` is what the tests compare with. It is not used itself because it dequantises
the whole model at once, and because for some files it drops what changes the model without a word: RoPE scaling,
Qwen3's head size, the experts' width and every tensor that it does not know.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hyconvert.checkpoint.gguf_header import GgufHeader
from hyconvert.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
"""GGUF architectures that can be read, and their Transformers model types. Mistral files say `llama`."""

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's RoPE scaling, stored as a tensor; it belongs to the config in Transformers."""


def tensor_name(path: Path, gguf_name: str) -> str:
    """The Transformers name of a GGUF tensor; a stack of experts has `{expert}` in its place.

    Raises:
        UnsupportedModelError: The name is not known; leaving the tensor out would change the model.
    """
    stem, _, suffix = gguf_name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if suffix in ("weight", "bias"):
        if match and match[2] in _LAYER:
            return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{suffix}"
        if stem in _TOP:
            return f"{_TOP[stem]}.{suffix}"
    raise UnsupportedModelError(
        f"{path} holds the tensor {gguf_name!r}, which hyconvert does not know; convert the safetensors checkpoint"
    )


def make_config(path: Path, header: GgufHeader, rope_factors: npt.NDArray[Any] | None) -> "PretrainedConfig":
    """Build the Transformers config that a GGUF file describes.

    Args:
        path: The file, for messages.
        header: Its header.
        rope_factors: The values of `ROPE_FACTORS`, if the file has it.

    Raises:
        CheckpointError: A value that every model needs is missing.
        UnsupportedModelError: The architecture, or its RoPE scaling, cannot be read from GGUF.
    """
    from transformers import AutoConfig

    meta = header.metadata
    architecture = meta.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{path} is a GGUF file of architecture {architecture!r}; from GGUF hyconvert reads "
            f"{', '.join(MODEL_TYPES)}; for others give the safetensors checkpoint"
        )
    if architecture == "llama" and meta.get("llama.expert_count"):
        raise UnsupportedModelError(
            f"{path} is a Mixtral-like mixture of experts, which hyconvert cannot convert"
        )

    def value(key: str, default: Any = None) -> Any:
        found = meta.get(f"{architecture}.{key}", default)
        if found is None:
            raise CheckpointError(
                f"{path} lacks {architecture}.{key} in its GGUF metadata; download it again"
            )
        # GGUF keeps floats in 32 bits: 1e-05 would come out as 9.999999747378752e-06.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    heads = value("attention.head_count")
    kv_heads = value("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise UnsupportedModelError(
            f"{path} has another number of heads in every layer, which hyconvert cannot read"
        )
    width = value("embedding_length")
    head_dim = value("attention.key_length", width // heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{path} rotates only part of each head (RoPE), which hyconvert cannot read"
        )
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{path} has no tensor token_embd.weight; download it again")
    settings: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[MODEL_TYPES[architecture]]],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": value("context_length"),
        "rope_parameters": _rope(path, value, rope_factors),
        # llama.cpp leaves the output matrix out when it is the embedding.
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float32",
        **token_ids(meta),
    }
    if architecture == "qwen3moe":
        settings |= {
            "num_experts": value("expert_count"),
            "num_experts_per_tok": value("expert_used_count"),
            "moe_intermediate_size": value("expert_feed_forward_length"),
            # Not in the metadata; llama.cpp always normalises the chosen experts' weights for this architecture.
            "norm_topk_prob": True,
        }
    else:
        settings["intermediate_size"] = value("feed_forward_length")
    if architecture in ("llama", "qwen3", "qwen3moe"):
        settings["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if architecture == "llama":
        settings["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    return AutoConfig.for_model(MODEL_TYPES[architecture], **settings)


def token_ids(meta: dict[str, Any]) -> dict[str, Any]:
    """The begin, end and padding token ids; an end-of-turn token that differs is a second end token."""
    eos, eot = meta.get("tokenizer.ggml.eos_token_id"), meta.get("tokenizer.ggml.eot_token_id")
    ends = sorted({token for token in (eos, eot) if token is not None})
    return {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends if len(ends) > 1 else eos,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }


def _rope(path: Path, value: Callable[..., Any], factors: npt.NDArray[Any] | None) -> dict[str, Any]:
    """Transformers' `rope_parameters`; raises `UnsupportedModelError` for a scaling that cannot be expressed."""
    theta = value("rope.freq_base", 10000.0)
    scaling = value("rope.scaling.type", "none")
    unreadable = UnsupportedModelError(
        f"{path} scales RoPE in a way ({scaling}) that hyconvert cannot read from GGUF; convert the safetensors "
        "checkpoint"
    )
    if factors is not None:
        return _llama3_rope(theta, factors, unreadable)
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("linear", "yarn"):
        raise unreadable
    rope = {"rope_type": scaling, "rope_theta": theta, "factor": value("rope.scaling.factor")}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = value("rope.scaling.original_context_length")
    return rope


def _llama3_rope(
    theta: float, factors: npt.NDArray[Any], unreadable: UnsupportedModelError
) -> dict[str, Any]:
    """Llama 3's scaling, recovered from its per-frequency factors and accepted only if it reproduces them."""
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    head_dim = 2 * len(factors)
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
        raise unreadable
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
