"""What counts as an image in a folder: written down by hand, and the same for all who list one."""

import os

import pytest

from datasets import grid, listing
from datasets.build import cache, check
from datasets.gps import find_images
from datasets.listing import UNSETTLED, as_known, list_files, walk
from datasets.names import Catalogue, ImageName

REGION = grid.image_path(9, 220, 300, 2021)
QUERY = str(ImageName(((10, 20), (11, 20), (11, 21), (10, 21)), "T-E-1", "20200101", (10, 20), 1, 0.0))


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


@pytest.fixture
def nasty(tmp_path):
    """-> a data set with all that file systems do to one, and the paths of its images."""
    root, name = tmp_path / "data", REGION.rsplit("/", 1)[1]
    images = [
        REGION,
        "database/2021_09/0_0/" + name.replace(".jpg", ".JPEG"),
        "database/2018_09/a-b/" + name,
        "database/2018_09/a/" + name.replace(".jpg", ".png"),
        "database/linked/" + name,
        f"queries/{QUERY}",
        "queries/link" + QUERY.replace("T-E-1", "T-E-2"),
        "queries/deep/er/" + QUERY.replace("T-E-1", "T-E-3"),
        "queries/dead" + QUERY.replace("T-E-1", "T-E-4"),
    ]
    images[6], images[8] = images[6].replace("link@", "@"), images[8].replace("dead@", "@")
    touch(root, *(path for k, path in enumerate(images) if k not in (4, 6, 8)))
    touch(root, "database/2021_09/0_0/._" + name, "queries/.hidden/" + QUERY, "queries/notes.txt", "queries/x.jpg.tmp")
    touch(tmp_path, f"disk/{name}", "disk/photo")
    (root / "database" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "up").symlink_to(root / "database")  # a loop
    (root / "queries" / "self").symlink_to("self")
    (root / "queries" / "folder.jpg").mkdir()
    (root / images[6]).symlink_to(tmp_path / "disk" / "photo")
    (root / images[8]).symlink_to("nothing")  # stays in the list, so that reading it names it
    strange = os.fsencode(f"queries/{QUERY}").replace(b"T-E-1", b"T-\xff-5")
    try:
        os.close(os.open(os.path.join(os.fsencode(root), strange), os.O_CREAT))
        images.append(os.fsdecode(strange))
    except OSError:  # this file system takes text only
        pass
    return root, sorted(images)


def test_all_who_list_a_data_set_see_the_same_images(nasty):
    root, images = nasty
    parts = [[path for path in images if path.startswith(part)] for part in ("database", "queries")]
    assert [sorted(Catalogue.read(root, part).paths) for part in ("database", "queries")] == parts
    assert [sorted(found) for found in check.list_folder(root)[:2]] == parts
    assert sorted(cache.stamps(root)) == images
    assert sorted(str(path.relative_to(root)) for path in find_images([root])) == images


def test_files_that_are_no_image_are_told(nasty):
    root, _ = nasty
    assert check.list_folder(root)[2] == sorted(
        [
            "database/2021_09/0_0/._" + REGION.rsplit("/", 1)[1],
            "database/linked/photo",
            "queries/notes.txt",
            "queries/self",
            "queries/x.jpg.tmp",
        ]
    )


def test_the_cache_of_a_nasty_data_set_leaves_out_what_cannot_be_read(nasty, tmp_path):
    root, images = nasty
    made, errors = cache.make_cache(root, tmp_path / "small", num_workers=0)
    assert made == 0 and len(errors) == len(images) and list_files(tmp_path / "small")[0] == []


def test_folders_come_in_the_order_of_the_paths_of_their_images(tmp_path):
    names = ["a", "a-b", "a/c", "a0", "b", "a.d/e"]
    touch(tmp_path, *(f"{folder}/{k}.jpg" for folder in names for k in (2, 1)))
    assert list_files(tmp_path)[0] == sorted(f"{folder}/{k}.jpg" for folder in names for k in (1, 2))
    assert [folder.decode() for folder, *_ in walk(tmp_path)] == ["", "a-b", "a.d", "a.d/e", "a", "a/c", "a0", "b"]
    assert list(walk(tmp_path, "nowhere")) == [] and list_files(tmp_path, "b") == (["b/1.jpg", "b/2.jpg"], [])


def test_known_folders_are_not_listed_unless_they_changed(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "a/b/2.jpg", "c/3.jpg")
    assert {times for _, times, *_ in walk(tmp_path)} == {UNSETTLED}  # a moment ago: they could change again unseen
    monkeypatch.setattr(listing, "RACY_SECONDS", -1)
    known = {folder: times for folder, times, *_ in walk(tmp_path)}
    again = list(walk(tmp_path, subfolders_of=as_known(known)))
    assert [(folder, images) for folder, _, images, _ in again] == [
        (b"", None),
        (b"a", None),
        (b"a/b", None),
        (b"c", None),
    ]
    (tmp_path / "a" / "b" / "4.jpg").touch()
    (tmp_path / "c" / "3.jpg").unlink()
    (tmp_path / "c").rmdir()
    again = {folder: images for folder, _, images, _ in walk(tmp_path, subfolders_of=as_known(known))}
    assert again == {b"": [], b"a": None, b"a/b": [b"2.jpg", b"4.jpg"]}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg")

    def refuse(place):
        raise PermissionError(13, "Permission denied", os.fsdecode(place))

    monkeypatch.setattr(listing.os, "scandir", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        list_files(tmp_path)
