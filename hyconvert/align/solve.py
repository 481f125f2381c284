"""The least-squares problems behind alignment, solved in closed form or by a few conjugate-gradient steps."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge(gram: Tensor, cross: Tensor, strength: float, prior: Tensor | None = None) -> Tensor:
    """Minimise ||W X - Y||^2 + l ||W - prior||^2 over W from accumulated products.

    Args:
        gram: [..., n, n] X X'.
        cross: [..., m, n] Y X'.
        strength: l as a share of the mean diagonal of `gram`.
        prior: [..., m, n] what W shrinks to; zero when None.

    Returns:
        W, [..., m, n], float64.
    """
    gram, cross = gram.double(), cross.double()
    size = gram.shape[-1]
    level = strength * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[..., None, None]
    lhs = gram + level * torch.eye(size, dtype=gram.dtype, device=gram.device)
    rhs = cross if prior is None else cross + level * prior.double()
    factor, failed = torch.linalg.cholesky_ex(lhs)
    if bool(failed.any()):  # products accumulated in less than float32 need not be positive definite
        solution: Tensor = torch.linalg.solve(lhs, rhs.mT)
        return solution.mT
    return torch.cholesky_solve(rhs.mT, factor).mT


def quadratic_map(
    curvature: Tensor, linear: Tensor, inputs: Tensor, strength: float, steps: int = 24
) -> Tensor:
    """Minimise sum_t (M x_t)' A_t (M x_t) / 2 - c_t' (M x_t), plus a ridge, over a matrix M per head.

    Conjugate gradients, preconditioned with the Kronecker product of the mean A and the mean x x'.

    Args:
        curvature: [H, n, d, d] symmetric, positive semi-definite A_t.
        linear: [H, n, d] c_t.
        inputs: [H, n, d] x_t.
        strength: ridge as a share of the mean diagonal of both factors.
        steps: conjugate-gradient steps at most.

    Returns:
        M, [H, d, d] float32.
    """
    eye = torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
    mean_a, mean_x = curvature.mean(1), inputs.mT @ inputs
    level_a = strength * mean_a.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[:, None, None]
    level_x = strength * mean_x.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[:, None, None]
    inverse_a = torch.cholesky_inverse(torch.linalg.cholesky(mean_a + level_a * eye))
    inverse_x = torch.cholesky_inverse(torch.linalg.cholesky(mean_x + level_x * eye))
    ridge_level = level_a * level_x / max(strength, 1e-12)

    def apply(m: Tensor) -> Tensor:
        y = inputs @ m.mT
        # y' A, which is (A y)': the CPU's product of many small matrices takes three times as long for columns.
        return (y[..., None, :] @ curvature)[..., 0, :].mT @ inputs + ridge_level * m

    def precondition(r: Tensor) -> Tensor:
        return inverse_a @ r @ inverse_x

    rhs = linear.mT @ inputs
    m = precondition(rhs)
    residual = rhs - apply(m)
    z = precondition(residual)
    direction, rz = z, (residual * z).sum((-1, -2), keepdim=True)
    first = (rhs * precondition(rhs)).sum((-1, -2), keepdim=True).clamp(min=1e-30)
    for _ in range(steps):
        if bool((rz <= 1e-6 * first).all()):
            break
        applied = apply(direction)
        alpha = rz / (direction * applied).sum((-1, -2), keepdim=True).clamp(min=1e-30)
        m = m + alpha * direction
        residual = residual - alpha * applied
        z = precondition(residual)
        rz, previous = (residual * z).sum((-1, -2), keepdim=True), rz
        direction = z + rz / previous.clamp(min=1e-30) * direction
    return m
