"""The architectures hyconvert converts, and what is particular about their attention."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from hyconvert.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """How one transformers architecture computes q, k and v.

    Attributes:
        model_type: the `model_type` of its config.
        prefix: class name prefix in transformers, as in `<prefix>ForCausalLM`.
        qk_norm: where q and k are normalised: per head after the split (`head`), over the whole projection
            before it (`flat`), or not at all.
        title: name for people.
    """

    model_type: str
    prefix: str
    title: str
    qk_norm: Literal["head", "flat"] | None = None

    def load_class(self, suffix: str) -> Any:
        """The transformers class `<prefix><suffix>`, imported on first use."""
        package = f"transformers.models.{self.model_type}"
        module = "configuration" if suffix == "Config" else "modeling"
        return getattr(importlib.import_module(f"{package}.{module}_{self.model_type}"), self.prefix + suffix)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", "Llama"),
        Family("mistral", "Mistral", "Mistral"),
        Family("qwen2", "Qwen2", "Qwen2"),
        Family("qwen3", "Qwen3", "Qwen3", qk_norm="head"),
        Family("qwen3_moe", "Qwen3Moe", "Qwen3-MoE", qk_norm="head"),
        Family("olmo2", "Olmo2", "OLMo2", qk_norm="flat"),
        Family("smollm3", "SmolLM3", "SmolLM3"),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`.

    Raises:
        UnsupportedModelError: hyconvert cannot convert it; the message lists what it can.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(family.title for family in FAMILIES.values())
        hint = " (it is converted already)" if model_type == "hyconvert" else ""
        raise UnsupportedModelError(
            f"models of type '{model_type}' cannot be converted{hint}; hyconvert converts {known}"
        ) from None


def base_window(config: Any, layer: int) -> int | None:
    """Sliding window of one layer of a *base* config in tokens, or None where it attends to everything."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return None
    types = getattr(config, "layer_types", None)
    return window if types is None or types[layer] == "sliding_attention" else None
