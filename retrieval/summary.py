"""What was found, for a person: lines of the log, photos beside what they were found to look like, world maps."""

import logging
from collections.abc import Sequence
from pathlib import Path

from datasets.images import read_image
from retrieval.database import Places
from retrieval.describe import rotate
from retrieval.locator import Answer, Place
from utils import figures
from utils.files import printable
from utils.world_map import candidates_map


def label(place: Place) -> str:
    """How sure it is, in a few words."""
    return f"{place.score:.3f}" + (f", {place.inliers} inliers, p {place.probability:.2f}" if place.inliers else "")


def tell(answers: Sequence[Answer], each_photo: bool) -> None:
    """Why photos have no place, and with each_photo the places of the others, into the log."""
    for answer in answers:
        if answer.why:
            logging.info(f"left out: {answer.why}")
        elif each_photo:
            found = (f"{place.latitude:.3f} {place.longitude:.3f} ({label(place)})" for place in answer.places)
            logging.info(f"{answer.image}: {', '.join(found)}")


def save_map(file: Path, answer: Answer) -> None:
    """The places of one photo on a map of the world."""
    points = [(place.latitude, place.longitude) for place in answer.places]
    figures.save(candidates_map(points, list(map(label, answer.places)), printable(Path(answer.image).name)), file)


def save_sheet(file: Path, places: Places, answers: Sequence[Answer], size: int = 160) -> None:
    """A row a photo: the photo, and the images that it was found to look like, turned as they matched."""
    cells, captions = [], []
    for answer in answers:
        pictures = [places.picture(place.row, size) for place in answer.places]
        turned = [
            None if each is None else rotate(each, 90 * round(place.rotation / 90))
            for each, place in zip(pictures, answer.places)
        ]
        cells.append([read_image(answer.image, size, upright=True), *turned])
        found = (f"{place.latitude:.1f} {place.longitude:.1f} ({place.score:.2f})" for place in answer.places)
        captions.append([printable(Path(answer.image).name)[:22], *found])
    titles = ["photo", *(f"prediction {rank + 1}" for rank in range(max(map(len, cells)) - 1))]
    figures.save(figures.mosaic(cells, size, captions=captions, column_titles=titles), file)
