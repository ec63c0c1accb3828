import numpy as np
import pytest
import torch

from models.aggregators import MixVPR
from models.normalise import l2_normalise

torch.set_num_threads(1)


def with_random_parameters(module):
    """Fresh biases are zero and LayerNorms identities, which would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def mixvpr_by_hand(x, state, depth, eps=1e-5):
    """One image (C, H, W), float64, plain loops over channels -> flat descriptor."""
    rows = x.reshape(x.shape[0], -1).copy()
    for block in range(depth):
        p = {key: state[f"mix.{block}.mix.{key}"] for key in ("0.weight", "0.bias", "1.weight", "1.bias")}
        q = {key: state[f"mix.{block}.mix.{key}"] for key in ("3.weight", "3.bias")}
        for c in range(len(rows)):
            normed = (rows[c] - rows[c].mean()) / np.sqrt(rows[c].var() + eps) * p["0.weight"] + p["0.bias"]
            hidden = np.maximum(p["1.weight"] @ normed + p["1.bias"], 0)
            rows[c] = rows[c] + q["3.weight"] @ hidden + q["3.bias"]
    by_channel = np.stack(
        [state["channel_proj.weight"] @ rows[:, i] + state["channel_proj.bias"] for i in range(rows.shape[1])], axis=1
    )
    flat = [
        state["row_proj.weight"][r] @ by_channel[c] + state["row_proj.bias"][r]
        for c in range(len(by_channel))
        for r in range(len(state["row_proj.weight"]))
    ]
    return np.array(flat) / np.linalg.norm(flat)


@pytest.mark.parametrize("depth", [0, 2])
def test_output_is_that_of_plain_loops(depth):
    torch.manual_seed(0)
    model = with_random_parameters(MixVPR(6, 3, 4, 10, mix_depth=depth, out_rows=2).double())
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    x = torch.randn(3, 6, 3, 4, dtype=torch.float64)
    expected = np.stack([mixvpr_by_hand(image.numpy(), state, depth) for image in x])
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_shape_and_unit_length():
    y = MixVPR(8, 4, 4, 18, out_rows=3)(torch.randn(2, 8, 4, 4))
    assert y.shape == (2, 18)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(2))


def test_names_are_the_released_ones():
    shapes = {key: tuple(value.shape) for key, value in MixVPR(8, 4, 4, 24, mix_depth=1).state_dict().items()}
    assert shapes == {
        "mix.0.mix.0.weight": (16,),
        "mix.0.mix.0.bias": (16,),
        "mix.0.mix.1.weight": (16, 16),
        "mix.0.mix.1.bias": (16,),
        "mix.0.mix.3.weight": (16, 16),
        "mix.0.mix.3.bias": (16,),
        "channel_proj.weight": (6, 8),
        "channel_proj.bias": (6,),
        "row_proj.weight": (4, 16),
        "row_proj.bias": (4,),
    }


def test_mixers_start_as_published():
    torch.manual_seed(0)
    state = MixVPR(8, 16, 16, 24, mix_depth=1).state_dict()
    for layer in (1, 3):
        assert state[f"mix.0.mix.{layer}.weight"].std() == pytest.approx(0.02, rel=0.02)
        assert not state[f"mix.0.mix.{layer}.bias"].any()


@pytest.mark.parametrize("shape", [(1, 8, 5, 5), (1, 8, 2, 8), (1, 9, 4, 4)])
def test_features_of_another_shape_are_an_error_that_names_the_image_size(shape):
    with pytest.raises(ValueError, match=f"8 x 4 x 4 and got {shape[1]} x {shape[2]} x {shape[3]}.*--image_size"):
        MixVPR(8, 4, 4, 24)(torch.zeros(shape))


def test_low_precision_is_normalised_in_float32():
    x = torch.randn(2, 300).bfloat16()
    y = l2_normalise(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.float() / x.float().norm(dim=1, keepdim=True))
    assert l2_normalise(x.double()).dtype == torch.float64
