"""What a benchmark runs on: published shapes with random weights, bases by their shape, and converted models."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hyconvert.errors import CheckpointError, PlanError
from hyconvert.plan import Plan

DENSE = "dense"


@dataclass(frozen=True)
class Subject:
    """One model to time.

    Attributes:
        name: `dense`, or what tells its plan from the others.
        config: to make it from: a converted model's, or a base's for the dense one.
        path: a converted checkpoint whose weights are wanted; None for random ones.
    """

    name: str
    config: Any
    path: str | None = None

    @property
    def plan(self) -> Plan | None:
        """Of a converted model."""
        plan: Plan | None = self.config.get_plan() if hasattr(self.config, "get_plan") else None
        return plan

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model on the device. Random weights are made there, in that dtype: there is no larger copy of them.

        Raises:
            CheckpointError: the device has no room for the weights.
        """
        from hyconvert.loading import load, quiet_loading

        try:
            if self.path is not None:
                with quiet_loading():
                    model = load(self.path, dtype=dtype).to(device)
            else:
                with torch.device(device):
                    model = model_class(self.config)._from_config(self.config, dtype=dtype)
        except torch.OutOfMemoryError as error:
            gc.collect()
            torch.cuda.empty_cache()
            raise CheckpointError(
                f"the weights of {self.name} do not fit on {device}: {str(error).splitlines()[0]}"
            ) from error
        return model.eval().requires_grad_(False)


def model_class(config: Any) -> Any:
    """The class of a config's model: hyconvert's, or the base's own."""
    from hyconvert.modeling import HyConvertForCausalLM, family_of

    if hasattr(config, "get_plan"):
        return HyConvertForCausalLM
    return family_of(config.model_type).load_class("ForCausalLM")


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """The named shapes: `config`, `uniform` (a ratio that suits them) and a `note`."""
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text())
    return found


def shape_config(name: str) -> Any:
    """The config of a named shape."""
    from hyconvert.modeling import family_of

    data = dict(shapes()[name]["config"])
    return family_of(data.pop("model_type")).load_class("Config")(**data)


def find_subjects(
    target: str,
    *,
    uniform: Sequence[int] = (),
    plans: Sequence[str] = (),
    base: bool = False,
    **settings: Any,
) -> list[Subject]:
    """The models that a target and its options mean, the dense one first.

    Args:
        target: name of a shape; a converted model; or a base, of which only the config is read.
        uniform: ratios N of uniform plans 1:N; one model each.
        plans: plan files or layer maps; one model each. Without both, a shape's own ratio.
        base: time the dense model too.
        **settings: of the plans, as for `make_plan`.

    Raises:
        CheckpointError: there is no such target.
        PlanError: a plan is missing, does not fit, or was given for a converted model.
    """
    from hyconvert.conversion import make_plan
    from hyconvert.modeling import HyConvertConfig

    given = bool(uniform or plans or any(value is not None for value in settings.values()))
    converted = _converted_config(target)
    if converted is not None:
        if given:
            raise PlanError(
                f"{target} is converted and has its plan; leave out --uniform, --plan and their settings"
            )
        found = [Subject("converted", converted, target)]
        return [Subject(DENSE, dense_config(converted)), *found] if base else found
    names = {name.lower(): name for name in shapes()}
    if target.lower() in names:
        config = shape_config(names[target.lower()])
        uniform = uniform or (() if plans else (shapes()[names[target.lower()]]["uniform"],))
    else:
        config = _base_config(target)
    if not uniform and not plans:
        raise PlanError(f"{target} is a base: say with --uniform 1:N or --plan how it would be converted")
    subjects = [Subject(DENSE, config)] if base else []
    for ratio in uniform:
        plan = make_plan(config, uniform=ratio, **settings)
        subjects.append(Subject(f"1:{ratio}", HyConvertConfig.from_base(config, plan)))
    for line in plans:
        plan = make_plan(config, plan=line, **settings)
        name = Path(line).stem if line.endswith(".json") else plan.line
        subjects.append(Subject(name, HyConvertConfig.from_base(config, plan)))
    return subjects


def dense_config(converted: Any) -> Any:
    """The base's config, from a converted model's."""
    data = converted.base_dict()
    return converted.family.load_class("Config")(**{k: v for k, v in data.items() if k != "model_type"})


def _converted_config(target: str) -> Any:
    from hyconvert.inspection import read_config

    config = Path(target, "config.json")
    if not config.is_file():
        return None
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config} is not valid JSON ({error})") from error
    return read_config(target) if kind == "hyconvert" else None


def _base_config(target: str) -> Any:
    from transformers import AutoConfig

    from hyconvert.checkpoint import open_source
    from hyconvert.checkpoint.hub import looks_like_hub_id
    from hyconvert.modeling import family_of

    path = Path(target)
    if path.is_file():
        config = open_source(target).config
    elif path.exists() or ("/" in target and looks_like_hub_id(target)):
        try:
            config = AutoConfig.from_pretrained(target)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no model at {target}: {str(error).splitlines()[0]}") from error
    else:
        raise CheckpointError(
            f"{target} is neither a folder nor a shape; the shapes are {', '.join(shapes())}"
        )
    family_of(config.model_type)
    return config
