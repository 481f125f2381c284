"""Dispatch of what a layer does around attention and products, for inference.

These write into the caller's buffers and have no gradient, so they are no ops of ``torch.library``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..configs import matvec_rows
from ..dispatch import DTYPES, choose, dense_rows, on_device
from ..fp8 import FP8, check_scales, fp8_problem
from . import reference


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    after: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.add_norm`. The kernel overwrites ``residual``, which must be contiguous, with the sum."""
    if choose("add_norm", (x, residual, weight), implementation) == "reference":
        return reference.add_norm(x, residual, weight, eps, after=after)
    from . import forward

    x = x.contiguous()
    out = x.new_empty(x.shape)
    with on_device(x):
        forward.add_norm(x, residual, weight, eps, out, after=after)
    if after:
        return out, out if residual is None else residual
    return out, x if residual is None else residual


def silu_mul(x: Tensor, *, out: Tensor | None = None, implementation: str | None = None) -> Tensor:
    """See `reference.silu_mul`; a contiguous ``out`` is filled."""
    if out is not None and not out.is_contiguous():
        raise ValueError("out must be contiguous")
    if choose("silu_mul", (x, out), implementation) == "reference":
        return reference.silu_mul(x) if out is None else out.copy_(reference.silu_mul(x))
    from . import forward

    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2) if out is None else out
    with on_device(x):
        forward.silu_mul(x.contiguous(), out)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    out: Tensor | None = None,
    most_rows: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """See `reference.linear`.

    Args:
        out: contiguous, to be filled; only of a gated product.
        most_rows: products of up to so many rows, at most 16, run on our kernel, and larger ones on PyTorch's; None is
            as many as that is faster for.
    """
    if out is not None and not (gated and out.is_contiguous()):
        raise ValueError("out must be contiguous, and the product gated")
    if choose("linear", (x, weight, bias, out), implementation) == "reference":
        result = reference.linear(x, weight, bias, gated=gated)
        return result if out is None else out.copy_(result)
    rows = x.numel() // x.shape[-1]
    most = matvec_rows(x.dtype) if most_rows is None else min(most_rows, 16)
    if not 0 < rows <= most or x.dtype not in DTYPES or weight.stride(-1) != 1:
        product = torch.nn.functional.linear(x, weight, bias)
        return silu_mul(product, out=out, implementation=implementation) if gated else product
    from . import matvec

    if out is None:
        out = x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if gated else 1))
    with on_device(x):
        matvec.matvec(x.reshape(rows, -1), weight, bias, out.view(rows, -1), gated=gated)
    return out


def split_heads(
    x: Tensor,
    q_offset: Tensor,
    start: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
    *,
    heads: int,
    query_map: Tensor | None = None,
    rotate: bool = True,
    rotate_source: bool = True,
    implementation: str | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.split_heads`."""
    dim = k_out.shape[3]
    problem = f"head dim {dim}; it must be even" if dim % 2 else None
    if settings.get("ring") and x.shape[1] > k_out.shape[2]:
        raise ValueError(f"a ring of {k_out.shape[2]} slots cannot take {x.shape[1]} tokens at once")
    flags = {"query_map": query_map, "rotate": rotate, "rotate_source": rotate_source}
    tensors = (x, q_offset, start, k_out, v_out)
    if settings.get("scales") is not None:
        check_scales(k_out, settings["scales"])
        if not all(scale.is_contiguous() for scale in settings["scales"]):
            raise ValueError("scales that are written must be contiguous")
        problem = problem or (fp8_problem(k_out.device) if k_out.dtype == FP8 else None)
    if choose("split_heads", (*tensors, query_map), implementation, problem) == "reference":
        return reference.split_heads(*tensors, heads=heads, **flags, **settings)
    from . import forward

    q = x.new_empty(x.shape[0], heads, x.shape[1], dim)
    same = query_map is None and rotate == rotate_source
    sparse = None if same else x.new_empty(q.shape)
    with on_device(x):
        forward.split_heads(
            x, q_offset, start, k_out, v_out, q, sparse, **({"q_norm": None, "k_norm": None, "eps": 0.0, "ring": False}
            | settings), **{**flags, "query_map": None if query_map is None else query_map.contiguous()},
        )  # fmt: skip
    return q, sparse


def fill_rings(
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    last: Tensor,
    *,
    at: int,
    shift: int,
    implementation: str | None = None,
) -> None:
    """See `reference.fill_rings`."""
    tensors = (k, v, ring_k, ring_v, last)
    problem = None if ring_k.stride(3) == ring_v.stride(3) == 1 else "rings' last stride must be 1"
    if choose("fill_rings", tensors, implementation, problem) == "reference":
        return reference.fill_rings(*tensors, at=at, shift=shift)
    from . import forward

    with on_device(k):
        forward.fill_rings(dense_rows(k), dense_rows(v), ring_k, ring_v, last, at=at, shift=shift)
