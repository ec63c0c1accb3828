"""Quadruplets from a folder."""

import numpy as np
import pytest
import torch

from datasets import index, listing
from datasets.names import YEARS, ImageName
from datasets.regions import RegionDataset, Regions, source_size


def test_regions_hold_every_year_in_order(world):
    regions, missing = Regions.read(world.path)
    assert len(regions) == 24 and missing == [] and regions.years == YEARS
    for paths, region_id, footprint in zip(regions.paths, regions.ids, regions.footprints):
        names = [ImageName.parse(path) for path in paths]
        assert [name.year for name in names] == list(YEARS) and {name.image_id for name in names} == {region_id}
        assert np.allclose(names[0].footprint, footprint)


def test_a_region_without_a_year_is_listed_and_left_out(own_world):
    own_world.image(own_world.regions[5], 2019).unlink()
    regions, missing = Regions.read(own_world.path)
    assert missing == ["{:02d}_{:04d}_{:04d}".format(*own_world.regions[5])]
    assert len(regions) == 23 and missing[0] not in regions.ids


def test_regions_agree_with_plain_loops_whatever_is_missing(own_world, monkeypatch):
    """Also from an index, and in whatever years."""
    rng = np.random.default_rng(0)
    for path in sorted((own_world.path / "database").rglob("*.jpg")):
        if rng.uniform() < 0.1:
            path.unlink()
    monkeypatch.setattr(index, "MIN_IMAGES", 1)
    monkeypatch.setattr(listing, "RACY_SECONDS", -1)
    for years in (YEARS, (2021,), (2020, 2018)):
        found = {}
        for path in sorted((own_world.path / "database").rglob("*.jpg")):
            name = ImageName.parse(path.name)
            found.setdefault(name.image_id, {})[name.year] = str(path.relative_to(own_world.path))
        whole = {
            key: tuple(paths[year] for year in years)
            for key, paths in sorted(found.items())
            if set(years) <= set(paths)
        }
        regions, missing = Regions.read(own_world.path, years)
        assert list(regions.ids) == list(whole) and list(regions.paths) == list(whole.values())
        assert missing == sorted(set(found) - set(whole)) and 0 < len(whole) <= 24
        assert [tuple(map(tuple, each)) for each in regions.footprints.tolist()] == [
            ImageName.parse(paths[0]).footprint for paths in whole.values()
        ]
        assert list(regions.views_of(years[-1]).paths) == [(paths[-1],) * len(years) for paths in whole.values()]
    assert (own_world.path / "index_database.parquet").is_file()


def test_no_whole_region_is_an_error(own_world):
    for region in own_world.regions:
        own_world.image(region, 2019).unlink()
    with pytest.raises(ValueError, match="24 regions, none with an image of every year"):
        Regions.read(own_world.path)


def test_the_data_set_loads_the_four_years(world):
    regions, _ = Regions.read(world.path)
    row, images = RegionDataset(regions, 16)[3]
    assert row == 3 and images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 4
    _, views = RegionDataset(regions.views_of(2021), 16)[3]
    assert all(torch.equal(view, images[3]) for view in views)


def test_images_are_loaded_at_a_power_of_two_that_leaves_room_for_the_crop():
    assert [source_size(size) for size in (96, 128, 160, 161, 320, 321, 640, 800, 1600)] == [
        256,
        256,
        256,
        512,
        512,
        1024,
        1024,
        1024,
        1600,
    ]
