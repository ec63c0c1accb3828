"""retrieval/ground.py: pixels around a place, from a database's images or from a raster."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import grid
from retrieval.ground import AROUND, DatabaseGround, RasterGround, cover
from utils import geo

ZOOM = 7


def truth(x, y, period=AROUND / 2**ZOOM * 4):
    """Metres, broadcast -> (..., 3) float: three smooth colours of the place, the same a turn around the Earth away."""
    x, y = np.broadcast_arrays((np.asarray(x) + AROUND / 2) % AROUND, y)
    phases = (x / period, y / period, (x + y) / period)
    return np.stack([127 + 100 * np.sin(2 * np.pi * each) for each in phases], axis=-1)


def pixel_centres(box, size):
    west, south, east, north = box
    steps = (np.arange(size) + 0.5) / size
    return np.meshgrid(west + steps * (east - west), north - steps * (north - south))


def box_of(zoom, row, col, tiles=grid.TILES):
    tile = AROUND / 2**zoom
    west, north = col * tile - AROUND / 2, AROUND / 2 - row * tile
    return (west, north - tiles * tile, west + tiles * tile, north)


def write(folder, regions, size=256, change=lambda picture, region: picture):
    """Images of the regions -> their DatabaseGround."""
    paths = []
    for region in regions:
        picture = truth(*pixel_centres(box_of(*region), size))
        paths.append(f"{'_'.join(map(str, region))}.png")
        Image.fromarray(change(picture, region).round().astype(np.uint8)).save(folder / paths[-1])
    return DatabaseGround(folder, paths, grid.footprints(regions))


def difference(picture, box):
    """Mean and largest difference of a ground's picture to the truth."""
    off = np.abs(picture.permute(1, 2, 0).numpy() - truth(*pixel_centres(box, picture.shape[1])))
    return off.mean(), off.max()


def test_an_images_own_box_is_the_image(tmp_path):
    regions = [(ZOOM, 40, 60), (ZOOM, 40, 62), (ZOOM, 42, 60), (ZOOM - 1, 20, 30), (ZOOM + 1, 82, 122)]
    ground = write(tmp_path, regions, change=lambda picture, region: picture * 0 + 10 * sum(region) % 251)
    for region in regions:
        picture = ground(box_of(*region), 256)
        assert picture.dtype == torch.uint8 and picture.shape == (3, 256, 256)
        assert set(picture.unique().tolist()) == {10 * sum(region) % 251}


def test_neighbours_fill_in_each_in_its_place(tmp_path):
    ground = write(tmp_path, [(ZOOM, row, col) for row in (40, 44) for col in (60, 64)])
    box = box_of(ZOOM, 42, 61)  # across all four
    mean, most = difference(ground(box, 200), box)
    assert mean < 1 and most < 4
    tile = AROUND / 2**ZOOM
    beyond = (box[0] - 4 * tile, box[1] - 4 * tile, box[2], box[3])  # half of it unknown
    picture = ground(beyond, 240).numpy()
    x, y = pixel_centres(beyond, 240)
    left, bottom, _, _ = box_of(ZOOM, 44, 60)
    known = (x > left) & (y > bottom)
    assert (picture[:, ~known] == 0).all() and 0.2 < known.mean() < 0.8
    expected = truth(x, y).transpose(2, 0, 1)
    # Away from the rim, where a pixel is half known.
    inner = (x > left + tile / 10) & (y > bottom + tile / 10)
    assert np.abs(picture - expected)[:, inner].max() < 4
    assert ground(box_of(ZOOM, 10, 10), 64) is None


def test_the_antimeridian_is_no_edge(tmp_path):
    last = 2**ZOOM - 4
    ground = write(tmp_path, [(ZOOM, 40, last), (ZOOM, 40, 0)])
    tile = AROUND / 2**ZOOM
    box = box_of(ZOOM, 40, last + 2)  # half beyond the map's edge
    for turn in (0, -AROUND):
        moved = (box[0] + turn, box[1], box[2] + turn, box[3])
        assert difference(ground(moved, 128), box)[1] < 4
    assert box[2] - AROUND / 2 == pytest.approx(2 * tile)


def test_a_footprint_over_the_antimeridian_is_one_image(tmp_path):
    region = (ZOOM, 40, 2**ZOOM - 2)
    Image.fromarray(truth(*pixel_centres(box_of(*region), 256)).round().astype(np.uint8)).save(tmp_path / "a.png")
    footprint = grid.footprints([region])
    footprint[..., 1] = geo.wrap_longitude(footprint[..., 1])
    ground = DatabaseGround(tmp_path, ["a.png"], footprint)
    box = box_of(*region)
    assert difference(ground(box, 128), box)[1] < 4
    assert difference(ground((box[0] - AROUND, box[1], box[2] - AROUND, box[3]), 128), box)[1] < 4


def test_images_as_wide_as_the_box_come_first_and_finer_before_coarser():
    box = np.array([0.0, 0, 4, 4])
    coarse, fine, finer, own = [-2, -2, 6, 6], [0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 4, 4]
    assert cover(box, np.array([coarse, fine, own], dtype=float)) == [2]
    assert cover(box, np.array([coarse, fine], dtype=float))[0] == 0  # a quarter in fine pixels is less than all
    half = [[0, 0, 2, 2], [2, 0, 4, 2], [0, 2, 2, 4], [2, 2, 4, 4]]
    assert sorted(cover(box, np.array([*half, finer], dtype=float))) == [0, 1, 2, 3]
    assert cover(box, np.array([[8, 8, 9, 9]], dtype=float)) == []


def test_an_unreadable_image_is_left_to_its_neighbours(tmp_path):
    regions = [(ZOOM, 40, 60), (ZOOM - 1, 19, 29)]
    ground = write(tmp_path, regions)
    (tmp_path / ground.paths[0]).write_bytes(b"no picture")
    box = box_of(*regions[0])
    assert ground(box, 64) is None or difference(ground(box, 64), box)[0] < 3
    (tmp_path / ground.paths[1]).unlink()
    assert DatabaseGround(tmp_path, ground.paths, grid.footprints(regions))(box, 64) is None


@pytest.fixture(scope="module")
def raster(tmp_path_factory):
    import rasterio
    from rasterio.transform import from_origin

    path, side = tmp_path_factory.mktemp("raster") / "earth.tif", 2048
    pixel = AROUND / side
    x, y = pixel_centres((-AROUND / 2, -AROUND / 2, AROUND / 2, AROUND / 2), side)
    pixels = truth(x, y, AROUND / 16).round().astype(np.uint8)[256:-256].transpose(2, 0, 1)
    place = {"crs": "EPSG:3857", "transform": from_origin(-AROUND / 2, AROUND / 2 - 256 * pixel, pixel, pixel)}
    shape = {"width": side, "height": side - 512, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place) as file:
        file.write(pixels)
    return path


@pytest.mark.parametrize("width", [0.01, 0.1, 0.37])
@pytest.mark.parametrize("middle", [(0.1, 0.02), (0.5, 0.03), (-0.5, -0.01)])
def test_a_raster_shows_the_box_also_over_the_antimeridian(raster, width, middle):
    (x, y), half = np.array(middle) * AROUND, width * AROUND / 2
    box = (x - half, y - half, x + half, y + half)
    picture = RasterGround(raster)(box, 160).permute(1, 2, 0).numpy()
    assert np.abs(picture - truth(*pixel_centres(box, 160), AROUND / 16)).mean() < 3


def test_beyond_a_raster_it_is_black(raster):
    ground = RasterGround(raster)
    top = AROUND / 2 - 256 * AROUND / 2048
    picture = ground((0, top - 1e6, 2e6, top + 1e6), 100)
    assert (picture[:, :48] == 0).all() and (picture[:, 52:] > 0).any(dim=0).all()
    assert ground((0, top + 1e6, 1e6, top + 2e6), 32) is None
    with pytest.raises(FileNotFoundError, match="no such file"):
        RasterGround(raster.with_name("none.tif"))
