"""Dispatch of decoding, and its registration. A step that wants a gradient runs on the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import check_inputs
from ..dispatch import attention_problem, choose, dense_rows, on_device, wants_gradient
from ..fp8 import Scales, check_scales
from ..oracle.op import decode_scaled, oracle_topk
from . import reference


def oracle_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    block_size: int,
    window: int,
    topk: int,
    scale: float,
    scales: Scales | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.oracle_decode`; with ``scales`` it is no op of ``torch.library``."""
    check_inputs(q, k, v, q_offset, start)
    settings = {"block_size": block_size, "window": window, "scale": scale}
    scaled = scales is not None
    problem = attention_problem(q, k, v, block_size=block_size, window=window, topk=topk, scaled=scaled)
    blocks = -(-k.shape[2] // block_size)
    if problem is None and blocks > 65536:
        problem = f"{blocks} blocks of keys; at most 65536"
    tensors = (q, k, v, q_offset, start)
    if choose("oracle_decode", tensors, implementation, problem) == "reference" or q.shape[2] != 1:
        return reference.oracle_decode(*tensors, topk=topk, scales=scales, **settings)
    if scales is not None:
        return decode_scaled(*tensors, scales, topk=topk, **settings)
    return oracle_topk(*tensors, block_size, window, topk, scale)


def sparse_decode(
    q: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    q_sparse: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    q_offset: Tensor,
    start: Tensor,
    gate_logit: Tensor,
    *,
    block_size: int,
    window: int,
    scale: float,
    value_map: Tensor | None = None,
    window_offset: Tensor | None = None,
    window_start: Tensor | None = None,
    scales: Scales | None = None,
    window_scales: Scales | None = None,
    implementation: str | None = None,
) -> Tensor:
    """See `reference.sparse_decode`; with scales it is no op of ``torch.library``."""
    check_inputs(q_sparse, k, v, q_offset, start)
    settings = {"block_size": block_size, "window": window, "scale": scale}
    maps = {"value_map": value_map, "window_offset": window_offset, "window_start": window_start}
    scaled = scales is not None, window_scales is not None
    problem = _sparse_problem(
        q, k_window, v_window, q_sparse, k, v, indices, block_size, window, value_map, scaled
    )
    if problem is None and window_offset is None and k_window.shape[2] < window:
        problem = f"a ring of {k_window.shape[2]} slots does not hold a window of {window}"
    tensors = (q, k_window, v_window, q_sparse, k, v, indices, q_offset, start, gate_logit)
    every = (*tensors, *maps.values())
    chosen = choose("sparse_decode", every, implementation, problem)
    if chosen == "reference" or q.shape[2] != 1 or wants_gradient(every):
        return reference.sparse_decode(
            *tensors, **settings, **maps, scales=scales, window_scales=window_scales
        )
    gate = gate_logit.to(q.device).expand(q.shape[:3])
    if any(scaled):
        every = (*tensors[:-1], gate, *maps.values())
        return _launch(*every, block_size, window, scale, scales, window_scales)
    return _sparse_decode(*tensors[:-1], gate, *maps.values(), block_size, window, scale)


def window_decode(
    q: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    window: int,
    scale: float,
    implementation: str | None = None,
) -> Tensor:
    """See `reference.window_decode`. No gradient is defined."""
    problem = attention_problem(q, k_window, v_window, window=window)
    tensors = (q, k_window, v_window, q_offset, start)
    if choose("window_decode", tensors, implementation, problem) == "reference" or q.shape[2] != 1:
        return reference.window_decode(*tensors, window=window, scale=scale)
    return _window_decode(*tensors, window, scale)


@torch.library.custom_op("hyconvert::window_decode", mutates_args=())
def _window_decode(
    q: Tensor, k_window: Tensor, v_window: Tensor, q_offset: Tensor, start: Tensor, window: int, scale: float
) -> Tensor:
    from . import sparse

    out = q.new_empty(q.shape)
    if out.numel():
        with on_device(q):
            sparse.sparse_decode(
                *(dense_rows(x) for x in (q, k_window, v_window)), None, None, None, None, q_offset.contiguous(),
                start.contiguous(), None, out, block_size=16, window=window, scale=scale,
            )  # fmt: skip
    return out


@_window_decode.register_fake
def _(q, *rest):
    return q.new_empty(q.shape)


@torch.library.custom_op("hyconvert::sparse_decode", mutates_args=())
def _sparse_decode(
    q: Tensor, k_window: Tensor, v_window: Tensor, q_sparse: Tensor, k: Tensor, v: Tensor, indices: Tensor,
    q_offset: Tensor, start: Tensor, gate: Tensor, value_map: Tensor | None, window_offset: Tensor | None,
    window_start: Tensor | None, block_size: int, window: int, scale: float,
) -> Tensor:  # fmt: skip
    return _launch(
        q, k_window, v_window, q_sparse, k, v, indices, q_offset, start, gate, value_map, window_offset, window_start,
        block_size, window, scale,
    )  # fmt: skip


def _launch(
    q, k_window, v_window, q_sparse, k, v, indices, q_offset, start, gate, value_map, window_offset, window_start,
    block_size, window, scale, scales=None, window_scales=None,
):  # fmt: skip
    from . import sparse

    out = q.new_empty(q.shape)
    if out.numel():
        whole = window_offset is not None and window_start is not None
        with on_device(q):
            sparse.sparse_decode(
                *(dense_rows(x) for x in (q, k_window, v_window, q_sparse, k, v)),
                indices.to(torch.int32).contiguous(), q_offset.contiguous(), start.contiguous(), gate, out,
                value_map=None if value_map is None else value_map.contiguous(),
                window_offset=window_offset.contiguous() if whole else None,
                window_start=window_start.contiguous() if whole else None,
                block_size=block_size, window=window, scale=scale,
                scales=_checked(k, scales), window_scales=_checked(k_window, window_scales),
            )  # fmt: skip
    return out


def _checked(k, scales):
    if scales is None:
        return None
    check_scales(k, scales)
    return [scale.contiguous() for scale in scales]


@_sparse_decode.register_fake
def _(q, *rest):
    return q.new_empty(q.shape)


def _sparse_problem(q, k_window, v_window, q_sparse, k, v, indices, block_size, window, value_map, scaled):
    if q.shape != q_sparse.shape or k_window.shape[:2] != k.shape[:2] or k_window.shape[3] != k.shape[3]:
        return (
            f"q {tuple(q.shape)} and q_sparse {tuple(q_sparse.shape)}, or k_window {tuple(k_window.shape)} and "
            f"k {tuple(k.shape)}, do not fit"
        )
    if value_map is not None and value_map.shape != (q.shape[1], q.shape[3], q.shape[3]):
        return f"value_map must be [H,d,d], got {tuple(value_map.shape)}"
    topk = indices.shape[3]
    sparse = attention_problem(
        q_sparse, k, v, block_size=block_size, window=window, topk=topk, scaled=scaled[0]
    )
    return sparse or attention_problem(q, k_window, v_window, window=window, scaled=scaled[1])
