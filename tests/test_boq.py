import numpy as np
import pytest
import torch

from models.aggregators import BoQ

torch.set_num_threads(1)


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def attention(state, name, queries, keys, heads):
    """queries (Q, D), keys (N, D), which are the values, too -> (Q, D); one head and one query at a time."""
    weights, biases = (np.split(state[f"{name}.in_proj_{kind}"], 3) for kind in ("weight", "bias"))
    q, k, v = (x @ w.T + b for x, w, b in zip((queries, keys, keys), weights, biases))
    size, out = q.shape[1] // heads, np.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(q)):
            shares = np.exp(k[:, part] @ q[row, part] / np.sqrt(size))
            out[row, part] = shares / shares.sum() @ v[:, part]
    return out @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def boq_by_hand(x, state, blocks, heads):
    """One image (C, H, W), float64 -> flat descriptor."""
    channels, height, width = x.shape
    padded, kernel = np.pad(x, ((0, 0), (1, 1), (1, 1))), state["proj_c.weight"]
    x = np.array(
        [
            [(kernel[c] * padded[:, i : i + 3, j : j + 3]).sum() + state["proj_c.bias"][c] for c in range(len(kernel))]
            for i in range(height)
            for j in range(width)
        ]
    )
    norm = lambda x, name: layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"])
    linear = lambda x, name: x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    x, answers = norm(x, "norm_input"), []
    for block in (f"boqs.{i}" for i in range(blocks)):
        x = norm(x + attention(state, f"{block}.encoder.self_attn", x, x, heads), f"{block}.encoder.norm1")
        hidden = np.maximum(linear(x, f"{block}.encoder.linear1"), 0)
        x = norm(x + linear(hidden, f"{block}.encoder.linear2"), f"{block}.encoder.norm2")
        queries = state[f"{block}.queries"][0]
        queries = norm(queries + attention(state, f"{block}.self_attn", queries, queries, heads), f"{block}.norm_q")
        answers.append(norm(attention(state, f"{block}.cross_attn", queries, x, heads), f"{block}.norm_out"))
    flat = linear(np.concatenate(answers).T, "fc").ravel()
    return flat / np.linalg.norm(flat)


@pytest.mark.parametrize("training", [True, False])
def test_output_is_that_of_plain_loops(training):
    torch.manual_seed(0)
    model = BoQ(3, 2, 3, boq_channels=128, boq_queries=4, boq_blocks=2, boq_rows=3).double().train(training)
    with torch.no_grad():  # fresh norms and biases would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    expected = [boq_by_hand(image, state, blocks=2, heads=2) for image in x.numpy()]
    with torch.no_grad():
        found = model(x)
    assert model.out_dim == found.shape[1] == 128 * 3
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = BoQ(768, 23, 23, boq_channels=384)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert model.out_dim == 12288
    attention = {"in_proj_weight": (1152, 384), "in_proj_bias": (1152,), "out_proj.weight": (384, 384)}
    expected = {
        **{f"{name}.{key}": shape for name in ("self_attn", "cross_attn") for key, shape in attention.items()},
        **{f"encoder.self_attn.{key}": shape for key, shape in attention.items()},
        "encoder.linear1.weight": (1536, 384),
        "encoder.linear2.weight": (384, 1536),
        "queries": (1, 64, 384),
        "norm_q.weight": (384,),
        "norm_out.weight": (384,),
    }
    for key, shape in expected.items():
        assert shapes[f"boqs.0.{key}"] == shapes[f"boqs.1.{key}"] == shape
    assert shapes["proj_c.weight"] == (384, 768, 3, 3) and shapes["norm_input.weight"] == (384,)
    assert shapes["fc.weight"] == (32, 128) and not any(key.startswith("boqs.2") for key in shapes)


def test_wrong_settings_name_the_flag():
    with pytest.raises(ValueError, match="--boq_blocks 0"):
        BoQ(4, 2, 2, boq_blocks=0)
    with pytest.raises(ValueError, match="--boq_channels 131"):
        BoQ(4, 2, 2, boq_channels=131)
