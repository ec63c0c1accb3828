"""A cache is a data set: same names, smaller pictures, made once, and never silently old."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval
import train
from datasets import listing
from datasets.build import __main__ as build
from datasets.build import cache
from datasets.build.cache import cache_note, make_cache, stamps
from datasets.images import read_image
from datasets.names import Catalogue
from datasets.regions import Regions
from datasets.sets import load_evaluation_data


@pytest.fixture
def small(own_world, tmp_path):
    """A cache at half the size, and the world it was made from."""
    made, errors = make_cache(own_world.path, tmp_path / "small", size=32, num_workers=0)
    assert made == 24 * 4 + 10 and errors == []
    return tmp_path / "small"


def psnr(a, b):
    return (-10 * torch.log10(((a.float() - b.float()) / 255).square().mean())).item()


def replace_image(path, colour, size=(64, 64)):
    path.unlink()
    Image.new("RGB", size, colour).save(path, format="JPEG")


def test_a_cache_is_the_same_data_set_at_a_smaller_size(own_world, small):
    regions, missing = Regions.read(small)
    expected, _ = Regions.read(own_world.path)
    assert regions.paths == expected.paths and missing == [] and np.array_equal(regions.footprints, expected.footprints)
    data, whole = load_evaluation_data(small), load_evaluation_data(own_world.path)
    assert np.array_equal(data.pairs, whole.pairs) and len(data.sets) == len(whole.sets)
    for path in regions.paths[0] + regions.paths[7]:
        cached = read_image(small / path)
        assert cached.shape == (3, 32, 32)
        # The pictures are blocks of random colours, four pixels a side here, and JPEG halves the colours' size.
        assert psnr(cached, read_image(own_world.path / path, 32)) > 22
        assert psnr(cached, read_image(own_world.path / expected.paths[4][0], 32)) < 14


def test_what_is_small_enough_is_copied_as_it_is(own_world, tmp_path):
    make_cache(own_world.path, tmp_path / "same", size=64, num_workers=0)
    for path in stamps(own_world.path):
        assert (tmp_path / "same" / path).read_bytes() == (own_world.path / path).read_bytes()


def test_shapes_are_kept_and_odd_images_become_rgb(own_world, tmp_path):
    photo = own_world.path / Catalogue.read(own_world.path, "queries").paths[0]
    replace_image(photo, (200, 100, 50), (90, 60))
    grey = own_world.image(own_world.regions[0])
    grey.unlink()
    Image.new("CMYK", (64, 64), (0, 0, 0, 55)).save(grey, format="JPEG")
    make_cache(own_world.path, tmp_path / "small", size=30, num_workers=0)
    assert read_image(tmp_path / "small" / photo.relative_to(own_world.path)).shape == (3, 30, 45)
    cached = tmp_path / "small" / grey.relative_to(own_world.path)
    assert Image.open(cached).mode == "RGB" and (read_image(cached).float() - 200).abs().max() <= 4


def test_a_second_run_makes_only_what_is_missing_or_changed(own_world, small):
    assert make_cache(own_world.path, small, size=32, num_workers=0) == (0, [])
    changed, gone, lost = (own_world.image(own_world.regions[i]) for i in (0, 1, 2))
    (small / lost.relative_to(own_world.path)).unlink()
    replace_image(changed, (10, 200, 10))
    gone.unlink()
    note = cache_note(small, 32)
    assert "STALE: 2 images" in note and "1 are gone" in note and f"--output {small}" in note
    untouched = small / own_world.image(own_world.regions[5]).relative_to(own_world.path)
    before = untouched.stat().st_ino
    assert make_cache(own_world.path, small, size=32, num_workers=0) == (2, [])
    assert untouched.stat().st_ino == before and not (small / gone.relative_to(own_world.path)).exists()
    green = read_image(small / changed.relative_to(own_world.path)).float()
    assert (green - torch.tensor([10.0, 200, 10])[:, None, None]).abs().max() <= 6
    assert "up to date" in cache_note(small, 32)


def test_a_start_looks_at_folders_times_and_at_images_of_changed_folders_only(own_world, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "RACY_SECONDS", -1)
    make_cache(own_world.path, tmp_path / "small", size=32, num_workers=0)
    looked, real = [], cache._time
    monkeypatch.setattr(cache, "_time", lambda path: (looked.append(path), real(path))[1])
    assert "up to date" in cache_note(tmp_path / "small", 32) and looked == []
    changed = own_world.image(own_world.regions[0])
    replace_image(changed, "red")
    assert "STALE: 1 images are new, changed or unreadable, 0 are gone" in cache_note(tmp_path / "small", 32)
    assert {os.path.basename(os.path.dirname(path)) for path in looked} == {changed.parent.name}
    make_cache(own_world.path, tmp_path / "small", size=32, num_workers=0)
    (tmp_path / "small" / changed.relative_to(own_world.path)).unlink()
    assert "STALE: 1 images" in cache_note(tmp_path / "small", 32)
    make_cache(own_world.path, tmp_path / "small", size=32, num_workers=0)
    shutil.rmtree(changed.parents[1])
    assert "STALE: 0 images are new, changed or unreadable, 24 are gone" in cache_note(tmp_path / "small", 32)
    shutil.rmtree(tmp_path / "small" / "queries")
    assert "STALE: 10 images are new, changed or unreadable, 24 are gone" in cache_note(tmp_path / "small", 32)


def test_what_could_not_be_read_is_told_at_every_start(own_world, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "RACY_SECONDS", -1)
    broken = own_world.image(own_world.regions[3])
    broken.unlink()
    broken.write_bytes(b"no image")
    make_cache(own_world.path, tmp_path / "small", size=32, num_workers=0)
    assert "STALE: 1 images" in cache_note(tmp_path / "small", 32)


def test_a_cache_of_an_earlier_version_is_compared_image_by_image(own_world, small):
    (small / cache.FOLDERS_FILE).unlink()
    assert "up to date" in cache_note(small, 32)
    replace_image(own_world.image(own_world.regions[0]), "red")
    assert "STALE: 1 images" in cache_note(small, 32)


def test_an_older_image_put_in_place_is_noticed(own_world, small):
    path = own_world.image(own_world.regions[0])
    replace_image(path, "red")
    os.utime(path, (1, 1))
    assert "STALE: 1 images" in cache_note(small, 32)


def test_broken_images_are_named_and_left_out(own_world, tmp_path):
    broken = own_world.image(own_world.regions[3])
    broken.unlink()
    broken.write_bytes(b"no image")
    made, (error,) = make_cache(own_world.path, tmp_path / "small", size=32, num_workers=0)
    assert made == 24 * 4 + 10 - 1 and broken.name in error
    assert not (tmp_path / "small" / broken.relative_to(own_world.path)).exists()
    assert not list((tmp_path / "small").rglob("*.tmp"))


def test_what_a_note_says(own_world, small):
    assert cache_note(own_world.path, 32) is None
    assert "less than the 51 px" in cache_note(small, 51) and "less than" not in cache_note(small, 32)
    shutil.rmtree(own_world.path)
    assert "not here to compare with" in cache_note(small, 32)


@pytest.mark.parametrize(
    "wrong, message",
    [({"size": 40}, "remove it or choose another --output"), ({"quality": 80}, "remove it or choose another --output")],
)
def test_other_settings_are_refused(own_world, small, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_cache(own_world.path, small, **{"size": 32, "num_workers": 0, **wrong})


def test_no_cache_into_something_else(own_world, tmp_path):
    with pytest.raises(ValueError, match="not empty and no cache"):
        make_cache(own_world.path, own_world.path, num_workers=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_cache(tmp_path / "nowhere", tmp_path / "small", num_workers=0)
    assert not (tmp_path / "small").exists()


def test_the_command(own_world, capsys):
    command = [sys.executable, "-m", "datasets.build", "cache", str(own_world.path), "--num_workers", "1"]
    done = subprocess.run([*command, "--size", "32"], capture_output=True, text=True, check=True)
    assert "106 images made now" in done.stdout and len(stamps(f"{own_world.path}_32")) == 106
    for flags, told in ((["--size", "0"], "--size: 0"), (["--quality", "101"], "--quality: 101")):
        assert build.main(["cache", str(own_world.path), *flags]) == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, flags",
    [(train, ["--iterations", "1", "--batch_size", "4", "--num_clusters", "2"]), (eval, ["--tta", "none"])],
)
def test_scripts_say_that_they_read_a_cache(own_world, small, tmp_path, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    replace_image(own_world.image(own_world.regions[0]), "red")
    script.main(
        script.parse_arguments(
            [
                "--dataset_path",
                str(small),
                "--backbone",
                "resnet18",
                "--weights",
                "none",
                "--cut_after",
                "layer1",
                "--aggregator",
                "gem",
                "--descriptor_dim",
                "16",
                "--image_size",
                "20",
                "--num_workers",
                "0",
                "--device",
                "cpu",
                "--log_dir",
                "t",
                *flags,
            ]
        )
    )
    (log,) = (tmp_path / "logs" / "t").glob("*/info.log")
    assert f"{small} is a cache of {own_world.path} at 32 px; STALE: 1 images" in log.read_text()
