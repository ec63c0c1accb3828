"""Search, the two countings, chance, turning and describing, each against something worked out another way."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils import geo, retrieval
from utils.retrieval import recall_at


def test_recall_ignores_missing_neighbours():
    assert recall_at([[-1, 2]], [{2}], ks=(1, 2)) == {1: 0.0, 2: 100.0}


def test_recall_against_plain_loops():
    rng = np.random.default_rng(0)
    predictions = rng.integers(-1, 40, (50, 30))
    positives = [set(rng.choice(40, rng.integers(0, 4), replace=False).tolist()) for _ in range(50)]
    recalls = recall_at(predictions, positives, ks=(1, 7, 30, 100))
    for k, value in recalls.items():
        hits = [any(entry in right for entry in row[:k]) for row, right in zip(predictions.tolist(), positives)]
        assert value == pytest.approx(100 * sum(hits) / 50)


def test_recall_over_no_queries_is_an_error():
    with pytest.raises(ValueError, match="no queries"):
        recall_at(np.zeros((0, 5), dtype=int), [])


def test_the_two_countings():
    images = np.array([[7, 7, 3, 7, 3, 5, -1], [1, 2, 3, 4, 5, 6, 7]])
    positions = retrieval.first_of_each(images, 4)
    assert positions.tolist() == [[0, 2, 5, -1], [0, 1, 2, 3]]
    assert retrieval.take(images, positions, -1).tolist() == [[7, 3, 5, -1], [1, 2, 3, 4]]
    # Image 5 is sixth as they come, third over distinct images.
    assert recall_at(images[:1], [{5}], ks=(3, 6)) == {3: 0.0, 6: 100.0}
    assert recall_at(retrieval.take(images, positions, -1)[:1], [{5}], ks=(3,)) == {3: 100.0}


@pytest.mark.parametrize("block", [7, 1000])
def test_search_is_exact(block):
    rng = np.random.default_rng(1)
    database, queries = rng.normal(size=(100, 8)).astype(np.float32), rng.normal(size=(9, 8)).astype(np.float32)
    scores, indices = retrieval.search(database, queries, 12, block=block)
    expected = queries.astype(np.float64) @ database.T.astype(np.float64)
    assert np.array_equal(indices, np.argsort(-expected, axis=1)[:, :12])
    assert np.allclose(scores, np.sort(expected, axis=1)[:, ::-1][:, :12], atol=1e-5)


def test_search_in_some_rows_counts_within_them():
    database = np.eye(6, dtype=np.float16)
    scores, indices = retrieval.search(database, np.eye(6, dtype=np.float32)[4:5], 1, rows=[5, 4, 0])
    assert indices.tolist() == [[1]] and scores.tolist() == [[1.0]]


def test_search_for_more_than_there_is_gives_minus_one_not_the_last_image():
    scores, indices = retrieval.search(np.eye(3), np.eye(3)[:2], 5)
    assert (indices[:, 3:] == -1).all() and (scores[:, 3:] == -np.inf).all()
    assert sorted(indices[0, :3].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["query", "database"])
def test_search_refuses_nan(kind):
    database, queries = np.eye(4), np.eye(4)
    (queries if kind == "query" else database)[2, 1] = np.nan
    with pytest.raises(ValueError, match=f"1 {kind} descriptors are not finite.*row 2"):
        retrieval.search(database, queries, 2)
    if kind == "database":  # left out, it does no harm
        assert retrieval.search(database, queries[:1], 1, rows=[0, 1, 3])[1].tolist() == [[0]]


def test_random_choice_is_hypergeometric():
    stats = pytest.importorskip("scipy.stats")
    positives, images = np.array([1, 3, 50, 120, 0]), 120
    for k, value in retrieval.random_choice_recall(positives, images, ks=(1, 5, 100, 500)).items():
        expected = [1 - stats.hypergeom.pmf(0, images, p, min(k, images)) for p in positives]
        assert value == pytest.approx(100 * np.mean(expected))
    assert retrieval.random_choice_recall([2], 4, ks=(1, 2)) == pytest.approx({1: 50, 2: 100 * (1 - 1 / 6)})


def test_random_choice_keeps_its_precision_at_full_size():
    assert retrieval.random_choice_recall([60], 53012, ks=(1,))[1] == pytest.approx(100 * 60 / 53012, rel=1e-5)


def test_nearest_to_nadir_crosses_the_antimeridian():
    centers = np.array([(0, 0), (0, -179), (0, 170), (80, 180)])
    assert retrieval.nearest_to_nadir([(0, 179.5)], centers, 3).tolist() == [[1, 2, 3]]
    assert retrieval.nearest_to_nadir([(0, 179.5)], centers, 6).tolist() == [[1, 2, 3, 0, -1, -1]]


def test_nearest_to_nadir_of_more_nadirs_than_a_block():
    rng = np.random.default_rng(5)
    nadirs = np.stack([rng.uniform(-52, 52, 1100), rng.uniform(-180, 180, 1100)], axis=1)
    centers = np.stack([rng.uniform(-60, 60, 40), rng.uniform(-180, 180, 40)], axis=1)
    expected = np.argsort(geo.distance_km(nadirs[:, None], centers), axis=1)[:, :7]
    assert np.array_equal(retrieval.nearest_to_nadir(nadirs, centers, 7), expected)


def test_rotate_turns_counter_clockwise():
    image = torch.tensor([[[1, 2], [3, 4]]])  # 1 top left, 2 top right
    assert retrieval.rotate(image, 90).tolist() == [[[2, 4], [1, 3]]]
    assert torch.equal(retrieval.rotate(image, 180), image.flip(-1, -2))
    with pytest.raises(ValueError, match="45"):
        retrieval.rotate(image, 45)


def test_orientation_follows_north_around_the_image():
    """North is the bright edge of a north-up image; its angle from up, clockwise, is the orientation."""
    image = torch.zeros(1, 3, 3)
    image[0, 0] = 1
    clockwise_from_up = {"top": 0, "right": 90, "bottom": 180, "left": 270}
    for degrees in retrieval.ROTATIONS:
        turned = retrieval.rotate(image, degrees)[0]
        edges = {"top": turned[0], "right": turned[:, 2], "bottom": turned[2], "left": turned[:, 0]}
        north = max(edges, key=lambda edge: edges[edge].sum())
        assert retrieval.orientation_of(degrees) == clockwise_from_up[north]


def test_orientation_error_is_modulo_a_turn():
    error = retrieval.orientation_error([0, 270, 350, 180], [-33.4, -90, 10, 0])
    assert error.tolist() == pytest.approx([33.4, 0, 20, 180])


class Quadrants(torch.nn.Module):
    """A descriptor that can be worked out by hand: the mean colour of the four quadrants, normalised."""

    def forward(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return torch.nn.functional.normalize(pooled - pooled.mean(dim=1, keepdim=True), dim=1)


@pytest.fixture
def files(tmp_path):
    """Six images of four random colours each; the last is not an image."""
    rng = np.random.default_rng(3)
    paths = []
    for i in range(6):
        pixels = np.kron(rng.integers(0, 256, (2, 2, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    paths[5].write_bytes(b"not an image")
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_a_turned_photo_finds_its_image_with_the_turn(files, tmp_path, workers):
    queries = []
    for i, degrees in enumerate((0, 90, 180, 270)):  # PIL turns counter-clockwise
        queries.append(tmp_path / f"query{i}.png")
        Image.open(files[i]).rotate(degrees).save(queries[-1])
    model = Quadrants().train()
    common = dict(image_size=32, batch_size=4, num_workers=workers, progress=False)
    database, failures = retrieval.describe(model, files, rotations=retrieval.ROTATIONS, **common)
    described, none = retrieval.describe(model, queries, **common)
    assert model.training and not none
    assert database.shape == (4, 6, 12) and database.dtype == np.float32
    assert [row for row, _ in failures] == [5] and "5.png" in failures[0][1]
    assert np.isnan(database[:, 5]).all() and np.isfinite(database[:, :5]).all()

    candidates = (np.arange(4)[:, None] * 6 + np.arange(5)).ravel()
    scores, entries = retrieval.search(database.reshape(24, 12), described[0], 1, candidates)
    assert (entries[:, 0] % 5).tolist() == [0, 1, 2, 3]
    assert [retrieval.ROTATIONS[turn] for turn in entries[:, 0] // 5] == [0, 90, 180, 270]
    assert scores[:, 0] == pytest.approx(np.ones(4), abs=1e-4)


def test_describe_without_images():
    descriptors, failures = retrieval.describe(Quadrants(), [], 8, rotations=(0, 90), progress=False)
    assert descriptors.shape[:2] == (2, 0) and not failures
