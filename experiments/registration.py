"""From photos to footprints: what registration adds, on a data set whose photos have footprints.

python -m experiments.registration DATASET_PATH --register xfeat sift
python -m experiments.registration DATASET_PATH --index weights/earth_index.safetensors --ground RASTER --candidates 50

Photos are located as predict.py does it, near their nadirs; candidates are the data set's images, or an index's
regions. Told for each are the ranks of the first right place: among the candidates as retrieval orders them, and after
registration. A right one shares ground with the photo. Labels whose sides are longer than 2.2:1 are faulty (3.5 %
of the public names), and are left out where footprints are compared; corners are compared in whatever order fits best,
as names have them in any.
"""

import time
from collections.abc import Sequence
from copy import copy
from typing import Annotated

import numpy as np

from datasets.names import Catalogue
from datasets.overlap import polygons, share_ground
from retrieval.locator import Locator, Place
from retrieval.matching import matcher_flag
from utils import geo
from utils.arguments import positive
from utils.flags import DESCRIPTORS, DEVICE, Device, command

PLAUSIBLE = 2.2  # of a label's sides


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Two footprints (4, 2) -> their intersection over union, as datasets.overlap measures it."""
    b = geo.unwrap_footprints(b)
    b[:, 1] += geo.wrap_longitude(b[0, 1] - a[0, 1]) - (b[0, 1] - a[0, 1])
    a, b = (polygons(each[None])[0] for each in (a, b))
    shared = a.intersection(b).area
    return shared / (a.area + b.area - shared)


def sides(footprint: np.ndarray) -> np.ndarray:
    """(4, 2) degrees -> (4,) km."""
    return geo.distance_km(footprint, np.roll(footprint, -1, axis=0))


def sides_ratio(footprint: np.ndarray) -> float:
    """(4, 2) degrees -> the longest side over the shortest."""
    return sides(footprint).max() / sides(footprint).min()


def corners_off(label: np.ndarray, footprint: np.ndarray) -> float:
    """Two footprints (4, 2) -> km between their corners, the mean, in the order and sense that fit best."""
    orders = (np.roll(footprint[::step], turn, axis=0) for step in (1, -1) for turn in range(4))
    return min(float(geo.distance_km(label, each).mean()) for each in orders)


def measure(name: str, label: np.ndarray, places: Sequence[Place], candidates: np.ndarray, seconds: float) -> dict:
    """A photo's label (4, 2), its places, best first, and the footprints (N, 4, 2) that retrieval found, best first
    -> dict. ranks: of the first right one, before (None: there is none) and after."""
    true, right = (
        share_ground(label[None], np.asarray(each))[0] for each in (candidates, [place.footprint for place in places])
    )
    best = places[0]
    return {
        "photo": name,
        "ranks": [1 + int(each.argmax()) if each.any() else None for each in (true, right)],
        "best": best,
        "right": bool(right[0]),
        "iou": iou(label, best.footprint) if best.registration else 0.0,
        "off": corners_off(label, best.footprint),
        "width": float(sides(label).mean()),
        "plausible": bool(sides_ratio(label) < PLAUSIBLE),
        "seconds": seconds,
        "false": max((place.inliers for place, each in zip(places, right) if not each), default=0),
    }


HEADER = "photo                 ranks     inliers/matches  rounds  moved  spread  p      IoU     km off  label"


def line(r: dict) -> str:
    """A photo's row in the table."""
    found = r["best"].registration
    told = (
        f"{found.inliers:7d}/{found.matches:<7d} {found.rounds:6d} {found.moved:7.3f} {found.spread:7.2f}"
        if found
        else f"{'-':>7}/{'-':<7} {'-':>6} {'-':>7} {'-':>7}"
    )
    before, after = (str(rank or "-") for rank in r["ranks"])
    return (
        f"{r['photo']:<20} {before:>4} {after:>4} {told}  {r['best'].probability:.3f}  {r['iou']:.3f} {r['off']:8.1f}  "
        f"{'' if r['plausible'] else 'faulty'} (false: {r['false']})"
    )


def summary(results: Sequence[dict]) -> list[str]:
    """-> lines: what all photos come to."""
    there, verified = [r for r in results if r["ranks"][0]], [r for r in results if r["best"].verified]
    first = [sum(r["ranks"][k] == 1 for r in results) for k in (0, 1)]
    right = [r for r in verified if r["right"]]
    good = [r for r in right if r["plausible"]]
    lines = [
        f"{len(there)} of {len(results)} photos have a true candidate; a right place is first for {first[0]} before, "
        f"{first[1]} after",
        f"verified: {len(right)} right ones, {len(verified) - len(right)} wrong ones",
    ]
    if good:
        ious, off = [r["iou"] for r in good], np.array([r["off"] for r in good])
        share = off / [r["width"] for r in good]
        lines.append(
            f"right and verified, plausible labels ({len(good)}): IoU median {np.median(ious):.3f}, least "
            f"{min(ious):.3f}; corners off by {np.median(off):.2f} km (90 %: {np.percentile(off, 90):.2f}), "
            f"{np.median(share):.2%} of the photo's side (90 %: {np.percentile(share, 90):.2%})"
        )
    seconds = [r["seconds"] for r in results]
    return [*lines, f"{np.mean(seconds):.1f} s a photo (median {np.median(seconds):.1f})"]


def main(
    dataset_path: Annotated[str, "folder with queries/, and database/ without --index"],
    resume: Annotated[str | None, "the model that finds candidates; default: as of predict.py"] = None,
    index: Annotated[
        str | None, "file of retrieval/earth_index.py: its regions are the candidates; needs --ground"
    ] = None,
    ground: Annotated[str | None, "Web Mercator raster to register on; default: the data set's images"] = None,
    register: Annotated[list[str], "matchers", matcher_flag()] = ("xfeat",),
    matcher_weights: Annotated[str | None, "folder with the matcher's published files"] = None,
    candidates: Annotated[int, "of a photo", {"type": positive}] = 10,
    photos: Annotated[int | None, "so many of them, evenly from the list; default: all", {"type": positive}] = None,
    min_km2: Annotated[float, "smallest photo that is looked for"] = 0,
    descriptors: Annotated[str, "folder where the images' descriptors are kept"] = DESCRIPTORS,
    device: Device = DEVICE,
) -> None:
    """Prints a row for each photo and a summary, for each matcher."""
    queries = Catalogue.read(dataset_path, "queries")
    rows = np.flatnonzero(queries.areas >= min_km2)
    rows = rows[np.linspace(0, len(rows) - 1, min(photos or len(rows), len(rows))).astype(int)]
    settings = {"index": index} if index else {"dataset_path": dataset_path}
    settings |= dict(matcher_weights=matcher_weights, ground=ground, candidates=candidates)
    settings |= dict(descriptors=descriptors, device=device)
    for name in register:
        locator = Locator.from_files(resume, register=name, **settings)
        retrieval = copy(locator)
        retrieval.matcher = None
        near = [locator.places.near(tuple(nadir), locator.near_km) for nadir in queries.nadirs[rows].tolist()]
        locator.places.prepare(np.unique(np.concatenate(near)))  # once, so it is no photo's time
        results = []
        print(f"{name}\n{HEADER}")
        for row in rows:
            began = time.perf_counter()
            (found,) = locator([queries.root / queries.paths[row]], [tuple(queries.nadirs[row])], candidates)
            seconds = time.perf_counter() - began
            if found:
                (before,) = retrieval([queries.root / queries.paths[row]], [tuple(queries.nadirs[row])], candidates)
                looks = locator.places.footprints[[place.row for place in before]]
                results.append(measure(queries.ids[row], queries.footprints[row], found, looks, seconds))
                print(line(results[-1]), flush=True)
        print("\n".join(summary(results)), flush=True)


if __name__ == "__main__":
    command(main)
