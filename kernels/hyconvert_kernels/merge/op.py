"""Dispatch of the merge of branches, and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import DTYPES, choose, on_device
from . import reference


def merge_branches(
    out_w: Tensor,
    lse_w: Tensor,
    out_s: Tensor,
    lse_s: Tensor,
    gate_logit: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """See `reference.merge_branches`."""
    problem = None
    if out_w.dtype not in DTYPES or out_s.dtype not in DTYPES:
        problem = f"outputs are {out_w.dtype} and {out_s.dtype}; they must be float32, float16 or bfloat16"
    elif out_w.shape != out_s.shape or lse_w.shape != out_w.shape[:3] or lse_s.shape != out_w.shape[:3]:
        problem = (
            f"shapes {tuple(out_w.shape)}, {tuple(lse_w.shape)}, {tuple(out_s.shape)} and {tuple(lse_s.shape)} "
            "must be [B,H,T,d] and [B,H,T], twice"
        )
    tensors = (out_w, lse_w, out_s, lse_s, gate_logit)
    if choose("merge_branches", tensors, implementation, problem) == "reference":
        return reference.merge_branches(*tensors)
    gate = gate_logit.to(out_w.device).expand(out_w.shape[:3])
    return _merge(out_w.contiguous(), lse_w.float(), out_s.contiguous(), lse_s.float(), gate)


@torch.library.custom_op("hyconvert::merge_branches", mutates_args=())
def _merge(out_w: Tensor, lse_w: Tensor, out_s: Tensor, lse_s: Tensor, gate: Tensor) -> Tensor:
    from . import forward

    out = out_w.new_empty(out_w.shape)
    if out.numel():
        with on_device(out):
            forward.forward(
                out_w.contiguous(), lse_w.contiguous(), out_s.contiguous(), lse_s.contiguous(), gate, out
            )
    return out


@_merge.register_fake
def _(out_w, lse_w, out_s, lse_s, gate):
    return out_w.new_empty(out_w.shape)


@torch.library.custom_op("hyconvert::merge_branches_backward", mutates_args=())
def _merge_backward(
    out_w: Tensor, lse_w: Tensor, out_s: Tensor, lse_s: Tensor, gate: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of out_w, out_s and the sigmoid's argument."""
    from . import backward

    grads = _merge_grads(out_w, lse_w, out_s, lse_s, gate, grad)
    if grad.numel():
        with on_device(grad):
            backward.backward(
                out_w.contiguous(), lse_w.contiguous(), out_s.contiguous(), lse_s.contiguous(), gate,
                grad.contiguous(), *grads,
            )  # fmt: skip
    return grads


@_merge_backward.register_fake
def _merge_grads(out_w, lse_w, out_s, lse_s, gate, grad):
    return out_w.new_empty(out_w.shape), out_s.new_empty(out_s.shape), lse_w.new_empty(lse_w.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    saved = ctx.saved_tensors  # unpacked once: under gradient checkpointing a second time is an error
    grad_w, grad_s, grad_logit = _merge_backward(*saved, grad)
    return grad_w, -grad_logit, grad_s, grad_logit, grad_logit.to(saved[4].dtype)


_merge.register_autograd(_differentiate, setup_context=_setup_context)
