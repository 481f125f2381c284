"""The distillation loss, straight from hidden states, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**26
"""Logits held at once, per buffer: 256 MiB in float32."""


class Sums(NamedTuple):
    """Sums over tokens, 0-d; only `loss` carries a gradient.

    Attributes:
        loss: of temperature^2 KL + weight * cross-entropy.
        kl: of KL(teacher || student) at the loss's temperature, in nats; 0 without a teacher.
        nll: of the student's negative log-likelihood of the text, in nats.
        teacher_nll: the teacher's, if it was asked for, else 0.
    """

    loss: Tensor
    kl: Tensor
    nll: Tensor
    teacher_nll: Tensor


def distillation(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    target_weight: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    measure_teacher: bool = False,
    chunk: int | None = None,
) -> Sums:
    """KL(teacher || student) over the whole vocabulary, and cross-entropy, summed over tokens.

    Both models' logits exist for `chunk` tokens at a time. Their gradient is worked out in the forward pass, while they
    are there, so that the backward pass only scales it (as in Liger Kernel, arXiv 2410.10989).

    Args:
        hidden: [N, D] the student's last hidden states.
        weight: [V, D] its output head.
        target, target_weight: [N, D'] and [V, D'] of the teacher; None for cross-entropy alone.
        labels: [N] int64, the tokens that follow.
        temperature: divides both models' logits; the KL is multiplied by its square, as Hinton et al. do.
        cross_entropy: weight of the cross-entropy.
        measure_teacher: give the teacher's likelihood too.
        chunk: tokens at a time.

    Returns:
        The sums, in float32 (float64 for float64 input).
    """
    chunk = chunk or max(16, _CHUNK_ELEMENTS // weight.shape[0])
    return Sums(
        *_Distillation.apply(
            hidden, weight, target, target_weight, labels, temperature, cross_entropy, measure_teacher, chunk
        )
    )


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None,
        target_weight: Tensor | None,
        labels: Tensor,
        temperature: float,
        cross_entropy: float,
        measure_teacher: bool,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        sums = torch.zeros(4, dtype=wide, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        with torch.autocast(kind, enabled=False):
            head = weight.to(dtype)
            for at in range(0, len(hidden), chunk):
                piece = slice(at, at + chunk)
                h = hidden[piece].to(dtype)
                logits, theirs = h @ head.T, None
                if target is not None and target_weight is not None:
                    theirs = target[piece].to(target_weight.dtype) @ target_weight.T
                    if measure_teacher:
                        sums[3] += _nll(_log_softmax(theirs, 1, wide), labels[piece])
                grad = _chunk_loss(logits, theirs, labels[piece], temperature, cross_entropy, sums)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[piece] = grad @ head
                if grad_weight is not None:
                    grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        loss, kl, nll, teacher_nll = (x.clone() for x in sums)  # FSDP2 warns of views
        ctx.mark_non_differentiable(kl, nll, teacher_nll)
        return loss, kl, nll, teacher_nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.saved_tensors]
        return (*grads, *[None] * 7)


def _chunk_loss(
    logits: Tensor, theirs: Tensor | None, labels: Tensor, temperature: float, weight: float, sums: Tensor
) -> Tensor:
    """Add one chunk to the sums; returns d loss / d logits. Each pass over [n, V] costs, so buffers are reused."""
    plain = _log_softmax(logits, 1, sums.dtype)
    nll = _nll(plain, labels)
    sums[2] += nll
    sums[0] += weight * nll
    ours = plain if temperature == 1 else _log_softmax(logits, temperature, sums.dtype)
    if theirs is None:
        grad = torch.zeros_like(ours)
    else:
        wanted = _log_softmax(theirs, temperature, sums.dtype)
        chance = wanted.exp()
        kl = torch.linalg.vecdot(chance, wanted.sub_(ours)).sum()
        sums[1] += kl
        sums[0] += temperature**2 * kl
        grad = torch.exp(ours, out=wanted).sub_(chance)
        if temperature != 1:
            grad.mul_(temperature)
    if weight:
        grad.add_(plain.exp_(), alpha=weight)
        grad[torch.arange(len(labels), device=labels.device), labels] -= weight
    return grad


def _log_softmax(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    return (logits if temperature == 1 else logits.to(dtype) / temperature).log_softmax(-1, dtype=dtype)


def _nll(log_chances: Tensor, labels: Tensor) -> Tensor:
    return -log_chances.gather(-1, labels[:, None]).sum()
