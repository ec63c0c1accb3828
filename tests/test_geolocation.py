"""Embedding, searching and scoring coordinates, the gallery's cache, and the maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.geoclip import GeoClipConfig, build_geoclip
from models.location_encoder import LocationEncoder
from retrieval import geolocation
from retrieval.geolocation import (
    accuracy,
    accuracy_lines,
    cached_gallery,
    embed_gallery,
    embed_photos,
    locate,
    mean_point,
    nadir_bias,
    views_of,
)
from utils import geo
from utils.figures import GREEN, RED
from utils.world_map import candidates_map, errors_map, short_lines, to_pixel


def unit(rows, dim, seed):
    vectors = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_probabilities_are_a_softmax_over_the_gallery():
    photos, gallery = unit(5, 16, 0), unit(40, 16, 1)
    rows, shares = locate(photos, gallery, 20.0, top_k=4, block=2)
    for i in range(5):
        weights = np.exp(20 * (gallery.astype(np.float64) @ photos[i]))
        expected = np.argsort(-weights)[:4]
        assert rows[i].tolist() == expected.tolist()
        assert shares[i] == pytest.approx(weights[expected] / weights.sum(), rel=1e-4)


def test_a_known_nadir_leaves_near_places_only():
    points = np.array([[0.0, 179.0], [0.0, -179.0], [60.0, 0.0], [90.0, 0.0], [89.0, 180.0]])
    photos, gallery = unit(3, 16, 0), unit(5, 16, 1)
    nadirs = np.array([[1.0, -179.5], [89.5, 77.0], [-80.0, 0.0]])
    rows, shares = locate(photos, gallery, 1.0, top_k=5, bias=nadir_bias(nadirs, points, 500))
    assert set(rows[0, :2]) == {0, 1} and shares[0, :2].sum() == pytest.approx(1)  # over the antimeridian
    assert set(rows[1, :2]) == {3, 4} and shares[1, :2].sum() == pytest.approx(1)  # over the pole
    assert (shares[2] > 0.1).all()  # nothing is near: all stay


@pytest.mark.parametrize("top_k", [0, 41])
def test_more_places_than_the_gallery_has(top_k):
    with pytest.raises(ValueError, match=f"--top_k {top_k}: must be between 1 and the gallery's 40"):
        locate(unit(1, 8, 0), unit(40, 8, 1), 1.0, top_k)


def test_photos_without_embedding_are_refused():
    photos = unit(3, 8, 0)
    photos[1] = np.nan
    with pytest.raises(ValueError, match="1 photos have no finite embedding"):
        locate(photos, unit(4, 8, 1), 1.0)


def test_accuracy_counts_the_limit_and_says_it_as_its_readers_parse():
    km = [0.5, 25, 25.2, 750, 3000, 100]
    assert accuracy(km) == pytest.approx({2500: 500 / 6, 750: 500 / 6, 200: 400 / 6, 25: 200 / 6, 1: 100 / 6})
    assert accuracy_lines(km) == [
        "Accuracy at 2500 km: 83.33",
        "Accuracy at 750 km: 83.33",
        "Accuracy at 200 km: 66.67",
        "Accuracy at 25 km: 33.33",
        "Accuracy at 1 km: 16.67",
        "Median error: 62.6 km",
    ]
    for bad, message in (([], "no photos"), ([1, np.nan], "not a number")):
        with pytest.raises(ValueError, match=message):
            accuracy(bad)


def test_mean_point_over_the_antimeridian():
    assert geo.distance_km(mean_point([[10.0, 179.0], [10.0, -179.0]]), (10, 180)) < 2
    assert mean_point([[80.0, 0.0], [80.0, 180.0]])[0] == pytest.approx(90)


def test_gallery_in_blocks_is_the_gallery():
    torch.manual_seed(0)
    encoder = LocationEncoder((1.0,))
    points = np.random.default_rng(0).uniform((-90, -180), (90, 180), (50, 2))
    whole = torch.nn.functional.normalize(encoder(torch.tensor(points)), dim=1).detach().numpy()
    assert np.abs(embed_gallery(encoder, points, block=7, progress=False) - whole).max() < 1e-6
    with pytest.raises(ValueError, match="gallery is empty"):
        embed_gallery(encoder, points[:0])


def test_gallery_is_embedded_once_for_its_weights_and_points(tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder, other = LocationEncoder((1.0,)), LocationEncoder((1.0,))
    points = np.random.default_rng(0).uniform((-90, -180), (90, 180), (20, 2))
    calls = []
    original = geolocation.embed_gallery
    monkeypatch.setattr(geolocation, "embed_gallery", lambda *a, **k: calls.append(1) or original(*a, **k))
    first = cached_gallery(encoder, points, tmp_path, progress=False)
    assert np.array_equal(cached_gallery(encoder, points, tmp_path, progress=False), first) and len(calls) == 1
    cached_gallery(other, points, tmp_path, progress=False)
    cached_gallery(encoder, points + [[0, 1e-3]] * (abs(points) < 80), tmp_path, progress=False)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 3
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert np.array_equal(cached_gallery(encoder, points, tmp_path, progress=False), first) and len(calls) == 4
    cached_gallery(encoder, points, None, progress=False)
    assert len(calls) == 5 and len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_geoclip(GeoClipConfig("resnet18", cut_after="layer1", image_size=32, sigmas=(1.0,)), "none").eval()


@pytest.mark.parametrize("crops", ["one", "ten", "turns"])
def test_views_are_averaged_and_broken_photos_named(model, tmp_path, crops):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 37, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    embeddings, failures = embed_photos(
        model, [tmp_path / "b.jpg", tmp_path / "a.png", tmp_path / "c.jpg"], crops=crops, progress=False
    )
    assert np.isnan(embeddings[[0, 2]]).all() and [row for row, _ in failures] == [0, 2]
    assert "b.jpg: cannot be read" in failures[0][1] and "c.jpg: no such image" in failures[1][1]
    image = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC) if crops != "ten" else pixels)
    if crops == "ten":
        corners = [(y, x) for y in (0, 5) for x in (0, 5)] + [(2, 2)]
        views = [image[:, ::flip][y : y + 32, x : x + 32] for y, x in corners for flip in (1, -1)]
    else:
        views = [np.rot90(image, turn) for turn in range(4 if crops == "turns" else 1)]
    with torch.no_grad():
        batch = torch.tensor(np.stack(views)).permute(0, 3, 1, 2).float() / 255
        expected = torch.nn.functional.normalize(model.image_encoder(batch), dim=1).mean(dim=0)
    # read_image resizes with torch, which rounds a few pixels to the next grey level.
    assert np.abs(embeddings[1] - expected.numpy()).max() < 1e-4


def test_unknown_crops(model):
    with pytest.raises(ValueError, match="--crops five"):
        embed_photos(model, [], crops="five")
    assert len(views_of(torch.zeros(1, 3, 37, 37), 32, "ten")) == 10


def test_places_on_the_map():
    assert to_pixel((90, -180), 1440) == (0, 0) and to_pixel((0, 0), 1440) == (720, 360)
    picture = candidates_map(np.array([[10.0, 20.0], [-50.0, 179.9]]), ["a label", "another"], "title", width=720)
    assert picture.size == (720, 360) and picture.getpixel((400, 160)) == RED
    picture = errors_map([(0.0, 0.0)], [(0.0, 90.0)], width=720)
    assert picture.getpixel((360, 180)) == GREEN and picture.getpixel((540, 180)) == RED
    assert picture.getpixel((450, 180)) == (255, 255, 255)  # the line between


def test_lines_go_the_short_way():
    first, second = short_lines((1430, 5), (10, 9), 1440)
    assert first == [(1430, 5), (1450, 9)] and second == [(-10, 5), (10, 9)]
    assert short_lines((100, 5), (700, 9), 1440) == [[(100, 5), (700, 9)]]
