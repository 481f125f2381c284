"""The converted model: the base's own class with hyconvert's attention in every layer."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import AttentionMaskInterface

from hyconvert.modeling.attention import IMPLEMENTATIONS, HyConvertAttention
from hyconvert.modeling.configuration import HyConvertConfig, config_class_of
from hyconvert.modeling.families import FAMILIES, Family
from hyconvert.modeling.state import prepare_state

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
_BACKBONE_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
)


class HyConvertForCausalLM(PreTrainedModel):
    """Any converted model; loading gives an instance of a class made for its family.

    `HyConvertLlamaForCausalLM`, for one, derives from this class and from `LlamaForCausalLM`: decoder, MLP, norms and
    weight names are the base's, and so is everything transformers offers for it.
    """

    config_class = HyConvertConfig
    main_input_name = "input_ids"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        plan = config.get_plan()
        layers: Any = self.model.layers
        for index, layer in enumerate(layers):
            layer.self_attn = HyConvertAttention(layer.self_attn, config, plan, index)
        for layer in layers:
            if layer.self_attn.source is not None:
                layer.self_attn.source_uses_rope = layers[layer.self_attn.source].self_attn.use_rope
        self.model.register_forward_pre_hook(_prepare_backbone, with_kwargs=True)
        self.post_init()

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint gave: the base's way for the base's weights, an identity for hyconvert's."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, HyConvertAttention):
                module.reset_parameters()

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Accept hyconvert's own attention implementations only.

        Raises:
            ValueError: another one was asked for.
        """
        if requested_attention is None:
            return "hyconvert"
        if requested_attention not in IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation='{requested_attention}' is not available: converted models have attention of "
                f"their own; leave it out or choose one of {', '.join(map(repr, IMPLEMENTATIONS))}"
            )
        return requested_attention

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        chosen = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
        if enable and chosen:
            raise ValueError(
                "reentrant gradient checkpointing would lose the gradient that sparse layers send to their source "
                "layers; pass {'use_reentrant': False}, or no arguments at all"
            )
        if chosen is None:
            gradient_checkpointing_func = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)

    @staticmethod
    def create_masks_for_generate(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Hand the 2-D mask through: converted models never build a [T, T] mask."""
        return attention_mask

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load a converted checkpoint; see `transformers.PreTrainedModel.from_pretrained`."""
        path = pretrained_model_name_or_path
        if cls is not HyConvertForCausalLM:
            return super().from_pretrained(path, *args, config=config, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
            config = HyConvertConfig.from_pretrained(config or path, **hub)
        return model_class_of(config.family).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if cls is not HyConvertForCausalLM:
            return super()._from_config(config, **kwargs)
        return model_class_of(config.family)._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: saving the config writes the remote-code shim."""


def model_class_of(family: Family) -> Any:
    """The model class made for a family, `HyConvert<prefix>ForCausalLM`, created on first use, importable by name."""
    name = f"HyConvert{family.prefix}ForCausalLM"
    module = sys.modules[__name__]
    if name not in vars(module):
        base, config_class = family.load_class("ForCausalLM"), config_class_of(family)
        recorded = {k: v for k, v in (base._can_record_outputs or {}).items() if k != "attentions"}
        body = {
            "config_class": config_class,
            "_can_record_outputs": recorded,
            "_supports_flash_attn": False,
            "_supports_sdpa": True,
            "_supports_flex_attn": False,
            "__module__": __name__,
            "__doc__": HyConvertForCausalLM.__doc__,
        }
        model_class = type(name, (HyConvertForCausalLM, base), body)
        setattr(module, name, model_class)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        conversions = get_checkpoint_conversion_mapping(family.model_type)
        if conversions is not None:  # fused experts: stored one by one, as in the base's own checkpoints
            register_checkpoint_conversion_mapping(name, copy.deepcopy(conversions), overwrite=True)
    return vars(module)[name]


def _prepare_backbone(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the decoder: work out sequence starts once, and pass them to every layer."""
    kwargs = dict(zip(_BACKBONE_ARGUMENTS, args, strict=False)) | kwargs
    if kwargs.get("output_attentions"):
        raise ValueError("converted models never hold attention weights; leave out output_attentions")
    config: Any = module.config
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        return (), kwargs
    cache = kwargs.get("past_key_values")
    windows = config.cache_windows
    use_cache = config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    recomputes = module.training and module.gradient_checkpointing
    if cache is None and use_cache and not recomputes and len({*windows} - {None}) > 1:
        cache = kwargs["past_key_values"] = DynamicCache(config=config)
    if cache is not None:
        fit_cache(cache, windows)
    if kwargs.get("hyconvert_state") is None:
        kwargs["hyconvert_state"] = prepare_state(
            tokens.shape[0],
            tokens.shape[1],
            tokens.device,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            cache=cache,
            cache_layer=windows.index(None) if None in windows else 0,
        )
    kwargs["attention_mask"] = None  # nothing left for the base's code to mask
    return (), kwargs


def fit_cache(cache: Cache, windows: list[int | None]) -> None:
    """Give an empty cache's sliding layers the windows of this model, where they differ between layers.

    transformers sizes all sliding layers of a cache alike; a base with sliding layers of its own needs two sizes.
    """
    if len(cache.layers) != len(windows) or cache.get_seq_length(0) != 0:
        return
    for index, window in enumerate(windows):
        layer = cache.layers[index]
        if window is None:
            continue
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window != window:
            cache.layers[index] = fitted = DynamicSlidingWindowLayer(sliding_window=window)
            fitted.record_past = layer.record_past
        elif (
            isinstance(layer, StaticSlidingWindowLayer)
            and not layer.is_initialized
            and layer.max_cache_len > window
        ):
            cache.layers[index] = StaticSlidingWindowLayer(
                max_cache_len=layer.max_cache_len, sliding_window=window
            )


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Mask factory of hyconvert's attention: there is no mask."""


def _unused_attention(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "hyconvert's attention is part of its layers and is not called through transformers' interface"
    )


def register() -> None:
    """Make transformers' auto classes know converted checkpoints."""
    for name in IMPLEMENTATIONS:
        AttentionInterface.register(name, _unused_attention)
        AttentionMaskInterface.register(name, _no_mask)
    AutoConfig.register("hyconvert", HyConvertConfig, exist_ok=True)
    AutoModelForCausalLM.register(HyConvertConfig, HyConvertForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    for family in FAMILIES.values():
        if name == f"HyConvert{family.prefix}ForCausalLM":
            return model_class_of(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
