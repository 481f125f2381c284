"""Writing tiny GGUF files the way llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    path: Path,
    config: Any,
    weights: dict[str, np.ndarray],
    *,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    pre: str = "smollm",
    extra_metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    architecture: str | None = None,
) -> Path:
    """Write `weights`, named as in a Transformers checkpoint (experts apart), with a byte-level tokenizer."""
    arch = architecture or ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, arch)
    _add_metadata(writer, arch, config)
    _add_tokenizer(writer, config.vocab_size, pre)
    for key, value in (extra_metadata or {}).items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](key, value)
    for name, values in (to_gguf(config, weights) | (extra_tensors or {})).items():
        if values.ndim > 1 and quantization != GGMLQuantizationType.F32:
            writer.add_tensor(name, quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def to_gguf(config: Any, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """llama.cpp's names and layouts: Llama's Q and K reordered, a layer's experts stacked."""
    tensors: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, values in weights.items():
        stem, suffix = name.rsplit(".", 1)
        if stem in _TOP:
            tensors[f"{_TOP[stem]}.{suffix}"] = values
            continue
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        if part.startswith("mlp.experts."):
            projection = part.rsplit(".", 1)[1].removesuffix("_proj")
            stacks.setdefault(f"blk.{layer}.ffn_{projection}_exps.{suffix}", []).append(values)
            continue
        if config.model_type == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))
        tensors[f"blk.{layer}.{_LAYER[part]}.{suffix}"] = values
    return tensors | {name: np.stack(experts) for name, experts in stacks.items()}


def _add_metadata(writer: GGUFWriter, arch: str, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_feed_forward_length(config.intermediate_size)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_tokenizer(writer: GGUFWriter, vocab_size: int, pre: str) -> None:
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ", "ĊĊ", "ĠĠ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters]
    tokens += [f"<extra_{index}>" for index in range(vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
