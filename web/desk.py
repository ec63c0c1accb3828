"""The page's photos: kept in a folder under names of the server's own, located one after the other by one thread.

Nothing here knows HTTP. What the browser sends (names, numbers) never becomes part of a path.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import shutil
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from datasets.gps import check_points
from datasets.images import read_pixels
from datasets.names import ImageName
from retrieval.exports import EXPORTS, export_photo
from retrieval.exports.matches import Matches
from utils import geo
from utils.mercator import require_view

SHOWN_SIDE, THUMB_SIDE = 2048, 240  # pixels of a photo in the browser, on the map and in the list
MAX_NAME = 255  # letters
WAITING, LOCATING, DONE, FAILED = "waiting", "locating", "done", "failed"


class Unknown(KeyError):
    """No such photo, place or file."""


class Busy(ValueError):
    """It cannot be done now: too many photos, or none located yet."""


@dataclass(frozen=True)
class Found:
    """A place as the page needs it: properties (those of predictions.geojson), footprint (4, 2) of the photo's own
    corners, degrees, and perhaps a picture of the database image, uint8 (3, h, w) north up, with its footprint, and
    what the photo was matched with."""

    properties: dict
    footprint: np.ndarray
    picture: np.ndarray | None = None
    picture_footprint: np.ndarray | None = None
    matches: Matches | None = None


Point = tuple[float, float]  # lat, lon
# Photo file, nadir or None -> its places, best first; where there are none, why; and the nadir that it went by.
Locate = Callable[[Path, Point | None], tuple[list[Found], str, Point | None]]


@dataclass
class Photo:
    id: str
    name: str  # as the browser says; to be shown, never opened
    folder: Path
    nadir: Point | None
    size: tuple[int, int] = (0, 0)
    state: str = WAITING
    error: str = ""
    places: list[Found] = field(default_factory=list)
    decision: str = "open"  # accepted, rejected
    chosen: int = 0  # of the places, the accepted one
    corrected: np.ndarray | None = None  # (4, 2): the accepted footprint, where a person moved its corners
    run: int = 0  # raised with each new question, so that an older answer is dropped
    ticket: int = 0  # its turn

    @property
    def file(self) -> Path:
        return self.folder / "photo"

    def as_dict(self, ahead: int) -> dict:
        """What the browser is told; ahead: photos to be located before this one."""
        return {
            "id": self.id,
            "name": self.name,
            "nadir": self.nadir,
            "width": self.size[0],
            "height": self.size[1],
            "state": self.state,
            "ahead": ahead,
            "error": self.error,
            "run": self.run,
            "decision": self.decision,
            "chosen": self.chosen,
            "corrected": None if self.corrected is None else self.corrected.tolist(),
            "places": [
                each.properties
                | {
                    "footprint": np.asarray(each.footprint).tolist(),
                    "picture": each.picture is not None,
                    "picture_footprint": None
                    if each.picture_footprint is None
                    else np.asarray(each.picture_footprint).tolist(),
                }
                for each in self.places
            ],
        }


class Desk:
    """Photos, the queue of those to be located, and the thread that works on it.

    make_locate: called once, in that thread, as a model takes seconds to load -> Locate, and a line that tells what it
    searches; an error there is told by `status`. Use as a context: at its end the thread stops, and all that was
    uploaded is removed.
    """

    def __init__(self, folder: Path, make_locate: Callable[[], tuple[Locate, str]], max_photos: int = 200) -> None:
        self.folder, self.make_locate, self.max_photos = Path(folder), make_locate, max_photos
        self.photos: dict[str, Photo] = {}
        self.queue: queue.Queue = queue.Queue()
        self.lock = threading.RLock()
        self.decoding, self.exporting = threading.Lock(), threading.Lock()  # one at a time: the largest take GBs
        self.ready, self.error, self.text = False, "", ""
        self.tickets, self.is_stopping = itertools.count(), False
        self.worker = threading.Thread(target=self._work, name="locating", daemon=True)

    def __enter__(self) -> Desk:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.worker.start()
        return self

    def __exit__(self, *_) -> None:
        self.is_stopping = True
        self.queue.put(None)
        self.worker.join(timeout=5)  # a photo that is being matched does not hold up the end
        shutil.rmtree(self.folder, ignore_errors=True)

    def status(self) -> dict:
        with self.lock:
            return {"ready": self.ready, "error": self.error, "text": self.text, "max_photos": self.max_photos}

    def listed(self) -> list[dict]:
        with self.lock:
            waiting = [each for each in self.photos.values() if each.state in (WAITING, LOCATING)]
            ahead = {each.id: place for place, each in enumerate(sorted(waiting, key=lambda photo: photo.ticket))}
            return [each.as_dict(ahead.get(each.id, 0)) for each in self.photos.values()]

    def get(self, photo_id: str) -> Photo:
        with self.lock:
            if photo_id not in self.photos:
                raise Unknown("no such photo")
            return self.photos[photo_id]

    def require_room(self) -> None:
        with self.lock:
            if len(self.photos) >= self.max_photos:
                raise Busy(f"there are {self.max_photos} photos; remove some first")

    def place_for_upload(self) -> Path:
        """-> a new empty folder; `add` takes the file "photo" in it, or removes all of it."""
        self.require_room()
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir()
        return folder

    def add(self, folder: Path, name: str, nadir: Point | None = None) -> Photo:
        """A folder of `place_for_upload` whose file is complete -> the photo, queued. Without a nadir, that of its
        EarthLoc name. ValueError, and nothing kept, where it is no photo or the nadir is none."""
        try:
            self.require_room()
            name = PurePosixPath(name.replace("\\", "/")).name[:MAX_NAME] or "photo"
            nadir = checked_nadir(nadir) if nadir is not None else nadir_in(name)
            photo = Photo(folder.name, name, folder, nadir)
            with self.decoding:
                photo.size = make_previews(photo.file, folder)
        except ValueError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(str(error).replace(str(folder / "photo"), name)) from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self.lock:
            self.photos[photo.id] = photo
            self._enqueue(photo)
        return photo

    def ask_again(self, photo_id: str, nadir: Sequence | None) -> Photo:
        """Locate it anew, with another nadir (lat, lon) or None for the whole Earth."""
        nadir = None if nadir is None else checked_nadir(nadir)
        with self.lock:
            photo = self.get(photo_id)
            photo.nadir, photo.run = nadir, photo.run + 1
            photo.state, photo.error, photo.places = WAITING, "", []
            photo.decision, photo.chosen, photo.corrected = "open", 0, None
            self._enqueue(photo)
            return photo

    def decide(self, photo_id: str, decision: str, chosen: int = 0, corrected: Sequence | None = None) -> Photo:
        """accepted (place number `chosen`, perhaps with moved corners (4, 2)), rejected or open."""
        with self.lock:
            photo = self.get(photo_id)
            if decision not in ("accepted", "rejected", "open"):
                raise ValueError(f"decision {decision!r}: accepted, rejected or open")
            if decision == "accepted" and not 0 <= chosen < len(photo.places):
                raise ValueError(f"place {chosen}: the photo has {len(photo.places)}")
            if corrected is not None:
                corrected = require_view(np.asarray(corrected, dtype=np.float64))
                corrected[:, 1] = geo.wrap_longitude(corrected[:, 1])
            accepted = decision == "accepted"
            photo.decision, photo.chosen = decision, chosen if accepted else 0
            photo.corrected = corrected if accepted else None
            return photo

    def remove(self, photo_id: str) -> None:
        with self.lock:
            photo = self.get(photo_id)
            del self.photos[photo_id]
        shutil.rmtree(photo.folder, ignore_errors=True)

    def export(self, photo_id: str, kind: str) -> tuple[Path, str]:
        """-> the file, and a name to save it under; kind "zip": all kinds together, with the photo. Busy before it is
        located, ValueError where the footprint cannot be exported so."""
        with self.lock:
            photo = self.get(photo_id)
            if kind != "zip" and kind not in EXPORTS:
                raise Unknown("no such export")
            if not photo.places:
                raise Busy("the photo has no place yet")
            content = exported(photo)
        out = photo.folder / f"export_{secrets.token_hex(4)}"
        with self.exporting:
            files, failures = export_photo(out, EXPORTS if kind == "zip" else [kind], photo.file, *content)
        if not files:
            shutil.rmtree(out, ignore_errors=True)
            raise ValueError("; ".join(failures).replace(str(photo.file), photo.name))
        if kind == "zip":
            file = out / "all.zip"
            with zipfile.ZipFile(file, "w") as archive:
                for each in files:
                    archive.write(each, f"{photo.id}/exports/{each.name}")
                archive.write(photo.file, f"{photo.id}/photo")  # where the STAC item says it is
            files = [file]
        suffix = ".zip" if kind == "zip" else files[0].name.removeprefix("photo")
        return files[0], PurePosixPath(photo.name).stem[:150] + suffix

    def export_accepted(self, kind: str) -> tuple[Path, str]:
        """The accepted place of every photo that has one, in one file. Busy where there is none."""
        if kind not in ("geojson", "geoparquet"):
            raise Unknown("no such export")
        with self.lock:
            accepted = [exported(each) for each in self.photos.values() if each.decision == "accepted"]
        if not accepted:
            raise Busy("no photo is accepted yet")
        places, footprints = [each[0][0] for each in accepted], np.stack([each[1][0] for each in accepted])
        out = self.folder / f"export_{secrets.token_hex(4)}"
        files, failures = export_photo(out, [kind], Path("accepted"), places, footprints)
        if not files:
            raise ValueError("; ".join(failures))
        return files[0], files[0].name

    def _enqueue(self, photo: Photo):
        photo.ticket = next(self.tickets)
        self.queue.put((photo.id, photo.run))

    def _work(self):
        try:
            locate, text = self.make_locate()
        except Exception as error:  # told on the page, which stays of use for nothing else
            logging.exception("the locator cannot be loaded")
            with self.lock:
                self.error = str(error) or type(error).__name__
            return
        with self.lock:
            self.ready, self.text = True, text
        while (job := self.queue.get()) is not None and not self.is_stopping:
            self._locate(locate, *job)
            self.queue.task_done()

    def _locate(self, locate: Locate, photo_id: str, run: int):
        with self.lock:
            photo = self.photos.get(photo_id)
            if photo is None or photo.run != run:
                return
            photo.state, nadir = LOCATING, photo.nadir
        places, error = [], ""
        try:
            places, error, nadir = locate(photo.file, nadir)
            for number, place in enumerate(places):
                if place.picture is not None:
                    pixels = np.moveaxis(np.asarray(place.picture), 0, -1)
                    save_preview(pixels, photo.folder / f"place_{run}_{number}.jpg", 512)
        except Exception as failure:  # one photo's trouble is not the next one's
            logging.exception(f"photo {photo_id}")
            places, error = [], str(failure) or type(failure).__name__
        with self.lock:
            if photo.run == run:
                photo.nadir = nadir
                named = {"image": photo.name}
                photo.places = [replace(each, properties=each.properties | named) for each in places]
                photo.state = DONE if places else FAILED
                photo.error = "" if places else (error or "no place was found").replace(str(photo.file), photo.name)


def exported(photo: Photo) -> tuple[list[dict], np.ndarray, list, list]:
    """-> places, footprints (P, 4, 2), pictures and matches as exports take them: the accepted place first, with the
    corners that a person moved; "decision" and "corrected" say so."""
    order = [photo.chosen, *(k for k in range(len(photo.places)) if k != photo.chosen)]
    places, footprints = [], []
    for k in order:
        place, footprint = dict(photo.places[k].properties), np.asarray(photo.places[k].footprint)
        is_accepted = photo.decision == "accepted" and k == photo.chosen
        place["decision"] = "accepted" if is_accepted else "rejected" if photo.decision == "rejected" else "open"
        place["corrected"] = is_accepted and photo.corrected is not None
        if place["corrected"]:
            footprint = photo.corrected
            place["latitude"], place["longitude"] = (round(each, 6) for each in geo.centers(footprint).tolist())
        places.append(place)
        footprints.append(footprint)
    found = [photo.places[k] for k in order]
    return places, np.stack(footprints), [each.picture for each in found], [each.matches for each in found]


def checked_nadir(nadir: Sequence) -> Point:
    """(lat, lon) as the browser sends it -> floats. ValueError out of range."""
    try:
        lat, lon = map(float, nadir)
    except (TypeError, ValueError):
        raise ValueError(f"nadir {nadir!r}: two numbers, latitude and longitude in degrees") from None
    return tuple(check_points([(lat, lon)], "nadir")[0].tolist())


def nadir_in(name: str) -> Point | None:
    """The nadir in an EarthLoc file name, None in others."""
    try:
        return checked_nadir(ImageName.parse(name).nadir)
    except ValueError:
        return None


def make_previews(file: Path, folder: Path) -> tuple[int, int]:
    """A photo's file -> shown.jpg and thumb.jpg in the folder; returns its width and height as a viewer shows it."""
    pixels = read_pixels(file, upright=True).numpy()
    save_preview(pixels, folder / "shown.jpg", SHOWN_SIDE)
    save_preview(pixels, folder / "thumb.jpg", THUMB_SIDE)
    return pixels.shape[1], pixels.shape[0]


def save_preview(pixels: np.ndarray, file: Path, side: int) -> None:
    """uint8 (H, W, 3) -> JPEG, its longer side at most `side` pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2)
    image.save(file, "JPEG", quality=88)
