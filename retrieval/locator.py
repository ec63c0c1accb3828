"""From photos to places: described, searched near their nadirs, and registered. What predict.py and app.py share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from datasets import grid
from datasets.gps import check_points
from datasets.images import read_within, within
from datasets.nadirs import Nadir
from models.earthloc import load_model
from models.weights import weights_fingerprint
from retrieval.database import Dataset, Index, MilvusIndex, Places, search_near
from retrieval.describe import Describer
from retrieval.prior import PRIORS
from utils import geo
from utils.precision import default_precision, require_device

if TYPE_CHECKING:
    from retrieval.matching import Matcher
    from retrieval.store import DescriptorFile

# A place's properties, and their types; more follow where a table of nadirs has further columns.
COLUMNS = {
    "image": str,
    "rank": int,
    "score": float,
    "inliers": int,
    "probability": float,
    "verified": bool,
    "latitude": float,
    "longitude": float,
    "rotation": float,
    "database_image": str,
    "area_km2": int,
    "nadir_lat": float,
    "nadir_lon": float,
}
SHIPPED = Path(__file__).resolve().parent.parent / "weights"
EARTH_INDEX, INDEX_WEIGHTS = SHIPPED / "earth_index.safetensors", SHIPPED / "earth_ensemble.safetensors"
EARTH_WEIGHTS = SHIPPED / "earth.safetensors"
RESUME_HELP = (
    f"checkpoint of train.py, or released weights; default: weights/{INDEX_WEIGHTS.name}, which made the shipped "
)
RESUME_HELP += f"index, and with --dataset_path weights/{EARTH_WEIGHTS.name}"
REGISTERED_SIDE = 1024  # pixels of a photo's longer side that a matcher sees


@dataclass(frozen=True)
class Place:
    """Where a photo may have been taken; `as_dict` gives the properties of predictions.geojson.

    image: its path, or its number. rank: from 1. score: cosine similarity with database_image. inliers: points of the
    photo found on the ground by one homography; 0 without registration. probability: that the place is right, None
    without registration; verified: it is high enough to act on. latitude, longitude: of the footprint's centre.
    rotation: compass azimuth of the photo's up direction, as a viewer shows it, degrees; without registration to the
    next quarter. nadir: the point below the camera (lat, lon), None: unknown. footprint (4, 2): the ground at the
    photo's own corners, bottom left, top left, top right, bottom right, where it was registered; else that of the
    database image, turned likewise. row: of the database image. registration: what retrieval/registration.py found.
    """

    image: str | int
    rank: int
    score: float
    inliers: int
    probability: float | None
    verified: bool
    latitude: float
    longitude: float
    rotation: float
    database_image: str
    area_km2: int
    nadir: tuple[float, float] | None
    footprint: np.ndarray
    row: int
    columns: dict[str, str] = field(default_factory=dict)
    registration: object | None = None

    def as_dict(self) -> dict:
        lat, lon = (None, None) if self.nadir is None else self.nadir
        values = {name: getattr(self, name) for name in COLUMNS if not name.startswith("nadir")}
        return values | {"nadir_lat": lat, "nadir_lon": lon} | own_columns(self.columns)


@dataclass(frozen=True)
class Answer:
    """One photo's places, best first; without any, `why`. nadir: what was known of it."""

    image: str | int
    places: list[Place]
    nadir: Nadir
    why: str = ""


class Locator:
    """Photos -> places. A model, the places to compare with, and perhaps a matcher that registers the best of them.

        locator = Locator.from_files("weights/earth.safetensors", "data", register="xfeat")
        for places in locator(["a.jpg", "b.jpg"], nadirs=[(30.1, -95.4), None], top_k=3):
            print(places[0].latitude, places[0].longitude, places[0].probability, places[0].footprint)

    Called with images (paths; or pixels as PIL images, or uint8 tensors or arrays (3, H, W) or (H, W, 3)) and the point
    below the camera for each (lat, lon, degrees; None: unknown, the whole Earth is searched), it returns a list of at
    most top_k `Place`s for each image, best first: by inliers where they are registered, else by score and by distance
    from the nadir (`prior`). Only places within `near_km` of the nadir are looked at. An image that cannot be read has
    none; the log says why. `stream` does the same for any number of files, a batch at a time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        places: Places,
        matcher: Matcher | None = None,
        register: str = "none",
        near_km: float = 2500,
        prior: str = "archive",
        candidates: int = 10,
        batch_size: int = 32,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> None:
        """matcher: what `make_matcher(register)` gives; candidates: so many of the best are registered. prior:
        how far from their nadir photos look, "archive": as the public ones; "uniform": anywhere within near_km."""
        if prior not in PRIORS:
            raise ValueError(f"--prior {prior}: expected {' or '.join(PRIORS)}")
        self.model, self.places, self.matcher, self.register = model, places, matcher, register
        self.near_km, self.prior, self.candidates = near_km, prior, candidates
        self.settings = dict(
            image_size=model.config.image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            device=torch.device(device),
            precision=precision,
        )

    @classmethod
    def from_files(
        cls,
        weights: str | Path | None = None,
        dataset_path: str | Path | None = None,
        index: str | Path | None = None,
        milvus: str | None = None,
        register: str = "auto",
        matcher_weights: str | Path | None = None,
        ground: str | Path | None = None,
        descriptors: str | Path = "logs/descriptors",
        device: str | torch.device = "cpu",
        precision: str = "auto",
        batch_size: int = 32,
        num_workers: int = 0,
        **settings,
    ) -> Locator:
        """weights: checkpoint or released weights; None: see `default_weights`. dataset_path: a data set's folder (its
        database/ is described when first needed, and kept in `descriptors`), or index: a file of
        retrieval/earth_index.py; with neither, the one of the whole Earth that ships. milvus: where the index is
        searched, if not in memory, see MilvusIndex; a cluster's password is taken from $MILVUS_TOKEN. register: xfeat,
        aliked, disk, sift or none, on the data set's images or on ground, a Web Mercator raster; auto:
        `default_matcher` where there is one of these. settings: near_km, prior, candidates.

        Raises ValueError, FileNotFoundError or RuntimeError that names the file and the remedy.
        """
        if dataset_path is not None and index is not None:
            raise ValueError("--dataset_path and --index: give one of them, a folder with database/ or a file")
        if dataset_path is None and index is None:
            index = EARTH_INDEX
        if milvus is not None and index is None:
            raise ValueError(
                "--milvus: an index is searched there, not a data set; make one of it by python -m "
                "retrieval.earth_index and give it by --index"
            )
        on_ground = dataset_path is not None or ground is not None
        if register not in ("auto", "none") and not on_ground:
            raise ValueError(
                f"--register {register}: an index has no pictures; give --ground, a raster, or --dataset_path"
            )
        device = require_device(str(device))
        precision = default_precision(device) if precision == "auto" else precision
        weights = weights or default_weights(dataset_path)
        model = load_model(weights).to(device).eval()
        matcher = chosen_matcher(register, matcher_weights, device) if on_ground else None
        common = dict(batch_size=batch_size, num_workers=num_workers, device=device, precision=precision)
        if index is not None:
            places = open_index(index, model, weights, milvus)
        else:
            places = Dataset.read(dataset_path, model, descriptors, image_size=model.config.image_size, **common)
        if ground is not None:
            from retrieval.ground import RasterGround

            places.ground = RasterGround(ground)
        return cls(model, places, matcher, "none" if matcher is None else matcher.name, **common, **settings)

    def __call__(
        self, images: Sequence, nadirs: Sequence[tuple[float, float] | None] | None = None, top_k: int = 3
    ) -> list[list[Place]]:
        """See the class. Raises ValueError at a nadir that is out of range, and at another number of them."""
        nadirs = [None] * len(images) if nadirs is None else list(nadirs)
        if len(nadirs) != len(images):
            raise ValueError(f"{len(nadirs)} nadirs for {len(images)} images: give one for each, None where unknown")
        known = [number for number, nadir in enumerate(nadirs) if nadir is not None]
        points = check_points([nadirs[number] for number in known], "nadirs").tolist() if known else []
        given = dict(zip(known, points))
        named = [each if isinstance(each, (str, os.PathLike)) else as_pixels(each) for each in images]
        nadir_of = lambda number: Nadir(tuple(given[number]) if number in given else None, "given")
        answers = [each for batch in self.stream(named, nadir_of, top_k) for each in batch]
        for answer in answers:
            if answer.why:
                logging.warning(f"left out: {answer.why}")
        return [answer.places for answer in answers]

    def stream(
        self, images: Sequence, nadir_of: Callable[[int], Nadir], top_k: int = 3, kept: DescriptorFile | None = None
    ) -> Iterator[list[Answer]]:
        """images: paths, or uint8 tensors (3, H, W). nadir_of: number of an image -> its Nadir. kept: a file for the
        photos' descriptors (`Describer.file`). Yields the answers of a batch, or where photos are registered of one
        photo, in the order of the images."""
        depth = max(top_k, self.candidates) if self.matcher is not None else top_k
        describer = Describer(self.model, rotations=self.places.turns, upright=True, progress=False, **self.settings)
        for numbers, descriptors, failures in describer.in_order(images, kept):
            failed = dict(failures)
            nadirs = {number: nadir_of(number) for number in numbers.tolist()}
            readable = np.flatnonzero([number not in failed for number in numbers.tolist()])
            points = [nadirs[number].point for number in numbers[readable].tolist()]
            found = search_near(self.places, descriptors[:, readable], points, self.near_km, depth, self.prior)
            lists = dict(zip(numbers[readable].tolist(), zip(*found)))
            answers = (
                self._answer(images[number], number, nadirs[number], lists.get(number), failed.get(number), top_k)
                for number in numbers.tolist()
            )
            # Registration takes most of a second a photo: what is done is not held back.
            yield from ([list(answers)] if self.matcher is None else ([answer] for answer in answers))

    def _answer(
        self,
        image: str | Path | torch.Tensor,
        number: int,
        nadir: Nadir,
        found: tuple | None,
        error: str | None,
        top_k: int,
    ):
        name = number if torch.is_tensor(image) else os.fspath(image)
        if error is not None:
            return Answer(name, [], nadir, error)
        candidates = [each for each in zip(*(column.tolist() for column in found)) if each[1] >= 0]
        if not candidates:
            where = (
                "" if nadir.point is None else f" within {self.near_km:g} km of {nadir.point[0]:g}, {nadir.point[1]:g}"
            )
            return Answer(
                name, [], nadir, f"{name}: {self.places.source} shows nothing{where}; another nadir or database"
            )
        registered = [None] * len(candidates)
        if self.matcher is not None:
            try:
                registered = self._register(image, candidates, nadir)
            except (ValueError, OSError) as error:  # it could be read when it was described
                return Answer(name, [], nadir, str(error))
        order = by_inliers([each and each[0] for each in registered])[:top_k]
        places = [self._place(name, rank, candidates[k], registered[k], nadir) for rank, k in enumerate(order, 1)]
        return Answer(name, places, nadir)

    def _register(self, image: str | Path | torch.Tensor, candidates: list[tuple], nadir: Nadir):
        """-> for each candidate (score, row, rotation): (Registration, probability), or None."""
        from retrieval.confidence import probability
        from retrieval.registration import register

        photo = within(image, REGISTERED_SIDE) if torch.is_tensor(image) else read_within(image, REGISTERED_SIDE)
        tried = [(self.places.footprints[row], rotation) for _, row, rotation in candidates]
        found = register(photo, tried, self.places.ground, self.matcher, nadir=nadir.point)
        return [None if each is None else (each, float(probability(each))) for each in found]

    def _place(self, name: str | int, rank: int, candidate: tuple, registered: tuple | None, nadir: Nadir):
        score, row, rotation = candidate
        footprint, area = turn_footprint(self.places.footprints[row], rotation), int(self.places.areas[row])
        registration, inliers, probability, verified = None, 0, None if self.matcher is None else 0.0, False
        if registered is not None:
            from retrieval.confidence import VERIFIED

            registration, probability = registered
            footprint, inliers, rotation = registration.footprint, int(registration.inliers), registration.rotation
            verified = bool(probability >= VERIFIED)
            area = round(float(grid.quadrilateral_area(geo.unwrap_footprints(footprint))))
        lat, lon = geo.centers(footprint).tolist()
        return Place(
            name,
            rank,
            round(score, 6),
            inliers,
            None if probability is None else round(probability, 6),
            verified,
            round(lat, 6),
            round(lon, 6),
            round(rotation, 1),
            self.places.names[row],
            area,
            nadir.point,
            footprint,
            row,
            nadir.columns,
            registration,
        )


def default_weights(dataset_path: str | Path | None) -> Path:
    """Those that made the shipped index; for a data set's images, which are to be described, one network alone."""
    return INDEX_WEIGHTS if dataset_path is None else EARTH_WEIGHTS


def chosen_matcher(register: str, weights: str | Path | None, device: torch.device) -> Matcher | None:
    """--register on some ground -> the matcher; None for "none"."""
    if register == "none":
        return None
    from retrieval.matching import default_matcher, make_matcher

    return default_matcher(weights, device) if register == "auto" else make_matcher(register, weights, device)


def open_index(file: str | Path, model: torch.nn.Module, weights: str | Path, milvus: str | None) -> Index:
    """A file of retrieval/earth_index.py -> Index. ValueError where other weights than the model's made it."""
    from retrieval.earth_index import EarthIndex

    earth = EarthIndex.load(file)
    if earth.fingerprint != weights_fingerprint(model):
        raise ValueError(
            f"--index {file}: was not made with {weights}, so their descriptors cannot be compared; give the "
            f"weights that made it by --resume (of the one that ships: leave --resume out), or make an index of these "
            f"(python -m retrieval.earth_index)"
        )
    token = os.environ.get("MILVUS_TOKEN", "")  # flags are in the log
    return Index(earth, file) if milvus is None else MilvusIndex(earth, file, milvus, token=token)


def by_inliers(registrations: Sequence) -> list[int]:
    """Registrations of candidates, None where there is none, best score first -> their order as places: by inliers.

    Neighbours may lead to one and the same registration: all but the first of them come last.
    """
    known = {id(each): k for k, each in reversed(list(enumerate(registrations))) if each is not None}
    again = [each is not None and known[id(each)] != k for k, each in enumerate(registrations)]
    inliers = [0 if each is None else each.inliers for each in registrations]
    return sorted(range(len(inliers)), key=lambda k: (again[k], -inliers[k]))


def turn_footprint(footprint: np.ndarray, rotation: int) -> np.ndarray:
    """Corners (4, 2) of a north-up image -> those of the same image turned counter-clockwise by quarters, in the same
    order: bottom left, top left, top right, bottom right of what is shown then."""
    return np.roll(footprint, -(rotation // 90), axis=0)


def own_columns(columns: dict) -> dict:
    """A table's further columns under names that no property has."""
    return {f"table_{name}" if name in COLUMNS else name: value for name, value in columns.items()}


def as_pixels(image: Image.Image | torch.Tensor | np.ndarray) -> torch.Tensor:
    """PIL image, or uint8 tensor or array (3, H, W) or (H, W, 3) -> uint8 tensor (3, H, W). ValueError at others."""
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    pixels = torch.as_tensor(image)
    if pixels.ndim == 3 and pixels.shape[0] != 3 and pixels.shape[2] == 3:
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(
            f"an image of shape {tuple(pixels.shape)} and type {pixels.dtype}: give a path, a PIL image or uint8 RGB"
        )
    return pixels.contiguous()
