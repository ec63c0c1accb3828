"""Clouds, haze and exposure by pixels."""

import pytest
import torch

from augmentations.weather import HAZE_COLOUR, add_weather, cloud_opacity, expose, fractal, haze_opacity
from augmentations.year_wise import Augmentation

COUNT, SIZE = 200, 48


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def after_the_choice(seed=0):
    """The generator as it is once add_weather has drawn which images become photos."""
    state = generator(seed)
    photos = torch.randint(2, (COUNT, 1, 1, 1), generator=state).bool().expand(-1, 3, SIZE, SIZE)
    return photos, state


def test_fractal_fields_are_standardised_smooth_and_different():
    fields = fractal(COUNT, SIZE, generator())
    assert fields.shape == (COUNT, 1, SIZE, SIZE)
    assert torch.allclose(fields.mean((2, 3)), torch.zeros(COUNT, 1), atol=1e-4)
    assert torch.allclose(fields.std((2, 3)), torch.ones(COUNT, 1), atol=1e-4)
    steps = (fields[..., 1:] - fields[..., :-1]).abs().mean()
    assert steps < 0.6 < (fields[:-1] - fields[1:]).abs().mean()  # neighbours agree, images do not


def test_clouds_cover_their_share():
    opacity = cloud_opacity(0.6, COUNT, SIZE, generator())
    covered = (opacity > 0).float().mean((1, 2, 3))
    assert 0.5 < covered.max() <= 0.6 and 0 <= opacity.min() and opacity.max() < 1
    assert abs(covered.mean() - 0.2) < 0.05  # 0.6 u², u uniform


def test_haze_stays_below_its_limit_and_changes_along_one_direction():
    opacity = haze_opacity(0.5, COUNT, SIZE, generator())
    assert opacity.min() >= 0 and 0.4 < opacity.max() <= 0.5
    second = opacity[..., 2:] - 2 * opacity[..., 1:-1] + opacity[..., :-2]
    assert second.abs().max() < 1e-5  # a plane


def test_exposure_brings_dark_and_bright_images_together_in_order():
    dark, bright = torch.rand(2, 3, 16, 16, generator=generator()) * torch.tensor([0.2, 0.9])[:, None, None, None]
    images = torch.stack([dark, bright])
    full = expose(images, torch.ones(2, 1, 1, 1))
    means = full.mean((1, 2, 3))
    assert (means - 0.4).abs().max() < 0.06 and full.min() >= 0 and full.max() < 1
    none = expose(images, torch.zeros(2, 1, 1, 1))
    assert torch.allclose(none, 1 - torch.exp(-1.3 * images))
    assert torch.equal(full[0].flatten().argsort(), images[0].flatten().argsort())


@pytest.mark.parametrize("weather", [(0.6, 0, 0), (0, 0.5, 0), (0, 0, 1)])
def test_half_of_the_images_become_photos_pixel_by_pixel(weather):
    images = torch.rand(COUNT, 3, SIZE, SIZE, generator=generator(1))
    found = add_weather(images, *weather, generator())
    photos, state = after_the_choice()
    assert 0.4 < photos.float().mean() < 0.6 and torch.equal(found[~photos], images[~photos])
    if weather[0]:
        under = cloud_opacity(0.6, COUNT, SIZE, state)
        expected = images * (1 - under) + under  # towards white
    elif weather[1]:
        air = haze_opacity(0.5, COUNT, SIZE, state)
        expected = torch.stack([images[:, c] * (1 - air[:, 0]) + HAZE_COLOUR[c] * air[:, 0] for c in range(3)], 1)
    else:
        expected = expose(images, torch.rand(COUNT, 1, 1, 1, generator=state))
    assert torch.allclose(found[photos], expected[photos], atol=1e-6)


def test_no_weather_draws_nothing():
    images, state = torch.rand(2, 3, 8, 8), generator()
    assert torch.equal(add_weather(images, 0, 0, 0, state), images)
    assert torch.equal(state.get_state(), generator().get_state())


@pytest.mark.parametrize("weather", [{"clouds": 0.9}, {"haze": 0.9}, {"exposure": 0.9}])
def test_weather_is_of_each_image_though_the_draw_is_of_the_year(weather):
    grey = torch.full((8, 2, 3, 40, 40), 40, dtype=torch.uint8)
    plain = Augmentation(32, brightness=0.0, contrast=0.0, saturation=0.0)(grey, generator())
    assert plain.std() < 1e-4
    views = Augmentation(32, brightness=0.0, contrast=0.0, saturation=0.0, **weather)(grey, generator())
    assert 0 <= views.min() and views.max() <= 1
    assert len(set(views.mean((2, 3, 4)).flatten().tolist())) >= 5
