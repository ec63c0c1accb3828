"""conditions.csv: what is written comes back, and the builders write what their photos show."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.build import demo, demo_world, earth_photos
from datasets.build.camera import Camera
from datasets.conditions import CONDITIONS_FILE, read_conditions, write_conditions


def test_what_is_written_comes_back(tmp_path):
    assert read_conditions(tmp_path) == {"tilt": {}, "clouds": {}}
    write_conditions(tmp_path, {"A-E-1": (12.345, 50.0), "A-E-2": (0.0, 0.25)})
    assert read_conditions(tmp_path) == {"tilt": {"A-E-1": 12.35, "A-E-2": 0.0}, "clouds": {"A-E-1": 50, "A-E-2": 0.25}}


def test_what_is_not_known_is_left_out_and_what_is_no_number_is_named(tmp_path):
    (tmp_path / CONDITIONS_FILE).write_text("id,tilt,clouds\nISS001-E-1,,30\n\nISS001-E-2,21.5,\n")
    assert read_conditions(tmp_path) == {"tilt": {"ISS001-E-2": 21.5}, "clouds": {"ISS001-E-1": 30.0}}
    (tmp_path / CONDITIONS_FILE).write_text("id,tilt,clouds\nISS001-E-1,5,few\n")
    with pytest.raises(ValueError, match="line 2, clouds: 'few'"):
        read_conditions(tmp_path)
    (tmp_path / CONDITIONS_FILE).write_text("photo,tilt,clouds\nISS001-E-1,5,4\n")
    with pytest.raises(ValueError, match="header is photo,tilt,clouds"):
        read_conditions(tmp_path)


@pytest.mark.parametrize("index", range(3))
def test_the_share_under_clouds_is_what_the_demo_and_the_true_scale_photos_show(index, monkeypatch):
    camera, shown = Camera((10.0, 20.0), 400.0, 20.0, 30.0, 40.0, 24.0), []
    query = demo_world.Query(index, "world", camera, "20200102")
    clouds = demo_world._clouds

    def watched(*arguments):
        opacity, brightness = clouds(*arguments)
        shown.append(100 * float((opacity > 0).float().mean()))
        return opacity, brightness

    monkeypatch.setattr(demo_world, "_clouds", watched)
    monkeypatch.setattr(demo, "save_jpeg", lambda *_: None)
    mosaic = torch.zeros(3, 90, 180, dtype=torch.uint8)
    demo.Renderer(Path(), 16, 7, "full", {"": mosaic})(("", "", query))
    assert demo.conditions(7, [query], "full") == {f"DEMO07-E-0000{index}": (20.0, pytest.approx(shown[0], abs=0.5))}
    assert demo.conditions(7, [query], "hazy") == {f"DEMO07-E-0000{index}": (20.0, 0.0)}

    monkeypatch.setattr(earth_photos, "render_ground", lambda *_: (torch.zeros(3, 256, 256), _at_nodes(camera)))
    rng, _ = earth_photos._draws(7, query)
    earth_photos.render_photo(None, None, camera, rng, 256)
    expected = {f"EARTH07-E-0000{index}": (20.0, pytest.approx(shown[1], abs=0.5))}
    assert earth_photos.conditions(7, [query], 256, "full") == expected


def _at_nodes(camera):
    nodes = earth_photos._nodes()
    return earth_photos.ground_points(camera, *np.meshgrid(nodes, nodes))
