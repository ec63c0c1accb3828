import numpy as np
import pytest
import torch

from models.aggregators import ConvAP

torch.set_num_threads(1)


@pytest.mark.parametrize("grid", [1, 2])
def test_output_is_that_of_plain_loops(grid):
    torch.manual_seed(0)
    model = ConvAP(5, 4, 6, descriptor_dim=12, conv_grid=grid).double()
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    kernel, bias = model.channel_pool.weight.detach().numpy()[:, :, 0, 0], model.channel_pool.bias.detach().numpy()
    expected = np.array(
        [
            [
                np.mean(
                    [
                        kernel[c] @ image[:, row, column] + bias[c]
                        for row in range(i * 4 // grid, (i + 1) * 4 // grid)
                        for column in range(j * 6 // grid, (j + 1) * 6 // grid)
                    ]
                )
                for c in range(12 // grid**2)
                for i in range(grid)
                for j in range(grid)
            ]
            for image in x.numpy()
        ]
    )
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert model.out_dim == expected.shape[1] == 12
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-12)


def test_wrong_settings_name_the_flag():
    with pytest.raises(ValueError, match="--descriptor_dim 10.*--conv_channels"):
        ConvAP(5, 4, 4, descriptor_dim=10)
    with pytest.raises(ValueError, match="--conv_grid 5.*4 x 4"):
        ConvAP(5, 4, 4, descriptor_dim=25, conv_grid=5)
    assert ConvAP(5, 4, 4, descriptor_dim=10, conv_channels=3).out_dim == 12
