import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import grid
from datasets.build import __main__ as build
from datasets.build import demo, demo_world
from datasets.build.camera import Camera, footprint, project
from datasets.conditions import CONDITIONS_FILE, read_conditions
from datasets.names import YEARS, Catalogue

ZOOMS = (4,)  # regions of 90 degrees: a handful covers the Earth
QUERIES = 6
SMALL = dict(num_queries=QUERIES, zooms=ZOOMS, image_size=16, num_workers=0)


def always_land(lat, lon):
    return np.ones(np.shape(lat), dtype=bool)


NOTHING = (np.zeros((0, 2)), np.zeros(0))


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory):
    """Five small smooth mosaics, one per year and one for the queries."""
    folder = tmp_path_factory.mktemp("mosaics")
    paths = []
    for k in range(5):
        rows, cols = np.mgrid[0:90, 0:180]
        pixels = np.stack([rows * 2.5, cols * 1.3, np.full(rows.shape, 40 * k)], axis=-1).astype(np.uint8)
        paths.append(folder / f"{k}.png")
        Image.fromarray(pixels).save(paths[-1])
    return dict(mosaics=dict(zip(YEARS, paths)), query_mosaic=paths[4])


@pytest.fixture(scope="module")
def world(tmp_path_factory, mosaics):
    folder = tmp_path_factory.mktemp("worlds") / "one"
    demo.main(folder, **SMALL, **mosaics)
    return folder


def checksums(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.jpg")
        if "figures" not in path.parts
    }


def test_layout_parses_and_every_region_has_every_year(world):
    queries = Catalogue.read(world, "queries")
    database = Catalogue.read(world, "database")
    assert len(queries) == QUERIES
    assert len(database) > 0
    per_year = [sorted(Catalogue.read(world, "database", year=year).ids) for year in YEARS]
    assert per_year.count(per_year[0]) == 4 and len(database) == 4 * len(per_year[0])
    assert (world / "figures" / "demo_world.jpg").exists()


def test_names_hold_the_camera_of_the_plan(world):
    plan = json.loads((world / "world.json").read_text())
    queries = Catalogue.read(world, "queries")
    for index, _, values, _ in plan["queries"]:
        row = queries.ids.index(f"DEMO00-E-{index:05d}")
        camera = Camera(**values)
        np.testing.assert_allclose(queries.footprints[row], footprint(camera), atol=1e-6)
        np.testing.assert_allclose(queries.nadirs[row], camera.nadir, atol=0.0501)
        assert demo_world.AREAS_KM2[0] <= queries.areas[row] <= demo_world.AREAS_KM2[1]


def test_intersections_file_lists_every_query(world):
    table = torch.load(world / "queries_intersections_with_db_2021.pt", weights_only=True)
    assert sorted(table) == sorted(Catalogue.read(world, "queries").names)
    assert all((world / path).exists() for positives in table.values() for path, _ in positives)


def test_second_run_makes_nothing_and_deleted_files_come_back_the_same(world, mosaics):
    before = checksums(world)
    assert ": 0 images made now" in demo.main(world, **SMALL, **mosaics)
    for path in [*list(world.glob("database/2019_*/*/*.jpg"))[:3], *world.glob("queries/*DEMO00-E-00001*")]:
        path.unlink()
    assert ": 4 images made now" in demo.main(world, **SMALL, **mosaics)
    assert checksums(world) == before


def test_each_photo_has_a_line_with_its_cameras_tilt_also_in_a_world_built_before(world, mosaics):
    plan = json.loads((world / "world.json").read_text())
    tilts = {
        f"DEMO00-E-{index:05d}": pytest.approx(camera["tilt"], abs=0.006) for index, _, camera, _ in plan["queries"]
    }
    written = (world / CONDITIONS_FILE).read_bytes()
    assert read_conditions(world)["tilt"] == tilts and len(tilts) == QUERIES
    (world / CONDITIONS_FILE).unlink()
    assert ": 0 images made now" in demo.main(world, **SMALL, **mosaics)
    assert (world / CONDITIONS_FILE).read_bytes() == written


def test_images_do_not_depend_on_the_number_of_workers(world, mosaics, tmp_path):
    demo.main(tmp_path / "two", **{**SMALL, "num_workers": 2}, **mosaics)
    assert checksums(tmp_path / "two") == checksums(world)


def test_other_parameters_in_the_same_folder_are_refused(world, mosaics):
    with pytest.raises(ValueError, match="seed: 0 there, 1 now.*another folder"):
        demo.main(world, seed=1, **SMALL, **mosaics)


def test_region_pixel_equals_the_mosaics_value_at_its_place():
    # Red rises with latitude and green with longitude, so that a pixel tells where it is.
    lat, lon = 90 - (np.arange(512) + 0.5) / 512 * 180, (np.arange(1024) + 0.5) / 1024 * 360 - 180
    mosaic = torch.zeros(3, 512, 1024, dtype=torch.uint8)
    mosaic[0] = torch.from_numpy(np.round((lat + 90) / 180 * 255).astype(np.uint8))[:, None]
    mosaic[1] = torch.from_numpy(np.round((lon + 180) / 360 * 255).astype(np.uint8))[None]
    zoom, row, col, size = 5, 8, 12, 32
    pixels = demo_world.render_region(mosaic, zoom, row, col, size).numpy().astype(float)
    for i in (0, 10, 31):
        for j in (0, 7, 31):
            y = (row + (i + 0.5) / size * 4) / 2**zoom  # Web Mercator: 0 at the top, 1 at the bottom
            latitude = np.degrees(2 * np.arctan(np.exp(np.pi * (1 - 2 * y))) - np.pi / 2)
            longitude = (col + (j + 0.5) / size * 4) / 2**zoom * 360 - 180
            assert pixels[0, i, j] == pytest.approx((latitude + 90) / 180 * 255, abs=1.01)
            assert pixels[1, i, j] == pytest.approx((longitude + 180) / 360 * 255, abs=1.01)


def test_finer_mosaic_is_averaged_not_skipped():
    mosaic = torch.zeros(3, 1024, 2048, dtype=torch.uint8)
    mosaic[:, ::2] = 200  # stripes finer than the region's pixels
    assert (demo_world.render_region(mosaic, 3, 2, 2, 16).float() - 100).abs().max() < 8


@pytest.mark.parametrize("nadir", [(20.0, 30.0), (-17.0, 179.9), (-45.0, -179.9)])
def test_painted_marker_appears_where_project_says(nadir):
    camera = Camera(nadir, 400, tilt=25, azimuth=110, roll=40, focal_mm=24)
    mosaic = torch.zeros(3, 1024, 2048, dtype=torch.uint8)
    # A pixel of the mosaic near the photo's middle, beyond the antimeridian for the last two.
    row, col = int((90 - nadir[0]) / 180 * 1024), int((nadir[1] + 180.9) / 360 * 2048) % 2048
    mosaic[:, row, col] = 255
    place = 90 - (row + 0.5) / 1024 * 180, (col + 0.5) / 2048 * 360 - 180
    image = demo_world.render_ground(mosaic, camera, (384, 256))[0].numpy()
    assert image.max() > 100
    weights = np.where(image > image.max() / 2, image, 0)
    y, x = (np.indices(image.shape) * weights).sum(axis=(1, 2)) / weights.sum()
    u, v = project(camera, place)
    assert abs(x + 0.5 - u * 384) < 1 and abs(y + 0.5 - v * 256) < 1


def test_every_prefix_of_the_queries_has_the_groups_shares():
    groups = [demo_world.group_of(index) for index in range(1000)]
    total = sum(share for share, _, _ in demo_world.GROUPS.values())
    for group, (share, _, _) in demo_world.GROUPS.items():
        for prefix in (200, 1000):
            assert groups[:prefix].count(group) == pytest.approx(prefix * share / total, abs=4)


def test_query_depends_on_seed_and_index_only():
    once = demo_world.plan_query(3, 2, NOTHING, always_land)
    assert demo_world.plan_query(3, 2, NOTHING, always_land) == once
    assert demo_world.plan_query(4, 2, NOTHING, always_land) != once


def test_antimeridian_queries_cross_it_and_sea_queries_see_no_region():
    indices = {}
    for index in range(300):
        indices.setdefault(demo_world.group_of(index), index)
    for group in demo_world.ANTIMERIDIAN:
        corners = footprint(demo_world.plan_query(0, indices[group], NOTHING, always_land).camera)
        assert np.ptp(corners[:, 1]) > 180
    region = grid.footprints([(4, 6, 6)])
    regions = region.mean(axis=1), np.array([9000.0])
    sea = footprint(demo_world.plan_query(0, indices["sea"], regions, always_land).camera)
    assert demo_world.geo.distance_km(sea, regions[0]).min() > 9000


@pytest.mark.parametrize("size, mode, message", [((90, 90), "RGB", "twice as wide")])
def test_mosaic_of_another_shape_is_refused(tmp_path, mosaics, size, mode, message):
    Image.new(mode, size).save(tmp_path / "wrong.png")
    with pytest.raises(ValueError, match=f"wrong.png.*{message}"):
        demo.main(tmp_path / "world", **SMALL, **{**mosaics, "query_mosaic": tmp_path / "wrong.png"})
    assert not (tmp_path / "world").exists()


def test_command_prints_errors_without_a_traceback(tmp_path, capsys):
    assert build.main(["demo", str(tmp_path / "world"), "--query_mosaic", str(tmp_path / "none.jpg")]) == 2
    assert "error:" in capsys.readouterr().err
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    assert build.main(["demo", str(tmp_path / "world"), "--query_mosaic", str(tmp_path / "broken.jpg")]) == 2
    assert "broken.jpg" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert build.main(["demo", str(tmp_path / "file")]) == 2
    assert "name a folder" in capsys.readouterr().err
    (tmp_path / "real" / "queries").mkdir(parents=True)
    assert build.main(["demo", str(tmp_path / "real")]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_photos_without_clouds_or_air_show_the_same_ground():
    mosaic = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (3, 90, 180), dtype=np.uint8))
    mosaic = torch.nn.functional.interpolate(mosaic[None].float(), scale_factor=4, mode="bicubic")[0].clamp(0, 255)
    mosaic = mosaic.to(torch.uint8)
    camera = Camera((10.0, 20.0), 400.0, 0.0, 30.0, 40.0, 24.0)
    clear, hazy, full = (
        demo_world.render_query(mosaic, camera, np.random.default_rng(5), (48, 32), photos).float()
        for photos in ("clear", "hazy", "full")
    )
    assert torch.equal(clear, demo_world.render_ground(mosaic, camera, (48, 32)).round())
    assert (hazy != full).any() and (hazy[2] - hazy[0]).mean() > (clear[2] - clear[0]).mean()  # the air is blue
    same = np.corrcoef(clear.mean(0).flatten(), hazy.mean(0).flatten())[0, 1]
    assert same > 0.9
