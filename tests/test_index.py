"""The index of a data set's folder against plain listings: after changes, damaged, read-only, with many readers."""

import logging
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from datasets import grid, index
from datasets.metadata import Catalogue, ImageName, parse_columns

FILE = "index_database.npz"


@pytest.fixture
def trusting(monkeypatch):
    """Folders made a moment ago count as settled, so that tests need not wait."""
    monkeypatch.setattr(index, "RACY_SECONDS", -1)


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


def read(root, parse=parse_columns, **options):
    """The file system's clock has moved on when this returns: what is changed next gets another time."""
    columns = index.read_columns(root, "database", parse, **{"min_images": 1, **options})
    with tempfile.NamedTemporaryFile(dir=root.parent) as probe:
        began = os.stat(probe.name).st_mtime_ns
        while os.stat(probe.name).st_mtime_ns == began:
            os.utime(probe.name)
    return columns


def listing(root):
    """All images by os.walk, as str."""
    return sorted(os.path.relpath(os.path.join(base, file), root)
                  for base, _, files in os.walk(root / "database") for file in files if file.endswith(".jpg"))


def paths_of(columns):
    return [path.decode() for path in columns["paths"].tolist()]


def check(root, columns):
    """Every column is what parsing the listing gives."""
    assert paths_of(columns) == listing(root)
    names = [ImageName.parse(path) for path in listing(root)]
    assert [tuple(map(tuple, each)) for each in columns["footprints"].tolist()] == [name.footprint for name in names]
    assert columns["years"].tolist() == [name.year for name in names]
    assert columns["ids"].tolist() == [name.image_id.encode() for name in names]
    assert columns["areas"].tolist() == [name.area for name in names]


def counted(monkeypatch, function):
    """-> what the function gives, and the folders that were listed meanwhile."""
    listed, real = [], os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(index.os, "scandir", lambda place: (listed.append(place), real(place))[1])
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
        assert paths_of(found) == [path for path in listing(tree) if "/2021_" in path] and len(found["years"]) == 24


def test_only_changed_folders_are_listed_and_only_new_names_parsed(tree, trusting, monkeypatch):
    read(tree)
    new = grid.image_path(9, 202, 140, 2018)
    (tree / listing(tree)[0]).parent.joinpath(new.rsplit("/", 1)[-1]).touch()
    parsed = []
    found, listed = counted(monkeypatch, lambda: read(
        tree, parse=lambda paths: (parsed.extend(paths), parse_columns(paths))[1]))
    check(tree, found)
    assert len(listed) == 1 and [path.rsplit("/", 1)[-1] for path in parsed] == [new.rsplit("/", 1)[-1]]


def test_whatever_happens_the_index_agrees_with_a_listing(tree, trusting):
    rng = np.random.default_rng(0)
    for step in range(60):
        images = listing(tree)
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
    image = tree / listing(tree)[3]
    times = image.parent.stat()
    image.unlink()
    os.utime(image.parent, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert image.parent.stat().st_mtime_ns == times.st_mtime_ns
    check(tree, read(tree))


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(tree, monkeypatch):
    monkeypatch.setattr(index, "RACY_SECONDS", 3600)  # a moment on the slowest machine
    read(tree)
    found, listed = counted(monkeypatch, lambda: read(tree))
    check(tree, found)
    assert len(listed) == len({os.path.dirname(path) for path in listing(tree)}) + 3  # and database/, 2018_09, 2021_09


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:-1], lambda data: data[:len(data) // 2], lambda data: b"\0" * len(data),
    lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:],
    lambda data: b"not an index"])
def test_a_damaged_index_is_made_again(tree, trusting, caplog, damage):
    read(tree)
    whole = (tree / FILE).read_bytes()
    (tree / FILE).write_bytes(damage(whole))
    check(tree, read(tree))
    assert f"{FILE}: cannot be used" in caplog.text
    caplog.clear()
    check(tree, read(tree, parse=None))
    assert not caplog.text


def test_another_version_is_made_again(tree, trusting, monkeypatch, caplog):
    read(tree)
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    check(tree, read(tree))
    assert "another version" in caplog.text


def test_a_pickle_in_its_place_is_never_run(tree, trusting, caplog):
    np.savez(tree / FILE, version=index.VERSION, paths=np.array([{"a": 1}], dtype=object))
    check(tree, read(tree))
    assert "cannot be used" in caplog.text


def test_a_write_that_is_cut_off_leaves_the_old_index(tree, trusting, monkeypatch):
    read(tree)
    before = (tree / FILE).read_bytes()
    (tree / listing(tree)[0]).unlink()

    def killed(file, **_):
        file.write(before[:100])
        raise KeyboardInterrupt
    monkeypatch.setattr(index.np, "savez", killed)
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
        monkeypatch.setattr(index, "replacing", refuse)
    check(tree, read(tree))
    parsed = []
    found = read(tree, parse=lambda paths: (parsed.extend(paths), parse_columns(paths))[1], prefix="database/2021_")
    assert len(found["paths"]) == 24 and len(parsed) == (24 if how == "asked" else 48)
    assert os.listdir(tree) == ["database"] and "cannot be written to" in caplog.text


def test_a_small_data_set_gets_no_index(tree, trusting):
    check(tree, read(tree, min_images=49))
    assert os.listdir(tree) == ["database"]
    read(tree, min_images=48)
    assert (tree / FILE).is_file()


def test_links_to_folders_are_followed_once(tree, tmp_path_factory, trusting):
    disk = tmp_path_factory.mktemp("disk")
    first = (tree / listing(tree)[0]).parent
    shutil.move(first, disk / first.name)
    first.symlink_to(disk / first.name)
    (first / "up").symlink_to(tree / "database")  # would never end
    linked = [f"{first.relative_to(tree)}/{path.name}" for path in (disk / first.name).glob("*.jpg")]
    for _ in range(2):
        assert paths_of(read(tree)) == sorted(linked + listing(tree))
    (disk / first.name).rename(disk / "elsewhere")
    assert paths_of(read(tree)) == listing(tree)


def test_an_empty_folder_and_one_that_becomes_empty(tmp_path, trusting):
    (tmp_path / "database").mkdir()
    assert len(read(tmp_path)["paths"]) == 0
    touch(tmp_path, grid.image_path(9, 200, 100, 2021))
    check(tmp_path, read(tmp_path))
    (tmp_path / listing(tmp_path)[0]).unlink()
    assert len(read(tmp_path)["paths"]) == 0 and read(tmp_path)["footprints"].shape == (0, 4, 2)


def test_a_name_that_does_not_parse_is_named_and_nothing_is_written(tree, trusting):
    touch(tree, "database/2021_09/0_0/holiday.jpg")
    with pytest.raises(ValueError, match="database/2021_09/0_0/holiday.jpg"):
        read(tree)
    assert os.listdir(tree) == ["database"]


def test_many_at_once_write_one_whole_index(tree, trusting):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read(tree), range(16)))
    assert all(paths_of(each) == listing(tree) for each in found)
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
