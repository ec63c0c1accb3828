"""The full-size script on a small tree."""

import numpy as np
import pytest

from benchmarks import full_size
from datasets.names import YEARS
from datasets.regions import Regions
from datasets.sets import load_evaluation_data
from utils.flags import call

REGIONS = np.array([(zoom, row, col) for zoom in (5, 6) for row in range(10, 16, 2) for col in range(4, 20, 2)])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    return folder, full_size.make_tree(folder, None, lambda: REGIONS)


def test_the_tree_is_a_data_set(tree):
    folder, count = tree
    regions, missing = Regions.read(folder)
    data = load_evaluation_data(folder)
    assert missing == [] and regions.years == YEARS and len(data.database) == len(regions) == len(REGIONS) == 48
    assert count == 4 * 48 + 24 == sum(1 for _ in folder.rglob("*.jpg")) and len(data.queries) == 24
    # A query is one region's footprint: it, and what overlaps it.
    assert {(query, image) for query, image in data.pairs.tolist()} == {
        (query, image)
        for query, a in enumerate(data.queries.footprints)
        for image, b in enumerate(data.database.footprints)
        if (np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]) > 1e-4).all()
    }
    assert full_size.make_tree(folder, "not asked for again", None) == count


def test_openings_say_what_they_found(tree):
    assert "regions with four years, 0 without" in full_size.open_both(tree[0])
    assert "ms a batch of 32" in full_size.neutral_test(tree[0], batches=2)


def test_a_folder_that_holds_something_else_is_left_alone(world):
    before = sorted(world.path.rglob("*"))
    with pytest.raises(ValueError, match=f"{world.path}: is not empty"):
        full_size.make_tree(world.path, None, lambda: REGIONS)
    assert sorted(world.path.rglob("*")) == before


def test_an_unfinished_tree_goes_on(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        full_size.make_tree(tmp_path, None, stop)
    assert full_size.make_tree(tmp_path, None, lambda: REGIONS[:2]) == 2 * 4 + 2


@pytest.mark.slow
def test_the_script(tree, capfd):
    call(full_size.main, ["--folder", str(tree[0]), "--zooms", "5"])
    text = capfd.readouterr().out
    assert "train.py: both, index" in text and "neutral test" in text
