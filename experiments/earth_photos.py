"""Rendered photos beside the real archive's: python -m experiments.earth_photos data/earth NAMES --figure photos.png

Both are a data set's folder or a text file with one query name a line. Printed are quantiles of what a photo shows
(km²), of how far its centre lies from the nadir (km), of its footprint's longer to shorter sides, and of how the camera
was held (degrees between the photo's up and the direction away from the nadir); drawn are cumulative shares.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import ks_2samp

from datasets.build.check_names import corner_orientations
from datasets.names import Catalogue
from utils import geo
from utils.flags import QueryNames, command

PERCENT = (1, 5, 10, 25, 50, 75, 90, 95, 99)
LOGARITHMIC = ("area km²", "distance km")


def quantities(names: Catalogue) -> dict[str, np.ndarray]:
    """Catalogue of queries -> {what: (N,)}."""
    sides = geo.to_unit_vectors(geo.ring(names.footprints))
    sides = np.linalg.norm(np.roll(sides, -1, axis=1) - sides, axis=-1)
    sides = sides[:, :2] + sides[:, 2:]  # opposite ones
    up, away = -corner_orientations(names.footprints), bearing(names.nadirs, names.centers)
    return {
        "area km²": names.areas.astype(float),
        "distance km": geo.distance_km(names.nadirs, names.centers),
        "longer to shorter side": sides.max(axis=1) / sides.min(axis=1),
        "up from away °": np.abs(geo.wrap_longitude(up - away)),
    }


def bearing(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(..., 2), (..., 2) degrees -> compass direction (...) of the great circle at its start."""
    lat0, lat1 = np.radians(start[..., 0]), np.radians(end[..., 0])
    across = np.radians(end[..., 1] - start[..., 1])
    ahead = np.cos(lat0) * np.sin(lat1) - np.sin(lat0) * np.cos(lat1) * np.cos(across)
    return np.degrees(np.arctan2(np.sin(across) * np.cos(lat1), ahead))


def table(rendered: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> list[str]:
    """Two of quantities' dicts -> lines: quantiles of both, and the largest gap between the cumulative shares."""
    lines = [f"{'':24}{'':10}" + "".join(f"{f'{percent} %':>9}" for percent in PERCENT) + f"{'gap':>8}"]
    for what in rendered:
        gap = f"{100 * ks_2samp(rendered[what], real[what], method='asymp').statistic:7.1f}%"
        for who, values in (("rendered", rendered[what]), ("real", real[what])):
            cells = "".join(f"{value:9,.{2 if value < 10 else 0}f}" for value in np.percentile(values, PERCENT))
            lines.append(f"{what if who == 'rendered' else '':24}{who:10}{cells}{gap if who == 'real' else '':>8}")
    return lines


def draw(rendered: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> Figure:
    """-> matplotlib figure: a panel of cumulative shares for each quantity."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(rendered), sharey=True), rendered):
        for label, values in (("rendered", rendered[what]), ("real", real[what])):
            axes.plot(np.sort(values), np.linspace(0, 100, len(values)), label=label)
        low, high = np.percentile(real[what], (0.5, 99.5))
        axes.set(xlabel=what, xlim=(low, high), ylim=(0, 100))
        if what in LOGARITHMIC:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("% of the photos below")
    figure.axes[0].legend()
    return figure


def main(
    photos: QueryNames,
    names: Annotated[str, "the real ones: a data set's folder, or a text file of query names"],
    figure: Annotated[Path | None, "where the picture goes; default: none is drawn"] = None,
) -> tuple[dict, dict]:
    """-> quantities of the rendered, and of the real."""
    rendered, real = (quantities(Catalogue.read_source(each, "queries")) for each in (photos, names))
    print(f"{len(rendered['area km²']):,} of {photos}, {len(real['area km²']):,} of {names}")
    print("\n".join(table(rendered, real)))
    if figure:
        draw(rendered, real).savefig(figure, dpi=90)
    return rendered, real


if __name__ == "__main__":
    command(main)
