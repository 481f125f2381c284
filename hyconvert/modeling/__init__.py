"""Model code: config, attention and model classes of converted checkpoints."""

from __future__ import annotations

from typing import Any

from hyconvert.modeling import configuration, model
from hyconvert.modeling.configuration import HyConvertConfig
from hyconvert.modeling.families import FAMILIES, Family, family_of
from hyconvert.modeling.model import HyConvertForCausalLM

__all__ = ["FAMILIES", "Family", "HyConvertConfig", "HyConvertForCausalLM", "family_of"]

model.register()


def __getattr__(name: str) -> Any:
    """`HyConvert<Family>Config` and `HyConvert<Family>ForCausalLM`, made on first use."""
    if name.startswith("HyConvert") and name.endswith("Config"):
        return getattr(configuration, name)
    if name.startswith("HyConvert") and name.endswith("ForCausalLM"):
        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
