"""What the registrations of the Triton kernels with ``torch.library`` share.

Every kernel is an opaque op of the namespace ``hyconvert`` with a fake implementation, and one with an autograd formula
where a gradient is defined, so that ``torch.compile`` and CUDA graphs treat it like PyTorch's own. The ops take what
the dispatchers checked already; they are not meant to be called by hand. Triton is imported when one first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous ``out [B,H,T,d]`` in q's dtype and float32 ``lse [B,H,T]``, not filled."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def attention_backward(backward, saved, out: Tensor, grad, grad_lse, settings: tuple, inputs: int) -> tuple:
    """What an attention op's autograd formula returns: gradients of q, k and v, None for its other inputs.

    Args:
        backward: the op's backward, called with ``*saved, grad, grad_lse, *settings``.
        saved: tensors that the forward saved.
        out: the forward's output, for the shape of a gradient that is missing.
        grad, grad_lse: gradients of the output and of the log-sum-exp; None where there is none.
        settings: numbers that the backward takes.
        inputs: how many inputs the op has.
    """
    if grad is None and grad_lse is None:
        return (None,) * inputs
    grads = backward(*saved, torch.zeros_like(out) if grad is None else grad, grad_lse, *settings)
    return (*grads, *(None,) * (inputs - 3))


def attention_grads(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of q, k and v, not filled."""
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
