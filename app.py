"""A page on this machine: drop photos, see where they were taken, correct, accept, export. python app.py

Opens at http://127.0.0.1:8000. Nothing leaves the machine, and nothing comes from elsewhere: map, scripts and model are
local. Uploaded photos are removed when it stops (Ctrl-C).
"""

import argparse
import ipaddress
import logging
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from datasets.nadirs import Nadir, read_nadirs
from retrieval.database import Dataset, Places
from retrieval.exports.matches import matches_of
from retrieval.locator import RESUME_HELP, Locator, Place
from retrieval.matching import matcher_flag
from retrieval.prior import PRIOR_HELP, PRIORS
from utils import geo
from utils.arguments import add_shared, make_parser, positive, run
from utils.mercator import bounds
from utils.workers import usable_cores
from web.apart import Apart
from web.desk import Desk, Found, Point

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
PICTURE_SIDE = 512  # pixels of a candidate


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what photos are compared with")
    add = group.add_argument
    add("--resume", help=RESUME_HELP)
    add("--dataset_path", help="folder with database/")
    add("--index", help="file of python -m retrieval.earth_index; default: without --dataset_path, the shipped one")
    add("--top_k", type=positive, default=5, help="places for each photo")
    add("--tle", metavar="FILE", help="two-line elements of the station: nadirs of photos with a time in their EXIF")
    add("--near_km", type=float, default=2500, help="how far a photo reaches from its nadir")
    add("--prior", choices=PRIORS, default="archive", help=PRIOR_HELP)
    add("--register", **matcher_flag("auto", "none"), default="auto", help="of the best places, see predict.py")
    add("--matcher_weights", metavar="FILE", help="of --register, if not those of the installed package")
    add("--ground", metavar="FILE", help="raster in Web Mercator: what --register matches, and the page's map")
    add("--candidates", type=positive, default=10, help="places that are registered; the best --top_k stay")
    add("--descriptors", default="logs/descriptors", help="folder where descriptors are kept")
    add_shared(group, "device", "precision")
    left = max(1, usable_cores() - 1)
    add("--threads", type=positive, default=left, help="of the network; the rest is the page's")
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen at. There is no password: whoever reaches it can use it")
    add("--port", type=positive, default=8000)
    add(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names under which other machines may ask for it; needed where --host is not this machine alone",
    )
    add("--max_mb", type=float, default=100, help="largest photo")
    add("--max_photos", type=positive, default=200, help="photos at a time")
    add("--open", action="store_true", help="open the browser")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    import uvicorn

    from web.server import make_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s   %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    hosts = allowed_hosts(args.host, args.port, args.allowed_hosts)
    names = "dataset_path index register matcher_weights ground near_km prior candidates".split()
    names += "descriptors device precision".split()
    settings = {name: getattr(args, name) for name in names}
    apart = Apart(partial(load, args.resume, args.top_k, args.tle, args.threads, **settings))
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, leave)
    with tempfile.TemporaryDirectory(prefix="earthloc_") as folder, apart as make_locate:
        desk = Desk(Path(folder) / "photos", make_locate, args.max_photos)
        app = make_app(desk, hosts, int(args.max_mb * 1e6), open_ground(args.ground), args.near_km)
        shown = f"[{args.host}]" if ":" in args.host else args.host
        logging.info(f"http://{shown}:{args.port}   (Ctrl-C stops it)")
        if args.open:  # some browsers come back only when they are closed
            threading.Thread(target=webbrowser.open, args=(f"http://{shown}:{args.port}",), daemon=True).start()
        settings = dict(log_level="warning", proxy_headers=False, server_header=False, timeout_graceful_shutdown=5)
        uvicorn.run(app, host=args.host, port=args.port, **settings)
    logging.info("stopped; uploaded photos are removed")


def leave(number: int, _: object) -> None:
    """A signal's handler: what was uploaded is removed all the same, and the last line says why it ends."""
    raise SystemExit(f"stopped by {signal.Signals(number).name}")


def allowed_hosts(host: str, port: int, others: list[str]) -> set[str]:
    """-> what a request's Host may be. Raises ValueError where other machines could ask, and no name is allowed."""
    if not is_loopback(host) and not others:
        raise ValueError(
            f"--host {host}: other machines could reach the page, which asks for no password; say under which names "
            f"with --allowed_hosts, or leave --host out"
        )
    names = [each.lower() for each in (*LOOPBACK, *others)]
    return {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_ground(file: str | None) -> Callable | None:
    """A raster for the map's tiles, opened a second time: the locator's thread has its own."""
    if file is None:
        return None
    from retrieval.ground import RasterGround

    return RasterGround(file)


def load(weights: str, top_k: int, tle: str | None, threads: int, **settings) -> tuple[Callable, str]:
    """-> what web.desk calls for each photo, and a line that tells what it searches."""
    # Where all cores wait for each other, one that draws the page stops them all.
    torch.set_num_threads(threads)
    locator = Locator.from_files(weights, **settings)
    nadirs = read_nadirs(None, None, tle, [])

    def locate(file: Path, nadir: Point | None):
        nadir = nadirs.of(file) if nadir is None else Nadir(nadir, "given")
        [[answer]] = locator.stream([str(file)], lambda _: nadir, top_k)
        return [as_found(locator.places, place) for place in answer.places], answer.why, nadir.point

    matched = "not registered" if locator.register == "none" else f"registered by {locator.register}"
    return locate, f"{len(locator.places):,} places, {matched}"


def as_found(places: Places, place: Place) -> Found:
    """A Place of retrieval/locator.py -> as the page needs it. An index has no images: its ground is shown."""
    footprint = places.footprints[place.row]
    if isinstance(places, Dataset) or places.ground is None:
        picture = places.picture(place.row, PICTURE_SIDE)
    else:
        picture = places.ground(bounds(geo.to_mercator(geo.unwrap_footprints(footprint))), PICTURE_SIDE)
    matches = matches_of(place.registration, places.ground)
    if picture is None:
        return Found(place.as_dict(), place.footprint, matches=matches)
    return Found(place.as_dict(), place.footprint, picture.numpy(), footprint, matches)


if __name__ == "__main__":
    arguments = parse_arguments()
    run(main, arguments, keep_memory=False)
