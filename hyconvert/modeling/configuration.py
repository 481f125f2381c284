"""Config of a converted model: the base's config and the plan, nested in `config.json`, flat in memory."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hyconvert.errors import CheckpointError, PlanError
from hyconvert.modeling.families import FAMILIES, Family, base_window, family_of
from hyconvert.plan import Plan

SHIM_FILE = "modeling_hyconvert.py"

# Kept next to `base_config` in config.json because generation and tokenizer code looks for them there.
_TOP_LEVEL = (
    "architectures",
    "dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# What a converted config says differently from its base, in memory, to size the caches.
_CACHE_KEYS = ("layer_types", "sliding_window")


class HyConvertConfig(PreTrainedConfig):
    """Config of any converted model.

    In memory a config is an instance of a class made for its family, `HyConvert<Family>Config`, which derives from
    this class and from the base's own config class: the base's decoder reads it as its own. Two attributes differ
    from the base's: `layer_types` and `sliding_window` describe what each layer *caches*, so that transformers'
    caches come out right (full and reuse layers everything, the others a window).

    Attributes:
        plan: the plan as plain data; `get_plan()` gives it validated.
    """

    model_type = "hyconvert"
    has_no_defaults_at_init = True  # there is no default plan
    family: ClassVar[Family]
    plan: dict | None = None

    def get_plan(self) -> Plan:
        """The validated plan."""
        return Plan.from_dict(self.plan, where="config.json: plan")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: saving the config writes the remote-code shim."""

    @classmethod
    def from_base(cls, base: PreTrainedConfig, plan: Plan) -> HyConvertConfig:
        """The config of `base` converted by `plan`.

        Args:
            base: config of a supported family.
            plan: one entry per decoder layer.

        Raises:
            UnsupportedModelError: the family cannot be converted.
            PlanError: the plan does not fit the base.
        """
        family = family_of(base.model_type)
        data = base.to_dict()
        data.pop("model_type", None)
        config_class = config_class_of(family)
        config: HyConvertConfig = config_class(**data, plan=plan.model_dump(mode="json", exclude_none=True))
        config.architectures = [f"HyConvert{family.prefix}ForCausalLM"]
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base = config_dict.get("base_config")
        if base is None:
            if cls is HyConvertConfig:
                raise CheckpointError(
                    "config.json has model_type 'hyconvert' but no 'base_config'; convert again"
                )
            return super().from_dict(config_dict, **kwargs)
        config_class = config_class_of(family_of(base["model_type"]))
        flat = {key: value for key, value in base.items() if key != "model_type"}
        flat.update(
            {key: value for key, value in config_dict.items() if key not in ("base_config", "model_type")}
        )
        return config_class.from_dict(flat, **kwargs)


class _FamilyConfig(HyConvertConfig):
    """What the per-family config classes share."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._adopt_plan()

    def _adopt_plan(self) -> None:
        plan = self.get_plan()
        check_fits(plan, self)
        windows = [base_window(self, i) for i in range(self.num_hidden_layers)]
        self._base = {key: copy.copy(getattr(self, key)) for key in _CACHE_KEYS if hasattr(self, key)}
        self._cache_windows = [
            {"full": None, "reuse": None, "sliding": windows[i]}.get(layer.kind, plan.window)
            for i, layer in enumerate(plan.layers)
        ]
        self.layer_types = [
            "full_attention" if w is None else "sliding_attention" for w in self._cache_windows
        ]
        # One number is all that transformers' caches read; `fit_cache` narrows the layers that need less.
        self.sliding_window = max((w for w in self._cache_windows if w is not None), default=plan.window)

    @property
    def cache_windows(self) -> list[int | None]:
        """Tokens each layer's cache must serve to one query (itself included); None means all of them."""
        return self._cache_windows

    def base_dict(self) -> dict[str, Any]:
        """The base's own config as plain data, as it was before conversion."""
        data = self._flat_dict()
        for key in (
            "plan",
            "auto_map",
            "_name_or_path",
            "_base",
            "_cache_windows",
            *_CACHE_KEYS,
            *_TOP_LEVEL[:3],
        ):
            data.pop(key, None)
        return data | self._base | {"model_type": self.family.model_type}

    def _flat_dict(self) -> dict[str, Any]:
        return super().to_dict()

    def to_dict(self) -> dict[str, Any]:
        data = self._flat_dict()
        head = {key: data[key] for key in _TOP_LEVEL if data.get(key) is not None}
        return {
            "model_type": "hyconvert",
            **head,
            "auto_map": auto_map(self.family),
            "plan": data["plan"],
            "base_config": self.base_dict(),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save `config.json`, `plan.json` and the remote-code shim; saving a model calls this."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_companions(self, save_directory)


def check_fits(plan: Plan, base: PreTrainedConfig) -> None:
    """Check a plan against the base it is meant for.

    Raises:
        PlanError: wrong number of layers, or the base's sliding layers are not kept.
    """
    count = base.num_hidden_layers
    if len(plan.layers) != count:
        raise PlanError(
            f"the plan has {len(plan.layers)} layers, but the model has {count}; make one for this model"
        )
    for i, layer in enumerate(plan.layers):
        window = base_window(base, i)
        if (layer.kind == "sliding") != (window is not None):
            raise PlanError(
                f"layer {i} of the base has a sliding window of {window}; keep it with kind 'sliding'"
                if window
                else f"layer {i} is planned as 'sliding', but the base has full attention there; use full, sparse, "
                "reuse or window"
            )


def write_companions(config: HyConvertConfig, folder: str | Path) -> None:
    """Write the files that go with a converted model's `config.json`: `plan.json` and the remote-code shim."""
    config.get_plan().save(Path(folder, "plan.json"))
    Path(folder, SHIM_FILE).write_text(shim_module(config.family))


def shim_module(family: Family) -> str:
    """Source of `modeling_hyconvert.py`, which lets `trust_remote_code=True` find the installed package."""
    name = f"HyConvert{family.prefix}"
    return (
        '"""Loads this checkpoint with the hyconvert package: pip install hyconvert."""\n\n'
        f"from hyconvert.modeling import {name}Config, {name}ForCausalLM\n\n"
        f'__all__ = ["{name}Config", "{name}ForCausalLM"]\n'
    )


def auto_map(family: Family) -> dict[str, str]:
    """The `auto_map` entries that go with `shim_module`."""
    name = f"modeling_hyconvert.HyConvert{family.prefix}"
    return {"AutoConfig": f"{name}Config", "AutoModelForCausalLM": f"{name}ForCausalLM"}


def config_class_of(family: Family) -> Any:
    """The config class made for a family, `HyConvert<prefix>Config`, created on first use and importable by name."""
    name = f"HyConvert{family.prefix}Config"
    module = sys.modules[__name__]
    if name not in vars(module):
        base = family.load_class("Config")
        body = {
            "model_type": "hyconvert",
            "base_model_tp_plan": None,  # maps and gates are per head and would need splitting with the projections
            "family": family,
            "__module__": __name__,
            "__doc__": HyConvertConfig.__doc__,
        }
        setattr(module, name, type(name, (_FamilyConfig, base), body))
    return vars(module)[name]


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values():
        if name == f"HyConvert{family.prefix}Config":
            return config_class_of(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
