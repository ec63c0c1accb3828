"""Pairs of photos and database images: who is in them, what they look like, and training with them."""

import shutil

import numpy as np
import pytest
import shapely
import torch
from test_resume import differences, go, losses, same_end, signal_at

import train
from datasets.batches import BatchLoader
from datasets.images import read_image
from datasets.kinds import PhotoPairs, Quadruplets, join, paths_of
from datasets.names import Catalogue, ImageName
from datasets.overlap import INTERSECTIONS_FILE, load_intersections
from datasets.pairs import PairDataset, read_pairs, schedule_pairs
from datasets.regions import Regions
from datasets.sets import load_evaluation_data
from datasets.training import neutral_pairs, serve_pairs
from retrieval.describe import Describer
from retrieval.reclustering import photo_shares, shares_of
from utils.checkpoint import load_checkpoint, save_checkpoint

BOTH = ("--positives", "years+photos", "--cluster_draw", "photos")


@pytest.fixture(scope="module")
def regions(photo_world):
    return Regions.read(photo_world.path)[0]


@pytest.fixture(scope="module")
def pairs(photo_world, regions):
    return read_pairs(photo_world.path, regions, 0.2, 4)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def shape(name):
    """A name's footprint in the equal-area projection, by hand."""
    corners = ImageName.parse(name).footprint
    return shapely.convex_hull(shapely.MultiPoint([(lon, np.degrees(np.sin(np.radians(lat)))) for lat, lon in corners]))


@pytest.mark.parametrize("least", [0.05, 0.2, 0.5])
def test_pairs_are_those_of_shapely(photo_world, regions, least):
    """Every photo outside the sets with every region, one by one."""
    expected = set()
    for photo in (photo_world.path / "queries").glob("*.jpg"):
        if ImageName.parse(photo.name).nadir not in {(5.0, -90.0), (70.0, 10.0)}:
            continue
        own = shape(photo.name)
        for paths in regions.paths:
            other = shape(paths[-1])
            if own.intersection(other).area / own.union(other).area >= least:
                expected.add((f"queries/{photo.name}", paths))
    pairs = read_pairs(photo_world.path, regions, least, 4)
    found = [(pairs.photos.paths[photo], regions.paths[region]) for photo, region in pairs.shown]
    assert set(found) == expected and len(found) == len(expected) > 10
    assert len(pairs) == 4 * len(found)
    listed = {pairs.paths_of(row) for row in range(len(pairs))}
    assert listed == {(photo, path) for photo, paths in expected for path in paths}


def test_no_photo_of_an_evaluation_set_takes_part(photo_world, regions):
    """By the sets that eval.py makes, those without a positive too."""
    data = load_evaluation_data(photo_world.path)
    rows = np.unique(np.concatenate([np.concatenate([one.query_rows, one.left_out]) for one in data.sets]))
    evaluated = set(data.queries.paths[rows])
    used = set(read_pairs(photo_world.path, regions, 0.0, 4).photos.paths)
    assert len(evaluated) == 10 and len(used) == 12 and not evaluated & used


def test_a_table_without_positives_changes_nothing(photo_world, regions, tmp_path):
    """Listed without a positive: evaluation leaves it out, training does too."""
    path = shutil.copytree(photo_world.path, tmp_path / "world")
    table = load_intersections(path / INTERSECTIONS_FILE)
    torch.save({name: [] for name in table}, path / INTERSECTIONS_FILE)
    assert len(read_pairs(path, Regions.read(path)[0], 0.2, 4).photos) == 12


def test_2500_km_are_the_edge_of_a_set(photo_world, regions, tmp_path):
    """2,500 km from a set's point on the sphere of 6,371 km: half a kilometre decides."""
    path = shutil.copytree(photo_world.path, tmp_path / "world")
    photos = sorted((path / "queries").glob("*TEST00-E-1[0-9]*"))
    for photo, km in zip(photos, (2499.5, 2500.5)):
        north = 45 + np.degrees(km / 6371)
        name = ImageName.parse(photo.name)
        fields = photo.name.split("@")
        assert fields[11:13] == [f"{value:.1f}" for value in name.nadir]
        fields[11:13] = f"{north:.6f}", "10.0"
        photo.rename(photo.with_name("@".join(fields)))
    used = read_pairs(path, regions, 0.2, 4).photos
    assert len(used) == 11 and any(np.isclose(used.nadirs[:, 0], 45 + np.degrees(2500.5 / 6371)))


def test_too_few_photos_are_an_error_that_names_the_remedy(photo_world, world, regions):
    with pytest.raises(ValueError, match="12 photos outside the evaluation sets .*; use a smaller --batch_size"):
        read_pairs(photo_world.path, regions, 0.2, 13)
    with pytest.raises(ValueError, match="queries: 0 photos outside the evaluation sets"):
        read_pairs(world.path, regions, 0.2, 1)


def test_photos_lie_as_their_region_does(photo_world, pairs):
    """The photo turned back looks like the middle of its region, whatever way it was held; the image is its year's."""
    dataset = PairDataset(pairs, 48)
    turns = set()
    for row in range(len(pairs)):
        _, (photo, image) = dataset[row]
        photo_path, image_path = pairs.paths_of(row)
        assert torch.equal(image, read_image(photo_world.path / image_path, 48))
        centers = [np.mean(ImageName.parse(path).footprint, axis=0) for path in (photo_path, image_path)]
        if not np.allclose(*centers, atol=1e-3):
            continue  # a neighbour's
        middle = image[:, 6:42, 6:42].float()
        middle = torch.nn.functional.interpolate(middle[None], (48, 48), mode="bilinear")[0]
        errors = [(torch.rot90(photo.float(), k, (1, 2)) - middle).abs().mean() for k in range(4)]
        assert int(np.argmin(errors)) == 0 and errors[0] < 20 < min(errors[1:])
        turns.add(int(pairs.turns[pairs.photo_of(row)]))
    assert turns == {0, 1, 2, 3}


def test_the_schedule_takes_each_photo_once_a_pass_in_any_region_and_year(pairs):
    batches = schedule_pairs(pairs, 5, 400, [1, 2])
    assert batches.shape == (400, 5) and set(batches.ravel().tolist()) == set(range(len(pairs)))
    photos = np.vectorize(pairs.photo_of)(batches)
    for start in range(0, 400, 2):  # a pass of 12 photos is two batches of 5
        assert len(np.unique(photos[start : start + 2])) == 10
    assert np.array_equal(batches, schedule_pairs(pairs, 5, 400, [1, 2]))
    assert np.array_equal(batches[:7], schedule_pairs(pairs, 5, 7, [1, 2]))
    assert not np.array_equal(batches, schedule_pairs(pairs, 5, 400, [1, 3]))


def test_a_broken_photo_is_named_once_and_replaced(photo_world, tmp_path):
    path = shutil.copytree(photo_world.path, tmp_path / "world")
    own = read_pairs(path, Regions.read(path)[0], 0.2, 4)
    (path / own.photos.paths[3]).write_bytes(b"no picture")
    kind = PhotoPairs(own, BatchLoader(PairDataset(own, 16), 0), 0.1)
    kind.serve({}, "size", 4, 0, 30, 30, 5, slice(0, 4))
    for rows, _, errors in kind.served:
        assert 3 not in [own.photo_of(row) for row in kind.receive(rows, errors)]
    assert list(kind.unreadable) == [3] and str(path / own.photos.paths[3]) in kind.unreadable[3]
    (path / own.photos.paths[4]).write_bytes(b"no picture")
    kind.serve({}, "size", 4, 0, 30, 30, 5, slice(0, 4))
    with pytest.raises(ValueError, match="2 of 12 photos have an image that cannot be read"):
        for rows, _, errors in kind.served:
            kind.receive(rows, errors)


def test_a_period_served_in_parts_is_the_same_batches(pairs):
    loader = BatchLoader(PairDataset(pairs, 8), 0)
    serve = lambda iteration, part: [
        rows.tolist() for rows, *_ in serve_pairs(loader, pairs, 4, iteration, 6, 10, 3, part)
    ]
    whole = serve(0, slice(0, 4))
    assert len(whole) == 6 and serve(2, slice(0, 4)) == whole[2:] and len(serve(6, slice(0, 4))) == 4
    assert [a + b for a, b in zip(serve(0, slice(0, 2)), serve(0, slice(2, 4)))] == whole
    assert serve(6, slice(0, 4)) != whole[:4]


def test_labels_are_regions_and_shared_ground_is_neutral(regions, pairs):
    """Both kinds in one batch, against shapely."""
    rows = np.array([0, 5, 9]), np.array([0, 7, 41, 8])
    footprints, places, labels = join([regions, pairs], rows)
    paths = paths_of([regions, pairs], rows)
    assert len(paths) == len(labels) == len(places) == 3 * 4 + 4 * 2
    assert labels[:12].tolist() == np.repeat(rows[0], 4).tolist()
    for k, row in enumerate(rows[1]):
        photo, image = paths[12 + 2 * k : 14 + 2 * k]
        region = int(labels[12 + 2 * k])
        assert labels[13 + 2 * k] == region and image in regions.paths[region] and photo.startswith("queries/")
        assert (photo, image) == pairs.paths_of(row)
    neutral = neutral_pairs(footprints, places)
    shapes = [shape(path) for path in paths]
    for i in range(len(paths)):
        for j in range(len(paths)):
            shared = shapes[i].intersection(shapes[j]).area > 1e-3
            assert bool(neutral[i, j]) == (shared and not (labels[i] == labels[j] and i < 12 and j < 12 or i == j)), (
                i,
                j,
            )


def test_shares_of_photos_against_plain_loops():
    rng = np.random.default_rng(0)
    points, centers = rng.normal(size=(40, 3)), rng.normal(size=(5, 3)) * 2
    expected = np.zeros(5)
    for point in points:
        distances = [sum((a - b) ** 2 for a, b in zip(point, center)) for center in centers]
        expected[distances.index(min(distances))] += 1 / 40
    assert shares_of(points, centers) == pytest.approx(expected) and (expected > 0).sum() > 2


class Colours(torch.nn.Module):
    """The mean colour of the upper left quarter: it turns with the image."""

    def forward(self, x):
        return x[:, :, :8, :8].mean(dim=(2, 3))


def test_photos_are_described_with_north_up(photo_world, regions, pairs):
    describer = Describer(Colours(), 16, 4, progress=False)
    dataset, own = PairDataset(pairs, 16), []
    for photo in range(len(pairs.photos)):
        row = 4 * int(np.searchsorted(pairs.shown[:, 0], photo))
        own.append(Colours()(dataset[row][1][:1].float() / 255)[0].numpy())
    kind = PhotoPairs(pairs, None, 0)
    assert photo_shares(describer, kind, np.array(own)) == pytest.approx(np.full(12, 1 / 12))


# Training


@pytest.fixture(scope="module")
def undisturbed(photo_world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        return go(photo_world, *BOTH)


def test_both_kinds_train_and_leave_their_pictures(undisturbed):
    log = (undisturbed / "info.log").read_text()
    assert "22 photos, 12 of them in no evaluation set, 12 of these show a region" in log
    assert (undisturbed / "batch.jpg").is_file() and (undisturbed / "pairs.jpg").is_file()
    state = load_checkpoint(undisturbed / "last.pt")
    assert state["iteration"] == 10 and len(state["shares"]) == len(state["clusters"])
    assert state["shares"].sum() == pytest.approx(1)
    first = load_checkpoint(undisturbed / "initial.pt")["model"]
    assert any(not torch.equal(first[key], state["model"][key]) for key in first)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(undisturbed))
    events.Reload()
    value = lambda tag: [each.value for each in events.Scalars(tag)]
    assert value("loss") == pytest.approx(np.add(value("loss/years"), value("loss/photos")), rel=1e-4)


POINTS = [("update", 5), *(pytest.param(*point, marks=pytest.mark.slow) for point in (("cluster", 1), ("load", 9)))]


@pytest.mark.parametrize("name, call", POINTS)
def test_stopped_anywhere_it_ends_with_the_same_bits(photo_world, undisturbed, monkeypatch, name, call):
    with monkeypatch.context() as patch:
        signal_at(patch, name, call)
        stopped = go(photo_world, *BOTH)
    assert not (stopped / "done").exists()
    assert same_end(undisturbed, resume(photo_world, stopped, workers=1)) == []


def test_without_the_shares_in_the_checkpoint_the_end_is_another(photo_world, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, "update", 5)
        stopped = go(photo_world, *BOTH)
    state = load_checkpoint(stopped / "last.pt")
    save_checkpoint(stopped / "last.pt", {**state, "shares": None})
    ends = (load_checkpoint(folder / "last.pt")["model"] for folder in (undisturbed, resume(photo_world, stopped)))
    assert differences(*ends) != []


def resume(photo_world, stopped, **more):
    return go(photo_world, *BOTH, "--resume", stopped, **more)


def test_pairs_alone_need_no_clusters(photo_world, monkeypatch):
    seen, update = [], train.update

    def watched(run, views, labels, neutral, loss_fn, *rest):
        seen.append((views.shape, labels.tolist(), type(loss_fn).__name__))
        return update(run, views, labels, neutral, loss_fn, *rest)

    monkeypatch.setattr(train, "update", watched)
    monkeypatch.setattr(train, "make_clusters", lambda *_: pytest.fail("no batch is clustered"))
    flags = "--positives", "photos", "--iterations", 2, "--validate_every", 2
    folder = go(photo_world, *flags)
    assert [each[0] for each in seen] == [(8, 3, 32, 32)] * 2 and {each[2] for each in seen} == {"PairwiseLoss"}
    go(photo_world, *flags, "--iterations", 1, "--pair_loss", "contrastive")
    assert seen.pop()[2] == "ContrastiveLoss"
    assert all(labels[::2] == labels[1::2] for _, labels, _ in seen)
    assert set(losses(folder)) == {1, 2} and not (folder / "batch.jpg").exists()


def test_clusters_by_photos_beside_no_pairs(photo_world):
    """MUM alone: quadruplets only, whose clusters photos choose."""
    folder = go(photo_world, "--cluster_draw", "photos", "--iterations", 5)
    assert load_checkpoint(folder / "last.pt")["shares"].sum() == pytest.approx(1)
    assert not (folder / "pairs.jpg").exists()


def test_kinds_tell_regions_and_photos_apart(regions, pairs):
    assert Quadruplets(regions, None, 0.5).sources == 24 and PhotoPairs(pairs, None, 0.5).sources == 12
    assert isinstance(pairs.photos, Catalogue)
