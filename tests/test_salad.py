import numpy as np
import pytest
import torch

from models.aggregators import SALAD
from models.aggregators.salad import sinkhorn

torch.set_num_threads(1)


def transport_by_hand(scores, dustbin, steps):
    """scores (M, N) -> shares (M + 1, N): rows and columns scaled in turn, no logarithms."""
    plan = np.exp(np.vstack([scores, np.full(scores.shape[1], dustbin)]))
    clusters, count = scores.shape
    for _ in range(steps):
        for row in range(clusters + 1):
            plan[row] *= (1 if row < clusters else count - clusters) / plan[row].sum()
        for column in range(count):
            plan[:, column] /= plan[:, column].sum()
    return plan


@pytest.mark.parametrize("steps", [1, 3])
def test_sinkhorn_is_that_of_plain_loops(steps):
    scores = np.random.default_rng(0).normal(size=(2, 3, 7))
    found = sinkhorn(torch.from_numpy(scores), torch.tensor(0.5, dtype=torch.float64), steps).exp()
    np.testing.assert_allclose(found, [transport_by_hand(each, 0.5, steps) for each in scores], atol=1e-12)


def test_sinkhorn_comes_to_its_amounts():
    scores = torch.randn(2, 5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(3 * scores, torch.tensor(1.0, dtype=torch.float64), 500).exp()
    expected = torch.tensor([1.0] * 5 + [15.0], dtype=torch.float64).expand(2, -1)
    torch.testing.assert_close(plan.sum(2), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.ones(2, 20, dtype=torch.float64))


def test_sinkhorn_is_finite_where_exponentials_overflow():
    scores = torch.tensor([[[500.0, 0, -500], [0, 0, 0]]])
    assert torch.isfinite(sinkhorn(scores, torch.tensor(1.0), 3).exp()).all()


def perceptron(state, name, last, x):
    """(C, N) -> (D, N)"""
    first, second = (
        (state[f"{name}.{k}.weight"].reshape(len(state[f"{name}.{k}.weight"]), -1), state[f"{name}.{k}.bias"])
        for k in (0, last)
    )
    return second[0] @ np.maximum(first[0] @ x + first[1][:, None], 0) + second[1][:, None]


def test_output_is_that_of_plain_loops():
    torch.manual_seed(0)
    settings = dict(salad_clusters=3, salad_dim=4, salad_token=5, salad_hidden=6, sinkhorn_steps=3)
    model = SALAD(7, 3, 4, **settings).double().eval()
    x, token = torch.randn(2, 7, 3, 4, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    expected = []
    for image, scene in zip(x.numpy(), token.numpy()):
        flat = image.reshape(7, -1)
        shares = transport_by_hand(perceptron(state, "score", 3, flat), float(state["dust_bin"]), 3)
        local = perceptron(state, "cluster_features", 3, flat)
        clusters = np.zeros((4, 3))
        for k in range(3):
            for n in range(12):
                clusters[:, k] += shares[k, n] * local[:, n]
        scene = perceptron(state, "token_features", 2, scene[:, None])[:, 0]
        whole = np.concatenate([scene / np.linalg.norm(scene), (clusters / np.linalg.norm(clusters, axis=0)).ravel()])
        expected.append(whole / np.linalg.norm(whole))
    assert model.out_dim == len(expected[0]) == 5 + 4 * 3
    np.testing.assert_allclose(model(x, token).detach().numpy(), expected, atol=1e-12)


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = SALAD(768, 23, 23)
    assert model.out_dim == 8448
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        "dust_bin": (),
        "token_features.0.weight": (512, 768),
        "token_features.0.bias": (512,),
        "token_features.2.weight": (256, 512),
        "token_features.2.bias": (256,),
        "cluster_features.0.weight": (512, 768, 1, 1),
        "cluster_features.0.bias": (512,),
        "cluster_features.3.weight": (128, 512, 1, 1),
        "cluster_features.3.bias": (128,),
        "score.0.weight": (512, 768, 1, 1),
        "score.0.bias": (512,),
        "score.3.weight": (64, 512, 1, 1),
        "score.3.bias": (64,),
    }


def test_as_many_clusters_as_features_is_an_error_that_names_the_flags():
    with pytest.raises(ValueError, match="--salad_clusters 64.*8 x 8.*--image_size"):
        SALAD(8, 8, 8)
    with pytest.raises(ValueError, match="64 clusters.*7 x 9.*--image_size"):
        SALAD(8, 9, 9)(torch.rand(1, 8, 7, 9), torch.rand(1, 8))
