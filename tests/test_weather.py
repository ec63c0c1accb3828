"""Clouds and haze by pixels."""

import pytest
import torch

from augmentations.weather import HAZE_COLOUR, add_weather, cloud_opacity, fractal, haze_opacity
from augmentations.year_wise import Augmentation

COUNT, SIZE = 200, 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_fractal_fields_are_standardised_smooth_and_different():
    fields = fractal(COUNT, SIZE, generator())
    assert fields.shape == (COUNT, 1, SIZE, SIZE)
    assert torch.allclose(fields.mean((2, 3)), torch.zeros(COUNT, 1), atol=1e-4)
    assert torch.allclose(fields.std((2, 3)), torch.ones(COUNT, 1), atol=1e-4)
    steps = (fields[..., 1:] - fields[..., :-1]).abs().mean()
    assert steps < 0.4 < (fields[:-1] - fields[1:]).abs().mean()  # neighbours agree, images do not


def test_clouds_cover_their_share_of_half_of_the_images():
    covered = (cloud_opacity(0.6, COUNT, SIZE, generator()) > 0).float().mean((1, 2, 3))
    assert covered.max() <= 0.6 and covered.max() > 0.5
    assert 0.4 < (covered > 0.002).float().mean() < 0.6
    assert abs(covered[covered > 0.002].mean() - 0.3) < 0.05  # uniform up to 0.6


def test_haze_stays_below_its_limit_and_changes_along_one_direction():
    opacity = haze_opacity(0.5, COUNT, SIZE, generator())
    assert opacity.min() == 0 and 0.4 < opacity.max() <= 0.5
    assert 0.4 < (opacity.amax((1, 2, 3)) > 0).float().mean() < 0.6
    second = opacity[..., 2:] - 2 * opacity[..., 1:-1] + opacity[..., :-2]
    assert second.abs().max() < 1e-5  # a plane


def test_each_pixel_is_a_mix_of_ground_haze_and_white():
    images = torch.rand(COUNT, 3, SIZE, SIZE, generator=generator(1))
    hazy = add_weather(images, 0, 0.5, generator())
    opacity = haze_opacity(0.5, COUNT, SIZE, generator())
    expected = torch.stack([images[:, c] * (1 - opacity[:, 0]) + HAZE_COLOUR[c] * opacity[:, 0] for c in range(3)], 1)
    assert torch.allclose(hazy, expected, atol=1e-6)
    cloudy = add_weather(images, 0.6, 0, generator())
    under = cloud_opacity(0.6, COUNT, SIZE, generator())
    clear = (under == 0).expand(-1, 3, -1, -1)
    assert torch.equal(cloudy[clear], images[clear])
    brightness = ((cloudy - images * (1 - under)) / under.clamp(min=1e-9))[(under > 0.2).expand(-1, 3, -1, -1)]
    assert 0.74 < brightness.min() and brightness.max() < 1.01


def test_no_weather_draws_nothing():
    images, state = torch.rand(2, 3, 8, 8), generator()
    assert torch.equal(add_weather(images, 0, 0, state), images)
    assert torch.equal(state.get_state(), generator().get_state())


@pytest.mark.parametrize("weather", [{"clouds": 0.9}, {"haze": 0.9}])
def test_weather_is_of_each_image_though_the_draw_is_of_the_year(weather):
    grey = torch.full((8, 2, 3, 40, 40), 80, dtype=torch.uint8)
    plain = Augmentation(32, brightness=0.0, contrast=0.0, saturation=0.0)(grey, generator())
    assert plain.std() < 1e-4
    views = Augmentation(32, brightness=0.0, contrast=0.0, saturation=0.0, **weather)(grey, generator())
    assert 0 <= views.min() and views.max() <= 1
    assert len(set(views.mean((2, 3, 4)).flatten().tolist())) >= 5
