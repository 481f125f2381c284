"""Keys and values as float8 with a scale per token and KV head: plain PyTorch, the truth for the kernels.

A row x [d] is kept as y = x / s in float8_e4m3fn, with the float32 scale s = max |x| / 448, so that x is about s y.
Every row has its own scale, so that no row is clipped, whatever came before it. Float8 has 4 significant bits: numbers
within 2^14 of the row's largest are off by at most 1/16 of themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coordinates import accumulation_dtype

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of float8_e4m3fn."""
SMALLEST = 1e-30
"""Least magnitude that a row's scale is made of; a row of zeros stays zeros."""

Scales = tuple[Tensor, Tensor]
"""float32 ``[B,G,S]`` of keys and of values."""


def quantise_rows(x: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """``x [..., d]`` as numbers of at most 448 in ``dtype``, and their scales ``[...]`` in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1).clamp(min=SMALLEST) / LARGEST
    return (wide / scale[..., None]).to(dtype), scale.float()


def dequantise_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``x [..., d]`` and ``scale [...]`` stand for."""
    wide = torch.promote_types(dtype, torch.float32)
    return (x.to(wide) * scale[..., None].to(wide)).to(dtype)


def store_rows(x: Tensor, out: Tensor, scale: Tensor, tokens: int = 16_384) -> None:
    """Put ``x [B,G,T,d]`` and its scales into the first T slots of a cache, a few tokens at a time."""
    for at in range(0, x.shape[2], tokens):
        part = slice(at, min(at + tokens, x.shape[2]))
        stored, scales = quantise_rows(x[:, :, part], out.dtype)
        out[:, :, part] = stored
        scale[:, :, part] = scales


def plain_rows(q: Tensor, k: Tensor, v: Tensor, scales: Scales | None) -> tuple[Tensor, Tensor]:
    """Keys and values in the dtype that references accumulate in for ``q``; without scales, as they are."""
    if scales is None:
        return k, v
    check_scales(k, scales)
    wide = accumulation_dtype(q.dtype)
    return dequantise_rows(k, scales[0], wide), dequantise_rows(v, scales[1], wide)


def check_scales(k: Tensor, scales: Scales) -> None:
    """Raise ValueError unless the scales are float32 ``[B,G,S]`` of ``k [B,G,S,d]``."""
    for scale in scales:
        if scale.shape != k.shape[:3] or scale.dtype != torch.float32:
            raise ValueError(
                f"scales must be float32 {list(k.shape[:3])}, got {scale.dtype} {list(scale.shape)}"
            )


def fp8_problem(device: torch.device) -> str | None:
    """Why Triton's kernels cannot read float8_e4m3fn on this device, or None."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {major}.{minor}, and float8 needs 8.9 (Ada, Hopper) or more"
