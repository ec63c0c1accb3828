"""From photos to places in Python: what goes in, what comes out, and what registration changes."""

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import grid
from datasets.nadirs import Nadir
from models.config import ModelConfig
from models.earthloc import EarthLoc, build_model, load_model
from models.weights import save_safetensors, weights_fingerprint
from predict import Locator, Place
from retrieval.database import Dataset, Index, Places
from retrieval.earth_index import compress
from retrieval.locator import COLUMNS, as_pixels, by_inliers, own_columns, turn_footprint


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig("resnet18", cut_after="layer1", aggregator="gem", descriptor_dim=32, image_size=32)
    return build_model(config, "none").eval()


@pytest.fixture
def locator(world, model, tmp_path):
    places = Dataset.read(world.path, model, tmp_path / "descriptors", image_size=32)
    return Locator(model, places)


def test_paths_and_pixels_lead_to_the_same_places(locator, world):
    regions = [world.regions[k] for k in (2, 15, 20)]
    paths = [world.image(region) for region in regions]
    pixels = [np.array(Image.open(path)) for path in paths]
    of_paths = locator(paths, top_k=2)
    of_pixels = locator([Image.open(paths[0]), pixels[1], torch.from_numpy(pixels[2]).permute(2, 0, 1)], top_k=2)
    for number, (region, places, others) in enumerate(zip(regions, of_paths, of_pixels)):
        assert [place.rank for place in places] == [1, 2]
        assert [place.image for place in places] == [str(paths[number])] * 2
        assert [place.image for place in others] == [number] * 2
        np.testing.assert_allclose(places[0].footprint, grid.footprints([region])[0])
        center = grid.footprints([region])[0].mean(axis=0)
        np.testing.assert_allclose((places[0].latitude, places[0].longitude), center, atol=0.02)
        assert others[0].database_image == places[0].database_image and others[0].score > 0.99


def test_nadirs_are_the_photos_own(locator, world):
    paths = [world.image(world.regions[k]) for k in (2, 15)]
    texas, alps = (30.0, -95.0), (45.0, 10.0)
    for nadirs in ([texas, alps], [alps, texas], [None, alps], [texas, None]):
        for places, nadir in zip(locator(paths, nadirs, top_k=1), nadirs):
            assert places[0].nadir == nadir
            assert nadir is None or (places[0].longitude < 0) == (nadir is texas)
    with pytest.raises(ValueError, match="nadirs, row 1: latitude 95"):
        locator(paths, [None, (95, 0)])
    with pytest.raises(ValueError, match="1 nadirs for 2 images"):
        locator(paths, [texas])


def test_photos_are_taken_to_look_as_far_as_the_public_ones_or_anywhere(world, model):
    """Of two that look nearly as alike the one at the nadir comes first; where any distance is as likely, it does not;
    and one that looks much less alike comes last, though it is nearer."""
    regions = np.array([(8, 100, 60), (8, 100, 66), (8, 100, 72)])  # 760 km from one to the next

    class Made:
        footprints = grid.footprints(regions)

        def search(self, photos, rows, k):
            best = np.tile(np.array([2, 0, 1])[:k], (photos.shape[1], 1))
            return np.tile([0.52, 0.51, 0.4][:k], (photos.shape[1], 1)), best, np.zeros_like(best)

    Made.regions = regions
    nadir = tuple(grid.footprints(regions)[0].mean(axis=0))
    image = world.image(world.regions[0])
    rows = lambda *nadirs, **settings: [
        [place.row for place in places]
        for places in Locator(model, Index(Made(), "earth.index"), **settings)([image] * len(nadirs), nadirs)
    ]
    assert rows(nadir) == [[0, 2, 1]] and rows(nadir, None) == [[0, 2, 1], [2, 0, 1]]
    assert rows(nadir, prior="uniform") == [[2, 0, 1]]
    with pytest.raises(ValueError, match="--prior near: expected archive or uniform"):
        Locator(model, Index(Made(), "earth.index"), prior="near")


def test_what_cannot_be_read_has_no_place_and_costs_no_other(locator, world, tmp_path, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    paths = [
        tmp_path / "broken.jpg",
        world.image(world.regions[0]),
        tmp_path / "none.jpg",
        world.image(world.regions[1]),
    ]
    with caplog.at_level(logging.WARNING):
        found = locator(paths, [None, None, None, (-80, 0)], top_k=1)
    assert [len(places) for places in found] == [0, 1, 0, 0]
    assert "broken.jpg: cannot be read" in caplog.text and "none.jpg: no such image" in caplog.text
    assert "shows nothing within 2500 km of -80, 0" in caplog.text


def test_batches_come_in_order_whatever_their_size(locator, world):
    paths = [world.image(region) for region in world.regions[:7]]
    locator.settings["batch_size"] = 3
    batches = list(locator.stream(paths, lambda number: Nadir(None, "none"), top_k=1))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert [answer.image for batch in batches for answer in batch] == list(map(str, paths))
    whole = [places[0].score for places in locator(paths, top_k=1)]
    np.testing.assert_allclose([answer.places[0].score for batch in batches for answer in batch], whole, atol=1e-5)


def test_an_index_is_asked_with_the_photo_in_four_turns(model, world):
    asked = []

    class Made:
        regions = np.array(world.regions)
        footprints = grid.footprints(world.regions)

        def search(self, photos, rows, k):
            asked.append((photos, rows))
            best = np.tile(rows[:k], (photos.shape[1], 1))
            return np.ones(best.shape), best, np.full(best.shape, 90)

    image = torch.from_numpy(np.array(Image.open(world.image(world.regions[0])).resize((32, 32)))).permute(2, 0, 1)
    places = Locator(model, Index(Made(), "earth.index"))([image, image], top_k=2)
    ((photos, rows),) = asked
    assert photos.shape == (4, 2, 32) and rows.tolist() == list(range(24))
    with torch.inference_mode():
        for turn in range(4):
            expected = model(torch.rot90(image, turn, (1, 2))[None].float() / 255)[0].numpy()
            np.testing.assert_allclose(photos[turn, 0], expected, atol=1e-5)
    assert places[0][0].rotation == 90 and places[0][1].database_image == "_".join(map(str, world.regions[1]))


def test_a_place_as_a_dict_has_the_named_properties_and_the_tables_columns():
    square = np.zeros((4, 2))
    place = Place("a", 1, 0.5, 7, 0.9, True, 1.0, 2.0, 90, "b", 3, (4.0, 5.0), square, 0, {"who": "x", "score": "y"})
    properties = place.as_dict()
    assert list(properties) == [*COLUMNS, "who", "table_score"]
    assert list(properties.values()) == ["a", 1, 0.5, 7, 0.9, True, 1.0, 2.0, 90, "b", 3, 4.0, 5.0, "x", "y"]
    assert own_columns({"rank": 1, "x": 2}) == {"table_rank": 1, "x": 2}


def test_a_turned_footprint_lists_the_corners_of_the_turned_image():
    """Each corner pixel says where it is; after the turn, the corner pixels are those of the listed corners."""
    corners = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])  # from the bottom left, clockwise
    picture = np.array([[(1, 0), (1, 1)], [(0, 0), (0, 1)]])  # rows from the top: (lat, lon)
    for degrees in (0, 90, 180, 270):
        turned = np.rot90(picture, degrees // 90)
        expected = [turned[1, 0], turned[0, 0], turned[0, 1], turned[1, 1]]
        np.testing.assert_array_equal(turn_footprint(corners, degrees), expected)


def test_places_are_ordered_by_inliers_and_repeats_come_last():
    few, many = SimpleNamespace(inliers=5), SimpleNamespace(inliers=50)
    assert by_inliers([None, few, many, None, few, many]) == [2, 1, 0, 3, 5, 4]
    assert by_inliers([None, None]) == [0, 1] and by_inliers([]) == []


@pytest.fixture
def registering(monkeypatch):
    """Stands in for retrieval.registration and .confidence -> what register is to return, and what it was asked."""
    asked, results = [], []

    def register(photo, candidates, ground, matcher, nadir=None):
        asked.append((photo, candidates, ground, matcher, nadir))
        return results[: len(candidates)] + [None] * (len(candidates) - len(results))

    fake = SimpleNamespace(register=register)
    monkeypatch.setitem(sys.modules, "retrieval.registration", fake)
    confidence = SimpleNamespace(probability=lambda found, *_: found.inliers / 100, VERIFIED=0.5)
    monkeypatch.setitem(sys.modules, "retrieval.confidence", confidence)
    return asked, results


def test_registered_places_have_the_photos_own_footprint_and_come_first(locator, world, registering, monkeypatch):
    asked, results = registering
    path, nadir = world.image(world.regions[2]), (30.0, -95.0)
    plain = locator([path], [nadir], top_k=4)[0]
    corners = np.array([(10.0, 179.5), (12.0, 179.0), (12.5, -179.0), (10.5, -178.5)])
    results[:] = [None, SimpleNamespace(inliers=60, footprint=corners, rotation=12.34)]
    results.append(SimpleNamespace(inliers=12, footprint=corners[[1, 2, 3, 0]], rotation=102.0))
    monkeypatch.setattr(Dataset, "ground", "the ground")
    locator.matcher, locator.candidates = "a matcher", 4
    places = locator([path], [nadir], top_k=3)[0]
    ((photo, candidates, ground, matcher, near),) = asked
    assert (ground, matcher, near) == ("the ground", "a matcher", nadir) and photo.shape == (3, 64, 64)
    for (footprint, rotation), place in zip(candidates, plain, strict=True):
        assert rotation == place.rotation
        np.testing.assert_array_equal(turn_footprint(footprint, rotation), place.footprint)
    assert [place.database_image for place in places] == [plain[k].database_image for k in (1, 2, 0)]
    assert [(place.inliers, place.probability, place.verified) for place in places] == [
        (60, 0.6, True),
        (12, 0.12, False),
        (0, 0.0, False),
    ]
    assert [place.rotation for place in places] == [12.3, 102.0, plain[0].rotation]
    np.testing.assert_array_equal(places[0].footprint, corners)
    assert places[0].longitude == pytest.approx(-179.75, abs=0.01)  # not on the other side of the Earth
    beyond = corners + [(0, 0), (0, 0), (0, 360), (0, 360)]
    assert places[0].area_km2 == pytest.approx(grid.quadrilateral_area(beyond), abs=1)
    np.testing.assert_array_equal(places[2].footprint, plain[0].footprint)
    assert places[2].area_km2 == plain[0].area_km2


def test_a_large_photo_is_registered_at_1024_pixels_as_a_viewer_shows_it(locator, world, registering, tmp_path):
    asked, _ = registering
    locator.matcher = "a matcher"
    picture = Image.open(world.image(world.regions[2])).resize((1800, 1200))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "large.jpg", exif=exif)
    locator.places.ground = None
    locator([tmp_path / "large.jpg", picture])
    assert [each[0].shape for each in asked] == [(3, 1024, 683), (3, 683, 1024)]
    upright = np.rot90(np.array(picture.resize((1024, 683))), -1).astype(float)
    assert np.abs(asked[0][0].permute(1, 2, 0).numpy() - upright).mean() < 6
    assert (asked[1][0].permute(1, 2, 0).numpy() - np.array(picture.resize((1024, 683))).astype(float)).std() < 6


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="an image of shape"):
        as_pixels(image)


def test_an_index_alone_cannot_register():
    with pytest.raises(ValueError, match="--register xfeat: an index has no pictures; give --ground"):
        Locator.from_files("x", index="y", register="xfeat")
    with pytest.raises(ValueError, match="--dataset_path and --index: give one"):
        Locator.from_files("x", "data", "index")


def test_by_itself_it_registers_where_there_is_ground(monkeypatch, world, tmp_path):
    model = EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 32, 32))
    save_safetensors(model, tmp_path / "a.safetensors")
    asked = []

    def stand_in(weights, device):
        asked.append(weights)
        return SimpleNamespace(name="one")

    monkeypatch.setattr("retrieval.matching.default_matcher", stand_in)
    make = lambda **more: Locator.from_files(tmp_path / "a.safetensors", world.path, **more)
    found = make(matcher_weights="w")
    assert (found.register, found.matcher.name, asked) == ("one", "one", ["w"])
    assert make(register="sift").matcher.name == make(register="sift").register == "sift"
    found = make(register="none")
    assert (found.register, found.matcher, len(asked)) == ("none", None, 1)


def test_an_index_of_other_weights_is_refused(tmp_path):
    """Its descriptors mean nothing to this model; with its own weights it searches, and shows the Blue Marble."""
    regions = np.array([(8, 100, 40 + 2 * k) for k in range(20)])
    vectors = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32)
    models = [EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 32, 32)) for _ in range(2)]
    for name, model in zip("ab", models):
        save_safetensors(model, tmp_path / f"{name}.safetensors")
    own = weights_fingerprint(load_model(tmp_path / "a.safetensors"))
    compress(regions, vectors, 16, own).save(tmp_path / "index.safetensors")
    with pytest.raises(ValueError, match="b.safetensors, so their descriptors cannot be compared"):
        Locator.from_files(tmp_path / "b.safetensors", index=tmp_path / "index.safetensors")
    locator = Locator.from_files(tmp_path / "a.safetensors", index=tmp_path / "index.safetensors")
    assert (locator.register, locator.matcher) == ("none", None)  # no ground to register on
    photo = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (places,) = locator([photo], top_k=4)
    assert len({place.row for place in places}) == 4
    picture = locator.places.picture(places[0].row, 24)
    assert picture.shape == (3, 24, 24) and picture.float().std() > 5


def test_places_without_a_search_say_so():
    with pytest.raises(NotImplementedError):
        Places("x", np.zeros((1, 4, 2)), ["a"], np.ones(1)).search(None, None, 1)
