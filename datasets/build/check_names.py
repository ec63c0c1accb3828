"""What the names alone say about a data set.

A check returns Findings. Everything is arrays: 720,000 names take seconds, and none that is wrong stops the others.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from datasets import grid
from datasets.names import Catalogue, parse_paths
from datasets.overlap import degenerate, ring, self_crossing
from utils import geo
from utils.tables import Strings

PROBLEM, NOTE = "problem", "note"
COORDINATE_TOLERANCE = 2e-5  # degrees; names hold five decimals
AREA_TOLERANCE = 0.005, 2.0  # share, and km²: the real names hold 0.0002 and whole numbers
MAX_NADIR_KM = 2500  # to the footprint's centre: what the crew can see (paper, eq. 1 rounded up)
MAX_TURN = 60.0  # degrees between the orientation and the one that the corners show


@dataclass(frozen=True)
class Finding:
    """One kind of thing that is wrong (level PROBLEM) or worth knowing (NOTE), and all items that it is true of."""

    what: str
    level: str
    items: list = field(default_factory=list)


@dataclass(frozen=True)
class Names:
    """Names that parse: their columns, and as lists paths, ids and dates (N) as written."""

    columns: Catalogue
    paths: list[str]
    ids: list[str]
    dates: list[str]

    def find(self, what: str, rows: np.ndarray, detail: Callable | None = None, level: str = PROBLEM) -> Finding:
        """rows: (N,) bool, or in the order of the items. detail: function of a row -> text."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Finding(what, level, [self.paths[row] + (f": {detail(row)}" if detail else "") for row in rows])

    def repeated(self, what: str, keys: Iterable) -> Finding:
        """Those whose key is that of an earlier one."""
        first, items = {}, []
        for row, key in enumerate(keys):
            if first.setdefault(key, row) != row:
                items.append(f"{self.paths[row]}: as {self.paths[first[key]]}")
        return Finding(what, PROBLEM, items)


def parse_names(paths: Sequence[str]) -> tuple[Names, list[str]]:
    """-> Names of those that parse, and what is wrong with the others."""
    wrong = []
    table = parse_paths(Strings(paths).array, wrong)
    columns = Catalogue.from_table("", table)
    return Names(columns, list(columns.paths), list(columns.ids), list(Strings(table["timestamp"]))), wrong


def wrong_areas(names: Names, kind: str, but: np.ndarray | bool = False) -> Finding:
    """Areas that do not fit the corners, of all `but` some."""
    said, areas = names.columns.areas, grid.quadrilateral_area(ring(names.columns.footprints))
    wrong = np.abs(areas - said) > AREA_TOLERANCE[1] + AREA_TOLERANCE[0] * areas
    return names.find(
        f"{kind} whose area does not fit their corners",
        wrong & ~np.asarray(but),
        lambda row: f"sq_km_area {said[row]:.0f}, the corners have {areas[row]:.0f}",
    )


def check_queries(names: Names) -> list[Finding]:
    """Names of queries -> Findings."""
    if not names.paths:
        return []
    footprints, orientations = names.columns.footprints, names.columns.orientations
    flat, crossed = degenerate(footprints), self_crossing(footprints)
    distances = geo.distance_km(names.columns.centers, names.columns.nadirs)
    farthest = np.argsort(-distances, kind="stable")
    turned = geo.wrap_longitude(orientations - corner_orientations(footprints))
    return [
        names.find(
            "queries whose timestamp is no date yyyymmdd",
            _no_date(names.dates),
            lambda row: f"timestamp {names.dates[row]}",
        ),
        names.repeated("queries with the image id of another", names.ids),
        names.find("queries with degenerate corners: they can have no positive", flat),
        names.find("queries whose corners cross over", crossed),
        wrong_areas(names, "queries", but=flat),
        names.find(
            f"queries with their nadir more than {MAX_NADIR_KM:,} km from their centre: beyond the horizon",
            farthest[distances[farthest] > MAX_NADIR_KM],
            lambda row: f"{distances[row]:,.0f} km",
        ),
        names.find("queries with an orientation beyond -180 … 360", (orientations < -180) | (orientations > 360)),
        names.find(
            f"queries whose orientation and corners differ by more than {MAX_TURN:g} degrees (not used by training "
            "or evaluation)",
            (np.abs(turned) > MAX_TURN) & ~flat & ~crossed,
            lambda row: f"orientation {orientations[row]:g}, off by {turned[row]:.0f}",
        ),
        names.find(
            "queries with a negative orientation", orientations < 0, lambda row: f"{orientations[row]:g}", level=NOTE
        ),
    ]


def corner_orientations(footprints: np.ndarray) -> np.ndarray:
    """(N, 4, 2) -> (N,) degrees: what the orientation should be, from the direction of the photo's right.

    Photos' corners go around from one end of the left edge to the right: bottom first or (all but one of the real
    names) top first, corner 0 to 3 and 1 to 2 lead to the right either way. Up is a quarter turn anticlockwise of it,
    and the orientation minus the azimuth of up, which is the direction of the right counted from east to north.
    """
    points = geo.unwrap_footprints(footprints)
    right = (points[:, 3] - points[:, 0] + points[:, 2] - points[:, 1]) / 2
    return np.degrees(np.arctan2(right[:, 0], right[:, 1] * np.cos(np.radians(points[..., 0].mean(axis=1)))))


def _no_date(dates: Sequence[str]) -> np.ndarray:
    bad = {}
    for date in set(dates):
        try:
            np.datetime64(f"{date[:4]}-{date[4:6]}-{date[6:]}", "D")
            bad[date] = len(date) != 8
        except ValueError:
            bad[date] = True
    return np.array([bad[date] for date in dates], dtype=bool)


def read_ids(ids: Sequence[str]) -> np.ndarray:
    """zoom_row_col strings -> (N, 3) int64, -1 where it is not of that form."""
    values = {}
    for text in set(ids):
        parts = text.split("_")
        fits = len(parts) == 3 and all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts)
        values[text] = tuple(map(int, parts)) if fits and int(parts[0]) <= 25 else (-1, -1, -1)
    return np.array([values[text] for text in ids], dtype=np.int64).reshape(-1, 3)


def check_database(names: Names) -> list[Finding]:
    """Names of database images -> Findings."""
    if not names.paths:
        return []
    columns, regions = names.columns, read_ids(names.ids)
    known = regions[:, 0] >= 0
    corners = np.array(columns.footprints)
    corners[known] = grid.footprints(regions[known])
    off_grid = np.abs(corners - columns.footprints).max(axis=(1, 2)) > COORDINATE_TOLERANCE
    centers = geo.unwrap_footprints(columns.footprints).mean(axis=1)
    centers[:, 1] = geo.wrap_longitude(centers[:, 1])
    shift = columns.nadirs - centers
    shift[:, 1] = geo.wrap_longitude(shift[:, 1])
    return [
        names.find("database images whose id is not zoom_row_col (no region of the grid)", ~known, level=NOTE),
        names.find("database images whose corners are not those of their zoom_row_col", off_grid),
        wrong_areas(names, "database images"),
        names.find(
            "database images whose centre does not fit their corners",
            np.abs(shift).max(axis=1) > COORDINATE_TOLERANCE,
            lambda row: f"the corners' is {centers[row, 0]:.5f}, {centers[row, 1]:.5f}",
        ),
        wrong_folders(names, centers, regions[:, 0]),
        names.find("database images with an orientation other than 0", columns.orientations != 0),
        names.repeated(
            "database images of a region and year that is there already", zip(names.ids, columns.years.tolist())
        ),
        missing_years(names),
    ]


def wrong_folders(names: Names, centers: np.ndarray, zooms: np.ndarray) -> Finding:
    """Images in another folder than YEAR_ZOOM/LAT10_LON10. zooms: -1 where the name does not tell."""
    folders, said, years = [path.rpartition("/")[0] for path in names.paths], {}, names.columns.years
    for folder in set(folders):
        try:
            (year, zoom), (lat, lon) = (part.split("_") for part in folder.split("/")[-2:])
            said[folder] = int(year), int(zoom), int(lat), int(lon)
        except ValueError:
            said[folder] = (-1000,) * 4 if folder else (np.nan,) * 4  # a bare name: nothing to check
    said = np.array([said[folder] for folder in folders], dtype=np.float64)
    # A centre half-way between two tens may be rounded to either, as its corners are rounded themselves.
    wrong = np.abs(said[:, 2:] - centers).max(axis=1) > 5 + COORDINATE_TOLERANCE
    wrong |= (said[:, 0] != years) | (said[:, 1] != zooms) & (zooms >= 0)

    def expected(row: int) -> str:
        lat10, lon10 = (round(value / 10) * 10 for value in centers[row].tolist())
        zoom = f"{zooms[row]:02d}" if zooms[row] >= 0 else "ZOOM"
        return f"belongs into database/{years[row]}_{zoom}/{lat10}_{lon10}"

    what = "database images in a folder that does not fit their name"
    return names.find(what, wrong & ~np.isnan(said[:, 0]), expected)


def missing_years(names: Names) -> Finding:
    """Regions that lack one of the years that other regions have: training leaves them out."""
    number = {}
    rows = np.array([number.setdefault(image_id, len(number)) for image_id in names.ids], dtype=np.int64)
    years, column = np.unique(names.columns.years, return_inverse=True)
    there = np.zeros((len(number), len(years)), dtype=bool)
    there[rows, column] = True
    lacking = sorted((image_id, years[~there[row]].tolist()) for image_id, row in number.items())
    return Finding(
        "regions without an image of each year (training leaves them out)",
        PROBLEM,
        [f"{image_id}: without {', '.join(map(str, without))}" for image_id, without in lacking if without],
    )


def count_zooms(names: Names) -> dict[str, dict[int, int]]:
    """-> {zoom as text: {year: images}}, by the names' ids."""
    counts, zooms = {}, read_ids(names.ids)[:, 0]
    pairs, numbers = np.unique(np.stack([zooms, names.columns.years], axis=1), axis=0, return_counts=True)
    for (zoom, year), number in zip(pairs.tolist(), numbers.tolist()):
        counts.setdefault(f"zoom {zoom}" if zoom >= 0 else "no zoom", {})[year] = number
    return counts
