import numpy as np
import pytest
import torch

from models.aggregators import GeM

torch.set_num_threads(1)


@pytest.mark.parametrize("grid, p", [(1, 3.0), (2, 3.0), (2, 1.7), (3, 1.0)])
def test_output_is_that_of_plain_loops(grid, p):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    positive = np.maximum(x.numpy(), 1e-6)
    side = 6 // grid
    expected = np.array(
        [
            [
                (positive[b, c, i * side : (i + 1) * side, j * side : (j + 1) * side] ** p).mean() ** (1 / p)
                for c in range(4)
                for i in range(grid)
                for j in range(grid)
            ]
            for b in range(2)
        ]
    )
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    model = GeM(4, 6, 6, grid, p=p).double()
    assert model.out_dim == expected.shape[1]
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-9)


def test_p_learns_and_the_gradient_is_finite_where_features_are_zero():
    model = GeM(4, 3, 3)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    (model(x * (x > 0)) * torch.randn(4)).sum().backward()
    assert model.p.grad.abs() > 0 and torch.isfinite(model.p.grad) and torch.isfinite(x.grad).all()


def test_power_is_computed_in_float32_under_autocast():
    model = GeM(4, 8, 8)
    x = torch.rand(2, 4, 8, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y, model(x.float()))


def test_grid_finer_than_the_features_is_an_error_that_names_the_flags():
    with pytest.raises(ValueError, match="--gem_grid.*--image_size"):
        GeM(4, 8, 8, gem_grid=3)(torch.rand(1, 4, 2, 8))
