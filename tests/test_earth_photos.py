"""Photos at true scale, from a small raster: a coarse one, so the photos are large."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from datasets.build import __main__ as build
from datasets.build import earth_photos
from datasets.build.camera import Camera, footprint, ground_points
from datasets.build.demo_world import query_name
from datasets.build.earth import month_ratios, open_raster
from datasets.conditions import CONDITIONS_FILE, read_conditions
from datasets.names import Catalogue, ImageName
from datasets.overlap import INTERSECTIONS_FILE, load_intersections
from datasets.sets import POINTS_OF_INTEREST
from experiments import earth_photos as experiment
from utils import geo
from utils.flags import call
from utils.geo import MERCATOR_HALF

REAL_NAMES = Path(__file__).resolve().parents[2] / "shared" / "names" / "queries.txt"
AROUND = 4096  # pixels around the Earth, 9.8 km each at the equator
AREAS = (200_000, 800_000)


def write_raster(path, pixels):
    """uint8 (3, AROUND, AROUND) -> file."""
    side = 2 * MERCATOR_HALF / AROUND
    place = {"crs": "EPSG:3857", "transform": from_origin(-MERCATOR_HALF, MERCATOR_HALF, side, side)}
    shape = {"width": AROUND, "height": AROUND, "count": 3, "dtype": "uint8", "tiled": True, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place) as file:
        file.write(pixels)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """grey.tif of one grey, dots.tif of white dots on black, months of which November is half as bright as August."""
    folder = tmp_path_factory.mktemp("sources")
    write_raster(folder / "grey.tif", np.full((3, AROUND, AROUND), 200, np.uint8))
    dots = np.zeros((3, AROUND, AROUND), np.uint8)
    for row, col in DOTS:
        dots[:, row - 1 : row + 2, [col - 1, col, (col + 1) % AROUND]] = 255
    write_raster(folder / "dots.tif", dots)
    (folder / "months").mkdir()
    for month in range(1, 13):
        level = 92 if month == 8 else 42
        Image.new("RGB", (128, 64), (level,) * 3).save(folder / "months" / f"{month:02d}.jpg", quality=100)
    return folder


# Beside Corsica, in the Amazon, and on both sides of the antimeridian.
DOTS = ((1495, 2140), (1503, 2165), (2070, 1370), (2080, 1352), (1700, 4094), (1708, 3), (1690, 4070))
CAMERAS = (
    Camera((42.0, 8.0), 410, tilt=20, azimuth=40, roll=20, focal_mm=28),
    Camera((-3.0, -61.0), 380, tilt=15, azimuth=100, roll=-140, focal_mm=24),
    Camera((28.0, 178.0), 420, tilt=22, azimuth=60, roll=75, focal_mm=28),
)


def dot_place(row, col):
    """Latitude and longitude of the middle of a raster's pixel."""
    y = np.pi * (1 - 2 * (row + 0.5) / AROUND)
    return np.degrees(2 * np.arctan(np.exp(y)) - np.pi / 2), (col + 0.5) / AROUND * 360 - 180


def seen_at(camera, lat, lon):
    """u, v by spherical trigonometry: distance and bearing from the nadir, then the angle from straight down."""
    lat0, lon0, lat1, lon1 = np.radians([*camera.nadir, lat, lon])
    cosine = np.sin(lat0) * np.sin(lat1) + np.cos(lat0) * np.cos(lat1) * np.cos(lon1 - lon0)
    bearing = np.arctan2(
        np.sin(lon1 - lon0) * np.cos(lat1),
        np.cos(lat0) * np.sin(lat1) - np.sin(lat0) * np.cos(lat1) * np.cos(lon1 - lon0),
    )
    off = np.arctan2(np.sqrt(1 - cosine**2), 1 + camera.altitude_km / 6371 - cosine)
    tilt, azimuth, roll = np.radians([camera.tilt, camera.azimuth, camera.roll])
    turned = bearing - azimuth
    ahead, aside, below = np.sin(off) * np.cos(turned), np.sin(off) * np.sin(turned), np.cos(off)
    depth = ahead * np.sin(tilt) + below * np.cos(tilt)
    up = (ahead * np.cos(tilt) - below * np.sin(tilt)) / depth
    aside = aside / depth
    x, y = aside * np.cos(roll) - up * np.sin(roll), aside * np.sin(roll) + up * np.cos(roll)
    width, height = camera.sensor_mm
    return 0.5 + x * camera.focal_mm / width, 0.5 - y * camera.focal_mm / height


@pytest.mark.parametrize("size", [256, 255, 24])  # from half the pixels, from all, from more
@pytest.mark.parametrize("camera", CAMERAS)
def test_what_lies_at_a_known_place_is_seen_where_the_camera_says(folder, camera, size):
    raster = open_raster(folder / "dots.tif")
    ground, _ = earth_photos.render_ground(raster, None, camera, size)
    light = ground[0].double().numpy()
    rows, cols = np.mgrid[:size, :size]
    seen = 0
    for place in DOTS:
        u, v = seen_at(camera, *dot_place(*place))
        if geo.distance_km(dot_place(*place), camera.nadir) > 1500 or not (0.06 < u < 0.94 and 0.06 < v < 0.94):
            continue
        near = np.hypot(cols + 0.5 - u * size, rows + 0.5 - v * size) < max(0.05 * size, 3)
        assert light[near].max() > 0.3 * light.max() > 0
        weights = light[near] / light[near].sum()
        center = (weights * (cols[near] + 0.5)).sum() / size, (weights * (rows[near] + 0.5)).sum() / size
        assert np.hypot(center[0] - u, center[1] - v) * size < 0.5
        seen += 1
    assert seen >= 2


def test_places_between_the_nodes_are_those_of_the_camera(folder):
    raster = open_raster(folder / "dots.tif")
    nodes = np.meshgrid(earth_photos._nodes(), earth_photos._nodes())
    centers = np.meshgrid((np.arange(40) + 0.5) / 40, (np.arange(30) + 0.5) / 30)
    for camera in CAMERAS:
        found = earth_photos.raster_places(ground_points(camera, *nodes), raster)
        for place, exact in zip(found, earth_photos.raster_places(ground_points(camera, *centers), raster)):
            turned = earth_photos.spread(place, 30, 40).numpy() - exact
            assert np.abs((turned + AROUND / 2) % AROUND - AROUND / 2).max() < 1e-3


def test_a_photo_has_the_colours_of_its_month(folder):
    raster = open_raster(folder / "grey.tif")
    ratio = dict(month_ratios(folder / "months", [8, 11]))
    assert list(ratio) == [11]
    for month, level in ((11, 100), (8, 200)):  # (42 + 8) / (92 + 8): half
        photo = earth_photos.render_photo(raster, ratio.get(month), CAMERAS[0], None, 64, "clear")
        assert photo.shape == (3, 64, 64) and (photo.int() - level).abs().max() <= 1


def test_colours_are_read_between_pixels_and_around_the_antimeridian():
    rng = np.random.default_rng(0)
    ratio, latlon = (
        rng.uniform(0.5, 2, (6, 12, 3)),
        np.array([[(20.0, 179.0), (-88.0, -170.0)], [(3.0, 40.0), (61, 7)]]),
    )
    for found, (lat, lon) in zip(earth_photos.sample_colours(ratio, latlon).reshape(-1, 3), latlon.reshape(-1, 2)):
        y, x = np.clip((90 - lat) / 30 - 0.5, 0, 5), (lon + 180) / 30 - 0.5
        expected = sum(
            max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - col)) * ratio[row, col % 12]
            for row in range(6)
            for col in range(-1, 13)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("area, distance", [(5001, 30), (11_000, 320), (95_000, 900), (200_000, 250), (20_000, 1200)])
def test_a_camera_is_aimed_at_the_wanted_area_and_distance(area, distance):
    camera = earth_photos.aim((20.0, 179.0), 410, azimuth=80, roll=-35, area_km2=area, distance_km=distance)
    assert geo.distance_km(geo.centers(footprint(camera)), camera.nadir) == pytest.approx(distance, abs=1)
    # The ground's area, as the sum of 40 × 40 cells; a name's area has straight edges in another projection.
    edges = np.linspace(0, 1, 41)
    points = geo.to_unit_vectors(ground_points(camera, *np.meshgrid(edges, edges))) * 6378.137
    cells = np.cross(points[1:, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, 1:])
    assert np.linalg.norm(cells, axis=-1).sum() / 2 == pytest.approx(area, rel=0.05)
    assert 24 <= camera.focal_mm <= 1150


def test_a_camera_that_no_lens_fits_or_that_sees_the_horizon_is_none():
    assert earth_photos.aim((0.0, 0.0), 410, 0, 0, 30, 100) is None  # 2,000 mm
    assert earth_photos.aim((0.0, 0.0), 410, 0, 0, 2_000_000, 10) is None  # a fisheye
    assert earth_photos.aim((0.0, 0.0), 410, 0, 0, 100_000, 2150) is None


def test_sizes_are_drawn_as_in_the_names():
    rng = np.random.default_rng(1)
    drawn = np.array([earth_photos.draw_size(rng) for _ in range(6000)])
    for values, known in zip(drawn.T, (earth_photos.AREAS_KM2, earth_photos.DISTANCES_KM)):
        shares = [(values <= bound).mean() for bound in known]
        assert np.abs(np.array(shares) - earth_photos.DISTANCE_SHARES).max() < 0.02
    drawn = np.array([earth_photos.draw_size(rng, (1000, 100_000))[0] for _ in range(2000)])
    assert drawn.min() >= 1000 and np.median(drawn) == pytest.approx(10_000, rel=0.15)


@pytest.mark.skipif(not REAL_NAMES.is_file(), reason="needs ../shared/names")
def test_quantiles_are_those_of_the_real_names():
    names = Catalogue.read_source(REAL_NAMES, "queries")
    percent = 100 * np.array(earth_photos.DISTANCE_SHARES)
    np.testing.assert_allclose(earth_photos.AREAS_KM2, np.percentile(names.areas, percent), rtol=1e-3)
    distances = np.percentile(geo.distance_km(names.nadirs, names.centers), percent)
    np.testing.assert_allclose(earth_photos.DISTANCES_KM[:-1], distances[:-1], atol=1)  # the last nadirs are wrong


def plan(count, raster):
    return [
        earth_photos.plan_photo(
            0, index, lambda camera: earth_photos.covers(camera, raster), earth_photos.SETS, (11,), AREAS
        )
        for index in range(count)
    ]


def test_planned_photos_lie_in_their_sets_and_on_the_raster(folder):
    raster = open_raster(folder / "grey.tif")
    queries = plan(20, raster)
    assert {query.group for query in queries} == set(earth_photos.SETS)
    for query in queries:
        _, center, radius = earth_photos.SETS[query.group]
        assert geo.distance_km(query.camera.nadir, center) <= radius + 1e-6 and query.date[4:6] == "11"
        name = ImageName.parse(str(query_name(query, 7, "EARTH")))
        assert AREAS[0] * 0.99 < name.area < AREAS[1] * 1.01 and name.image_id == f"EARTH07-E-{query.index:05d}"
        u, v = np.array([seen_at(query.camera, *corner) for corner in name.footprint]).T
        np.testing.assert_allclose(u, [0, 0, 1, 1], atol=1e-4)  # bottom-left, top-left, top-right, bottom-right
        np.testing.assert_allclose(v, [1, 0, 0, 1], atol=1e-4)
    beyond = Camera((51.0, 0.0), 410, tilt=70, azimuth=0, roll=0, focal_mm=200)
    assert not earth_photos.covers(beyond, raster)


def build_some(folder, output, raster="dots.tif", **more):
    options = {"photos": 6, "image_size": 64, "areas": AREAS, "num_workers": 0, **more}
    return earth_photos.main(output, raster=folder / raster, months=folder / "months", **options)


def contents(output):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (output / "queries").iterdir()}


def test_a_stopped_build_goes_on_to_the_same_files(folder, tmp_path, monkeypatch):
    assert ": 6 photos made now" in build_some(folder, tmp_path / "whole")
    photograph, made = earth_photos.photograph, []

    def stopped(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return photograph(*arguments)

    monkeypatch.setattr(earth_photos, "photograph", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_some(folder, tmp_path / "stopped")
    monkeypatch.setattr(earth_photos, "photograph", photograph)
    torch.manual_seed(5), np.random.seed(5)
    assert ": 3 photos made now" in build_some(folder, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole") and len(contents(tmp_path / "whole")) == 6
    (tmp_path / "stopped" / CONDITIONS_FILE).unlink()
    assert ": 0 photos made now" in build_some(folder, tmp_path / "stopped")
    known = read_conditions(tmp_path / "stopped")
    assert known == read_conditions(tmp_path / "whole") and known["tilt"].keys() == known["clouds"].keys()
    assert {name.split("@")[9] for name in contents(tmp_path / "whole")} == known["tilt"].keys()
    with pytest.raises(ValueError, match="other parameters.*seed"):
        build_some(folder, tmp_path / "stopped", seed=1)


def test_photos_to_train_with_lie_outside_the_sets(folder, tmp_path):
    for nadirs, count in (("outside", 24), ("anywhere", 24)):
        build_some(folder, tmp_path / nadirs, photos=count, image_size=8, nadirs=nadirs)
    far, all_over = (Catalogue.read(tmp_path / nadirs, "queries").nadirs for nadirs in ("outside", "anywhere"))
    km = lambda nadirs: np.min([geo.distance_km(nadirs, center) for center in POINTS_OF_INTEREST.values()], axis=0)
    assert len(far) == 24 and km(far).min() > 2500 > km(all_over).min()


def test_positives_are_listed_where_there_is_a_database(folder, tmp_path, capsys):
    where = ["--raster", str(folder / "grey.tif"), "--months", str(folder / "months"), "--num_workers", "0"]
    more = ["--photos", "4", "--image_size", "64", "--areas", "200000", "800000"]
    assert build.main(["earth_photos", str(tmp_path / "none"), *where, *more]) == 0
    assert "no database" in capsys.readouterr().out
    area = ["--zooms", "5", "--bbox", "0", "-150", "55", "150"]
    assert build.main(["earth", str(tmp_path / "some"), *where, *area]) == 0
    assert build.main(["earth_photos", str(tmp_path / "some"), *where, *more]) == 0
    table = load_intersections(tmp_path / "some" / INTERSECTIONS_FILE)
    assert len(table) == 4 and any(table.values())
    assert all(path.startswith("database/2021_") for found in table.values() for path, _ in found)


def test_what_cannot_be_built_is_named(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="--areas 5001 99994.*147,650"):  # (32 × 9.784)² × 36 / 23.9 km²
        build_some(folder, tmp_path, areas=None)
    with pytest.raises(FileNotFoundError, match="01.jpg"):
        earth_photos.main(tmp_path, raster=folder / "grey.tif", months=tmp_path, photos=1, areas=AREAS)
    where = ["--raster", str(folder / "grey.tif"), "--months", str(folder / "months")]
    assert build.main(["earth_photos", str(tmp_path), *where, "--photos", "0"]) == 2
    assert "--photos: 0" in capsys.readouterr().err


def test_the_experiment_compares_what_was_planned_with_the_names(tmp_path, capsys):
    cameras = [earth_photos.aim((10.0, 178.0), 410, 80, 30, 20_000, distance) for distance in (100, 200, 400)]
    names = [query_name(earth_photos.Query(i, "", camera, "20200101"), 0) for i, camera in enumerate(cameras)]
    (tmp_path / "photos.txt").write_text("\n".join(map(str, names)))
    (tmp_path / "real.txt").write_text("\n".join(map(str, names[1:])))
    files = [str(tmp_path / "photos.txt"), str(tmp_path / "real.txt")]
    rendered, real = call(experiment.main, [*files, "--figure", str(tmp_path / "a.png")])
    assert rendered["distance km"] == pytest.approx([100, 200, 400], abs=10)  # a name's nadir has one decimal
    assert rendered["area km²"] == pytest.approx([20_000] * 3, rel=0.01) and len(real["area km²"]) == 2
    assert rendered["up from away °"] == pytest.approx([30] * 3, abs=15)  # the roll, but for perspective
    width, height = (geo.distance_km(*np.array(names[1].footprint)[[i, j]]) for i, j in ((1, 2), (1, 0)))
    assert rendered["longer to shorter side"][1] == pytest.approx(max(width / height, height / width), rel=0.15)
    assert "33.3%" in capsys.readouterr().out and (tmp_path / "a.png").stat().st_size > 5000
