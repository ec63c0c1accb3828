"""Regions from raster files whose pixels say where they are: in two projections, over seams, with holes, 16 bits."""

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_bounds
from rasterio.warp import transform

from datasets import grid
from datasets.build import __main__ as build
from datasets.build.rasters import Raster, build_rasters
from datasets.names import Catalogue

SIZE = 32


def place_of_pixels(region, size=SIZE):
    """-> latitude (size, 1) and longitude (1, size) of an image's pixels, by the inverse Gudermannian."""
    zoom, row, col = region
    y, x = ((start + (np.arange(size) + 0.5) / size * 4) / 2**zoom for start in (row, col))
    latitude = np.degrees(2 * np.arctan(np.exp(np.pi * (1 - 2 * y))) - np.pi / 2)
    return latitude[:, None], (x * 360 - 180)[None]


def colours(latitude, longitude):
    """Smooth everywhere, also at the antimeridian -> float (3, …) from 20 to 230."""
    lat, lon = np.radians(np.broadcast_arrays(latitude, longitude))
    return 125 + 105 * np.stack([np.sin(4 * lat), np.sin(8 * lon), np.cos(6 * lon) * np.cos(3 * lat)])


def write(path, pixels, crs="EPSG:4326", transform=None, **profile):
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(pixels),
        height=pixels.shape[1],
        width=pixels.shape[2],
        dtype=pixels.dtype,
        crs=crs,
        transform=transform,
        **profile,
    ) as file:
        file.write(pixels)
    return path


def degrees_file(path, west, south, east, north, step=0.1, **profile):
    lat = np.arange(north - step / 2, south, -step)
    lon = np.arange(west + step / 2, east, step)
    pixels = np.round(colours(lat[:, None], lon[None])).astype(np.uint8)
    return write(path, pixels, transform=from_bounds(west, south, east, north, len(lon), len(lat)), **profile)


def assert_shows_its_place(raster, region, tolerance=2.5):
    pixels, share = raster.read(region, SIZE)
    assert share == 1 and pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    expected = colours(*place_of_pixels(region)).transpose(1, 2, 0)
    assert np.abs(pixels - expected).max() < tolerance


REGION = (7, 40, 68)  # around 54 N 17 E


def test_pixels_lie_where_the_region_says(tmp_path):
    assert_shows_its_place(Raster(degrees_file(tmp_path / "a.tif", 0, 40, 40, 65)), REGION)


def test_another_projection_is_warped(tmp_path):
    """UTM zone 33, whose north is not up away from 15 E."""
    x, y = np.arange(-500_000, 1_500_000, 5000) + 2500.0, np.arange(6_900_000, 4_900_000, -5000) - 2500.0
    xs, ys = np.meshgrid(x, y)
    lon, lat = transform("EPSG:32633", "EPSG:4326", xs.ravel(), ys.ravel())
    pixels = np.round(colours(np.reshape(lat, xs.shape), np.reshape(lon, xs.shape))).astype(np.uint8)
    file = write(
        tmp_path / "utm.tif", pixels, "EPSG:32633", from_bounds(-500_000, 4_900_000, 1_500_000, 6_900_000, 400, 400)
    )
    assert_shows_its_place(Raster(file), REGION)


@pytest.mark.parametrize("region", [(4, 6, 6), (4, 6, 0), (4, 6, 12), (4, 6, 8)])
def test_longitudes_from_0_to_360_show_all_of_the_earth(tmp_path, region):
    """The first region lies over the file's seam at Greenwich, the next two left and right of the antimeridian."""
    raster = Raster(degrees_file(tmp_path / "a.tif", 0, -80, 360, 80, step=0.5))
    pixels, share = raster.read(region, SIZE)
    expected = colours(*place_of_pixels(region)).transpose(1, 2, 0)
    error = np.abs(pixels - expected).max(axis=(0, 2))
    beside = np.abs(place_of_pixels(region)[1][0]) < 5  # at the seam, pixels are interpolated from one side only
    assert share == 1 and error[~beside].max() < 4 and error[beside].max(initial=0) < 40


def test_equirectangular_picture_without_a_place(tmp_path):
    lat, lon = 90 - (np.arange(360) + 0.5) / 2, (np.arange(720) + 0.5) / 2 - 180
    pixels = np.round(colours(lat[:, None], lon[None])).astype(np.uint8)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "e.png")
    for region in ((4, 6, 0), (4, 4, 6), (4, 6, 12)):
        assert_shows_its_place(Raster(tmp_path / "e.png"), region, tolerance=4)


def test_finer_pixels_are_averaged(tmp_path):
    stripes = np.zeros((3, 2500, 4000), np.uint8)
    stripes[:, :, ::2] = 200
    raster = Raster(write(tmp_path / "a.tif", stripes, transform=from_bounds(0, 40, 40, 65, 4000, 2500)))
    pixels, _ = raster.read(REGION, SIZE)
    assert np.abs(pixels.astype(float) - 100).max() < 8


def test_sixteen_bits_one_band_and_an_alpha_band(tmp_path):
    shape, box = (1, 250, 400), from_bounds(0, 40, 40, 65, 400, 250)
    deep = write(tmp_path / "deep.tif", np.full(shape, 1500, np.uint16), transform=box)
    with pytest.raises(ValueError, match="deep.tif: holds uint16.*--scale"):
        Raster(deep)
    pixels, share = Raster(deep, scale=(500, 2500)).read(REGION, SIZE)
    assert share == 1 and set(pixels.ravel().tolist()) <= {127, 128} and pixels.shape == (SIZE, SIZE, 3)
    four = np.full((4, 250, 400), 90, np.uint8)
    four[3] = 255
    four[3, :, :170] = 0  # transparent west of 17 E
    pixels, share = Raster(write(tmp_path / "alpha.tif", four, transform=box, photometric="RGB", alpha="yes")).read(
        REGION, SIZE
    )
    _, lon = place_of_pixels(REGION)
    assert share == pytest.approx((lon > 17).mean(), abs=1.01 / SIZE)
    assert set(pixels[:, lon[0] > 17.5].ravel().tolist()) == {90} and not pixels[:, lon[0] < 16.5].any()


def test_holes_and_the_outside_are_left_out_and_counted(tmp_path):
    pixels = np.full((3, 300, 300), 77, np.uint8)
    pixels[:, :, 200:] = 0  # no data east of 20 E
    file = write(tmp_path / "a.tif", pixels, transform=from_bounds(0, 30, 30, 60, 300, 300), nodata=0)
    regions = grid.all_regions([7])
    counts = build_rasters(tmp_path / "out", {2021: Raster(file)}, regions, SIZE, min_coverage=0.9)
    corners = grid.footprints(regions)
    whole = (corners[:, 0] >= (30, 0)).all(axis=1) & (corners[:, 2] <= (60, 20)).all(axis=1)
    apart = (corners[:, 2] <= (30, 0)).any(axis=1) | (corners[:, 0] >= (60, 30)).any(axis=1)
    assert counts["outside"] == apart.sum() and counts["made"] + counts["empty"] == (~apart).sum()
    found = set(Catalogue.read(tmp_path / "out", "database").ids)
    assert whole.sum() > 3 and len(found) == counts["made"]
    assert {"{:02d}_{:04d}_{:04d}".format(*region) for region in regions[whole]} <= found
    again = build_rasters(tmp_path / "out", {2021: Raster(file)}, regions, SIZE, min_coverage=0.9)
    assert again == {"there": counts["made"], "empty": counts["empty"], "outside": counts["outside"]}
    with Image.open(next((tmp_path / "out").rglob("*.jpg"))) as image:
        assert image.size == (SIZE, SIZE)


def test_the_command_and_its_errors(tmp_path, capsys):
    file = degrees_file(tmp_path / "a.tif", 0, 40, 40, 65)
    base = ["--zooms", "7", "--bbox", "50", "10", "56", "20", "--no-land_only", "--image_size", "16"]
    assert build.main(["raster", str(tmp_path / "out"), "--rasters", f"2020={file}", f"2021={file}", *base]) == 0
    years = Catalogue.read(tmp_path / "out", "database").years.tolist()
    assert years.count(2020) == years.count(2021) == len(years) / 2 > 0
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no raster")
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.png")
    for flags, message in (
        ([f"2021={tmp_path / 'none.tif'}"], "none.tif: no such raster"),
        ([f"2021={tmp_path / 'broken.tif'}"], "broken.tif: cannot be read"),
        ([f"2021={tmp_path / 'photo.png'}"], "photo.png: nothing in the file says where"),
        ([f"2021={file}", f"2021={file}"], "2021 is there twice"),
        ([f"2021={file}", "--bands", "1", "2", "9"], "--bands [1, 2, 9]"),
        ([f"2021={file}", "--scale", "5", "5"], "LOW must be less"),
        ([f"2021={file}", "--bbox", "-40", "10", "-30", "20"], "none of"),
        ([f"2021={file}", "--min_coverage", "3"], "--min_coverage: 3"),
    ):
        assert build.main(["raster", str(tmp_path / "no"), *base, "--rasters", *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
