"""What the names alone say about a data set: columns of many names at once, and the checks on them.

A check returns Findings. Everything is arrays: 720,000 names take seconds, and none that is wrong stops the others.
"""

from dataclasses import dataclass, field

import numpy as np

from datasets import grid
from datasets.names import Catalogue, parse_paths
from datasets.overlap import degenerate, ring
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
    """Names that parse, as columns: paths (N), footprints (N, 4, 2), nadirs (N, 2), areas (N,), orientations (N,),
    years (N,), ids (N), dates (N) as written, folders (N): what
    stands before the name, without its last slash, regions (N, 3) int: zoom, row and col of the id, or -1."""

    paths: list
    footprints: np.ndarray
    nadirs: np.ndarray
    areas: np.ndarray
    orientations: np.ndarray
    years: np.ndarray
    ids: list
    dates: list
    folders: list
    regions: np.ndarray

    def __len__(self):
        return len(self.paths)


def parse_names(paths):
    """-> Names of those that parse, Findings for the others."""
    wrong = []
    table = parse_paths(Strings(paths).array, wrong)
    columns = Catalogue.from_table("", table)
    paths, ids, dates = list(columns.paths), list(columns.ids), list(Strings(table["timestamp"]))
    names = Names(
        paths,
        columns.footprints,
        columns.nadirs,
        columns.areas,
        columns.orientations,
        columns.years,
        ids,
        dates,
        [path.rpartition("/")[0] for path in paths],
        read_ids(ids),
    )
    return names, [Finding("names that do not parse", PROBLEM, wrong)]


def listed(what, level, names, rows, detail=None):
    """Rows of names -> Finding; detail: function of a row -> text."""
    rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else rows
    return Finding(what, level, [names.paths[row] + (f": {detail(row)}" if detail else "") for row in rows])


def wrong_areas(names):
    """(N,) bool, and the areas (N,) of the corners, km²."""
    areas = grid.quadrilateral_area(ring(names.footprints)) if len(names) else np.zeros(0)
    return np.abs(areas - names.areas) > AREA_TOLERANCE[1] + AREA_TOLERANCE[0] * areas, areas


def crossing(footprints):
    """(N, 4, 2) -> (N,) bool: the corners as they come cross over: a diagonal of the ring is one of their edges."""
    points, around = geo.unwrap_footprints(footprints), ring(footprints)
    opposite = np.abs(points[:, 0, None] - around).sum(-1).argmin(-1)
    across = np.take_along_axis(around, ((opposite + 2) % 4)[:, None, None], axis=1)[:, 0]
    return np.abs(points[:, 2] - across).sum(-1) > 1e-9


def check_queries(names):
    """Names of queries -> Findings."""
    degenerates = degenerate(names.footprints) if len(names) else np.zeros(0, dtype=bool)
    areas_wrong, areas = wrong_areas(names)
    centers = geo.centers(names.footprints) if len(names) else np.zeros((0, 2))
    distances = geo.distance_km(centers, names.nadirs)
    turned = geo.wrap_longitude(names.orientations - corner_orientations(names.footprints))
    crossed = crossing(names.footprints) & ~degenerates if len(names) else degenerates
    return [
        listed(
            "queries whose timestamp is no date yyyymmdd",
            PROBLEM,
            names,
            _no_date(names.dates),
            lambda row: f"timestamp {names.dates[row]}",
        ),
        Finding("queries with the image id of another", PROBLEM, _repeated(names, names.ids)),
        listed("queries with degenerate corners: they can have no positive", PROBLEM, names, degenerates),
        listed("queries whose corners cross over", PROBLEM, names, crossed),
        listed(
            "queries whose area does not fit their corners",
            PROBLEM,
            names,
            areas_wrong & ~degenerates,
            lambda row: f"sq_km_area {names.areas[row]:.0f}, the corners have {areas[row]:.0f}",
        ),
        listed(
            f"queries with their nadir more than {MAX_NADIR_KM:,} km from their centre: beyond the horizon",
            PROBLEM,
            names,
            _by_size(distances, distances > MAX_NADIR_KM),
            lambda row: f"{distances[row]:,.0f} km",
        ),
        listed(
            "queries with an orientation beyond -180 … 360",
            PROBLEM,
            names,
            (names.orientations < -180) | (names.orientations > 360),
        ),
        listed(
            f"queries whose orientation and corners differ by more than {MAX_TURN:g} degrees (not used by training "
            "or evaluation)",
            PROBLEM,
            names,
            (np.abs(turned) > MAX_TURN) & ~degenerates & ~crossed,
            lambda row: f"orientation {names.orientations[row]:g}, off by {turned[row]:.0f}",
        ),
        listed(
            "queries with a negative orientation",
            NOTE,
            names,
            names.orientations < 0,
            lambda row: f"{names.orientations[row]:g}",
        ),
    ]


def corner_orientations(footprints):
    """(N, 4, 2) -> (N,) degrees: what the orientation should be, from the direction of the photo's right.

    Photos' corners go around from one end of the left edge to the right: bottom first or (all but one of the real
    names) top first, corner 0 to 3 and 1 to 2 lead to the right either way. Up is a quarter turn anticlockwise of it,
    and the orientation minus the azimuth of up, which is the direction of the right counted from east to north.
    """
    points = geo.unwrap_footprints(footprints)
    right = (points[:, 3] - points[:, 0] + points[:, 2] - points[:, 1]) / 2
    return np.degrees(np.arctan2(right[:, 0], right[:, 1] * np.cos(np.radians(points[..., 0].mean(axis=1)))))


def _by_size(values, rows):
    rows = np.flatnonzero(rows)
    return rows[np.argsort(-values[rows], kind="stable")]


def _no_date(dates):
    bad = {}
    for date in set(dates):
        try:
            np.datetime64(f"{date[:4]}-{date[4:6]}-{date[6:]}", "D")
            bad[date] = len(date) != 8
        except ValueError:
            bad[date] = True
    return np.array([bad[date] for date in dates], dtype=bool)


def _repeated(names, keys):
    """Items for keys that come more than once: all of their paths but the first, beside the first."""
    first, items = {}, []
    for row, key in enumerate(keys):
        if first.setdefault(key, row) != row:
            items.append(f"{names.paths[row]}: as {names.paths[first[key]]}")
    return items


def read_ids(ids):
    """zoom_row_col strings -> (N, 3) int64, -1 where it is not of that form."""
    values = {}
    for text in set(ids):
        parts = text.split("_")
        fits = len(parts) == 3 and all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts)
        fits = fits and int(parts[0]) <= 25
        values[text] = tuple(map(int, parts)) if fits else (-1, -1, -1)
    return np.array([values[text] for text in ids], dtype=np.int64).reshape(-1, 3)


def check_database(names):
    """Names of database images -> Findings."""
    regions = names.regions
    known = regions[:, 0] >= 0
    corners = np.array(names.footprints)
    corners[known] = grid.footprints(regions[known])
    off_grid = np.abs(corners - names.footprints).max(axis=(1, 2), initial=0) > COORDINATE_TOLERANCE
    areas_wrong, areas = wrong_areas(names)
    centers = geo.unwrap_footprints(names.footprints).mean(axis=1)
    centers[:, 1] = geo.wrap_longitude(centers[:, 1])
    shift = names.nadirs - centers
    shift[:, 1] = geo.wrap_longitude(shift[:, 1])
    misplaced, expected = wrong_folders(names, centers)
    return [
        listed("database images whose id is not zoom_row_col (no region of the grid)", NOTE, names, ~known),
        listed("database images whose corners are not those of their zoom_row_col", PROBLEM, names, off_grid),
        listed(
            "database images whose area does not fit their corners",
            PROBLEM,
            names,
            areas_wrong,
            lambda row: f"sq_km_area {names.areas[row]:.0f}, the corners have {areas[row]:.0f}",
        ),
        listed(
            "database images whose centre does not fit their corners",
            PROBLEM,
            names,
            np.abs(shift).max(axis=1, initial=0) > COORDINATE_TOLERANCE,
            lambda row: f"the corners' is {centers[row, 0]:.5f}, {centers[row, 1]:.5f}",
        ),
        listed("database images in a folder that does not fit their name", PROBLEM, names, misplaced, expected),
        listed("database images with an orientation other than 0", PROBLEM, names, names.orientations != 0),
        Finding(
            "database images of a region and year that is there already",
            PROBLEM,
            _repeated(names, zip(names.ids, names.years.tolist())),
        ),
        missing_years(names),
    ]


def wrong_folders(names, centers):
    """-> (N,) bool, and a function of a row that says the folder it should be in."""
    said, zooms = {}, names.regions[:, 0]
    for folder in set(names.folders):
        try:
            (year, zoom), (lat, lon) = (part.split("_") for part in folder.split("/")[-2:])
            said[folder] = int(year), int(zoom), int(lat), int(lon)
        except ValueError:
            said[folder] = (-1000,) * 4 if folder else (np.nan,) * 4  # a bare name: nothing to check
    said = np.array([said[folder] for folder in names.folders], dtype=np.float64).reshape(-1, 4)
    # A centre half-way between two tens may be rounded to either, as its corners are rounded themselves.
    wrong = np.abs(said[:, 2:] - centers).max(axis=1, initial=0) > 5 + COORDINATE_TOLERANCE
    wrong |= said[:, 0] != names.years
    wrong |= (said[:, 1] != zooms) & (zooms >= 0)

    def expected(row):
        lat10, lon10 = (round(value / 10) * 10 for value in centers[row].tolist())
        zoom = f"{zooms[row]:02d}" if zooms[row] >= 0 else "ZOOM"
        return f"belongs into database/{names.years[row]}_{zoom}/{lat10}_{lon10}"

    return wrong & ~np.isnan(said[:, 0]), expected


def missing_years(names):
    """Regions that lack one of the years that other regions have: training leaves them out."""
    number = {}
    rows = np.array([number.setdefault(image_id, len(number)) for image_id in names.ids], dtype=np.int64)
    years = np.unique(names.years)
    there = np.zeros((len(number), len(years)), dtype=bool)
    there[rows, np.searchsorted(years, names.years)] = True
    ids = list(number)
    lacking = sorted(np.flatnonzero(~there.all(axis=1)).tolist(), key=ids.__getitem__)
    return Finding(
        "regions without an image of each year (training leaves them out)",
        PROBLEM,
        [f"{ids[row]}: without {', '.join(map(str, years[~there[row]].tolist()))}" for row in lacking],
    )


def count_zooms(names):
    """-> {zoom as text: {year: images}}, by the names' ids."""
    counts, zooms = {}, names.regions[:, 0]
    pairs, numbers = np.unique(np.stack([zooms, names.years], axis=1), axis=0, return_counts=True)
    for (zoom, year), number in zip(pairs.tolist(), numbers.tolist()):
        counts.setdefault(f"zoom {zoom}" if zoom >= 0 else "no zoom", {})[year] = number
    return counts
