"""The index of a data set's folder against plain listings: after changes, damaged, read-only, by other programs."""

import logging
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely

from datasets import grid, index, listing
from datasets.names import FIELDS, Catalogue, ImageName, parse_paths
from utils import tables

FILE = "index_database.parquet"


@pytest.fixture
def trusting(monkeypatch):
    """Folders made a moment ago count as settled, so that tests need not wait."""
    monkeypatch.setattr(listing, "RACY_SECONDS", -1)


@pytest.fixture
def tree(tmp_path):
    """24 regions in two years, in more than one folder."""
    for row in range(200, 248, 2):
        for year in (2018, 2021):
            touch(tmp_path, grid.image_path(9, row, 100 + row % 8, year))
    return tmp_path


def touch(root, path):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).touch()


def read(root, parse=parse_paths, **options):
    """The file system's clock has moved on when this returns: what is changed next gets another time."""
    table = index.read_table(root, "database", parse, **{"min_images": 1, **options})
    with tempfile.NamedTemporaryFile(dir=root.parent) as probe:
        began = os.stat(probe.name).st_mtime_ns
        while os.stat(probe.name).st_mtime_ns == began:
            os.utime(probe.name)
    return table


def listed_paths(root):
    """All images by os.walk, as str."""
    return sorted(
        os.path.relpath(os.path.join(base, file), root)
        for base, _, files in os.walk(root / "database")
        for file in files
        if file.endswith(".jpg")
    )


def paths_of(table):
    return [os.fsdecode(path) for path in table["path"].to_pylist()]


def check(root, table):
    """Every column is what parsing the listing gives."""
    assert paths_of(table) == listed_paths(root)
    names = [ImageName.parse(path) for path in listed_paths(root)]
    corners = [[table[f"{axis}{k}"].to_pylist() for axis in ("lat", "lon")] for k in range(1, 5)]
    assert np.array_equal(
        np.moveaxis(np.array(corners), 2, 0), np.array([name.footprint for name in names]).reshape(-1, 4, 2)
    )
    for field, attribute in (("image_id", "image_id"), ("timestamp", "timestamp")):
        assert table[field].to_pylist() == [getattr(name, attribute).encode() for name in names]
    assert list(zip(table["nadir_lat"].to_pylist(), table["nadir_lon"].to_pylist())) == [name.nadir for name in names]
    assert table["sq_km_area"].to_pylist() == [name.area for name in names]
    assert table["orientation"].to_pylist() == [name.orientation for name in names]


def counted(monkeypatch, function):
    """-> what the function gives, and the folders that were listed meanwhile."""
    listed, real = [], os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(listing.os, "scandir", lambda place: (listed.append(place), real(place))[1])
        return function(), listed


def test_the_second_start_lists_nothing_and_parses_nothing(tree, trusting, monkeypatch):
    check(tree, read(tree))
    assert (tree / FILE).is_file()
    found, listed = counted(monkeypatch, lambda: read(tree, parse=None))
    check(tree, found)
    assert listed == []


def test_a_prefix_picks_folders(tree, trusting):
    for _ in range(2):
        found = read(tree, prefix="database/2021_")
        assert paths_of(found) == [path for path in listed_paths(tree) if "/2021_" in path] and len(found) == 24


def test_only_changed_folders_are_listed_and_parsed(tree, trusting, monkeypatch):
    read(tree)
    new = grid.image_path(9, 202, 140, 2018)
    folder = os.path.dirname(listed_paths(tree)[0])
    touch(tree, f"{folder}/{os.path.basename(new)}")
    parsed = []
    found, listed = counted(
        monkeypatch, lambda: read(tree, parse=lambda paths: (parsed.extend(paths.to_pylist()), parse_paths(paths))[1])
    )
    check(tree, found)
    assert [os.path.relpath(os.fsdecode(place), tree) for place in listed] == [folder]
    assert [os.fsdecode(path) for path in parsed] == [path for path in listed_paths(tree) if path.startswith(folder)]


def test_whatever_happens_the_index_agrees_with_a_listing(tree, trusting):
    rng = np.random.default_rng(0)
    for step in range(60):
        images = listed_paths(tree)
        kind = rng.integers(6) if len(images) > 4 else 0
        one = tree / images[rng.integers(len(images))]
        if kind <= 1:
            touch(tree, grid.image_path(9, 190 + 2 * step, int(rng.integers(0, 500)), (2018, 2021)[kind]))
        elif kind == 2:
            one.unlink()
        elif kind == 3:
            one.rename(one.with_name(str(ImageName.parse(grid.image_path(9, 300, 2 * step, 2021)))))
        elif kind == 4:
            shutil.rmtree(one.parent)
        else:
            one.parent.rename(one.parent.with_name(f"{step}_{step}"))
        check(tree, read(tree))


def test_a_folder_whose_old_time_is_put_back_is_still_listed_again(tree, trusting):
    """As rsync -a, tar and cp -a do."""
    read(tree)
    image = tree / listed_paths(tree)[3]
    times = image.parent.stat()
    image.unlink()
    os.utime(image.parent, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert image.parent.stat().st_mtime_ns == times.st_mtime_ns
    check(tree, read(tree))


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(tree, monkeypatch):
    monkeypatch.setattr(listing, "RACY_SECONDS", 3600)  # a moment on the slowest machine
    read(tree)
    found, listed = counted(monkeypatch, lambda: read(tree))
    check(tree, found)
    assert (
        len(listed) == len({os.path.dirname(path) for path in listed_paths(tree)}) + 3
    )  # and database/, 2018_09, 2021_09


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"\0" * len(data),
        lambda data: b"not an index",
    ],
)
def test_a_damaged_index_is_made_again(tree, trusting, caplog, damage):
    read(tree)
    whole = (tree / FILE).read_bytes()
    (tree / FILE).write_bytes(damage(whole))
    check(tree, read(tree))
    assert f"{FILE}: cannot be used" in caplog.text
    caplog.clear()
    check(tree, read(tree, parse=None))
    assert not caplog.text


def test_a_flipped_bit_anywhere_changes_no_value(tree, trusting):
    read(tree)
    whole = (tree / FILE).read_bytes()
    for position in range(5, len(whole), len(whole) // 50):
        (tree / FILE).write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        check(tree, read(tree))


def test_another_version_is_made_again(tree, trusting, monkeypatch, caplog):
    read(tree)
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    check(tree, read(tree))
    assert "another version" in caplog.text


def test_a_file_of_another_kind_is_made_again(tree, trusting, caplog):
    table = read(tree)
    np.savez(tree / "index.npz", paths=np.array([{"a": 1}], dtype=object))  # a pickle
    os.replace(tree / "index.npz", tree / FILE)
    check(tree, read(tree))
    pq.write_table(table, tree / FILE)
    check(tree, read(tree))
    assert caplog.text.count("cannot be used") == 2


@pytest.mark.parametrize("path", ["database/2021_09/../../../secret.jpg", "/secret.jpg", "elsewhere/secret.jpg"])
def test_a_path_that_leads_out_is_refused(tree, trusting, caplog, path):
    table = read(tree)
    _, state = tables.opened(tree / FILE)
    paths = [path, *paths_of(table)[1:]]
    assert tables.store(tree / FILE, [table.set_column(0, "path", [paths])], state)
    check(tree, read(tree))
    assert "a path leads out of database/" in caplog.text


def test_a_write_that_is_cut_off_leaves_the_old_index(tree, trusting, monkeypatch):
    read(tree)
    before = (tree / FILE).read_bytes()
    (tree / listed_paths(tree)[0]).unlink()

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "ROW_GROUP", 20)
    whole = index.geometry
    monkeypatch.setattr(index, "geometry", lambda group: killed(group) if len(group) < 20 else whole(group))
    with pytest.raises(KeyboardInterrupt):
        read(tree)
    assert (tree / FILE).read_bytes() == before and sorted(os.listdir(tree)) == ["database", FILE]


@pytest.mark.parametrize("how", ["asked", "tried"])
def test_a_read_only_data_set_works_and_says_so(tree, trusting, monkeypatch, caplog, how):
    caplog.set_level(logging.INFO)
    if how == "asked":
        monkeypatch.setattr(index.os, "access", lambda *_: False)
    else:

        def refuse(_):
            raise PermissionError("read-only")

        monkeypatch.setattr(tables, "replacing", refuse)
    check(tree, read(tree))
    parsed = []
    found = read(
        tree, parse=lambda paths: (parsed.extend(paths.to_pylist()), parse_paths(paths))[1], prefix="database/2021_"
    )
    assert len(found) == 24 and len(parsed) == (24 if how == "asked" else 48)
    assert os.listdir(tree) == ["database"] and "cannot be written to" in caplog.text


def test_a_small_data_set_gets_no_index(tree, trusting):
    check(tree, read(tree, min_images=49))
    assert os.listdir(tree) == ["database"]
    read(tree, min_images=48)
    assert (tree / FILE).is_file()


def test_links_to_folders_are_followed_once(tree, tmp_path_factory, trusting):
    disk = tmp_path_factory.mktemp("disk")
    first = (tree / listed_paths(tree)[0]).parent
    shutil.move(first, disk / first.name)
    first.symlink_to(disk / first.name)
    (first / "up").symlink_to(tree / "database")  # would never end
    linked = [f"{first.relative_to(tree)}/{path.name}" for path in (disk / first.name).glob("*.jpg")]
    for _ in range(2):
        assert paths_of(read(tree)) == sorted(linked + listed_paths(tree))
    (disk / first.name).rename(disk / "elsewhere")
    assert paths_of(read(tree)) == listed_paths(tree)


def test_an_empty_folder_and_one_that_becomes_empty(tmp_path, trusting):
    (tmp_path / "database").mkdir()
    assert len(read(tmp_path)) == 0
    touch(tmp_path, grid.image_path(9, 200, 100, 2021))
    check(tmp_path, read(tmp_path))
    (tmp_path / listed_paths(tmp_path)[0]).unlink()
    for _ in range(2):
        assert len(read(tmp_path)) == 0 and read(tmp_path).column_names == ["path", *FIELDS]


def test_a_name_that_does_not_parse_is_named_and_nothing_is_written(tree, trusting):
    touch(tree, "database/2021_09/0_0/holiday.jpg")
    with pytest.raises(ValueError, match="database/2021_09/0_0/holiday.jpg"):
        read(tree)
    assert os.listdir(tree) == ["database"]


def test_many_at_once_write_one_whole_index(tree, trusting):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read(tree), range(16)))
    assert all(paths_of(each) == listed_paths(tree) for each in found)
    assert sorted(os.listdir(tree)) == ["database", FILE]
    check(tree, read(tree, parse=None))


def test_a_catalogue_comes_from_the_index(tree, trusting, monkeypatch):
    plain = Catalogue.read(tree, "database", 2021)
    monkeypatch.setattr(index, "MIN_IMAGES", 1)
    for _ in range(2):
        again = Catalogue.read(tree, "database", 2021)
        assert again.paths == plain.paths and again.ids == plain.ids and again.names == plain.names
        assert np.array_equal(again.footprints, plain.footprints) and np.array_equal(again.nadirs, plain.nadirs)
    assert (tree / FILE).is_file()


def test_row_groups_and_prefixes(tree, trusting, monkeypatch):
    """Of a file in many pieces, only those with wanted rows are read."""
    monkeypatch.setattr(index, "ROW_GROUP", 7)
    read(tree)
    groups, real = [], pq.ParquetFile.read_row_groups

    def spy(self, rows, columns, **options):
        groups.append(rows)
        return real(self, rows, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", spy)
    check(tree, read(tree, parse=None))
    for prefix in ("database/2018_", "database/2021_", "database/2021_09/20_", "database/2022_"):
        found = read(tree, parse=None, prefix=prefix)
        assert paths_of(found) == [path for path in listed_paths(tree) if path.startswith(prefix)]
    different = list(dict.fromkeys(map(tuple, groups)))
    assert different[:3] == [tuple(range(7)), (0, 1, 2, 3), (3, 4, 5, 6)] and different[-1] == ()


def test_names_that_are_no_text(tree, trusting):
    """A byte that is not UTF-8 comes back as Python's file functions write it."""
    strange = str(ImageName.parse(grid.image_path(9, 220, 300, 2021))).replace("@09_0220", "@\udcff09_0220")
    try:
        touch(tree, f"database/2021_09/odd\udcfe/{strange}")
    except OSError:
        pytest.skip("this file system takes text only")
    for _ in range(2):
        table = read(tree)
        assert f"database/2021_09/odd\udcfe/{strange}" in paths_of(table) and len(table) == 49
        assert Catalogue.from_table(tree, table).ids[-1] == "\udcff09_0220_0300"
    assert (tree / paths_of(table)[-1]).is_file()


ACROSS = [(10, 179), (12, 178.5), (12, -179), (10, -178)]  # 3 and 2.5 degrees wide
FOOTPRINTS = {
    "plain": [(0, 10), (2, 10), (2, 12), (0, 12)],
    "crosswise": [(0, 10), (2, 12), (2, 10), (0, 12)],
    "across": ACROSS,
    "up to it": [(0, 178), (2, 178), (2, -180), (0, -180)],
}


def footprint_tree(root):
    for number, corners in enumerate(FOOTPRINTS.values()):
        touch(root, f"database/2021_09/0_0/{ImageName(tuple(corners), f'{number}', '2021', (0, 0), 1, 0.0)}")
    read(root)
    return root / FILE


def test_the_geometry_is_where_the_corners_are(tmp_path, trusting):
    table = pq.read_table(footprint_tree(tmp_path))
    shapes = dict(
        zip(
            (list(FOOTPRINTS)[int(number)] for number in table["image_id"].to_pylist()),
            shapely.from_wkb(table["geometry"].to_numpy()),
        )
    )
    assert shapely.equals(shapes["plain"], shapely.box(10, 0, 12, 2))
    assert shapely.equals(shapes["crosswise"], shapely.box(10, 0, 12, 2))
    assert shapely.equals(shapes["up to it"], shapely.box(178, 0, 180, 2)) and shapes["up to it"].geom_type == "Polygon"
    west, east = sorted(shapes["across"].geoms, key=lambda part: part.bounds)
    assert west.bounds == (-180, 10, -178, 12) and east.bounds == (178.5, 10, 180, 12)
    assert shapes["across"].is_valid and shapes["across"].area == pytest.approx((3 + 2.5) / 2 * 2)
    assert shapely.equals(west, shapely.Polygon([(-180, 10), (-180, 12), (-179, 12), (-178, 10)]))


def test_geopandas_opens_it(tmp_path, trusting):
    geopandas = pytest.importorskip("geopandas")
    frame = geopandas.read_parquet(footprint_tree(tmp_path))
    assert frame.crs.to_string() == "OGC:CRS84" and frame.is_valid.all() and len(frame) == len(FOOTPRINTS)
    assert frame.cx[-179.5:-179, 11:11.5].image_id.tolist() == ["2"] and (frame.lat1 < 11).all()


def test_duckdb_opens_it(tmp_path, trusting):
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(
        f"select path, timestamp, lon4 from '{footprint_tree(tmp_path)}' where image_id = '2'"
    ).fetchall()
    assert found == [(path, "2021", -178.0) for path in listed_paths(tmp_path) if "@2@2021" in path]
