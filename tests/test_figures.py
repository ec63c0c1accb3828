"""Pictures: each cell is where the caption says, frames have the right colour."""

import numpy as np
import pytest
import torch

from utils import figures


def flat(value):
    return torch.full((3, 8, 8), value, dtype=torch.uint8)


def colours(image):
    return {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}


def test_batch_figure_holds_two_regions_a_row():
    views = torch.arange(3 * 4).reshape(3, 4, 1, 1, 1).expand(3, 4, 3, 8, 8) / 20  # float in [0, 1]
    picture = figures.batch_figure(views, years=(2018, 2019, 2020, 2021), size=32)
    assert picture.width > picture.height > 2 * 32
    shown = colours(picture)
    assert all((round(i / 20 * 255),) * 3 in shown for i in range(12))


def test_uint8_and_float_look_the_same():
    clusters = [[flat(51), flat(51).float() / 255], [flat(51)]]
    picture = figures.clusters_figure(clusters, titles=["rivers", "ice"], size=32)
    assert picture.size[1] == 2 * 32 + 3 * 4
    assert (51, 51, 51) in colours(picture)


def test_frames_are_green_when_right_and_red_when_wrong():
    right = figures.predictions_figure([(flat(9), [(flat(8), True)], "Alps")], size=32)
    wrong = figures.predictions_figure([(flat(9), [(flat(8), False)], "Alps")], size=32)
    assert figures.GREEN in colours(right) and figures.RED not in colours(right)
    assert figures.RED in colours(wrong) and figures.GREEN not in colours(wrong)
    with pytest.raises(ValueError, match="no queries"):
        figures.predictions_figure([])


def test_a_curve_a_name_in_the_order_of_its_points():
    curves = {"fresh": [(250, 31.5), (0, 18.4), (100, float("nan"))], "longer": [(0, 18.4)]}
    (axes,) = figures.curve_figure(curves, y_title="R@5").axes
    assert axes.get_ylabel() == "R@5" and [text.get_text() for text in axes.get_legend().get_texts()] == list(curves)
    assert axes.lines[0].get_xdata().tolist() == [0, 100, 250] and axes.lines[0].get_ydata()[2] == 31.5
    with pytest.raises(ValueError, match="no points"):
        figures.curve_figure({"empty": []})


def test_save_makes_the_folder(tmp_path):
    figures.save(figures.clusters_figure([[flat(1)]]), tmp_path / "new" / "clusters.jpg")
    assert (tmp_path / "new" / "clusters.jpg").stat().st_size > 0
