"""Search, turning and describing, each against something worked out another way."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.sets import read_database
from models.config import ModelConfig
from models.earthloc import EarthLoc
from retrieval import describe
from retrieval.describe import ROTATIONS, Describer, rotate
from retrieval.search import search


@pytest.mark.parametrize("block", [7, 1000])
def test_search_is_exact(block):
    rng = np.random.default_rng(1)
    database, queries = rng.normal(size=(100, 8)).astype(np.float32), rng.normal(size=(9, 8)).astype(np.float32)
    scores, indices = search(database, queries, 12, block=block)
    expected = queries.astype(np.float64) @ database.T.astype(np.float64)
    assert np.array_equal(indices, np.argsort(-expected, axis=1)[:, :12])
    assert np.allclose(scores, np.sort(expected, axis=1)[:, ::-1][:, :12], atol=1e-5)


def test_search_in_some_rows_counts_within_them():
    database = np.eye(6, dtype=np.float16)
    scores, indices = search(database, np.eye(6, dtype=np.float32)[4:5], 1, rows=[5, 4, 0])
    assert indices.tolist() == [[1]] and scores.tolist() == [[1.0]]


def test_search_for_more_than_there_is_gives_minus_one_not_the_last_image():
    scores, indices = search(np.eye(3), np.eye(3)[:2], 5)
    assert (indices[:, 3:] == -1).all() and (scores[:, 3:] == -np.inf).all()
    assert sorted(indices[0, :3].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["query", "database"])
def test_search_refuses_nan(kind):
    database, queries = np.eye(4), np.eye(4)
    (queries if kind == "query" else database)[2, 1] = np.nan
    with pytest.raises(ValueError, match=f"1 {kind} descriptors are not finite.*row 2"):
        search(database, queries, 2)
    if kind == "database":  # left out, it does no harm
        assert search(database, queries[:1], 1, rows=[0, 1, 3])[1].tolist() == [[0]]


def test_rotate_turns_counter_clockwise():
    image = torch.tensor([[[1, 2], [3, 4]]])  # 1 top left, 2 top right
    assert rotate(image, 90).tolist() == [[[2, 4], [1, 3]]]
    assert torch.equal(rotate(image, 180), image.flip(-1, -2))
    with pytest.raises(ValueError, match="45"):
        rotate(image, 45)


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
    database, failures = Describer(model, rotations=ROTATIONS, **common)(files)
    described, none = Describer(model, **common)(queries)
    assert model.training and not none
    assert database.shape == (4, 6, 12) and database.dtype == np.float32
    assert [row for row, _ in failures] == [5] and "5.png" in failures[0][1]
    assert np.isnan(database[:, 5]).all() and np.isfinite(database[:, :5]).all()

    candidates = (np.arange(4)[:, None] * 6 + np.arange(5)).ravel()
    scores, entries = search(database.reshape(24, 12), described[0], 1, candidates)
    assert (entries[:, 0] % 5).tolist() == [0, 1, 2, 3]
    assert [ROTATIONS[turn] for turn in entries[:, 0] // 5] == [0, 90, 180, 270]
    assert scores[:, 0] == pytest.approx(np.ones(4), abs=1e-4)


def test_describe_without_images():
    descriptors, failures = Describer(Quadrants(), 8, rotations=(0, 90), progress=False)([])
    assert descriptors.shape[:2] == (2, 0) and not failures


@pytest.mark.parametrize("free, fitting", [(13_000 + 10**6, 1), (9_000, 0), (10**9, 2), (None, 2)])
def test_of_the_workers_as_many_read_as_shared_memory_has_room_for(files, monkeypatch, caplog, free, fitting):
    monkeypatch.setattr(describe, "free_shared_memory", lambda: free)
    used = []
    loader = describe.DataLoader
    monkeypatch.setattr(
        describe, "DataLoader", lambda *values, **more: used.append(more["num_workers"]) or loader(*values, **more)
    )
    # A batch is 3 images of 3 x 18 x 18 bytes, 2916 in all: 4 of them for one worker, 6 for two.
    found, failures = Describer(Quadrants(), 18, batch_size=3, num_workers=2, progress=False)(files)
    assert used == [fitting] and len(failures) == 1 and np.isfinite(found[0, :5]).all()
    told = [line for line in caplog.messages if "--shm-size" in line]
    assert len(told) == (fitting < 2)
    if told:
        assert f"--num_workers {fitting}" in told[0] and f"{fitting} read now" in told[0]


def test_one_batch_wants_one_worker(files, monkeypatch):
    used = []
    loader = describe.DataLoader
    monkeypatch.setattr(
        describe, "DataLoader", lambda *values, **more: used.append(more["num_workers"]) or loader(*values, **more)
    )
    Describer(Quadrants(), 18, batch_size=6, num_workers=2, progress=False)(files)
    assert used == [1]


def test_a_catalogue_is_described_on_the_device_that_is_asked_for(world, monkeypatch):
    """Model and images are on the same one; without a GPU seen on the device that only has shapes."""
    asked = []

    class Told:
        def __init__(self, model, image_size, batch_size, num_workers, device, precision, rotations):
            asked.append((next(model.parameters()).device.type, device.type, image_size, precision, rotations))

        def kept(self, folder, root, paths, label):
            return (folder, root, len(paths)), []

    monkeypatch.setattr(describe, "Describer", Told)
    model, images = EarthLoc(ModelConfig("resnet18", "layer1", "none", "gem", 8, 32)), read_database(world.path)
    found, _ = describe.describe_catalogue(model, images, (0, 90), descriptors="kept", device="meta", precision="bf16")
    assert found == ("kept", images.root, 24) and asked == [("meta", "meta", 32, "bf16", (0, 90))]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: no CUDA device"):
            describe.describe_catalogue(model, images, device="cuda")
