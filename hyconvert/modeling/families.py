"""The architectures hyconvert converts, and what is particular about their attention."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from hyconvert.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from hyconvert.checkpoint import Source


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


def family_of_base(source: Source) -> Family:
    """The family of a base, once its weights are known to be those that its config describes.

    Builds the base without memory for its weights, and compares names and shapes of the layers and shapes of the rest.
    Experts are not compared: Transformers stores them otherwise.

    Raises:
        UnsupportedModelError: see `family_of`.
        CheckpointError: config and weights contradict each other.
    """
    family = family_of(source.config.model_type)
    config = copy.deepcopy(source.config)
    config._attn_implementation = "eager"  # whatever the config names need not be installed
    with torch.device("meta"):
        wanted = family.load_class("ForCausalLM")(config).state_dict()
    wrong = []
    for name, tensor in wanted.items():
        shape, found = list(tensor.shape), source.tensors.get(name)
        if found is not None and list(found.shape) != shape:
            wrong.append(f"{name} is {list(found.shape)} in the weights and {shape} by the config")
        elif found is None and _compared(name):
            wrong.append(f"the config wants {name}, which the weights lack")
    surplus = [name for name in source.tensors if name not in wanted and _compared(name)]
    wrong += [f"the weights hold {name}, of which the config does not know" for name in surplus]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"the config and the weights of {source.name!r} do not belong together: {wrong[0]}{more}; get both from "
            "one place"
        )
    return family


def _compared(name: str) -> bool:
    """Whether a base must have a tensor of this name exactly if its config implies it."""
    return ".layers." in name and ".experts." not in name and not name.endswith("rotary_emb.inv_freq")


def base_window(config: Any, layer: int) -> int | None:
    """Sliding window of one layer of a *base* config in tokens, or None where it attends to everything."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return None
    types = getattr(config, "layer_types", None)
    return window if types is None or types[layer] == "sliding_attention" else None
