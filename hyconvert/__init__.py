"""hyconvert turns a pretrained full-attention language model into a HySparse model (arXiv 2602.03560).

    import hyconvert
    hyconvert.convert("org/model", "out/", uniform=3)
    model = hyconvert.load("out/")

Importing the package makes transformers' auto classes know converted checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyconvert.conversion import Calibration, ConversionReport, convert
    from hyconvert.generation import Decoder, generate
    from hyconvert.loading import load
    from hyconvert.modeling import HyConvertConfig, HyConvertForCausalLM
    from hyconvert.plan import LayerPlan, Plan

__version__ = "0.1.0.dev0"
__all__ = [
    "Calibration",
    "ConversionReport",
    "Decoder",
    "HyConvertConfig",
    "HyConvertForCausalLM",
    "LayerPlan",
    "Plan",
    "convert",
    "generate",
    "load",
]

_HOMES = {
    "Calibration": "conversion",
    "ConversionReport": "conversion",
    "Decoder": "generation",
    "HyConvertConfig": "modeling",
    "HyConvertForCausalLM": "modeling",
    "LayerPlan": "plan",
    "Plan": "plan",
    "convert": "conversion",
    "generate": "generation",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"hyconvert.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The command line answers --help at once: there (also as `python -m`) torch and transformers wait for a command.
if Path(sys.argv[0] if sys.argv else "").name not in ("hyconvert", "-m"):
    import hyconvert.modeling  # noqa: F401
