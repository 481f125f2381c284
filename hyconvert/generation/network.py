"""A loaded model as the flat list of weights that the decode loop runs on: dense and converted models alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyconvert.errors import UnsupportedModelError
from hyconvert.modeling.attention import HyConvertAttention
from hyconvert.modeling.families import Family, base_window, family_of
from hyconvert.modeling.gates import MergeGate
from hyconvert_kernels import linear
from hyconvert_kernels.configs import library_rows

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE whose tables do not depend on how long the sequence is."""


@dataclass
class Norm:
    """An RMS norm; `after` says that it normalises what a branch puts out, before that is added."""

    weight: Tensor
    eps: float
    after: bool = False


@dataclass
class Linear:
    """A product `x W' + b`; `implementation` is the kernel's, and the last `fill` rows of W are zeros."""

    weight: Tensor
    bias: Tensor | None = None
    implementation: str | None = None
    fill: int = 0

    def __call__(self, x: Tensor, gated: bool = False, out: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, gated=gated, out=out, implementation=self.implementation)


@dataclass
class Block:
    """One decoder layer.

    Attributes:
        kind, source: as in its `LayerPlan`; a dense model has full and sliding layers.
        scored: whether another layer reads this one's blocks.
        window: tokens of the window branch; of a full layer, those that do not compete for blocks.
        ring: slots of the layer's ring of keys and values, or None where it keeps them all.
        heads, groups, dim, scale: H, G, d and the factor of the logits.
        inputs: fused projection of q, k and v, and behind them a merge gate's logit per head.
        output: o_proj.
        q_norm, k_norm: norms of q and k, per head, or over all heads where `flat_norm`; with `eps`.
        rotate, rotate_source: whether this layer and its source use RoPE.
        attention: the converted layer's module, with maps, gate and sinks; None for a layer of a dense model.
        before, between, behind: norms before attention, around the middle of the layer, and after the MLP.
        mlp: [B, T, D] to [B, T, D].
    """

    kind: str
    source: int | None
    scored: bool
    window: int
    ring: int | None
    heads: int
    groups: int
    dim: int
    scale: float
    inputs: Linear
    output: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    flat_norm: bool
    eps: float
    rotate: bool
    rotate_source: bool
    attention: Any
    before: Norm | None
    between: Norm
    behind: Norm | None
    mlp: FusedMlp | ModuleMlp

    @property
    def merges(self) -> bool:
        """Whether the layer's gate and maps are all that one decoding launch does."""
        layer = self.attention
        return isinstance(layer.gate, MergeGate) and layer.window_sink is None and layer.sparse_sink is None


@dataclass
class Network:
    """Everything of a causal LM that decoding needs; the tensors are the model's own.

    Attributes:
        blocks: the decoder layers.
        embedding, head: of the tokens, [V, D]; one tensor where the model ties them.
        norm: before the head.
        block_size, topk: of the plan; without meaning for a dense model, which selects nothing.
        config: the model's config.
        rotary: its module for RoPE.
    """

    blocks: list[Block]
    embedding: Tensor
    head: Linear
    norm: Norm
    block_size: int
    topk: int
    config: Any
    rotary: Any

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.embedding.dtype

    def rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 .. length - 1, float32 [length, d/2]."""
        positions = torch.arange(length, device=self.device)
        cos, sin = self.rotary(torch.empty(1, dtype=torch.float32, device=self.device), positions[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


class FusedMlp:
    """The gated MLP with one product for gate and up; many tokens go through it in pieces, longer ones if narrow."""

    def __init__(self, mlp: Any, implementation: str | None) -> None:
        self.up = join([mlp.gate_proj, mlp.up_proj], implementation)
        self.down = Linear(mlp.down_proj.weight.detach(), mlp.down_proj.bias, implementation)
        self.tokens = max(4096, 4096 * 12_288 // self.down.weight.shape[1])

    def weights(self) -> list[Tensor]:
        """Its matrices."""
        return [self.up.weight, self.down.weight]

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        parts = [self._part(part) for part in flat.split(self.tokens)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)

    def _part(self, x: Tensor) -> Tensor:
        """Of tokens [N, D]; the second product may be of more rows than there are, the others undefined."""
        inner = x.new_empty(library_rows(len(x), x.device), self.down.weight.shape[1])
        self.up(x, gated=True, out=inner[: len(x)])
        return self.down(inner)[: len(x)]


class ModuleMlp:
    """Any other MLP, experts among them, as transformers computes it."""

    def __init__(self, mlp: Any, tokens: int = 4096) -> None:
        self.mlp, self.tokens = mlp, tokens

    def weights(self) -> list[Tensor]:
        """Its parameters."""
        return list(self.mlp.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, -1, x.shape[-1])
        parts: list[Tensor] = [self.mlp(part) for part in flat.split(self.tokens, 1)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(x.shape)


def join(layers: list[Any], implementation: str | None = None, multiple: int = 1) -> Linear:
    """One product in place of several of the same input.

    The layers' parameters become views of the joint one, so that nothing is held twice. Rows of zeros fill it up
    to a multiple of `multiple`: an odd number of outputs sends cuBLAS to kernels for unaligned matrices, five times as
    slow.
    """
    biases = [layer.bias for layer in layers]
    weight = _joint([layer.weight for layer in layers], multiple)
    fill = len(weight) - sum(len(layer.weight) for layer in layers)
    if all(bias is None for bias in biases):
        return Linear(weight, None, implementation, fill)
    if all(bias is not None for bias in biases):
        return Linear(weight, _joint(biases, multiple), implementation, fill)
    parts = [
        weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach()
        for layer in layers
    ]
    return Linear(weight, _filled(parts, multiple), implementation, fill)


def _joint(parameters: list[Any], multiple: int) -> Tensor:
    first, at = parameters[0], parameters[0].storage_offset()
    adjacent = True
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjacent = adjacent and same and parameter.is_contiguous() and parameter.storage_offset() == at
        at += parameter.numel()
    count = sum(parameter.shape[0] for parameter in parameters)
    shape = (_round_up(count, multiple), *first.shape[1:])
    whole = (
        first.untyped_storage().nbytes() == math.prod(shape) * first.element_size()
    )  # zeros behind, as we put them
    if adjacent and (shape[0] == count or whole) and len(parameters) > 1:  # joined before
        known: Tensor = first.detach().as_strided(shape, first.stride(), first.storage_offset())
        return known
    joint = _filled([parameter.detach() for parameter in parameters], multiple)
    at = 0
    for parameter in parameters:
        parameter.data = joint[at : at + len(parameter)]
        at += len(parameter)
    return joint


def _round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def _filled(parts: list[Tensor], multiple: int) -> Tensor:
    """Parts one after the other, and zeros up to a multiple of so many rows."""
    rows = sum(len(part) for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(_round_up(rows, multiple) - rows, *parts[0].shape[1:])])


def read_network(model: Any, implementation: str | None = None) -> Network:
    """Take a model apart for the decode loop.

    Args:
        model: a converted model, or a causal LM of a family that can be converted. Its projections become views of
            fused ones; it computes what it did, and uses no more memory.
        implementation: of the kernels.

    Raises:
        UnsupportedModelError: the family, its RoPE, or wrapped layers (adapters, quantised weights) do not fit.
    """
    config = model.config
    family = getattr(config, "family", None) or family_of(config.model_type)
    _check(model, config)
    plan = config.get_plan() if hasattr(config, "get_plan") else None
    blocks = [
        _read_block(layer, index, config, plan, family, implementation)
        for index, layer in enumerate(model.model.layers)
    ]
    if any(isinstance(block.mlp, ModuleMlp) for block in blocks) and blocks[0].output.weight.is_cuda:
        # transformers' loop over experts waits for the GPU, and so does the grouped product but in bfloat16
        half = model.lm_head.weight.dtype == torch.bfloat16
        config._experts_implementation = "grouped_mm" if half else "batched_mm"
    return Network(
        blocks,
        model.model.embed_tokens.weight.detach(),
        Linear(model.lm_head.weight.detach(), model.lm_head.bias, implementation),
        _norm(model.model.norm),
        plan.block_size if plan else 64,
        plan.topk if plan else 1,
        config,
        model.model.rotary_emb,
    )


def _check(model: Any, config: Any) -> None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the decode loop runs on one device, and this model lies on {', '.join(sorted(map(str, devices)))}; "
            "use model.generate"
        )
    kind = getattr(model.model.rotary_emb, "rope_type", "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"the decode loop keeps RoPE in tables, and RoPE of type '{kind}' changes with the length; use "
            "model.generate"
        )
    for name, module in model.named_modules():
        if (
            name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj")
            and type(module) is not nn.Linear
        ):
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, and the decode loop takes plain linear layers; merge adapters "
                "and dequantise weights first, or use model.generate"
            )


def _norm(module: Any, after: bool = False) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon, after)


def _read_block(
    layer: Any, index: int, config: Any, plan: Any, family: Family, implementation: str | None
) -> Block:
    attention = layer.self_attn
    converted = isinstance(attention, HyConvertAttention)
    own = base_window(config, index)
    kind = attention.kind if converted else "sliding" if own else "full"
    keeps_all = kind in ("full", "reuse")
    window = attention.window if converted else own or 1
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    if converted and attention.source is not None and isinstance(attention.gate, MergeGate):
        parts.append(attention.gate)
    normed = family.qk_norm is not None
    before = getattr(layer, "input_layernorm", None)
    behind = getattr(layer, "post_feedforward_layernorm", None)
    gated = hasattr(layer.mlp, "gate_proj") and config.hidden_act == "silu"
    return Block(
        kind=kind,
        source=attention.source if converted else None,
        scored=plan is not None and index in plan.sources,
        window=window,
        ring=None if keeps_all else window,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        dim=attention.head_dim,
        scale=attention.scaling,
        inputs=join(parts, implementation, multiple=8),
        output=Linear(attention.o_proj.weight.detach(), attention.o_proj.bias, implementation),
        q_norm=attention.q_norm.weight.detach() if normed else None,
        k_norm=attention.k_norm.weight.detach() if normed else None,
        flat_norm=family.qk_norm == "flat",
        eps=attention.q_norm.variance_epsilon if normed else 0.0,
        rotate=bool(getattr(attention, "use_rope", True)),
        rotate_source=bool(getattr(attention, "source_uses_rope", getattr(attention, "use_rope", True))),
        attention=attention if converted else None,
        before=_norm(before) if before is not None else None,
        between=_norm(layer.post_attention_layernorm, after=before is None),
        behind=_norm(behind, after=True) if behind is not None else None,
        mlp=FusedMlp(layer.mlp, implementation) if gated else ModuleMlp(layer.mlp),
    )
