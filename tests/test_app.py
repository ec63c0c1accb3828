"""The page's server: what it does with photos, and what it does not let others do."""

import asyncio
import errno
import io
import json
import re
import signal
import tempfile
import threading
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from fastapi.testclient import TestClient
from PIL import Image
from rasterio.warp import transform

import app
from datasets import images
from datasets.sets import read_database
from models.config import ModelConfig
from models.earthloc import build_model
from utils import geo
from utils.checkpoint import save_checkpoint
from web import server
from web.desk import Desk, Found

HOST = "127.0.0.1:8000"
LIMIT = 200_000  # bytes
FOOTPRINT = np.array([(45.0, 7.0), (46.0, 7.2), (45.9, 8.6), (44.9, 8.4)])
SQUARE = np.array([(10.0, 179.0), (12.0, 179.0), (12.0, -179.0), (10.0, -179.0)])


class Fake:
    """A locator that finds two places, fails where it is told to, and can be held up."""

    def __init__(self):
        self.asked, self.free, self.entered, self.failure = [], threading.Event(), threading.Event(), None
        self.free.set()

    def load(self):
        return self.locate, "2 places"

    def locate(self, file, nadir):
        self.asked.append((file, nadir))
        self.entered.set()
        assert self.free.wait(20)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            if isinstance(failure, Exception):
                raise failure
            return [], failure.format(file), nadir
        places = []
        for k, footprint in enumerate((FOOTPRINT, SQUARE)):
            lat, lon = geo.centers(footprint).tolist()
            properties = dict(
                image=str(file), rank=k + 1, score=0.9 - k / 10, inliers=80 * (1 - k), probability=0.99 - k
            )
            properties |= dict(verified=k == 0, latitude=lat, longitude=lon, rotation=0, database_image=f"{k}.jpg")
            picture = None if k else np.full((3, 20, 20), 90, np.uint8)
            places.append(Found(properties, footprint, picture, None if k else FOOTPRINT.round()))
        return places, "", nadir


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def desk(fake, tmp_path):
    return Desk(tmp_path / "desk", fake.load, max_photos=3)


@pytest.fixture
def client(desk, fake):
    with TestClient(server.make_app(desk, app.allowed_hosts("127.0.0.1", 8000, []), LIMIT), f"http://{HOST}") as client:
        yield client
        fake.free.set()


def jpeg(width=60, height=40, colour=(200, 100, 50), orientation=None):
    out, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height), colour).save(out, "JPEG", exif=exif)
    return out.getvalue()


def upload(client, name="alps.jpg", content=None, **query):
    return client.post("/api/photos", params={"name": name, **query}, content=jpeg() if content is None else content)


def located(client, desk, **query):
    """An uploaded photo once it is located -> what the server tells of it."""
    made = upload(client, **query).json()
    desk.queue.join()
    return next(each for each in client.get("/api/photos").json() if each["id"] == made["id"])


def on_disk(desk):
    return sorted(path.relative_to(desk.folder).as_posix() for path in desk.folder.rglob("*") if path.is_file())


def test_a_photo_is_located_and_shown(client, desk, fake):
    photo = located(client, desk, content=jpeg(60, 40, orientation=6), lat=40.5, lon=-3)
    assert (photo["state"], photo["name"], photo["nadir"]) == ("done", "alps.jpg", [40.5, -3.0])
    assert (photo["width"], photo["height"]) == (40, 60)  # as a viewer shows it
    assert [fake.asked[0][1]] == [(40.5, -3.0)]
    first, second = photo["places"]
    assert first["footprint"] == FOOTPRINT.tolist() and first["verified"] and first["image"] == "alps.jpg"
    assert first["picture_footprint"] == FOOTPRINT.round().tolist() and not second["picture"]
    shown = client.get(f"/api/photos/{photo['id']}/shown.jpg")
    assert Image.open(io.BytesIO(shown.content)).size == (40, 60)
    assert client.get(f"/api/photos/{photo['id']}/thumb.jpg").status_code == 200
    picture = client.get(f"/api/photos/{photo['id']}/places/0.jpg")
    assert np.asarray(Image.open(io.BytesIO(picture.content))).mean() == pytest.approx(90, abs=2)
    assert client.get(f"/api/photos/{photo['id']}/places/1.jpg").status_code == 404
    assert (
        client.get("/api/about").json() | {"ready": True, "text": "2 places", "error": ""}
        == client.get("/api/about").json()
    )


def test_photos_wait_their_turn_and_say_how_many_are_before_them(client, desk, fake):
    fake.free.clear()
    for name in "abc":
        assert upload(client, f"{name}.jpg").status_code == 201
    assert fake.entered.wait(20)
    assert [(each["state"], each["ahead"]) for each in client.get("/api/photos").json()] == [
        ("locating", 0),
        ("waiting", 1),
        ("waiting", 2),
    ]
    fake.free.set()
    desk.queue.join()
    assert {each["state"] for each in client.get("/api/photos").json()} == {"done"} and len(fake.asked) == 3


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), "{}: shows nothing within 2500 km"])
def test_a_photo_that_fails_says_why_and_the_next_one_is_located(client, desk, fake, failure):
    fake.failure = failure
    photo = located(client, desk)
    assert photo["state"] == "failed" and photo["error"] in ("out of memory", "alps.jpg: shows nothing within 2500 km")
    assert client.get(f"/api/photos/{photo['id']}/export/kmz").status_code == 409
    assert located(client, desk)["state"] == "done"


def test_nadirs_come_from_the_page_or_the_name_and_are_checked(client, desk, fake):
    name = "@46.1@8.0@46.0@8.9@45.2@8.8@45.3@7.9@ISS064-E-46242@20180101@44.2@5.4@6131@0.0@.jpg"
    assert located(client, desk, name=name)["nadir"] == [44.2, 5.4]
    photo = located(client, desk, name=name, lat=1, lon=2)
    assert photo["nadir"] == [1.0, 2.0]
    for query in (dict(lat=120, lon=0), dict(lat="nan", lon=0), dict(lat=1), dict(lat="x", lon=1)):
        assert upload(client, **query).status_code == 422
    assert "120" in upload(client, lat=120, lon=0).json()["detail"]
    path = f"/api/photos/{photo['id']}/nadir"
    for bad in ([95, 0], [1], "ab", [1, 2, 3], [None, 1], {"a": 1}):
        assert client.put(path, json={"nadir": bad}).status_code == 422
    assert client.put(path, content=b"no json").status_code == 422
    assert client.put(path, json={"nadir": None}).json()["nadir"] is None
    desk.queue.join()
    assert [nadir for _, nadir in fake.asked] == [(44.2, 5.4), (1.0, 2.0), None]
    assert len(on_disk(desk)) == 2 * 4 + 1  # photo, two previews and a picture each; one more for the second question


def test_an_answer_to_an_older_question_is_dropped(client, desk, fake):
    fake.free.clear()
    photo = upload(client, lat=1, lon=1).json()
    assert fake.entered.wait(20)
    assert client.put(f"/api/photos/{photo['id']}/nadir", json={"nadir": [2, 2]}).json()["run"] == 1
    fake.failure = "nothing"  # the first answer
    fake.free.set()
    desk.queue.join()
    now = client.get("/api/photos").json()[0]
    assert now["state"] == "done" and now["nadir"] == [2.0, 2.0] and len(fake.asked) == 2


def test_a_corrected_place_is_exported_first_and_says_so(client, desk):
    photo = located(client, desk)
    path = f"/api/photos/{photo['id']}"
    moved = (SQUARE + [0.5, 0]).tolist()
    answer = client.put(f"{path}/decision", json={"decision": "accepted", "chosen": 1, "corrected": moved}).json()
    assert (answer["decision"], answer["chosen"], answer["corrected"]) == ("accepted", 1, moved)
    response = client.get(f"{path}/export/geojson")
    assert 'filename="alps.geojson"' in response.headers["content-disposition"]
    first, second = response.json()["features"]
    assert first["properties"]["corrected"] and first["properties"]["decision"] == "accepted"
    assert first["properties"]["rank"] == 2 and first["properties"]["latitude"] == pytest.approx(11.5, abs=0.01)
    assert shapely.geometry.shape(first["geometry"]).bounds == (-180, 10.5, 180, 12.5)
    assert not second["properties"]["corrected"] and second["properties"]["decision"] == "open"
    assert client.put(f"{path}/decision", json={"decision": "rejected"}).json()["corrected"] is None
    rejected = client.get(f"{path}/export/geojson").json()["features"]
    assert [each["properties"]["decision"] for each in rejected] == ["rejected"] * 2


@pytest.mark.parametrize(
    "body",
    [
        {"decision": "maybe"},
        {"decision": "accepted", "chosen": 2},
        {"decision": "accepted", "chosen": -1},
        {"decision": "accepted", "chosen": "0"},
        {"decision": "accepted", "corrected": FOOTPRINT[::-1].tolist()},
        {"decision": "accepted", "corrected": [[1, 2], [3, 4]]},
        {"decision": "accepted", "corrected": "here"},
        {"decision": "accepted", "corrected": [[95, 0], [96, 0], [96, 1], [95, 1]]},
    ],
)
def test_a_decision_that_makes_no_sense_changes_nothing(client, desk, body):
    photo = located(client, desk)
    response = client.put(f"/api/photos/{photo['id']}/decision", json=body)
    assert response.status_code == 422 and isinstance(response.json()["detail"], str)
    assert client.get("/api/photos").json()[0] == photo


def test_everything_together_is_a_folder_whose_stac_item_points_into_it(client, desk):
    photo = located(client, desk, name="../../alps & lakes.jpg")
    response = client.get(f"/api/photos/{photo['id']}/export/zip")
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        names = archive.namelist()
        item = next(name for name in names if name.endswith(".stac.json"))
        stac = json.loads(archive.read(item))
        for asset in stac["assets"].values():
            assert str(Path(item).parent / asset["href"]).replace("/exports/../", "/") in names
    assert len(names) == 8 and stac["properties"]["title"] == "alps & lakes.jpg"
    for kind in ("kmz", "geotiff", "cog", "geoparquet", "report"):
        assert client.get(f"/api/photos/{photo['id']}/export/{kind}").status_code == 200
    assert client.get(f"/api/photos/{photo['id']}/export/shp").status_code == 404
    assert not [name for name in on_disk(desk) if "export" in name]  # removed once they are sent


def test_accepted_places_come_in_one_file(client, desk):
    assert client.get("/api/export/geojson").status_code == 409
    for chosen in (0, 1):
        photo = located(client, desk, name=f"{chosen}.jpg")
        client.put(f"/api/photos/{photo['id']}/decision", json={"decision": "accepted", "chosen": chosen})
    located(client, desk, name="open.jpg")
    found = [each["properties"] for each in client.get("/api/export/geojson").json()["features"]]
    assert [(each["image"], each["rank"]) for each in found] == [("0.jpg", 1), ("1.jpg", 2)]
    assert client.get("/api/export/geoparquet").content[:4] == b"PAR1"
    assert client.get("/api/export/zip").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:8000"}, 421),  # DNS rebinding: that name, our address
        ({"Host": "127.0.0.1"}, 421),
        ({"Host": "127.0.0.1:8001"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}, 201),
        ({}, 201),
    ],
)
def test_only_its_own_page_is_answered(client, desk, headers, status):
    response = client.post("/api/photos", content=jpeg(), headers=headers)
    assert response.status_code == status and len(client.get("/api/photos").json()) == (status == 201)
    assert client.get("/", headers=headers).status_code == (200 if status == 201 else status)
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "default-src 'self'" in response.headers["content-security-policy"]


def test_uploads_are_limited_whatever_they_declare(client, desk):
    assert upload(client, content=b"x" * (LIMIT + 1)).status_code == 413
    pieces = (b"x" * 50_000 for _ in range(5))  # no length is declared
    response = client.post("/api/photos", content=pieces)
    assert response.status_code == 413 and "0.2 MB" in response.json()["detail"]
    assert on_disk(desk) == [] and client.get("/api/photos").json() == []


def test_what_is_no_photo_is_refused_and_not_kept(client, desk, monkeypatch):
    for content in (b"", b"<svg onload='alert(1)'/>", b"%!PS-Adobe", jpeg()[:100]):
        response = upload(client, "a.jpg", content)
        assert response.status_code == 422
        assert response.json()["detail"].startswith("a.jpg: ") and str(desk.folder) not in response.text
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert "more than 1,000" in upload(client).json()["detail"]
    assert on_disk(desk) == [] and list(desk.folder.iterdir()) == []


def test_no_name_reaches_the_disk(client, desk):
    names = ("../../../etc/passwd", "..\\..\\boot.ini", "a\0b.jpg", "/abs/olute.jpg", "x" * 2000)
    for name in names:
        photo = located(client, desk, name=name)
        assert "/" not in photo["name"] and "\\" not in photo["name"] and len(photo["name"]) <= 255
        folders = [path.name for path in desk.folder.iterdir()]
        assert folders == [photo["id"]] and re.fullmatch("[0-9a-f]{16}", photo["id"])
        assert {path.name for path in (desk.folder / photo["id"]).iterdir()} == {
            "photo",
            "shown.jpg",
            "thumb.jpg",
            "place_0_0.jpg",
        }
        client.delete(f"/api/photos/{photo['id']}")
    for path in ("..%2F..%2Fphoto", "..%2Fphoto", "%00"):
        for rest in ("shown.jpg", "export/kmz", "places/0.jpg"):
            assert client.get(f"/api/photos/{path}/{rest}").status_code == 404
    assert client.get("/static/..%2fserver.py").status_code == 404


def test_removed_photos_leave_nothing_and_there_is_a_limit(client, desk):
    kept = [located(client, desk) for _ in range(3)]
    full = upload(client)
    assert full.status_code == 409 and "3 photos" in full.json()["detail"]
    assert client.delete(f"/api/photos/{kept[0]['id']}").status_code == 200
    assert client.delete(f"/api/photos/{kept[0]['id']}").status_code == 404
    assert len(list(desk.folder.iterdir())) == 2 and upload(client).status_code == 201


def test_nothing_is_left_at_the_end(fake, tmp_path):
    desk = Desk(tmp_path / "desk", fake.load)
    with TestClient(server.make_app(desk, {HOST}, LIMIT), f"http://{HOST}") as client:
        located(client, desk)
    assert not (tmp_path / "desk").exists() and not desk.worker.is_alive()


def test_a_model_that_cannot_be_loaded_is_told(tmp_path):
    def fail():
        raise FileNotFoundError("weights.pt: no such file")

    desk = Desk(tmp_path / "desk", fail)
    with TestClient(server.make_app(desk, {HOST}, LIMIT), f"http://{HOST}") as client:
        desk.worker.join(20)
        about = client.get("/api/about").json()
        assert not about["ready"] and about["error"] == "weights.pt: no such file"


def test_the_page_fetches_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    found = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    for path in found:
        assert path.startswith("/")
        if path.startswith("/static"):
            assert client.get(path).status_code == 200
    for file in server.STATIC.glob("*.*"):
        assert not re.findall(r"https?://(?!www\.w3\.org)", file.read_text()), file
    assert (server.STATIC / "leaflet" / "LICENSE").exists()
    assert client.get("/docs").status_code == 404 and client.get("/openapi.json").status_code == 404


def test_tiles_are_web_mercator(client):
    """The tile's pixels, taken to degrees by rasterio, against the Blue Marble at that place."""
    x, y = 33, 22  # of zoom 6, north Africa
    tile = np.asarray(Image.open(io.BytesIO(client.get(f"/tiles/6/{x}/{y}.jpg").content)), dtype=float)
    with Image.open("datasets/build/blue_marble/bmng_5400.jpg") as image:
        world = np.asarray(image.convert("RGB"), dtype=float)
    half = np.pi * 6378137
    errors = []
    for row in range(8, 256, 16):
        for col in range(8, 256, 16):
            east = (x + (col + 0.5) / 256) / 64 * 2 * half - half
            north = half - (y + (row + 0.5) / 256) / 64 * 2 * half
            (lon,), (lat,) = transform("EPSG:3857", "EPSG:4326", [east], [north])
            errors.append(np.abs(tile[row, col] - world[int((90 - lat) * 15), int((lon + 180) * 15)]).mean())
    assert np.median(errors) < 6 and tile.std() > 10
    for path in ("7/0/0", "2/4/0", "2/0/-1", "0/0/1"):
        assert client.get(f"/tiles/{path}.jpg").status_code == 404


def test_a_finer_map_is_shown_where_there_is_one(fake, tmp_path):
    asked = []

    def ground(box, size):
        asked.append(box)
        return torch.full((3, size, size), 77, dtype=torch.uint8) if box[0] >= 0 else None

    desk = Desk(tmp_path / "desk", fake.load)
    with TestClient(server.make_app(desk, {HOST}, LIMIT, ground), f"http://{HOST}") as client:
        east, west = (
            np.asarray(Image.open(io.BytesIO(client.get(f"/tiles/8/{x}/100.jpg").content))) for x in (130, 20)
        )
        client.get("/tiles/4/8/6.jpg")
        assert len(asked) == 2  # that one would read a sixteenth of the raster
        assert client.get("/api/about").json()["max_zoom"] == 10
        assert client.get("/tiles/11/0/0.jpg").status_code == 404
    assert (east == 77).all() and west.std() > 0
    (left, right), (top, bottom) = ([n / 256 * 360 - 180 for n in (130, 131)], (100, 101))
    x, _ = transform("EPSG:4326", "EPSG:3857", [left, right], [0, 0])
    assert (asked[0][0], asked[0][2]) == pytest.approx(tuple(x))
    half = np.pi * 6378137
    assert (asked[0][3], asked[0][1]) == pytest.approx([half - n / 256 * 2 * half for n in (top, bottom)])


def test_it_listens_to_this_machine_unless_told_who_may_ask():
    assert app.parse_arguments([]).host == "127.0.0.1"
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert app.is_loopback(host)
        assert app.allowed_hosts(host, 8000, []) == {"127.0.0.1:8000", "localhost:8000", "[::1]:8000"}
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        with pytest.raises(ValueError, match="--allowed_hosts"):
            app.allowed_hosts(host, 8000, [])
    assert "Lab.local:80".lower() in app.allowed_hosts("0.0.0.0", 80, ["Lab.local"])
    assert "lab.local" in app.allowed_hosts("0.0.0.0", 80, ["Lab.local"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_it_is_told_and_leaves_no_photo(tmp_path, monkeypatch, number):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    there = []

    def serve(*_, **__):
        there.extend(tmp_path.glob("earthloc_*"))
        (there[0] / "photo").write_bytes(b"x")
        signal.raise_signal(number)

    monkeypatch.setattr("uvicorn.run", serve)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit, match=f"stopped by {number.name}"):
            app.main(app.parse_arguments(["--device", "cpu"]))
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert len(there) == 1 and not there[0].exists()


def test_a_full_disk_is_told_and_nothing_is_kept(client, desk, monkeypatch):
    async def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(desk.folder))

    monkeypatch.setattr(server, "receive", full)
    response = upload(client)
    assert response.status_code == 507 and "No space left" in response.json()["detail"]
    assert str(desk.folder) not in response.text and list(desk.folder.iterdir()) == []


def test_a_photo_that_is_removed_while_it_is_exported_is_gone(client, desk, monkeypatch):
    photo = located(client, desk)

    def removed(out, kinds, *_):
        desk.remove(photo["id"])
        return [out / "photo.kmz"], []

    monkeypatch.setattr("web.desk.export_photo", removed)
    response = client.get(f"/api/photos/{photo['id']}/export/zip")
    assert response.status_code == 404 and response.json()["detail"] == "no such photo"


def test_a_browser_that_goes_away_leaves_no_part_of_a_photo(client, desk):
    """The upload's task is cancelled, as the server does; what it awaits then is given up at once."""
    scope = dict(type="http", method="POST", path="/api/photos", raw_path=b"/api/photos", query_string=b"name=a.jpg")
    scope |= dict(headers=[(b"host", HOST.encode())], http_version="1.1", scheme="http", server=("127.0.0.1", 8000))
    seen = []

    async def go():
        started = asyncio.Event()

        async def receive():
            if not started.is_set():
                started.set()
                return {"type": "http.request", "body": b"x" * 10, "more_body": True}
            await asyncio.sleep(60)

        async def send(message):
            seen.append(message)

        task = asyncio.ensure_future(client.app(dict(scope), receive, send))
        await started.wait()
        while not on_disk(desk):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert list(desk.folder.iterdir()) == [] and not seen


def test_the_real_locator_answers_the_page(world, tmp_path, monkeypatch):
    """A database image comes back at its own place, with its picture."""
    torch.manual_seed(0)
    config = ModelConfig("resnet18", cut_after="layer1", aggregator="gem", descriptor_dim=32, image_size=32)
    model = build_model(config, "none")
    save_checkpoint(tmp_path / "best.pt", {"model": model.state_dict(), "model_config": asdict(model.config)})
    monkeypatch.chdir(tmp_path)
    settings = dict(dataset_path=str(world.path), near_km=500, descriptors="kept", device="cpu", register="none")
    desk = Desk(tmp_path / "desk", lambda: app.load(str(tmp_path / "best.pt"), 2, None, 1, **settings), max_photos=3)
    database = read_database(world.path)
    row = len(database) // 2
    content, (lat, lon) = (world.path / database.paths[row]).read_bytes(), database.centers[row].tolist()
    with TestClient(server.make_app(desk, {HOST}, LIMIT), f"http://{HOST}") as client:
        photo = located(client, desk, content=content, lat=lat, lon=lon)
        assert client.get("/api/about").json()["text"] == f"{len(database)} places, not registered"
        assert photo["state"] == "done" and len(photo["places"]) == 2
        first = photo["places"][0]
        assert first["database_image"] == database.paths[row] and first["picture"]
        assert first["footprint"] == first["picture_footprint"] == database.footprints[row].tolist()
        assert not first["verified"] and first["probability"] is None
        far = located(client, desk, content=content, lat=-45, lon=170)
        assert far["state"] == "failed" and "500 km" in far["error"] and str(desk.folder) not in far["error"]
        assert client.get(f"/api/photos/{photo['id']}/export/zip").status_code == 200
