"""The index of the Earth against a plain search of the descriptors that it was made of."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from datasets import grid
from models.config import ModelConfig
from models.earthloc import EarthLoc, load_model
from models.weights import save_safetensors, weights_fingerprint
from retrieval import earth_index
from retrieval.earth_index import EarthIndex, compress
from utils.flags import call

REGIONS = np.array([(8, row, col) for row in range(90, 110, 2) for col in range(120, 150, 2)])


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


@pytest.fixture
def descriptors():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(len(REGIONS), 32)) * np.linspace(2, 0.1, 32) + rng.normal(size=32)
    return unit(mixed).astype(np.float32)


@pytest.mark.parametrize("bits, off", [(8, 0.02), (4, 0.1)])
def test_scores_are_cosines_of_the_centred_descriptors(descriptors, bits, off):
    """With all directions kept, to the precision of a byte or of half a one."""
    index = compress(REGIONS, descriptors, 32, "x", bits)
    photos = np.stack([descriptors[[3, 70]]] * 4)
    scores, rows, _ = index.search(photos, np.arange(len(REGIONS)), 150)
    centred = unit(descriptors.astype(np.float64) - descriptors.astype(np.float64).mean(axis=0))
    for q, own in enumerate((3, 70)):
        assert rows[q, 0] == own and sorted(rows[q]) == list(range(150))
        np.testing.assert_allclose(scores[q], (centred @ centred[own])[rows[q]], atol=off)
        assert (np.diff(scores[q]) <= 0).all()


def test_a_region_counts_in_its_best_turn_and_the_turn_becomes_a_rotation(descriptors):
    """A photo that looks like a region once it is turned by t: the region, turned by -t, looks like the photo."""
    index, other = compress(REGIONS, descriptors, 32, "x", 8), unit(np.ones(32, np.float32))
    for turn, degrees in enumerate(earth_index.TURNS):
        photos = np.stack([other] * 4)[:, None].copy()
        photos[turn, 0] = descriptors[40]
        scores, rows, rotations = index.search(photos, np.arange(len(REGIONS)), 5)
        assert rows[0, 0] == 40 and rotations[0, 0] == -degrees % 360
        assert len(set(rows[0])) == 5 and scores[0, 0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dim", [7, 32])
def test_two_codes_of_four_bits_share_a_byte(descriptors, dim):
    """Against plain loops: each value is the nearest of sixteen equal steps, but for what is cut off."""
    index = compress(REGIONS, descriptors, dim, "x", 4)
    assert index.codes.shape == (150, (dim + 1) // 2) and index.codes.dtype == np.uint8
    wanted = unit((descriptors - index.mean).astype(np.float64) @ index.axes)
    found = np.zeros((150, dim))
    for row in range(150):
        for k in range(dim):
            code = index.codes[row, k // 2] // 16 if k % 2 else index.codes[row, k // 2] % 16
            found[row, k] = index.low[k] + code * index.step[k]
    inside = (wanted >= index.low) & (wanted <= index.low + 15 * index.step)
    assert inside.mean() > 0.97 and (np.abs(found - wanted) <= index.step / 2 + 1e-5)[inside].all()
    np.testing.assert_allclose(index.vectors, unit(found), atol=1e-5)


def test_an_index_of_the_older_form_has_a_byte_a_value(descriptors, tmp_path):
    index = compress(REGIONS, descriptors, 7, "x", 8)
    assert index.codes.shape == (150, 7)
    index.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    told = {"format": "earthloc index 1", "fingerprint": "x"}
    save_file(arrays, tmp_path / "old.safetensors", told)
    for name in ("old", "new"):
        again = EarthIndex.load(tmp_path / f"{name}.safetensors")
        assert again.bits == 8
        np.testing.assert_array_equal(again.vectors, index.vectors)


def test_only_the_given_rows_are_searched_and_what_is_missing_is_filled(descriptors):
    index = compress(REGIONS, descriptors, 16, "x")
    scores, rows, _ = index.search(np.stack([descriptors[[7]]] * 4), np.array([5, 9, 20]), 5)
    assert sorted(rows[0, :3]) == [5, 9, 20] and (rows[0, 3:] == -1).all() and np.isneginf(scores[0, 3:]).all()


def test_directions_without_variance_are_finite(descriptors):
    same = compress(REGIONS, np.ones_like(descriptors), 4, "x")
    assert np.isfinite(same.axes).all() and np.isfinite(same.vectors).all()


def test_the_first_directions_are_kept(descriptors):
    """Those of most variance: of 16, the cosines are nearer than those of the 16 last."""
    index = compress(REGIONS, descriptors, 16, "x")
    centred = descriptors - descriptors.mean(axis=0)
    variances = (centred @ index.axes).var(axis=0)
    assert (np.diff(variances) < 1e-6).all()
    np.testing.assert_allclose(variances, np.linalg.svd(centred)[1][:16] ** 2 / len(REGIONS), rtol=0.02)


def test_it_comes_back_from_its_file(descriptors, tmp_path):
    index = compress(REGIONS, descriptors, 16, "abc")
    index.save(tmp_path / "i.safetensors")
    again = EarthIndex.load(tmp_path / "i.safetensors")
    assert again.fingerprint == "abc" and len(again) == len(REGIONS)
    np.testing.assert_array_equal(again.vectors, index.vectors)
    np.testing.assert_array_equal(again.footprints, grid.footprints(REGIONS))


def test_what_is_no_index_says_so(descriptors, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        EarthIndex.load(tmp_path / "none.safetensors")
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not an index"):
        EarthIndex.load(tmp_path / "other.safetensors")
    compress(REGIONS, descriptors, 16, "abc").save(tmp_path / "i.safetensors")
    whole = (tmp_path / "i.safetensors").read_bytes()
    (tmp_path / "i.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="truncated"):
        EarthIndex.load(tmp_path / "i.safetensors")
    with pytest.raises(ValueError, match="--dim 33"):
        compress(REGIONS, descriptors, 33, "x")
    with pytest.raises(ValueError, match="not finite"):
        compress(REGIONS, np.full_like(descriptors, np.nan), 16, "x")
    with pytest.raises(ValueError, match="expected \\(4, photos, 32\\)"):
        compress(REGIONS, descriptors, 16, "x").search(np.zeros((1, 2, 32), np.float32), np.arange(3), 2)


def test_too_many_bytes_a_region_are_refused_before_describing(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_safetensors(EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 32, 64)), tmp_path / "m.safetensors")
    monkeypatch.setattr(earth_index, "describe_catalogue", None)
    with pytest.raises(ValueError, match="--dim 33: the model's descriptors have 32 values"):
        flags = ["--resume", "m.safetensors", "--dataset_path", str(world.path), "--dim", "33"]
        call(earth_index.main, ["out.safetensors", *flags])


def test_the_command_makes_an_index_of_a_data_set(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = ModelConfig("resnet18", "layer2", "none", "gem", 32, 64)
    model = EarthLoc(config)
    save_safetensors(model, tmp_path / "m.safetensors")
    flags = ["new/out.safetensors", "--resume", "m.safetensors", "--dataset_path", str(world.path), "--dim", "8"]
    made = call(earth_index.main, [*flags, "--num_workers", "0", "--device", "cpu"])
    assert "regions" in capsys.readouterr().out
    index = EarthIndex.load("new/out.safetensors")
    assert len(index) == len(made) and index.codes.shape[1] == 4
    assert index.fingerprint == weights_fingerprint(load_model("m.safetensors"))
    assert index.fingerprint != weights_fingerprint(EarthLoc(config))
