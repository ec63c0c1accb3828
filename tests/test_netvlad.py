import numpy as np
import pytest
import torch

from models.aggregators import NetVLAD
from models.config import ModelConfig
from models.earthloc import EarthLoc
from models.whitening import whiten

torch.set_num_threads(1)


def vlad_by_hand(x, weight, bias, centers):
    """One image (C, H, W), float64, plain loops over positions and centres -> flat descriptor."""
    sums = np.zeros_like(centers)
    for position in x.reshape(len(x), -1).T:
        feature = position / np.linalg.norm(position)
        scores = [np.exp(weight[k] @ feature + bias[k]) for k in range(len(centers))]
        for k in range(len(centers)):
            sums[k] += scores[k] / sum(scores) * (feature - centers[k])
    for k in range(len(centers)):
        sums[k] /= np.linalg.norm(sums[k])
    return sums.ravel() / np.linalg.norm(sums)


@pytest.mark.parametrize("projected", [None, 3])
def test_output_is_that_of_plain_loops(projected):
    torch.manual_seed(0)
    model = NetVLAD(5, 3, 4, vlad_clusters=4, vlad_channels=projected).double()
    with torch.no_grad():
        model.centers.copy_(torch.randn_like(model.centers))
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    local = x.numpy()
    if projected:
        kernel = state["project.weight"][:, :, 0, 0]
        local = np.einsum("dc,bchw->bdhw", kernel, local) + state["project.bias"][:, None, None]
    expected = np.stack(
        [
            vlad_by_hand(each, state["assign.weight"][:, :, 0, 0], state["assign.bias"], state["centers"])
            for each in local
        ]
    )
    assert model.out_dim == expected.shape[1] == 4 * (projected or 5)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-12)


def test_started_from_features_it_assigns_each_to_its_centre_a_hundred_times_as_much_as_to_the_next():
    torch.manual_seed(0)
    places = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    x = (places.repeat(25, 1) + 0.02 * torch.randn(100, 16)).T.reshape(1, 16, 10, 10)
    model = NetVLAD(16, 10, 10, vlad_clusters=4)
    model.start_from(x)
    similarity = torch.nn.functional.normalize(model.centers, dim=1) @ places.T
    assert similarity.max(dim=0).values.min() > 0.99
    shares = model.assign(model.local(x)).flatten(2)[0].softmax(0)
    nearest = torch.cdist(model.local(x).flatten(2)[0].T, model.centers).argmin(1)
    assert torch.equal(shares.argmax(0), nearest)
    two = shares.topk(2, dim=0).values.log()
    assert (two[0] - two[1]).mean().item() == pytest.approx(np.log(100), rel=1e-3)


def test_whitening_starts_the_centres_from_the_views():
    torch.manual_seed(0)
    config = ModelConfig("resnet18", "layer1", "none", "netvlad", 8, 32, {"vlad_clusters": 3, "vlad_channels": 4})
    model = EarthLoc(config)
    before = model.aggregator.centers.detach().clone()
    images = torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batches = lambda: iter([(None, images, [])])
    whiten(model, batches, lambda images, generator: images.float() / 255, 0, 1.0, 0.1, "cpu", "fp32")
    assert not torch.equal(model.aggregator.centers, before)
    outputs = model.fc(model.train().aggregate(images.flatten(0, 1).float() / 255))
    torch.testing.assert_close(outputs.mean(0), torch.zeros(8), atol=1e-3, rtol=0)  # of the centres as they are now


def test_views_for_the_whitening_are_made_in_float32():
    """Under autocast places of pixels would be products in bfloat16, off by some pixels."""
    seen = []

    def augment(images, generator):
        seen.append(torch.is_autocast_enabled("cpu"))
        return images.float() / 255

    images = torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    model = EarthLoc(ModelConfig("resnet18", "layer1", "none", "gem", 8, 32))
    whiten(model, lambda: iter([(None, images, [])]), augment, 0, 1.0, 0.1, "cpu", "bf16")
    assert seen == [False]


def test_wrong_settings_name_the_flag():
    with pytest.raises(ValueError, match="--vlad_clusters 1"):
        NetVLAD(4, 2, 2, vlad_clusters=1)
    with pytest.raises(ValueError, match="--vlad_clusters 5: more than the 4 features"):
        NetVLAD(4, 2, 2, vlad_clusters=5).start_from(torch.rand(1, 4, 2, 2))
