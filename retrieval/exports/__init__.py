"""What GIS people open, a file a photo: `python predict.py … --export kmz geotiff cog geoparquet stac report`.

An export is a module here and a line in EXPORTS: write(folder, photo, places, footprints, pictures, matches) -> the
file that it wrote, named after the photo, suffix and all: a.jpg and a.png are two photos. What goes in (pictures and
matches are for the report alone):

photo: its path. places: dicts, best first, with the properties of predictions.geojson (image, rank, score, inliers,
probability, verified, latitude, longitude, rotation, database_image, and what else there is). footprints: (P, 4, 2)
degrees, the photo's own corners as a viewer shows it: bottom left, top left, top right, bottom right; of a place that
was not registered, the database image's, turned likewise. pictures: of the places, uint8 (3, h, w) north up, or None.
matches: of the places, `Matches` or None.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from retrieval.database import Places
from retrieval.exports import cog, geojson, geoparquet, geotiff, kmz, report, stac
from retrieval.exports.matches import Matches, matches_of
from retrieval.locator import Answer
from utils.files import printable

# A STAC item lists the files that are there by then, so it comes late.
EXPORTS = {
    "geojson": geojson.write,
    "geoparquet": geoparquet.write,
    "kmz": kmz.write,
    "geotiff": geotiff.write,
    "cog": cog.write,
    "report": report.write,
    "stac": stac.write,
}


def export_photo(
    folder: Path,
    kinds: Iterable[str],
    photo: Path,
    places: Sequence[dict],
    footprints: np.ndarray,
    pictures: Sequence = (),
    matches: Sequence[Matches | None] = (),
) -> tuple[list[Path], list[str]]:
    """-> the files written, and what went wrong with the others, which is logged, too: a kind that fails, or a photo,
    costs no other one. Raises ValueError only at a kind that there is not."""
    wanted = set(kinds)
    if unknown := wanted - set(EXPORTS):
        raise ValueError(f"--export {' '.join(sorted(unknown))}: choose among {', '.join(EXPORTS)}")
    folder, files, failures = Path(folder), [], []
    for kind, write in EXPORTS.items():
        if kind in wanted:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                files.append(write(folder, Path(photo), places, footprints, pictures, matches))
            except Exception as error:  # whatever it is, the photos to come are worth more
                text = str(error) or type(error).__name__
                failures.append(f"{printable(str(photo))}: no {kind} ({text})")
                logging.warning(failures[-1])
    return files, failures


def export_answer(folder: Path, kinds: Iterable[str], answer: Answer, places: Places, size: int = 512) -> None:
    """A located photo's files of the kinds, under the folder as the photo lies under the current one (or under /), so
    that no two photos share a file."""
    if not kinds or not answer.places:
        return
    beside, pictures, matches = os.path.relpath(os.path.dirname(os.path.abspath(answer.image))), [], []
    if beside.split(os.sep)[0] == os.pardir:
        beside = os.path.relpath(os.path.abspath(beside), os.sep)
    if "report" in kinds:
        pictures = [places.picture(place.row, size) for place in answer.places]
        matches = [matches_of(place.registration, places.ground) for place in answer.places]
    export_photo(
        Path(folder) / beside,
        kinds,
        Path(answer.image),
        [place.as_dict() for place in answer.places],
        np.stack([place.footprint for place in answer.places]),
        pictures,
        matches,
    )
