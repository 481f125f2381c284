"""Dispatch of window attention, and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..coordinates import check_inputs
from ..dispatch import attention_problem, choose, dense_rows, on_device
from ..merge import reference as merge_reference
from ..registration import attention_backward, attention_grads, attention_outputs
from . import reference


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: Tensor,
    start: Tensor,
    *,
    window: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.window_attention`."""
    check_inputs(q, k, v, q_offset, start)
    problem = attention_problem(q, k, v, window=window)
    tensors = (q, k, v, q_offset, start)
    if choose("window_attention", tensors, implementation, problem) == "reference":
        return reference.window_attention(*tensors, window=window, scale=scale)
    return _window(*tensors, window, scale)


def merged_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offset: Tensor,
    start: Tensor,
    out_s: Tensor,
    lse_s: Tensor,
    gate_logit: Tensor,
    *,
    window: int,
    scale: float,
    implementation: str | None = None,
) -> Tensor:
    """`window_attention`, and `merge_branches` of it with a sparse branch, in one pass; no gradient is defined.

    Args:
        q, k, v, q_offset, start, window, scale: as for `window_attention`.
        out_s, lse_s: ``[B,H,T,d]`` and ``[B,H,T]`` of the sparse branch.
        gate_logit: ``[B,H,T]``.

    Returns:
        ``[B,H,T,d]`` in q's dtype; of the kernel all heads of a token side by side in memory.
    """
    check_inputs(q, k, v, q_offset, start)
    problem = attention_problem(q, k, v, window=window)
    tensors = (q, k, v, q_offset, start)
    if choose("merged_window_attention", (*tensors, out_s), implementation, problem) == "reference":
        near = reference.window_attention(*tensors, window=window, scale=scale)
        return merge_reference.merge_branches(*near, out_s, lse_s, gate_logit)
    from . import forward

    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    with on_device(q):
        forward.forward(
            dense_rows(q), dense_rows(k), dense_rows(v), q_offset.contiguous(), start.contiguous(), out, None,
            window=window, scale=scale, merge=(dense_rows(out_s), lse_s.contiguous(), gate_logit),
        )  # fmt: skip
    return out


@torch.library.custom_op("hyconvert::window_attention", mutates_args=())
def _window(
    q: Tensor, k: Tensor, v: Tensor, q_offset: Tensor, start: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    from . import forward

    out, lse = attention_outputs(q)
    if out.numel():
        with on_device(q):
            q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
            q_offset, start = q_offset.contiguous(), start.contiguous()
            forward.forward(q, k, v, q_offset, start, out, lse, window=window, scale=scale)
    return out, lse


@_window.register_fake
def _(q, k, v, q_offset, start, window, scale):
    return attention_outputs(q)


@torch.library.custom_op("hyconvert::window_attention_backward", mutates_args=())
def _window_backward(
    q: Tensor, k: Tensor, v: Tensor, q_offset: Tensor, start: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    grad_lse: Tensor | None, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from . import backward

    grads = attention_grads(q, k)
    with on_device(q):
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        q_offset, start = q_offset.contiguous(), start.contiguous()
        backward.backward(
            q, k, v, q_offset, start, out, lse, grad, grad_lse, *grads, window=window, scale=scale
        )
    return grads


@_window_backward.register_fake
def _(q, k, *rest):
    return attention_grads(q, k)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_lse):
    saved = ctx.saved_tensors
    return attention_backward(_window_backward, saved, saved[5], grad, grad_lse, (ctx.window, ctx.scale), 7)


_window.register_autograd(_differentiate, setup_context=_setup_context)
