"""Student and teacher: what is trained at which rate, and which weights both can share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hyconvert.checkpoint import Source
from hyconvert.conversion import dense_plan, load_base_as
from hyconvert.errors import HealError
from hyconvert.loading import load, quiet_loading
from hyconvert.modeling import HyConvertConfig
from hyconvert.plan import Plan
from hyconvert.recipe import GROUPS, Group, HealRecipe, Lora, Scales

CONVERTED_KINDS = ("sparse", "reuse", "window")
_NEW = ("query_map", "value_map", "window_sink", "sparse_sink", "gate.")
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = re.compile(r"\blayers\.(\d+)\.self_attn\.(.+)$")


def group_of(name: str, plan: Plan) -> Group:
    """The learning-rate group of a parameter, by its name in the model."""
    match = _ATTENTION.search(name)
    if match is None:
        return "rest"
    if match[2].startswith(_NEW):
        return "new"
    return "converted" if plan.layers[int(match[1])].kind in CONVERTED_KINDS else "full"


def load_student(path: str, recipe: HealRecipe, device: torch.device, compute: torch.dtype) -> Any:
    """The converted model, ready to be trained.

    What is trained is float32; what is frozen has the dtype that it is computed in.

    Args:
        path: the converted checkpoint.
        recipe: which groups are trained, with or without adapters.
        device: where.
        compute: bfloat16 for mixed precision, or float32.
    """
    with quiet_loading():
        model = load(path, dtype=torch.float32)
    plan = model.config.get_plan()
    if recipe.lora is not None:
        _add_adapters(model, plan, recipe.lora, recipe.lr_scale, recipe.seed)
    for name, parameter in model.named_parameters():
        group = group_of(name, plan)
        adapted = recipe.lora is not None and group != "new"
        trained = getattr(recipe.lr_scale, group) > 0 and (not adapted or ".lora_" in name)
        parameter.requires_grad_(trained)
        if not trained:
            parameter.data = parameter.data.to(compute)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise HealError("nothing would be trained: every group that this model has is frozen; see lr_scale")
    model.to(device)
    if recipe.gradient_checkpointing:
        # Newer transformers call it activation checkpointing, and warn of the old name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def parameter_groups(model: nn.Module, plan: Plan, scales: Scales) -> list[dict[str, Any]]:
    """Optimiser groups of the trained parameters, with the group's name and its multiple of the learning rate."""
    found: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[group_of(name, plan)].append(parameter)
    return [
        {"params": parameters, "name": group, "scale": getattr(scales, group)}
        for group, parameters in found.items()
        if parameters
    ]


def load_teacher(source: Source, student: Any, device: torch.device, share: bool = True) -> Any:
    """The base, every layer as it was, without gradients.

    Args:
        source: the base, opened in the dtype to compute in.
        student: its frozen weights that are the base's own are used instead of a second copy.
        device: where.
        share: look for such weights.
    """
    config = HyConvertConfig.from_base(source.config, dense_plan(source.config))
    teacher = load_base_as(config, source, torch.device("cpu"))
    if share:
        theirs = dict(_slots(student))
        for name, (module, leaf) in dict(_slots(teacher)).items():
            if name in theirs:
                owner, twin = theirs[name]
                _share(owner._parameters[twin], module, leaf)
    return teacher.to(device)


def shared_bytes(student: nn.Module, teacher: nn.Module) -> int:
    """Bytes of weights that both models hold together."""
    ours = {parameter.data_ptr() for parameter in student.parameters()}
    return sum(p.nbytes for p in teacher.parameters() if p.data_ptr() in ours)


def trained_tensors(state: dict[str, Tensor], trained: set[str]) -> dict[str, Tensor]:
    """The checkpoint tensors that healing changed, from the student's full state dict.

    Args:
        state: every tensor of the student, adapters merged.
        trained: names of the parameters that were trained, in the student.
    """
    changed = {}
    for name in trained:
        if ".lora_" in name:
            module = name.split(".lora_")[0]
            changed[f"{module}.weight"] = state[f"{module}.base_layer.weight"]
        else:
            changed[name] = state[name]
    return changed


def merge_adapters(model: nn.Module) -> None:
    """Fold every adapter into its matrix, which becomes float32 first."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.float(), requires_grad=False)
            layer.merge()


def _slots(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for prefix, module in model.named_modules():
        for leaf in module._parameters:
            name = f"{prefix}.{leaf}".replace(".base_layer.", ".")
            yield name, (module, leaf)


def _share(ours: Tensor | None, module: nn.Module, leaf: str) -> None:
    theirs = module._parameters[leaf]
    if ours is None or theirs is None or ours.requires_grad or ours.dtype != theirs.dtype:
        return
    if torch.equal(theirs.to(ours.device), ours):
        module._parameters[leaf] = ours  # type: ignore[assignment]


def _add_adapters(model: Any, plan: Plan, lora: Lora, scales: Scales, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise HealError("--lora needs PEFT, which is not installed; pip install 'hyconvert[lora]'") from error
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(_ADAPTED)
        and getattr(scales, group_of(name + ".weight", plan)) > 0
    ]
    if targets:
        torch.manual_seed(seed)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        inject_adapter_in_model(config, model)
