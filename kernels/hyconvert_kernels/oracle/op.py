"""Dispatch of oracle attention, and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import check_inputs
from ..dispatch import attention_problem, choose, dense_rows, on_device
from ..fp8 import Scales, check_scales
from ..registration import attention_backward, attention_grads, attention_outputs
from . import reference

SCORE_ELEMENTS = 1 << 26
"""Scores that `oracle_attention_topk`'s portable kernel holds at a time (its query chunk is cut to fit)."""


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    block_size: int,
    window: int,
    scale: float,
    with_scores: bool = True,
    scales: Scales | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `reference.oracle_attention`. The kernels take ``scales`` for one query per row without scores."""
    check_inputs(q, k, v, q_offset, start)
    settings = {"block_size": block_size, "window": window, "scale": scale}
    problem = attention_problem(q, k, v, block_size=block_size, window=window, scaled=scales is not None)
    if scales is not None and (q.shape[2] != 1 or with_scores):
        problem = problem or "keys with scales, and several queries per row or scores"
    tensors = (q, k, v, q_offset, start)
    if choose("oracle_attention", tensors, implementation, problem) == "reference":
        return reference.oracle_attention(*tensors, with_scores=with_scores, scales=scales, **settings)
    if scales is not None:
        return decode_scaled(*tensors, scales, topk=None, **settings)
    out, lse, scores = _oracle(*tensors, block_size, window, with_scores, scale)
    return out, lse, scores if with_scores else None


def oracle_attention_topk(
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
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.oracle_attention_topk`."""
    check_inputs(q, k, v, q_offset, start)
    problem = attention_problem(q, k, v, block_size=block_size, window=window, topk=topk)
    tensors = (q, k, v, q_offset, start)
    if choose("oracle_attention_topk", tensors, implementation, problem) == "reference":
        return reference.oracle_attention_topk(
            *tensors, block_size=block_size, window=window, topk=topk, scale=scale
        )
    return oracle_topk(*tensors, block_size, window, topk, scale)


def decode_scaled(q, k, v, q_offset, start, scales, *, topk, **settings):
    """`oracle_decode` on checked inputs whose keys and values have scales, by the kernels; without top-k no selection.

    No op of ``torch.library``, and without a gradient: it is for the decode loop's caches.
    """
    from ..decode import full

    check_scales(k, scales)
    out, lse = attention_outputs(q)
    indices = None if topk is None else q.new_empty(*q.shape[:1], k.shape[1], 1, topk, dtype=torch.int32)
    if out.numel():
        with on_device(q):
            full.oracle_decode(
                dense_rows(q), dense_rows(k), dense_rows(v), q_offset.contiguous(), start.contiguous(), out, lse,
                indices, scales=[scale.contiguous() for scale in scales], **settings,
            )  # fmt: skip
    return out, lse, indices


@torch.library.custom_op("hyconvert::oracle_attention", mutates_args=())
def _oracle(
    q: Tensor, k: Tensor, v: Tensor, q_offset: Tensor, start: Tensor, block_size: int, window: int,
    with_scores: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Without scores the third output is empty: an op cannot return None."""
    from ..decode import full
    from . import forward

    out, lse, scores = _oracle_outputs(q, k, v, q_offset, start, block_size, window, with_scores, scale)
    if not out.numel():
        return out, lse, scores
    tensors = dense_rows(q), dense_rows(k), dense_rows(v), q_offset.contiguous(), start.contiguous()
    settings = {"block_size": block_size, "window": window, "scale": scale}
    with on_device(q):
        if q.shape[2] == 1 and not with_scores:  # one query cannot fill the GPU, so its keys are split
            full.oracle_decode(*tensors, out, lse, None, **settings)
        else:
            forward.forward(*tensors, out, lse, scores if with_scores else None, **settings)
    return out, lse, scores


@_oracle.register_fake
def _oracle_outputs(q, k, v, q_offset, start, block_size, window, with_scores, scale):
    blocks = -(-k.shape[2] // block_size) if with_scores else 0
    shape = (q.shape[0], k.shape[1], q.shape[2], blocks)
    return *attention_outputs(q), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("hyconvert::oracle_attention_topk", mutates_args=())
def oracle_topk(
    q: Tensor, k: Tensor, v: Tensor, q_offset: Tensor, start: Tensor, block_size: int, window: int, topk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`oracle_attention_topk` on checked inputs, by the kernels."""
    from ..decode import full
    from ..topk import forward as topk_forward
    from . import forward

    out, lse, indices = _topk_outputs(q, k, v, q_offset, start, block_size, window, topk, scale)
    if not out.numel():
        return out, lse, indices
    settings = {"block_size": block_size, "window": window, "scale": scale}
    tensors = dense_rows(q), dense_rows(k), dense_rows(v), q_offset.contiguous(), start.contiguous()
    batch, length, groups = q.shape[0], q.shape[2], k.shape[1]
    blocks = -(-k.shape[2] // block_size)
    if length == 1 and blocks <= 65536:  # one query cannot fill the GPU, so its keys are split
        with on_device(q):
            full.oracle_decode(*tensors, out, lse, indices, **settings)
        return out, lse, indices
    if hopper := forward.on_hopper(*tensors[:3], scale):
        with on_device(q):
            hopper.forward(*tensors, out, lse, None, indices, first=0, end=length, **settings)
        return out, lse, indices
    step = min(length, max(64, SCORE_ELEMENTS // (batch * groups * blocks) // 64 * 64))
    buffer = torch.empty(batch * groups * step * blocks, dtype=torch.float32, device=q.device)
    with on_device(q):
        for first in range(0, length, step):
            end = min(length, first + step)
            scores = buffer[: batch * groups * (end - first) * blocks].view(
                batch, groups, end - first, blocks
            )
            forward.forward(*tensors, out, lse, scores, span=(first, end), **settings)
            topk_forward.forward(scores, topk, indices, chunk=(first, *tensors[3:], window, block_size))
    return out, lse, indices


@oracle_topk.register_fake
def _topk_outputs(q, k, v, q_offset, start, block_size, window, topk, scale):
    shape = (q.shape[0], k.shape[1], q.shape[2], topk)
    return *attention_outputs(q), q.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("hyconvert::oracle_attention_backward", mutates_args=())
def _oracle_backward(
    q: Tensor, k: Tensor, v: Tensor, q_offset: Tensor, start: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    grad_lse: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import backward

    grads = attention_grads(q, k)
    with on_device(q):
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        q_offset, start = q_offset.contiguous(), start.contiguous()
        backward.backward(q, k, v, q_offset, start, out, lse, grad, grad_lse, *grads, scale=scale)
    return grads


@_oracle_backward.register_fake
def _(q, k, *rest):
    return attention_grads(q, k)


def _setup_context(ctx, inputs, output):
    out, lse, selected = output
    ctx.scale = inputs[-1]
    ctx.save_for_backward(*inputs[:5], out, lse)
    ctx.mark_non_differentiable(selected)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_lse, _):
    saved = ctx.saved_tensors
    return attention_backward(_oracle_backward, saved, saved[5], grad, grad_lse, (ctx.scale,), 9)


for _op in (_oracle, oracle_topk):
    _op.register_autograd(_differentiate, setup_context=_setup_context)
