"""The Earth at true scale, from a small raster and small months."""

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from datasets import grid
from datasets.build import __main__ as build
from datasets.build.earth import MONTHS, month_ratios, open_raster, sample_ratio, windows
from datasets.images import read_image
from datasets.names import YEARS
from utils.geo import MERCATOR_HALF

AROUND = 2048  # pixels around the Earth: 64 for a region at zoom 7


@pytest.fixture
def sources(tmp_path):
    """A raster of smooth colours, and months of which November is half as bright as August."""
    x, y = np.meshgrid(np.linspace(0, 20 * np.pi, AROUND), np.linspace(0, 20 * np.pi, AROUND))
    pixels = np.stack([120 + 60 * np.sin(x), 120 + 60 * np.cos(y), 120 + 60 * np.sin(x + y)]).astype(np.uint8)
    side = 2 * MERCATOR_HALF / AROUND
    place = {"crs": "EPSG:3857", "transform": from_origin(-MERCATOR_HALF, MERCATOR_HALF, side, side)}
    shape = {"width": AROUND, "height": AROUND, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(tmp_path / "august.tif", "w", driver="GTiff", **shape, **place) as file:
        file.write(pixels)
    (tmp_path / "months").mkdir()
    for month in range(1, 13):
        level = 92 if month == 8 else 42 if month == 11 else 60 + month
        Image.new("RGB", (128, 64), (level,) * 3).save(tmp_path / "months" / f"{month:02d}.jpg", quality=100)
    return tmp_path, pixels


def command(folder, *more):
    where = ["--raster", str(folder / "august.tif"), "--months", str(folder / "months")]
    return build.main(["earth", str(folder / "out"), *where, "--num_workers", "1", *more])


def test_regions_are_crops_and_other_years_other_months(sources, capsys):
    folder, pixels = sources
    area = ["--zooms", "7", "--bbox", "40", "0", "50", "20", "--quality", "98"]
    assert command(folder, *area) == 0
    made = sorted((folder / "out" / "database").rglob("*.jpg"))
    assert len(made) % len(YEARS) == 0 and len(made) >= 4 * len(YEARS)
    row, col = next((row, col) for row in range(44, 46, 2) for col in range(64, 70, 2))
    top, left = row * AROUND // 2**7, col * AROUND // 2**7
    crop = pixels[:, top : top + 64, left : left + 64].astype(float)
    images = {year: read_image(folder / "out" / grid.image_path(7, row, col, year)).numpy() for year in YEARS}
    assert np.abs(images[YEARS[MONTHS.index(8)]] - crop).mean() < 3
    dark = images[YEARS[MONTHS.index(11)]]  # (42 + 8) / (92 + 8): the smoothed months' ratio, away from black
    assert np.abs(dark - crop / 2).mean() < 3
    capsys.readouterr()
    made[0].unlink()
    assert command(folder, *area) == 0 and "1 images made now" in capsys.readouterr().out
    assert command(folder, *area, "--seed", "1") == 2 and "other parameters" in capsys.readouterr().err


def test_a_ratio_is_read_at_the_pixels_of_a_region(sources):
    ratio = np.tile(np.linspace(1, 2, 64, dtype=np.float16)[:, None, None], (1, 128, 3))
    sampled = sample_ratio(ratio, (7, 44, 64), 8)
    lat = grid.tile_latitude(7, 44 + (np.arange(8) + 0.5) / 2)
    expected = np.interp((90 - lat) / 180 * 64 - 0.5, np.arange(64), ratio[:, 0, 0].astype(float))
    assert np.abs(sampled - expected[:, None, None]).max() < 2e-3
    assert not dict(month_ratios(sources[0] / "months", [8]))


def test_what_cannot_be_built_is_named(sources, capsys):
    folder, _ = sources
    raster = open_raster(folder / "august.tif")
    assert raster.around == AROUND and windows(raster, [(7, 44, 64)]).tolist() == [[1024, 704, 64]]
    with pytest.raises(ValueError, match="zooms up to 8 can be built"):
        windows(raster, [(9, 200, 200)])
    assert command(folder, "--image_size", "8") == 2 and "--image_size: 8" in capsys.readouterr().err
    (folder / "august.tif").write_bytes(b"no raster")
    assert command(folder, "--zooms", "7") == 2 and "cannot be read as a raster" in capsys.readouterr().err
