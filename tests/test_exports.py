"""What GIS people open, each file opened again by a reader that knows nothing of us."""

import base64
import io
import json
import os
import re
import zipfile
from datetime import UTC, datetime
from types import SimpleNamespace
from xml.etree import ElementTree as xml

import numpy as np
import pyarrow.parquet as pq
import pystac
import pytest
import rasterio
import shapely
from PIL import Image
from shapely.geometry import Polygon, shape

from retrieval.exports import EXPORTS, cog, export_photo, geojson, geoparquet, geotiff, kmz, report, stac
from retrieval.exports.matches import Matches, matches_of
from retrieval.exports.warp import native_grid, warp
from utils import geo
from utils.geo import to_mercator

# Bottom left, top left, top right, bottom right of a photo whose up is about east; perspective included.
CORNERS = np.array([(45.4, 7.0), (45.5, 8.2), (44.7, 8.6), (44.9, 7.1)])
OVER = np.array([(-17.0, 178.5), (-15.5, 179.0), (-15.4, -178.6), (-16.9, -179.0)])
NAMES = {"kml": "http://www.opengis.net/kml/2.2", "gx": "http://www.google.com/kml/ext/2.2"}


def places_of(footprints, image="photos/a&b.jpg"):
    return [
        {
            "image": image,
            "rank": k + 1,
            "score": 0.75 - k / 8,
            "inliers": 120 if k == 0 else None,
            "probability": 0.998 if k == 0 else None,
            "verified": k == 0,
            "latitude": float(geo.centers(each)[0]),
            "longitude": float(geo.centers(each)[1]),
            "rotation": 90,
            "database_image": f"database/{k}.jpg",
            "note": "<b>ridge</b> & lake",
        }
        for k, each in enumerate(footprints)
    ]


def picture(width=48, height=32):
    """Smooth, so that interpolation is nearly exact, and different in every corner -> uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width] + 0.5
    waves = 120 + 60 * np.sin(x / 9) + 60 * np.cos(y / 7)
    return np.stack([x / width * 255, y / height * 255, waves], axis=-1).round().astype(np.uint8)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photos" / "a&b.jpg"
    path.parent.mkdir()
    Image.fromarray(picture()).save(path, quality=98, subsampling=0)
    return path


@pytest.fixture
def turned_photo(tmp_path):
    """Stored a quarter off: a viewer shows it as picture()."""
    path, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter clockwise
    Image.fromarray(np.rot90(picture())).save(path, exif=exif)
    return path


def loop_ground(footprint, u, v):
    """A place in the photo, shares of its width and height from the upper left -> x, y in Web Mercator, as a weighted
    mean of the corners: on a projective plane, their weights are those that make their diagonals meet (by areas)."""
    bl, tl, tr, br = to_mercator(geo.unwrap_footprints(footprint))

    def det(a, b, c):
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    # tl·a - tr·b + br·c - bl·d = 0 in homogeneous coordinates, by Cramer's rule.
    a, b, c, d = det(tr, br, bl), det(tl, br, bl), det(tl, tr, bl), det(tl, tr, br)
    weights = (a * (1 - u) * (1 - v), b * u * (1 - v), c * u * v, d * (1 - u) * v)
    total = sum(weights)
    return [sum(w * corner[axis] for w, corner in zip(weights, (tl, tr, br, bl))) / total for axis in (0, 1)]


@pytest.mark.parametrize("footprint", [CORNERS, OVER])
def test_warped_pixels_land_where_a_plain_loop_puts_them(footprint):
    image = picture(240, 160)
    box, columns, rows = native_grid(footprint, 240, 160)
    west, south, east, north = box
    assert (east - west) / columns == pytest.approx((north - south) / rows)
    laid = warp(image, footprint, box, columns, rows)
    assert laid.shape == (rows, columns, 4)
    pixel, worst = (east - west) / columns, 0
    for row in range(3, 160 - 3, 7):
        for col in range(3, 240 - 3, 7):
            x, y = loop_ground(footprint, (col + 0.5) / 240, (row + 0.5) / 160)
            i, j = int((north - y) / pixel), int((x - west) / pixel)
            assert laid[i, j, 3] == 255
            worst = max(worst, np.abs(laid[i, j, :3].astype(int) - image[row, col]).max())
    assert worst <= 10  # half a map's pixel beside it; colours differ by up to 7 from one pixel to the next
    outline = Polygon(to_mercator(geo.unwrap_footprints(footprint))).buffer(pixel)
    outside = 0
    for i in range(0, rows, 3):  # nothing of it lies outside of the outline
        for j in range(0, columns, 3):
            if not outline.contains(shapely.Point(west + (j + 0.5) * pixel, north - (i + 0.5) * pixel)):
                assert (laid[i, j] == 0).all()
                outside += 1
    assert outside > 1000
    # As many pixels in the photo as on the map.
    assert (laid[..., 3] > 0).sum() == pytest.approx(240 * 160, rel=0.03)


def test_a_warp_is_right_to_a_fraction_of_a_pixel():
    """The first two bands of the picture are its own coordinates: read off, they say where a pixel comes from."""
    image = picture(51, 51)  # five levels a pixel
    box, columns, rows = native_grid(CORNERS, 51, 51)
    laid = warp(image, CORNERS, box, columns, rows)
    pixel, seen = (box[2] - box[0]) / columns, []
    for i, j in np.argwhere(laid[..., 3] == 255)[::3]:
        u, v = (laid[i, j, :2] / 255).tolist()
        if 0.03 < u < 0.97 and 0.03 < v < 0.97:
            x, y = loop_ground(CORNERS, u, v)
            seen.append((x - (box[0] + (j + 0.5) * pixel), y - (box[3] - (i + 0.5) * pixel)))
    seen = np.array(seen) / pixel
    assert len(seen) > 300 and np.abs(seen.mean(axis=0)).max() < 0.02 and np.abs(seen).max() < 0.6


def test_a_large_photo_comes_out_coarser_and_is_averaged_first():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    box, columns, rows = native_grid(CORNERS, 400, 400, max_side=50)
    assert max(columns, rows) == 50
    laid = warp(noise, CORNERS, box, columns, rows)
    inside = laid[laid[..., 3] == 255]
    assert inside[:, :3].std() < 20  # noise of 74, averaged over 10 × 10


def test_kmz_drapes_the_photo_counter_clockwise_from_its_lower_left(photo, tmp_path):
    footprints = np.stack([CORNERS, CORNERS - [3, 0]])
    file = kmz.write(tmp_path, photo, places_of(footprints), footprints)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None and archive.read("photo.jpg") == photo.read_bytes()
        root = xml.fromstring(archive.read("doc.kml"))
    assert root.find(".//kml:Document/kml:name", NAMES).text == "a&b.jpg"
    overlays = root.findall(".//kml:GroundOverlay", NAMES)
    assert [each.find("kml:visibility", NAMES).text for each in overlays] == ["1", "0"]
    assert {each.find("kml:Icon/kml:href", NAMES).text for each in overlays} == {"photo.jpg"}
    text = overlays[0].find("gx:LatLonQuad/kml:coordinates", NAMES).text
    quad = np.array([[float(value) for value in each.split(",")] for each in text.split()])
    bottom_left, top_left, top_right, bottom_right = CORNERS[:, ::-1]
    assert quad == pytest.approx(np.array([bottom_left, bottom_right, top_right, top_left]), abs=1e-6)
    assert Polygon(quad).exterior.is_ccw
    mark = root.find(".//kml:Placemark", NAMES)
    data = {each.get("name"): each.find("kml:value", NAMES).text for each in mark.findall(".//kml:Data", NAMES)}
    assert data["note"] == "<b>ridge</b> & lake" and data["inliers"] == "120"
    ring = mark.find(".//kml:LinearRing/kml:coordinates", NAMES).text.split()
    assert len(ring) == 5 and ring[0] == ring[-1]


def test_kmz_over_the_antimeridian_is_one_drape_and_two_outlines(photo, tmp_path):
    file = kmz.write(tmp_path, photo, places_of(OVER[None]), OVER[None])
    with zipfile.ZipFile(file) as archive:
        root = xml.fromstring(archive.read("doc.kml"))
    quad = [each.split(",") for each in root.find(".//gx:LatLonQuad/kml:coordinates", NAMES).text.split()]
    longitudes = np.array(quad, dtype=float)[:, 0]
    assert np.ptp(longitudes) < 4 and longitudes.min() < 180 < longitudes.max()
    rings = [each.text.split() for each in root.findall(".//kml:LinearRing/kml:coordinates", NAMES)]
    sides = [np.array([float(point.split(",")[0]) for point in ring]) for ring in rings]
    assert len(sides) == 2 and {np.sign(each.mean()) for each in sides} == {-1.0, 1.0}
    assert all((np.abs(each) <= 180).all() for each in sides)


def test_photos_are_exported_as_a_viewer_shows_them(turned_photo, tmp_path):
    places, footprints = places_of(CORNERS[None]), CORNERS[None]
    with zipfile.ZipFile(kmz.write(tmp_path, turned_photo, places, footprints)) as archive:
        image = Image.open(io.BytesIO(archive.read("photo.jpg")))
        assert image.size == (48, 32) and 0x0112 not in image.getexif()
        assert np.abs(np.asarray(image).astype(int) - picture()).mean() < 4
    with rasterio.open(geotiff.write(tmp_path, turned_photo, places, footprints)) as source:
        assert (source.read().transpose(1, 2, 0) == picture()).all()


def test_geotiff_ties_the_four_corners_to_the_ground(turned_photo, tmp_path):
    file = geotiff.write(tmp_path, turned_photo, places_of(CORNERS[None]), CORNERS[None])
    with rasterio.open(file) as source:
        points, crs = source.gcps
        assert crs.to_epsg() == 4326 and source.tags()["inliers"] == "120"
    found = {(each.col, each.row): (each.y, each.x) for each in points}
    for pixel, corner in zip([(0, 32), (0, 0), (48, 0), (48, 32)], CORNERS):
        assert found[pixel] == pytest.approx(corner)


@pytest.mark.parametrize("footprint", [CORNERS, OVER])
def test_cog_lies_in_web_mercator_and_is_transparent_around(turned_photo, tmp_path, footprint):
    file = cog.write(tmp_path, turned_photo, places_of(footprint[None]), footprint[None])
    with rasterio.open(file) as source:
        assert source.crs.to_epsg() == 3857 and source.count == 4
        assert source.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert source.colorinterp[3] == rasterio.enums.ColorInterp.alpha
        x, y = to_mercator(geo.unwrap_footprints(footprint)).T
        assert source.bounds == pytest.approx((x.min(), y.min(), x.max(), y.max()), abs=2 * source.res[0])
        x, y = loop_ground(footprint, 24.5 / 48, 10.5 / 32)
        found = [*source.sample([(x, y)])][0]
    assert found[3] == 255 and np.abs(found[:3].astype(int) - picture()[10, 24]).max() <= 12


def test_a_large_cog_has_overviews(tmp_path):
    path = tmp_path / "large.png"
    Image.fromarray(picture(1600, 1200)).save(path)
    with rasterio.open(cog.write(tmp_path, path, places_of(CORNERS[None]), CORNERS[None])) as source:
        assert source.overviews(1) and source.block_shapes[0] == (512, 512)


def test_geoparquet_opens_with_the_corners_and_the_cut_geometry(tmp_path):
    footprints = np.stack([CORNERS, OVER])
    file = geoparquet.write_table(tmp_path / "all.parquet", places_of(footprints, "a\udcff.jpg"), footprints)
    table = pq.read_table(file)
    told = json.loads(table.schema.metadata[b"geo"])
    assert told["primary_column"] == "geometry" and told["columns"]["geometry"]["encoding"] == "WKB"
    shapes = shapely.from_wkb(table["geometry"].to_pylist())
    assert shapes[0].equals(Polygon(CORNERS[:, ::-1])) and len(shapes[1].geoms) == 2
    assert shapes[1].area == pytest.approx(Polygon(geo.unwrap_footprints(OVER)[:, ::-1]).area)
    corners = [[table[f"{axis}{n}"][1].as_py() for axis in ("lat", "lon")] for n in range(1, 5)]
    assert corners == OVER.tolist()
    assert table["inliers"].to_pylist() == [120, None] and table["verified"].to_pylist() == [True, False]
    assert table["image"].to_pylist() == ["a\\udcff.jpg"] * 2


def test_geojson_has_the_properties_that_others_rely_on(photo, tmp_path):
    found = json.loads(geojson.write(tmp_path, photo, places_of(OVER[None]), OVER[None]).read_text())["features"]
    wanted = "image rank score inliers probability verified latitude longitude rotation".split()
    assert set(wanted) <= set(found[0]["properties"])
    assert shape(found[0]["geometry"]).geom_type == "MultiPolygon"


def test_stac_item_is_valid_by_the_schemas_that_pystac_brings(photo, tmp_path):
    places, footprints = places_of(CORNERS[None]), CORNERS[None]
    written, failures = export_photo(tmp_path / "out", EXPORTS, photo, places, footprints)
    assert not failures and len(written) == len(EXPORTS)
    item = pystac.Item.from_file(str(tmp_path / "out" / "a&b.jpg.stac.json"))
    item.validate()  # raises; core schemas only, which lie in the package
    assert item.id == "a&b.jpg" and item.properties["earthloc:inliers"] == 120 and item.properties["earthloc:verified"]
    assert shape(item.geometry).equals(Polygon(CORNERS[:, ::-1]))
    lat, lon = CORNERS.T
    assert item.bbox == [lon.min(), lat.min(), lon.max(), lat.max()]
    assert set(item.assets) == {"photo", "gcps", "cog", "kmz", "geojson", "geoparquet", "report"}
    for asset in item.get_assets().values():
        assert os.path.exists(asset.get_absolute_href().replace("%26", "&"))


def test_stac_box_over_the_antimeridian_has_its_west_in_the_west(photo):
    item = stac.item(photo, places_of(OVER[None])[0], OVER)
    assert item.bbox == pytest.approx([178.5, -17.0, -178.6, -15.4]) and item.geometry["type"] == "MultiPolygon"
    item.validate()


def test_the_time_of_a_photo_comes_from_its_exif_or_its_name(tmp_path, photo):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2019:07:03 23:30:00"
    exif.get_ifd(0x8769)[0x9011] = "-02:00"
    path = tmp_path / "timed.jpg"
    Image.fromarray(picture()).save(path, exif=exif)
    assert stac.time_taken(path) == datetime(2019, 7, 4, 1, 30, tzinfo=UTC)
    name = "@1@2@3@4@5@6@7@8@ISS064-E-46242@20180102@-4.2@35.4@6131@0.0@.jpg"
    Image.fromarray(picture()).save(tmp_path / name)
    assert stac.time_taken(tmp_path / name) == datetime(2018, 1, 2, tzinfo=UTC)
    assert stac.time_taken(photo) is None
    item = stac.item(photo, places_of(CORNERS[None])[0], CORNERS)
    assert item.datetime is None and item.properties["end_datetime"] > item.properties["start_datetime"]


def images_in(text):
    return [
        Image.open(io.BytesIO(base64.b64decode(each))) for each in re.findall(r"data:image/\w+;base64,([^\"]+)", text)
    ]


def test_report_needs_nothing_else_and_shows_what_there_is(photo, tmp_path):
    footprints = np.stack([CORNERS, CORNERS - 3])
    pictures = [np.full((3, 40, 40), 200, np.uint8), None]
    points = np.random.default_rng(0).uniform(0, 1, (200, 2))
    matches = [Matches(points, points, pictures[0]), None]
    file = report.write(tmp_path, photo, places_of(footprints), footprints, pictures, matches)
    text = file.read_text()
    assert "https:" not in text and not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "&lt;b&gt;ridge&lt;/b&gt; &amp; lake" in text and "<b>ridge" not in text and "a&amp;b.jpg" in text
    assert "located" in text and text.count("<line ") == report.LINES and "0.998" in text
    again = report.page("a", picture(), places_of(footprints), [CORNERS] * 2, pictures, [matches[0]] * 2)
    assert again.count("<line ") == report.LINES  # a registration that two places share is drawn once
    assert len(images_in(text)) == 8  # photo, map, photo on it, two candidates, two of the matches, the world


def test_report_says_what_it_does_not_know(photo, tmp_path):
    places = places_of(CORNERS[None])
    for told, state in (
        ("not verified", dict(verified=False)),
        ("not registered", dict(verified=False, probability=None)),
    ):
        assert told in report.write(tmp_path, photo, [places[0] | state], CORNERS[None]).read_text()
    assert "mirrored" in report.write(tmp_path, photo, places, CORNERS[None, ::-1]).read_text()


def test_matches_are_drawn_where_they_are_after_the_candidate_was_turned(photo):
    """A white dot in a black candidate; the photo's up is east, so the candidate is turned counter-clockwise."""
    dot = np.zeros((3, 100, 100), np.uint8)
    dot[:, 18:22, 68:72] = 255  # right and up
    matches = Matches(np.array([(0.5, 0.5)]), np.array([(0.7, 0.2)]), dot)
    text = report._match_figure(picture(), matches, {"rotation": 90})
    x2, y2 = (float(re.search(rf'{name}="([\d.]+)"', text)[1]) for name in ("x2", "y2"))
    shift = float(re.search(r'x="([\d.]+)"', text)[1])
    shown = np.asarray(images_in(text)[1].convert("L"))
    assert shown[round(y2 / 600 * len(shown)), round((x2 - shift) / 600 * len(shown))] > 200


@pytest.mark.parametrize("footprint", [CORNERS, OVER])
def test_matches_end_at_their_ground(footprint):
    """A ground that shows its own coordinates: under the end of a line is the place that the registration names."""
    lat, lon = geo.unwrap_footprints(footprint).T
    ends = np.array([(lat.mean(), lon.mean()), (lat.max(), lon.min()), (lat.min() - 0.2, lon.max())])
    wrapped = np.stack([ends[:, 0], geo.wrap_longitude(ends[:, 1])], axis=1)
    west, south, east, north = -10, lat.min() - 5, 200, lat.max() + 5  # degrees, of the picture's whole range

    def ground(box, size):
        pixel = (box[2] - box[0]) / size
        assert box[3] - box[1] == pytest.approx(box[2] - box[0])
        x, y = box[0] + (np.arange(size) + 0.5) * pixel, box[3] - (np.arange(size) + 0.5) * pixel
        to_degrees = lambda x, y: geo.from_mercator(np.stack(np.broadcast_arrays(x, y), axis=-1))
        columns, rows = to_degrees(x, 0)[:, 1], to_degrees(0, y)[:, 0]
        shown = [(columns[None] - west) / (east - west), (rows[:, None] - south) / (north - south)]
        return np.stack([*np.broadcast_arrays(*shown), np.zeros((size, size))])

    found = SimpleNamespace(
        footprint=footprint,
        ground_points=wrapped,
        photo_size=(80, 40),
        photo_points=np.array([(40, 20), (0, 0), (80, 30)]),
    )
    matches = matches_of(found, ground, 400)
    assert matches.photo.tolist() == [[0.5, 0.5], [0, 0], [1, 0.75]]
    for (x, y), place in zip(matches.ground, ends):
        assert 0 < x < 1 and 0 < y < 1
        shown = matches.picture[:, int(y * 400), int(x * 400)]
        assert south + shown[1] * (north - south) == pytest.approx(place[0], abs=0.02)
        assert (west + shown[0] * (east - west)) % 360 == pytest.approx(place[1] % 360, abs=0.02)
    for registration, known in ((None, ground), (found, None), (found, lambda *_: None)):
        assert matches_of(registration, known) is None


def test_map_layers_put_photo_and_candidate_on_the_same_ground():
    """A candidate that fills the photo's own map-aligned footprint covers just what the photo covers."""
    square = np.array([(10.0, 20.0), (11.0, 20.0), (11.0, 21.0), (10.0, 21.0)])
    image = np.full((64, 64, 3), 255, np.uint8)
    ground, laid = report.map_layers(image, square, np.zeros((3, 64, 64), np.uint8) + 255, square, side=200)
    inside = laid[..., 3] > 200
    assert (ground[inside] > 200).all() and 0.18 < inside.mean() < 0.23  # (1 / 2.2)²
    assert (ground[laid[..., 3] == 0].mean(axis=-1) < 250).all()


def test_one_failure_costs_nothing_else(photo, tmp_path, monkeypatch, caplog):
    places, footprints = places_of(CORNERS[None]), CORNERS[None]
    mirrored = footprints[:, ::-1]
    files, failures = export_photo(tmp_path / "a", EXPORTS, photo, places, mirrored)
    assert {each.suffix for each in files} == {".geojson", ".parquet", ".html", ".json"}
    assert len(failures) == 3 and all("a&b.jpg" in each and "mirrored" in each for each in failures)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    files, failures = export_photo(tmp_path / "b", ["cog", "geojson"], tmp_path / "broken.jpg", places, footprints)
    assert [each.name for each in files] == ["broken.jpg.geojson"] and "broken.jpg: no cog" in failures[0]
    assert sorted(os.listdir(tmp_path / "b")) == ["broken.jpg.geojson"]
    with pytest.raises(ValueError, match="--export shp: choose among geojson"):
        export_photo(tmp_path, ["shp"], photo, places, footprints)
