"""Plain PyTorch of what a layer does around attention and products. This is the truth for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp8 import Scales, check_scales, quantise_rows


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, after: bool = False
) -> tuple[Tensor, Tensor]:
    """RMS norm with its residual sum.

    Args:
        x: ``[..., D]``, what a branch put out.
        residual: ``[..., D]`` to add it to; None for none.
        weight: ``[D]``.
        eps: added to the mean square.
        after: whether the norm belongs to the branch: ``residual + norm(x)`` instead of ``norm(residual + x)``.

    Returns:
        The normalised sum and the sum itself (with ``after`` the sum twice), in x's dtype. The kernel overwrites
        ``residual`` with the sum.
    """
    if after:
        total = _norm(x, weight, eps)
        total = total if residual is None else residual + total
        return total, total
    total = x if residual is None else x + residual
    return _norm(total, weight, eps), total


def silu_mul(x: Tensor) -> Tensor:
    """``silu(x[..., :I]) * x[..., I:]`` of ``x [..., 2 I]``."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """``x W' + b``, or with ``gated`` `silu_mul` of it.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``; with ``gated`` the gate's rows, then as many of the other factor.
        bias: ``[N]`` or None.
        gated: see above.

    Returns:
        ``[..., N]``, with ``gated`` ``[..., N / 2]``.
    """
    out = torch.nn.functional.linear(x, weight, bias)
    return silu_mul(out) if gated else out


def split_heads(
    x: Tensor,
    q_offset: Tensor,
    start: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
    *,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    query_map: Tensor | None = None,
    rotate: bool = True,
    rotate_source: bool = True,
    ring: bool = False,
    scales: Scales | None = None,
) -> tuple[Tensor, Tensor | None]:
    """From the fused projection to queries, and keys and values in their cache: norms, query map and RoPE.

    Args:
        x: ``[B,T,C]``, per token H query heads of d, then G key heads and G value heads; more columns are ignored.
        q_offset: int ``[B]``, slot of each row's first token.
        start: int ``[B]``, slot of each row's first real token, which has position 0.
        k_out: ``[B,G,S,d]``, receives the keys, each at its slot; ``ring`` puts slot s at ``s % S`` (``T <= S``).
        v_out: the same for values; None leaves them alone.
        heads: H.
        cos, sin: float32 ``[L, d/2]``, RoPE's tables of positions 0 .. L - 1.
        q_norm, k_norm: ``[d]``, RMS norms per head before all else, or None.
        eps: of the norms.
        query_map: ``[H,d,d]``; None for none.
        rotate: apply RoPE to queries and keys.
        rotate_source: apply RoPE to the query of the sparse branch.
        ring: see ``k_out``.
        scales: float32 ``[B,G,S]`` of keys and of values, which receive what `fp8.quantise_rows` finds; k_out and v_out
            receive its numbers. None stores keys and values as they are.

    Returns:
        The query ``[B,H,T,d]``, and the query of the sparse branch, None where it is the same.
    """
    length = x.shape[1]
    groups, slots, dim = k_out.shape[1:]
    ends = [heads * dim, (heads + groups) * dim, (heads + 2 * groups) * dim]
    parts = (x[..., : ends[0]], x[..., ends[0] : ends[1]], x[..., ends[1] : ends[2]])
    q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in parts)
    q = q if q_norm is None else _norm(q, q_norm, eps)
    k = k if k_norm is None else _norm(k, k_norm, eps)
    slot = q_offset[:, None] + torch.arange(length, device=x.device)
    at = (slot - start[:, None]).clamp(min=0)
    place = (slot % slots if ring else slot)[:, None, :, None].expand(-1, groups, -1, dim)
    _put(k_out, place, _rotate(k, cos[at], sin[at]) if rotate else k, None if scales is None else scales[0])
    if v_out is not None:
        _put(v_out, place, v, None if scales is None else scales[1])
    plain, q = q, _rotate(q, cos[at], sin[at]) if rotate else q
    if query_map is None and rotate == rotate_source:
        return q.contiguous(), None
    if query_map is not None:
        plain = torch.einsum("bhtd,hed->bhte", plain, query_map)
    sparse = _rotate(plain, cos[at], sin[at]) if rotate_source else plain
    return q.contiguous(), sparse.contiguous()


def fill_rings(
    k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, last: Tensor, *, at: int, shift: int
) -> None:
    """Put the last keys and values of prompts into rings, slot s at ``s % S``.

    Args:
        k, v: ``[B,G,T,d]``, of the slots from ``shift`` on.
        ring_k, ring_v: ``[B,G,S,d]``, receive slots ``at + last - S + 1 .. at + last``; what would be of slots before
            ``shift`` is left as it is.
        last: int ``[1]``, of slots from ``at`` on the prompts' last one.
        at, shift: see above.
    """
    size, end = ring_k.shape[2], at + last
    index = end - (end - torch.arange(size, device=k.device)) % size - shift
    known = (index >= 0)[:, None]
    for x, ring in ((k, ring_k), (v, ring_v)):
        ring.copy_(torch.where(known, x.index_select(2, index.clamp(min=0)), ring))


def _put(out: Tensor, place: Tensor, x: Tensor, scale: Tensor | None) -> None:
    if scale is None:
        out.scatter_(2, place, x)
        return
    check_scales(out, (scale, scale))
    stored, found = quantise_rows(x, out.dtype)
    scale.scatter_(2, place[..., 0], found)
    if out.dtype.itemsize == 1:  # PyTorch scatters bytes, but no float8
        out, stored = out.view(torch.uint8), stored.view(torch.uint8)
    out.scatter_(2, place, stored)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
