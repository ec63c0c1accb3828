"""The location encoder: against the published package, known values, and a float64 computation by hand."""

import importlib
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from models.location_encoder import FourierFeatures, LocationEncoder, equal_earth

SPECIAL = [
    (0, 0),
    (90, 0),
    (-90, 0),
    (90, 180),
    (-90, -180),
    (0, 180),
    (0, -180),
    (0, 179.999),
    (0, -179.999),
    (40.7128, -74.0060),
    (34.0522, -118.2437),
    (48.8566, 2.3522),
    (1e-6, -1e-6),
]
needs_package = pytest.mark.skipif(find_spec("geoclip") is None, reason="pip install --no-deps geoclip")


def random_points(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([np.degrees(np.arcsin(rng.uniform(-1, 1, count))), rng.uniform(-180, 180, count)], axis=1)


@pytest.fixture(scope="module")
def published():
    """Our encoder with the published weights, read here without our loading code."""
    folder = Path(find_spec("geoclip").submodule_search_locations[0])
    encoder = LocationEncoder()
    encoder.load_state_dict(torch.load(folder / "model/weights/location_encoder_weights.pth", weights_only=True))
    return encoder.eval()


@pytest.fixture(scope="module")
def reference():
    """The package's own location encoder, without the rest of the package and what that needs (pandas)."""
    folder = Path(find_spec("geoclip").submodule_search_locations[0]) / "model"
    package = types.ModuleType("geoclip_reference")
    package.__path__ = [str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "geoclip_reference", package)
        if find_spec("pandas") is None:
            patch.setitem(sys.modules, "pandas", types.ModuleType("pandas"))
        module = importlib.import_module("geoclip_reference.location_encoder")
        yield module.LocationEncoder(from_pretrained=True).eval()


@needs_package
@torch.no_grad()
def test_golden_against_the_package(published, reference):
    points = torch.tensor(np.concatenate([random_points(2000), SPECIAL]), dtype=torch.float32)
    difference = (published(points) - reference(points)).abs().max()
    assert difference <= 1e-6
    assert published(points).std() > 1e-3  # they agree on something


@needs_package
@torch.no_grad()
def test_known_values(published):
    new_york, los_angeles, paris = published(torch.tensor([SPECIAL[9], SPECIAL[10], SPECIAL[11]]))
    assert new_york[:4].tolist() == pytest.approx([-0.01039, 0.00788, 0.01303, 0.00285], abs=1e-5)
    assert [each.norm().item() for each in (new_york, los_angeles, paris)] == pytest.approx(
        [0.2243, 0.2301, 0.2401], abs=5e-5
    )
    assert torch.cosine_similarity(new_york, los_angeles, dim=0).item() == pytest.approx(0.374, abs=5e-4)


@needs_package
@torch.no_grad()
def test_the_two_sides_of_the_antimeridian_differ(published):
    """Not a wish but a fact to build on: distances must not be taken through the encoder."""
    east, west = published(torch.tensor([[0.0, 179.999], [0.0, -179.999]]))
    assert torch.cosine_similarity(east, west, dim=0) < 0.6


@torch.no_grad()
def test_recomputed_in_float64():
    torch.manual_seed(0)
    encoder = LocationEncoder((1.0, 4.0))  # fine scales amplify float32's rounding, which is not the subject here
    points = np.concatenate([random_points(20), SPECIAL])
    state = {key: value.double().numpy() for key, value in encoder.state_dict().items()}
    lat, lon = np.radians(points).T
    theta = np.arcsin(np.sqrt(3) / 2 * np.sin(lat))
    a1, a2, a3, a4 = 1.340264, -0.081106, 0.000893, 0.003796
    x = 2 * np.sqrt(3) * lon * np.cos(theta) / (3 * (9 * a4 * theta**8 + 7 * a3 * theta**6 + 3 * a2 * theta**2 + a1))
    y = a4 * theta**9 + a3 * theta**7 + a2 * theta**3 + a1 * theta
    v = np.stack([x, y], axis=1) * 66.50336 / 180
    expected = 0
    for name in ("LocEnc0", "LocEnc1"):
        phases = 2 * np.pi * v @ state[f"{name}.capsule.0.b"].T
        z = np.concatenate([np.cos(phases), np.sin(phases)], axis=1)
        for layer in (1, 3, 5):
            z = np.maximum(z @ state[f"{name}.capsule.{layer}.weight"].T + state[f"{name}.capsule.{layer}.bias"], 0)
        expected = expected + z @ state[f"{name}.head.0.weight"].T + state[f"{name}.head.0.bias"]
    assert np.abs(encoder(torch.tensor(points)).numpy() - expected).max() < 1e-5


def test_projection_keeps_the_shape_of_equal_earth():
    """Its published extent: the whole map is 2.05458 times as wide as high; the poles are 0.59247 as wide."""
    x, y = equal_earth(torch.tensor([[0.0, 180.0], [90.0, 180.0], [-90.0, 0.0]])).T
    assert (x[0] / y[1]).item() == pytest.approx(2.05458, abs=1e-4)
    assert (x[1] / x[0]).item() == pytest.approx(0.59247, abs=1e-4)
    assert y[2] == -y[1] and x[2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_around_it_changes_nothing(dtype):
    encoder = LocationEncoder()
    points = torch.tensor(random_points(50), dtype=torch.float32)
    outside = encoder(points)
    with torch.autocast("cpu", dtype):
        inside = encoder(points)
        control = torch.nn.functional.linear(outside, torch.ones(3, 512))
    assert control.dtype == dtype  # autocast was on
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@torch.no_grad()
def test_low_precision_products_around_it_change_nothing():
    encoder = LocationEncoder()
    points = torch.tensor(random_points(50), dtype=torch.float32)
    outside = encoder(points)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        inside = encoder(points)
        assert torch.get_float32_matmul_precision() == "medium"  # left as it was found
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(inside, outside)


def test_frequencies_are_frozen_and_the_rest_learns():
    encoder = LocationEncoder()
    encoder(torch.tensor(random_points(4))).sum().backward()
    assert {name for name, p in encoder.named_parameters() if p.grad is None} == {
        f"LocEnc{i}.capsule.0.b" for i in range(3)
    }


def test_frequencies_have_their_scale():
    torch.manual_seed(0)
    assert FourierFeatures(16.0, 20000).b.std().item() == pytest.approx(16, rel=0.02)


def test_state_dict_is_the_published_one():
    expected = {
        f"LocEnc{i}.{key}"
        for i in range(3)
        for key in (
            "capsule.0.b",
            "head.0.weight",
            "head.0.bias",
            *(f"capsule.{j}.{kind}" for j in (1, 3, 5) for kind in ("weight", "bias")),
        )
    }
    assert set(LocationEncoder().state_dict()) == expected


@pytest.mark.parametrize("shape", [(2,), (3, 3), (1, 2, 2)])
def test_points_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="latitude and longitude"):
        LocationEncoder()(torch.zeros(shape))
