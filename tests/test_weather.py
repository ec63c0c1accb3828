"""Clouds, haze and exposure by pixels."""

import pytest
import torch
from torch.nn import functional as F

from augmentations.weather import (
    CELLS,
    HAZE_COLOUR,
    NOISE,
    add_weather,
    cloud_opacity,
    draw_weather,
    expose,
    fractal,
    haze_opacity,
    noise_of,
)
from augmentations.year_wise import Augmentation

COUNT, SIZE = 200, 48


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(values, seed=0):
    return torch.rand(COUNT, values, generator=generator(seed))


def noise(seed=1):
    return torch.randn(COUNT, NOISE, generator=generator(seed))


def test_fractal_fields_are_standardised_smooth_and_different():
    roughness = 0.5 + 0.4 * uniform(1)[..., None, None]
    fields = fractal(roughness, noise(), SIZE)
    assert fields.shape == (COUNT, 1, SIZE, SIZE)
    assert torch.allclose(fields.mean((2, 3)), torch.zeros(COUNT, 1), atol=1e-4)
    assert torch.allclose(fields.std((2, 3)), torch.ones(COUNT, 1), atol=1e-4)
    steps = (fields[..., 1:] - fields[..., :-1]).abs().mean()
    assert steps < 0.6 < (fields[:-1] - fields[1:]).abs().mean()  # neighbours agree, images do not


def test_a_field_is_the_sum_of_its_octaves():
    roughness, values = torch.full((1, 1, 1, 1), 0.6), noise()[:1]
    expected, start = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64), 0
    for octave, cells in enumerate(CELLS):
        grid = values[:, start : start + (cells + 1) ** 2].double().view(1, 1, cells + 1, cells + 1)
        start += (cells + 1) ** 2
        expected += 0.6**octave * F.interpolate(grid, (SIZE, SIZE), mode="bicubic", align_corners=True)
    expected = (expected - expected.mean()) / expected.std()
    assert start == NOISE and (fractal(roughness, values, SIZE) - expected).abs().max() < 1e-4
    assert fractal(roughness, values, 8).shape == (1, 1, 8, 8)  # finer noise than pixels is left out


def test_clouds_cover_their_share():
    opacity = cloud_opacity(0.6, uniform(4), noise(), SIZE)
    covered = (opacity > 0).float().mean((1, 2, 3))
    assert 0.5 < covered.max() <= 0.6 and 0 <= opacity.min() and opacity.max() < 1
    assert abs(covered.mean() - 0.2) < 0.05  # 0.6 u², u uniform


def test_haze_stays_below_its_limit_and_changes_along_one_direction():
    opacity = haze_opacity(0.5, uniform(3), SIZE)
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
    rows, values, seed = draw_weather(COUNT, slice(0, COUNT), generator())
    found = add_weather(images.clone(), rows, values, noise_of(rows, COUNT, seed), *weather)
    clear = [row for row in range(COUNT) if row not in rows.tolist()]
    assert 0.4 < len(rows) / COUNT < 0.6 and torch.equal(found[clear], images[clear])
    photos = images[rows]
    if weather[0]:
        under = cloud_opacity(0.6, values[:, 3:7], torch.randn(COUNT, NOISE, generator=generator(seed))[rows], SIZE)
        expected = photos * (1 - under) + under  # towards white
    elif weather[1]:
        air = haze_opacity(0.5, values[:, :3], SIZE)
        expected = torch.stack([photos[:, c] * (1 - air[:, 0]) + HAZE_COLOUR[c] * air[:, 0] for c in range(3)], 1)
    else:
        expected = expose(photos, values[:, 7:, None, None])
    assert torch.allclose(found[rows], expected, atol=1e-6)


def test_weather_of_a_part_is_that_of_the_whole():
    rows, values, seed = draw_weather(COUNT, slice(0, COUNT), generator())
    some, own, same = draw_weather(COUNT, slice(40, 90), generator())
    inside = (rows >= 40) & (rows < 90)
    assert torch.equal(some, rows[inside]) and torch.equal(own, values[inside]) and seed == same
    assert torch.equal(noise_of(some, COUNT, seed), noise_of(rows, COUNT, seed)[inside])
    assert len(set(values.flatten().tolist())) > 0.99 * values.numel()  # each image's own


def test_no_weather_draws_nothing():
    images = torch.randint(0, 256, (2, 1, 3, 8, 8), dtype=torch.uint8, generator=generator())
    plain, state = Augmentation(8), generator()
    plain(images, state)
    expected = generator()
    plain.draw(1, expected)
    assert torch.equal(state.get_state(), expected.get_state())


@pytest.mark.parametrize("weather", [{"clouds": 0.9}, {"haze": 0.9}, {"exposure": 0.9}])
def test_weather_is_of_each_image_though_the_draw_is_of_the_year(weather):
    grey = torch.full((8, 2, 3, 40, 40), 40, dtype=torch.uint8)
    plain = Augmentation(32, brightness=0.0, contrast=0.0, saturation=0.0)(grey, generator())
    assert plain.std() < 1e-4
    views = Augmentation(32, brightness=0.0, contrast=0.0, saturation=0.0, **weather)(grey, generator())
    assert 0 <= views.min() and views.max() <= 1
    assert len(set(views.mean((2, 3, 4)).flatten().tolist())) >= 5
