"""The chunked distillation loss is the plain formula, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from hyconvert.heal.loss import distillation

N, D, V = 37, 11, 53


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, target, target_weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((N, D), (V, D), (N, 7), (V, 7))
    )
    labels = torch.randint(0, V, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), target, target_weight, labels


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight_of_text", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [10, 37, 1000])
def test_chunks_give_the_plain_formula(temperature: float, weight_of_text: float, chunk: int) -> None:
    hidden, weight, target, target_weight, labels = inputs()
    ours, theirs = hidden @ weight.T, target @ target_weight.T
    kl = kl_div(
        (ours / temperature).log_softmax(-1),
        (theirs / temperature).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    nll = cross_entropy(ours, labels, reduction="sum")
    want = temperature**2 * kl + weight_of_text * nll
    got = distillation(
        hidden,
        weight,
        target,
        target_weight,
        labels,
        temperature=temperature,
        cross_entropy=weight_of_text,
        measure_teacher=True,
        chunk=chunk,
    )
    torch.testing.assert_close(torch.stack([got.loss, got.kl, got.nll]), torch.stack([want, kl, nll]))
    torch.testing.assert_close(got.teacher_nll, cross_entropy(theirs, labels, reduction="sum"))
    grads = torch.autograd.grad(0.5 * got.loss, (hidden, weight))
    for grad, wanted in zip(grads, torch.autograd.grad(0.5 * want, (hidden, weight)), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    hidden, weight, _, _, labels = inputs()
    got = distillation(hidden, weight, None, None, labels, cross_entropy=1.0, chunk=8)
    want = cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(got.loss, want)
    for grad, wanted in zip(
        torch.autograd.grad(got.loss, (hidden, weight)),
        torch.autograd.grad(want, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted)


def test_a_frozen_head_gets_no_gradient_and_changes_none() -> None:
    hidden, weight, *rest = inputs()
    (want,) = torch.autograd.grad(distillation(hidden, weight, *rest).loss, (hidden,))
    loss = distillation(hidden, weight.detach(), *rest).loss
    loss.backward()
    assert hidden.grad is not None and weight.grad is None
    torch.testing.assert_close(hidden.grad, want)


def test_mixed_precision_stays_near_float32() -> None:
    hidden, weight, target, target_weight, labels = inputs(torch.float32)
    want = distillation(hidden, weight, target, target_weight, labels)
    (wanted,) = torch.autograd.grad(want.loss, (weight,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = distillation(hidden, weight, target.bfloat16(), target_weight.bfloat16(), labels)
    (grad,) = torch.autograd.grad(got.loss, (weight,))
    assert grad.dtype == torch.float32
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-2, atol=0)
    assert (grad - wanted).norm() < 2e-2 * wanted.norm()


def test_no_predictions_are_no_loss() -> None:
    hidden, weight, target, target_weight, labels = inputs()
    got = distillation(hidden[:0], weight, target[:0], target_weight, labels[:0])
    got.loss.backward()
    assert got.loss == 0 and weight.grad is not None and not weight.grad.any()
