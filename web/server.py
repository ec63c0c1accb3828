"""The page's HTTP side. It answers only the machine it runs on, unless told otherwise, and only its own page.

A page of another site, open in the same browser, can send requests to localhost as well: Host (DNS rebinding) and
Origin are checked, there is no CORS, and uploads are a raw body of limited size.
"""

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.background import BackgroundTask
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval.exports.kmz import to_jpeg
from utils.geo import MERCATOR_HALF
from utils.world_map import mercator_view
from web.desk import Busy, Desk, Photo, Unknown

STATIC = Path(__file__).parent / "static"
MAX_JSON = 100_000  # bytes
TILE = 256  # pixels
COARSE = 5  # zoom of 4.9 km a pixel
MAX_ZOOM, FINE_ZOOM = 6, 10  # 2.4 km a pixel, finer than the Blue Marble that ships; 150 m a pixel
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'; object-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_app(
    desk: Desk, hosts: set[str], max_bytes: int, ground: Callable | None = None, near_km: float = 2500
) -> FastAPI:
    """desk: not yet started; it lives as long as the app. hosts: what a request's Host may be, with its port.
    max_bytes: of an upload. ground: see `serve_map`. near_km: shown around nadirs."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        with desk:
            yield

    app = FastAPI(title="EarthLoc", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=hosts)
    answer_errors(app)

    @app.get("/")
    async def page():
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    max_zoom = serve_map(app, ground)

    @app.get("/api/about")
    async def tell():
        return {**desk.status(), "max_mb": max_bytes / 1e6, "max_zoom": max_zoom, "near_km": near_km}

    serve_photos(app, desk, max_bytes)
    return app


def answer_errors(app: FastAPI) -> None:
    """What the desk raises -> status and reason."""

    @app.exception_handler(Unknown)
    async def unknown(_: Request, error: Exception):
        return JSONResponse({"detail": error.args[0]}, 404)

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: Exception):
        return JSONResponse({"detail": str(error)}, 409 if isinstance(error, Busy) else 422)

    @app.exception_handler(FileNotFoundError)
    async def gone(_: Request, error: Exception):  # removed meanwhile
        return JSONResponse({"detail": "no such photo"}, 404)

    @app.exception_handler(OSError)
    async def failed(_: Request, error: Exception):  # a full disk; its path is nobody's business
        logging.error(str(error))
        return JSONResponse({"detail": f"the photo cannot be kept: {error.strerror}"}, 507)


def serve_map(app: FastAPI, ground: Callable | None) -> int:
    """The map's tiles -> their largest zoom. ground: of retrieval/ground.py, a finer map than the one that ships; it is
    asked by one thread at a time, and from zoom COARSE on: wider tiles would read much of it."""
    max_zoom = MAX_ZOOM if ground is None else FINE_ZOOM
    drawing = threading.Lock()

    @lru_cache(maxsize=2048)
    def ground_tile(zoom: int, x: int, y: int):
        with drawing:
            pixels = ground(tile_box(zoom, x, y), TILE)
        return None if pixels is None else as_jpeg(pixels.permute(1, 2, 0).numpy())

    @app.get("/tiles/{zoom}/{x}/{y}.jpg")
    def tile(zoom: int, x: int, y: int):
        if not (0 <= zoom <= max_zoom and 0 <= x < 2**zoom and 0 <= y < 2**zoom):
            raise HTTPException(404, "no such tile")
        content = ground_tile(zoom, x, y) if ground is not None and zoom >= COARSE else None
        return Response(
            content or blue_marble(zoom, x, y), media_type="image/jpeg", headers={"Cache-Control": "max-age=86400"}
        )

    return max_zoom


def serve_photos(app: FastAPI, desk: Desk, max_bytes: int) -> None:
    """All that the page does with photos. max_bytes: of an upload."""

    @app.get("/api/photos")
    async def photos():
        return desk.listed()

    @app.post("/api/photos", status_code=201)
    async def upload(request: Request, name: str = "photo", lat: float | None = None, lon: float | None = None):
        """The body is the file as it is; lat, lon: of the point below the camera."""
        if (lat is None) != (lon is None):
            raise ValueError("nadir: latitude and longitude go together")
        declared = int(request.headers.get("content-length") or 0)
        if declared > max_bytes:
            raise too_large(max_bytes)
        folder = desk.place_for_upload()
        try:
            await receive(request, folder / "photo", max_bytes)
        except BaseException:  # also when the browser went away: what is awaited now would be given up, too
            discard(folder)
            raise
        photo = await run_in_threadpool(desk.add, folder, name, None if lat is None else (lat, lon))
        return told(desk, photo)

    @app.delete("/api/photos/{photo_id}")
    def remove(photo_id: str):
        desk.remove(photo_id)
        return {}

    @app.put("/api/photos/{photo_id}/nadir")
    async def nadir(photo_id: str, request: Request):
        body = await read_json(request)
        return told(desk, desk.ask_again(photo_id, body.get("nadir")))

    @app.put("/api/photos/{photo_id}/decision")
    async def decide(photo_id: str, request: Request):
        body = await read_json(request)
        chosen = body.get("chosen", 0)
        if not isinstance(chosen, int):
            raise ValueError("chosen: the number of a place")
        return told(desk, desk.decide(photo_id, body.get("decision"), chosen, body.get("corrected")))

    @app.get("/api/photos/{photo_id}/{which}.jpg")
    def picture(photo_id: str, which: str):
        if which not in ("shown", "thumb"):
            raise Unknown("no such picture")
        return FileResponse(desk.get(photo_id).folder / f"{which}.jpg", headers={"Cache-Control": "max-age=3600"})

    @app.get("/api/photos/{photo_id}/places/{number}.jpg")
    def place_picture(photo_id: str, number: int):
        photo = desk.get(photo_id)
        if not 0 <= number < len(photo.places) or photo.places[number].picture is None:
            raise Unknown("no such picture")
        return FileResponse(photo.folder / f"place_{photo.run}_{number}.jpg")

    @app.get("/api/photos/{photo_id}/export/{kind}")
    def export(photo_id: str, kind: str):
        return download(*desk.export(photo_id, kind))

    @app.get("/api/export/{kind}")
    def export_accepted(kind: str):
        return download(*desk.export_accepted(kind))


class Guard:
    """Refuses what is not for us (`refusal`), and gives every answer its HEADERS."""

    def __init__(self, app: ASGIApp, hosts: set[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if not scope["path"].startswith(("/tiles/", "/static/leaflet/")):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await (refusal(Request(scope), self.hosts) or self.app)(scope, receive, send_guarded)


def refusal(request: Request, hosts: set[str]) -> Response | None:
    """None where the request is for us, from our own page or from no page."""
    if request.headers.get("host", "").lower() not in hosts:
        return JSONResponse({"detail": "unknown Host; see --allowed_hosts"}, 421)
    origin = request.headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] not in hosts:
        return JSONResponse({"detail": "requests of other sites are refused"}, 403)
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return JSONResponse({"detail": "requests of other sites are refused"}, 403)
    return None


async def receive(request: Request, file: Path, max_bytes: int) -> None:
    """The body -> a file, as it comes; 413 as soon as it is too long."""
    size = 0
    with open(file, "wb") as out:
        async for piece in request.stream():
            size += len(piece)
            if size > max_bytes:
                raise too_large(max_bytes)
            await asyncio.to_thread(out.write, piece)


async def read_json(request: Request) -> dict:
    """The body -> a dict. ValueError where it is none, or too long."""
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_JSON:
            raise ValueError("the request is too long")
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ValueError("the request is no JSON object")
    return body


def tile_box(zoom: int, x: int, y: int) -> tuple[float, float, float, float]:
    """-> west, south, east, north in metres of Web Mercator."""
    edge, side = MERCATOR_HALF, 2 * MERCATOR_HALF / 2**zoom
    return x * side - edge, edge - (y + 1) * side, (x + 1) * side - edge, edge - y * side


@lru_cache(maxsize=2048)
def blue_marble(zoom: int, x: int, y: int) -> bytes:
    """-> JPEG of the map that ships, TILE pixels a side."""
    return as_jpeg(mercator_view(tile_box(zoom, x, y), TILE, TILE))


def as_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> JPEG of at most TILE pixels a side."""
    return to_jpeg(pixels, TILE, quality=88)


def told(desk: Desk, photo: Photo) -> dict:
    """What the browser is told of one photo."""
    return next((each for each in desk.listed() if each["id"] == photo.id), {})


def too_large(max_bytes: int) -> HTTPException:
    """The answer to an upload of more than max_bytes."""
    return HTTPException(413, f"the file is larger than {max_bytes / 1e6:g} MB (--max_mb)")


def download(file: Path, name: str) -> FileResponse:
    """A file in a folder of its own, which is removed when it is sent."""
    return FileResponse(file, filename=name, background=BackgroundTask(discard, file.parent))


def discard(folder: Path) -> None:
    """Removes a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
