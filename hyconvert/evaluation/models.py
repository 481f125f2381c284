"""A converted model and its base, side by side in memory, sharing the weights that conversion left alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyconvert.checkpoint import Source, open_source
from hyconvert.errors import CheckpointError
from hyconvert.evaluate import pick_device
from hyconvert.inspection import read_config
from hyconvert.loading import load, quiet_loading
from hyconvert.modeling.families import family_of


@dataclass
class Pair:
    """Two models to compare.

    Attributes:
        path, base_name: where they are from.
        converted: the converted model.
        base: the base, as Transformers' own class with its own attention.
        tokenizer: the base's.
        fingerprint: of the base's contents.
        shared: bytes of weights that both hold together.
    """

    path: str
    base_name: str
    converted: Any
    base: Any
    tokenizer: Any
    fingerprint: str
    shared: int = 0

    @property
    def device(self) -> torch.device:
        """Where both are."""
        device: torch.device = next(self.converted.parameters()).device
        return device

    @property
    def models(self) -> dict[str, Any]:
        """Both by name."""
        return {"base": self.base, "converted": self.converted}


def load_pair(path: str, *, base: str | None = None, device: str = "auto", dtype: str = "auto") -> Pair:
    """Load a converted checkpoint and its base.

    Args:
        path: the converted checkpoint.
        base: the base; None is the one recorded in the plan.
        device: where to.
        dtype: of both; `auto` is the converted checkpoint's.

    Raises:
        CheckpointError: one of them cannot be used, or they do not belong together.
    """
    config = read_config(path)
    name = base or config.get_plan().base
    if name is None:
        raise CheckpointError(f"{path} does not say what it was converted from; name the base with --base")
    where = pick_device(device)
    chosen = str(config.dtype).removeprefix("torch.") if dtype == "auto" and config.dtype else dtype
    source = open_source(name, dtype=chosen)
    _check_shapes(path, config, name, source.config)
    with quiet_loading():
        converted = load(path, dtype=source.dtype).requires_grad_(False)
        original = load_base(source)
    shared = share_weights(converted, original)
    return Pair(
        path,
        name,
        converted.to(where),
        original.to(where),
        source.load_tokenizer(),
        source.fingerprint,
        shared,
    )


def load_base(source: Source) -> Any:
    """A base as Transformers' own class, for inference."""
    model_class = family_of(source.config.model_type).load_class("ForCausalLM")
    if source.path.is_dir():
        model = model_class.from_pretrained(source.path, dtype=source.dtype)
    else:
        state = {name: tensor for _, name, tensor in source.iter_tensors()}
        model = model_class.from_pretrained(None, config=source.config, state_dict=state, dtype=source.dtype)
    return model.eval().requires_grad_(False)


def share_weights(ours: Any, theirs: Any) -> int:
    """Let `theirs` hold the tensors of `ours` where they are equal, and give the bytes saved."""
    mine = dict(ours.named_parameters(remove_duplicate=False))
    saved: dict[int, int] = {}
    for prefix, module in theirs.named_modules():
        for leaf, tensor in list(module._parameters.items()):
            twin = mine.get(f"{prefix}.{leaf}")
            if tensor is None or twin is None or twin.dtype != tensor.dtype or twin.shape != tensor.shape:
                continue
            if torch.equal(twin, tensor):
                module._parameters[leaf] = twin
                saved[twin.data_ptr()] = twin.nbytes
    return sum(saved.values())


def recorded_fingerprint(path: str) -> str | None:
    """The fingerprint of the base that a checkpoint was converted from, if it says."""
    recorded = read_json(path, "conversion.json").get("fingerprint")
    return None if recorded is None else str(recorded)


def read_json(path: str, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty where there is none."""
    import json

    try:
        data = json.loads(Path(path, name).read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


@torch.no_grad()
def hidden_states(model: Any, row: Tensor) -> Tensor:
    """Final hidden states [T, D] of one sequence [T]."""
    device = next(model.parameters()).device
    hidden: Tensor = model.model(row[None].to(device), use_cache=False).last_hidden_state[0]
    return hidden


def _check_shapes(path: str, config: Any, name: str, base: Any) -> None:
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"):
        ours, theirs = getattr(config, key), getattr(base, key)
        if ours != theirs:
            raise CheckpointError(
                f"{name} is not the base of {path}: its {key} is {theirs}, and the converted model's {ours}; name the "
                "right one with --base"
            )
