"""A tiny world in the exact layout: 24 regions × 4 years near Texas and the Alps, 10 queries, the intersections."""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import grid
from datasets.names import DATABASE_YEAR, YEARS, Catalogue, ImageName
from datasets.overlap import INTERSECTIONS_FILE, intersections_table, save_intersections

ZOOM, SIZE = 9, 64
# Upper left tiles of two blocks of 3 × 4 regions, around 30 N 95 W (Texas) and 45 N 10 E (Alps).
BLOCKS = ((208, 116), (181, 266))


@dataclass(frozen=True)
class World:
    path: Path
    regions: list  # (zoom, row, col)

    def image(self, region, year=DATABASE_YEAR):
        return self.path / grid.image_path(*region, year)


def region_picture(region, year):
    """Blocks of colour that are the region's own, and weaker noise that is the year's -> PIL image."""
    coarse = np.random.default_rng(region).integers(40, 216, (8, 8, 3)).astype(np.float64)
    noise = np.random.default_rng([*region, year]).normal(0, 12, (SIZE, SIZE, 3))
    return Image.fromarray((np.kron(coarse, np.ones((SIZE // 8, SIZE // 8, 1))) + noise).clip(0, 255).astype(np.uint8))


def query_of(region, number):
    """A turned photo of the middle of a region -> its ImageName and PIL image."""
    corners = grid.footprints([region])[0]
    middle = corners.mean(axis=0)
    corners = middle + 0.75 * (corners - middle)
    edge = SIZE // 8
    picture = region_picture(region, 2020).crop((edge, edge, SIZE - edge, SIZE - edge))
    turns = number % 4
    picture = picture.rotate(90 * turns)  # anticlockwise
    corners = np.roll(corners, -turns, axis=0)  # what was top left is bottom left after one turn
    name = ImageName(
        footprint=tuple(map(tuple, corners.round(6).tolist())),
        image_id=f"TEST00-E-{number}",
        timestamp="20200102",
        nadir=tuple(middle.round(1).tolist()),
        area=int(grid.quadrilateral_area(corners)),
        orientation=(-90.0 * turns + 180) % 360 - 180,
    )
    return name, picture


def make_world(path):
    regions = [(ZOOM, row + 2 * i, col + 2 * j) for row, col in BLOCKS for i in range(3) for j in range(4)]
    for region in regions:
        for year in YEARS:
            file = path / grid.image_path(*region, year)
            file.parent.mkdir(parents=True, exist_ok=True)
            region_picture(region, year).save(file, quality=92)
    (path / "queries").mkdir()
    for number in range(10):
        name, picture = query_of(regions[number * 7 % 24], number)
        picture.save(path / "queries" / str(name), quality=92)
    table = intersections_table(Catalogue.read(path, "queries"), Catalogue.read(path, "database", DATABASE_YEAR))
    save_intersections(path / INTERSECTIONS_FILE, table)
    return World(path, regions)


@pytest.hookimpl(trylast=True)  # after the random order
def pytest_collection_modifyitems(items):
    """Tests on the pretended GPU come last: autograd then has threads for it, and a process forked later cannot run
    backward any more."""
    items.sort(key=lambda item: hasattr(item.module, "pretended_gpu"))


def pytest_unconfigure():
    # milvus-lite's servers stop at the interpreter's end and say so, in a stream of pytest's that is closed by then.
    logging.raiseExceptions = False


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Shared by all tests: read only."""
    return make_world(tmp_path_factory.mktemp("tiny_world"))


# Nadirs from which each block can be seen, and that belong to no evaluation set.
FAR_NADIRS = ((5.0, -90.0), (70.0, 10.0))


@pytest.fixture(scope="session")
def photo_world(world, tmp_path_factory):
    """The tiny world with 12 more photos, whose nadirs belong to no evaluation set: read only."""
    path = tmp_path_factory.mktemp("photo_world") / "world"
    shutil.copytree(world.path, path)
    for number, region in enumerate(world.regions[::2]):
        name, picture = query_of(region, number + 10)
        name = replace(name, nadir=FAR_NADIRS[region[1] < 200])
        picture.save(path / "queries" / str(name), quality=92)
    table = intersections_table(Catalogue.read(path, "queries"), Catalogue.read(path, "database", DATABASE_YEAR))
    save_intersections(path / INTERSECTIONS_FILE, table)
    return World(path, world.regions)


@pytest.fixture
def own_world(world, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(world.path, tmp_path / "world")
    return World(tmp_path / "world", world.regions)


@pytest.fixture(autouse=True)
def root_logger():
    """What a script does to the root logger ends with the test."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield
    for handler in list(logger.handlers):
        if handler not in handlers:
            logger.removeHandler(handler)
            handler.close()
    for handler in handlers:
        if handler not in logger.handlers:
            logger.addHandler(handler)
    logger.setLevel(level)
