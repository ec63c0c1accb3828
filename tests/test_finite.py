"""The watch over the loss says what torch.isfinite says, on a GPU as well."""

import pytest
import torch

from utils.finite import finite_later

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value, expected", [(0.0, True), (-3e38, True), (torch.nan, False), (torch.inf, False)])
def test_what_is_finite(value, expected, device):
    tensor = torch.tensor(value, device=device, requires_grad=True)
    is_finite = finite_later(tensor * 1)
    tensor.data.fill_(torch.nan if expected else 0.0)  # the answer is about the time of the question
    assert is_finite() is expected and is_finite() is expected
