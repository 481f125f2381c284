"""Tiny models of every family, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from hyconvert.modeling import HyConvertConfig, HyConvertForCausalLM
from hyconvert.plan import Plan, parse_line

VOCAB = 97
EXACT = {"rtol": 1e-5, "atol": 2e-5}
MIXED = "F S0 R0 W F S4 F"
"""Every kind; the second source is not the nearest, and layer 3 of SmolLM3 has no RoPE."""

_SHAPE = {
    "num_hidden_layers": 7,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    ),
    "olmo2": (Olmo2Config, {}),
    "smollm3": (SmolLM3Config, {}),
}
FAMILY_NAMES = tuple(_CONFIGS)


def base_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Config of a tiny base model."""
    config_class, extra = _CONFIGS[family]
    return config_class(**(_SHAPE | extra | changes))


def base_model(family: str, **changes: Any) -> Any:
    """A tiny base model with seeded weights; biases and norms are not left at zero and one."""
    torch.manual_seed(0)
    config = base_config(family, **changes)
    return stir(
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), ("bias", "norm")
    )


def stir(model: Any, names: tuple[str, ...], scale: float = 0.3) -> Any:
    """Add seeded noise to the parameters whose name contains one of `names`."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def plan_of(line: str, **settings: Any) -> Plan:
    """A plan from a layer map; small blocks and a small window unless told."""
    defaults = {"block_size": 4, "topk": 2, "window": 6}
    return Plan(layers=parse_line(line), **(defaults | settings))


def converted(base: Any, plan: Plan, stirred: bool = True) -> Any:
    """The base converted in memory; its gates, maps and sinks are away from their neutral start if `stirred`."""
    model = HyConvertForCausalLM._from_config(HyConvertConfig.from_base(base.config, plan)).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    assert all("self_attn" in name for name in missing), missing
    if stirred:
        stir(model, ("gate.weight", "gate.bias", "_map"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_sink"):
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return model


def mixed_model(family: str = "llama", line: str = MIXED, **settings: Any) -> Any:
    """A converted model of every layer kind, with all that is learnable away from its neutral start."""
    return converted(base_model(family), plan_of(line, **settings))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[B, T] random ids, none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
