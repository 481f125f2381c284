"""The least-squares solvers give the minimum that they promise."""

import torch

from hyconvert.align.solve import quadratic_map, ridge


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_ridge_recovers_an_exact_linear_map() -> None:
    x, true = _random(50, 6), _random(4, 6)
    y = x @ true.T
    torch.testing.assert_close(ridge(x.T @ x, y.T @ x, 1e-12), true, rtol=1e-8, atol=1e-8)


def test_ridge_falls_back_to_its_prior_without_data() -> None:
    prior = _random(4, 6)
    zero = torch.zeros(6, 6, dtype=torch.float64)
    torch.testing.assert_close(ridge(zero, torch.zeros(4, 6, dtype=torch.float64), 1e-2, prior), prior)


def test_ridge_gradient_vanishes_at_its_solution() -> None:
    x, y, prior = _random(20, 6), _random(20, 4), _random(4, 6)
    gram, cross = x.T @ x, y.T @ x
    w = ridge(gram, cross, 0.1, prior)
    level = 0.1 * gram.diagonal().mean()
    torch.testing.assert_close(w @ gram - cross + level * (w - prior), torch.zeros_like(w), atol=1e-9, rtol=0)


def test_ridge_takes_products_that_rounding_made_indefinite() -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, -0.01]))
    cross = _random(2, 3)
    level = 1e-3 * gram.diagonal().mean().double()
    torch.testing.assert_close(ridge(gram, cross, 1e-3), cross / (gram.diagonal().double() + level))


def test_quadratic_map_solves_the_weighted_problem_exactly() -> None:
    heads, rows, dim = 2, 40, 5
    factors = _random(heads, rows, dim, 3)
    curvature, inputs, true = factors @ factors.mT, _random(heads, rows, dim), _random(heads, dim, dim)
    linear = (curvature @ (inputs @ true.mT)[..., None])[..., 0]
    found = quadratic_map(curvature, linear, inputs, 1e-9, steps=200)
    torch.testing.assert_close(found, true, rtol=1e-2, atol=1e-2)


def test_directions_without_curvature_stay_at_zero() -> None:
    rows, dim = 30, 4
    curvature = torch.zeros(1, rows, dim, dim, dtype=torch.float64)
    curvature[..., 0, 0] = 1
    inputs = _random(1, rows, dim)
    linear = torch.zeros(1, rows, dim, dtype=torch.float64)
    linear[..., 0] = inputs[..., 1]
    found = quadratic_map(curvature, linear, inputs, 1e-6, steps=100)
    torch.testing.assert_close(
        found[0, 0], torch.tensor([0.0, 1, 0, 0], dtype=torch.float64), atol=1e-3, rtol=0
    )
    assert found[0, 1:].abs().max() < 1e-6
