"""The raster from tiles, against test_tiles' server, which serves the Blue Marble and misbehaves on purpose."""

from contextlib import closing

import numpy as np
import pytest
import rasterio
import test_tiles
from PIL import Image
from test_tiles import SIZE, cut

from datasets import grid
from datasets.build import __main__ as build
from datasets.build import earth_raster
from datasets.build.earth import open_raster
from datasets.build.tile_server import TileServer
from datasets.images import read_image

marble, server, short_waits = test_tiles.marble, test_tiles.server, test_tiles.short_waits  # fixtures
ZOOM = 6
BOX = (8, 10, 50, 160)  # two blocks of 16 × 16 tiles
FIRST = (16, 32)  # row and column of their first tile


def fetch(server, output, **options):
    settings = {"tile_size": SIZE, "rate": 5000, "timeout": 100, "retries": 1, **options}
    zoom = settings.pop("zoom", ZOOM)
    with closing(TileServer(server.url + "/2004/{z}/{y}/{x}.png", **settings)) as client:
        tiles = earth_raster.build_raster(output, client, zoom, BOX, quality=95)
    return client.requests, tiles


def test_the_raster_is_the_ground_block_by_block(server, marble, tmp_path):
    output = tmp_path / "new" / "earth.tif"
    assert fetch(server, output) == (512, 512) and set(server.requests.values()) == {1}
    with rasterio.open(output) as file:
        assert file.block_shapes[0] == (512, 512) and file.profile["compress"] == "jpeg" and file.crs.to_epsg() == 3857
        pixels = file.read().transpose(1, 2, 0).astype(float)
        west, north = file.transform * (0, 0)
    assert (west, north) == pytest.approx((0, 20037508.342789 / 2))  # the first tile's corner: 0 E, and 66.5 N
    assert pixels.shape == (512, 1024, 3)
    for row, col in ((0, 0), (3, 20), (15, 31)):
        here = pixels[row * SIZE : (row + 1) * SIZE, col * SIZE : (col + 1) * SIZE]
        assert np.abs(here - cut(marble, ZOOM, FIRST[0] + row, FIRST[1] + col)).mean() < 8  # JPEG, chroma halved
    assert [path.name for path in output.parent.iterdir()] == ["earth.tif"]
    assert fetch(server, output) == (0, 0)


def test_earth_is_built_from_it(server, marble, tmp_path):
    fetch(server, tmp_path / "earth.tif")
    assert open_raster(tmp_path / "earth.tif")[1] == SIZE * 2**ZOOM
    (tmp_path / "months").mkdir()
    for month in range(1, 13):
        Image.new("RGB", (64, 32), (90,) * 3).save(tmp_path / "months" / f"{month:02d}.jpg")
    sources = ["--raster", str(tmp_path / "earth.tif"), "--months", str(tmp_path / "months")]
    area = ["--zooms", str(ZOOM), "--bbox", "30", "70", "45", "90", "--num_workers", "0", "--no-land_only"]
    assert build.main(["earth", str(tmp_path / "out"), *sources, *area]) == 0
    region = (ZOOM, 24, 46)
    image = read_image(tmp_path / "out" / grid.image_path(*region, 2021)).permute(1, 2, 0).double().numpy()
    ground = np.block([[[cut(marble, ZOOM, 24 + i, 46 + j)] for j in range(4)] for i in range(4)])
    assert np.abs(image - ground).mean() < 10 < np.abs(np.roll(image, SIZE, axis=1) - ground).mean()


def test_a_second_run_fetches_only_what_is_missing(server, tmp_path):
    bad = (ZOOM, FIRST[0] + 2, FIRST[1] + 5)
    server.faults[bad] = ["always 404"]
    output = tmp_path / "earth.tif"
    with pytest.raises(ValueError, match="1 of 512 tiles could not be had .1 HTTP 404.*--blank_status"):
        fetch(server, output)
    assert not output.exists()
    server.requests.clear()
    assert fetch(server, output, blank_status=(404,)) == (1, 512)
    assert set(server.requests) == {(2004, *bad)}
    with rasterio.open(output) as file:
        assert file.read()[:, 2 * SIZE + 8 : 3 * SIZE - 8, 5 * SIZE + 8 : 6 * SIZE - 8].max() < 8  # black


def test_a_run_that_is_stopped_keeps_what_it_has(server, tmp_path, monkeypatch):
    replacing, stored = earth_raster.replacing, []

    def stopped(path, **options):
        if len(stored) == 200:
            raise KeyboardInterrupt
        stored.append(path)
        return replacing(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(earth_raster, "replacing", stopped)
        with pytest.raises(KeyboardInterrupt):
            fetch(server, tmp_path / "earth.tif")
    assert fetch(server, tmp_path / "earth.tif") == (512 - 200, 512)
    # Written only after the last block: a kill meanwhile leaves no half raster.
    read_block, left = earth_raster.read_block, [1]

    def killed(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return read_block(*arguments)

    monkeypatch.setattr(earth_raster, "read_block", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path / "other.tif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earth.tif", "other.tif.tiles"]


def test_tiles_of_something_else_are_not_mixed_in(server, tmp_path):
    server.faults[(ZOOM, *FIRST)] = ["always 404"]
    with pytest.raises(ValueError, match="could not be had"):
        fetch(server, tmp_path / "earth.tif")
    with pytest.raises(ValueError, match="earth.tif.tiles.*other parameters.*zoom: 6 there, 7 now"):
        fetch(server, tmp_path / "earth.tif", zoom=7)


def test_the_whole_earth_has_the_rows_that_regions_need():
    top, left, bottom, right = earth_raster.tile_range(earth_raster.WHOLE_EARTH, 8, 2)
    assert (left, right) == (0, 256) and (top, bottom) == (70, 186)
    regions = grid.land_regions([8, 9])
    tile = 2.0 ** (8 - regions[:, 0])
    assert (regions[:, 1] * tile >= top).all() and ((regions[:, 1] + 4) * tile <= bottom).all()


def test_flags_that_make_no_raster_are_named(tmp_path, capsys):
    for flags, said in (
        (["--url", "http://host/{z}/{x}"], "{y} is missing"),
        (["--bbox", "0", "170", "10", "-170"], "antimeridian"),
        (["--tile_size", "100"], "--tile_size 100"),
        (["--zoom", "0"], "--zoom 0"),
        (["--rate", "0"], "--rate: 0"),
    ):
        assert build.main(["earth_raster", str(tmp_path / "a.tif"), *flags]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
