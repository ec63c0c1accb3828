"""Photos and galleries with GPS: what is read, and what is refused in words that help."""

from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from datasets.gps import (
    add_noise,
    check_points,
    distinct_points,
    find_images,
    gallery_points,
    grid_points,
    photos_of_dataset,
    read_photos,
    read_points,
)
from datasets.names import ImageName
from utils import geo


def written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("header", ["LAT,LON", "latitude,longitude", "id,Longitude,Latitude", "\ufeffLAT,LON"])
def test_gallery_columns(tmp_path, header):
    values = {"LAT": "-12.5", "LON": "170.25", "LATITUDE": "-12.5", "LONGITUDE": "170.25", "ID": "a"}
    row = ",".join(values[name.strip("\ufeff").upper()] for name in header.split(","))
    file = tmp_path / "g.csv"
    file.write_text(f"{header}\n{row}\n\n", encoding="utf-8")
    assert read_points(file).tolist() == [[-12.5, 170.25]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty; expected a header with LAT, LON"),
        ("LAT,LON\n", "a header and no rows"),
        ("x,y\n1,2\n", "no column LAT or LATITUDE; its columns are x, y"),
        ("LAT,LON\n1,2\n91,95\n", "row 3: latitude 91, longitude 95: latitude must be within ±90 and longitude"),
        ("LAT,LON\n1,2\n139.7,35.7\n-120,3\n", "row 3: latitude 139.7, longitude 35.7.*2 such rows; are .* swapped"),
        ("LAT,LON\nnan,2\n", "row 2: .*not finite"),
        ("LAT,LON\n1,181\n", "row 2: .*longitude within ±180"),
        ("LAT,LON\n1,2\n1,east\n", "line 3: longitude is 'east'"),
        ("LAT,LON\n1\n", "line 2: 1 cells"),
        ("LAT,LON\n,4\n", "line 2: latitude is ''"),
    ],
)
def test_bad_galleries_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"g.csv.*{message}"):
        read_points(written(tmp_path / "g.csv", text))


def test_no_text_at_all(tmp_path):
    (tmp_path / "g.csv").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="no CSV text file"):
        read_points(tmp_path / "g.csv")
    with pytest.raises(FileNotFoundError, match="nowhere.csv: no such CSV"):
        read_points(tmp_path / "nowhere.csv")


def test_limits_are_inside():
    assert check_points([(90, 180), (-90, -180)], "x").shape == (2, 2)


@pytest.fixture
def photo_folder(tmp_path):
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    return tmp_path


def test_photos_of_a_csv_count_and_list_what_is_missing(photo_folder):
    table = written(photo_folder / "t.csv", "IMG_ID,LAT,LON\na.jpg,1,2\nlost.jpg,3,4\nsub/c,5,6\nb.jpg,7,8\n")
    photos = read_photos(table, photo_folder / "images")
    assert [path.name for path in photos.paths] == ["a.jpg", "c.jpg", "b.jpg"]
    assert photos.points.tolist() == [[1, 2], [5, 6], [7, 8]]
    (note,) = photos.notes
    assert "1 of 4 images" in note and "lost.jpg" in note


def test_the_best_known_column_counts_wherever_it_stands(photo_folder):
    table = written(photo_folder / "t.csv", "FileName,Longitude,img_id,LAT,LON\nx.jpg,9,b.jpg,1,2\n")
    photos = read_photos(table, photo_folder / "images")
    assert [path.name for path in photos.paths] == ["b.jpg"] and photos.points.tolist() == [[1, 2]]


def test_photos_without_any_image(photo_folder):
    table = written(photo_folder / "t.csv", "IMG_ID,LAT,LON\na.jpg,1,2\n")
    with pytest.raises(ValueError, match="none of its 1 images.*--images"):
        read_photos(table)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_photos(table, photo_folder / "pictures")


def test_photos_of_a_dataset_stand_at_their_footprints(world):
    photos = photos_of_dataset(world.path, "database")
    assert len(photos) == 24 * 4
    for path, point in list(zip(photos.paths, photos.points))[::17]:
        corners = np.array(ImageName.parse(path.name).footprint)
        assert geo.distance_km(point, corners.mean(axis=0)) < 5  # regions of 200 km: the plane mean is near enough
    assert photos_of_dataset(world.path, "queries").nadirs.shape == (10, 2)
    assert photos.select(photos.points[:, 0] > 40).points[:, 0].min() > 40


def test_found_images(photo_folder):
    names = [path.name for path in find_images([photo_folder / "images" / "b.jpg", photo_folder / "images"])]
    assert names == ["b.jpg", "a.jpg", "b.jpg", "c.jpg"]
    (photo_folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no image in this folder"):
        find_images([photo_folder / "empty"])
    with pytest.raises(FileNotFoundError, match="no such image or folder"):
        find_images([photo_folder / "x.jpg"])


def test_grid_covers_the_earth_evenly():
    points = grid_points(500)
    anywhere = np.random.default_rng(0).uniform((-90, -180), (90, 180), (300, 2))
    nearest = geo.distance_km(anywhere[:, None], points[None]).min(axis=1)
    assert nearest.max() <= 500 / np.sqrt(2) * 1.02
    area = 4 * np.pi * geo.EARTH_RADIUS_KM**2
    assert area / 500**2 < len(points) < 1.1 * area / 500**2
    gaps = geo.distance_km(points[:, None], points[None]) + np.eye(len(points)) * 1e9
    assert np.median(gaps.min(axis=1)) > 400


def test_land_grid_is_on_land():
    points = gallery_points("land:500")
    everywhere = grid_points(500)
    assert 0.25 < len(points) / len(everywhere) < 0.4  # land is 29 % of Earth
    assert geo.distance_km(points, (0, -150)).min() > 1000  # the Pacific


@pytest.mark.parametrize(
    "spec, message",
    [
        ("grid:0", "2 to 5000.*grid:100"),
        ("grid:x", "grid:100"),
        ("land:nan", "2 to 5000"),
        ("train", "no training coordinates"),
    ],
)
def test_bad_gallery_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        gallery_points(spec)


def test_gallery_of_the_training_set():
    points = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    kept = distinct_points(points, limit=10)
    assert kept.tolist() == [[1, 2], [3, 4]]
    assert gallery_points("train", kept).tolist() == kept.tolist()
    many = np.random.default_rng(0).uniform(-80, 80, (100, 2))
    few = distinct_points(many, limit=7)
    assert len(few) == 7 and all((np.abs(many - row).max(axis=1) < 1e-5).any() for row in few)


@pytest.mark.skipif(find_spec("geoclip") is None, reason="pip install --no-deps geoclip")
def test_published_gallery():
    points = gallery_points("package")
    assert points.shape == (100_000, 2) and len(np.unique(points, axis=0)) == pytest.approx(94_100, abs=100)


def test_published_gallery_without_the_package(monkeypatch):
    monkeypatch.setattr("utils.files.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps geoclip"):
        gallery_points("package")


@pytest.mark.parametrize("point", [(0, 0), (89.9999, 10), (-90, 0), (10, 180), (48, -180)])
def test_noise_is_in_metres_everywhere(point):
    points = np.repeat([point], 20_000, axis=0).astype(float)
    moved = add_noise(points, 1000, np.random.default_rng(0))
    check_points(moved, "moved")
    km = geo.distance_km(points, moved)
    assert np.sqrt((km**2).mean() / 2) == pytest.approx(1, rel=0.02)  # a step of 1 km in each of two directions
    center = geo.from_unit_vectors(geo.to_unit_vectors(moved).mean(axis=0))
    assert geo.distance_km(center, point) < 0.05


def test_no_noise_moves_nothing():
    points = np.array([[12.5, -7.0], [-33.0, 179.0]])
    assert np.allclose(add_noise(points, 0, np.random.default_rng(0)), points, atol=1e-12)
