"""The page in a real browser: Chromium, driven through chromedriver's own protocol (W3C WebDriver)."""

import json
import shutil
import socket
import subprocess
import threading
import time

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

import app
from tests.test_app import FOOTPRINT, SQUARE, Fake
from web import server
from web.desk import Desk

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (Debian: chromium-driver)"),
]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def until(condition, seconds=60):
    """Asks again and again -> what it says at last, if that is true; AssertionError where it never is."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
    return answer


class Browser:
    def __init__(self, port, width=1100, height=720):
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        until(self.is_up)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.path = ""
        self.path = "/session/" + self.ask("/session", capabilities={"alwaysMatch": wanted})["sessionId"]

    def is_up(self):
        try:
            return self.client.get("/status").json()["value"]["ready"]
        except httpx.TransportError:
            return False

    def ask(self, path, **body):
        value = self.client.post(self.path + path, json=body).json()["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def js(self, code, *arguments):
        return self.ask("/execute/sync", script=code, args=arguments)

    def element(self, selector):
        found = self.ask("/element", using="css selector", value=selector)
        return f"/element/{next(iter(found.values()))}"

    def click(self, selector):
        self.ask(self.element(selector) + "/click")

    def type(self, selector, text):
        self.ask(self.element(selector) + "/value", text=text)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def press(self, x, y, dx=0, dy=0):
        steps = [("pointerMove", dict(x=x, y=y)), ("pointerDown", dict(button=0))]
        steps += [
            ("pointerMove", dict(x=x + dx * k // 4, y=y + dy * k // 4, duration=20)) for k in range(1, 5) if dx or dy
        ]
        steps += [("pointerUp", dict(button=0))]
        mouse = {"type": "pointer", "id": "mouse", "actions": [{"type": kind, **more} for kind, more in steps]}
        self.ask("/actions", actions=[mouse])

    def middle(self, selector, number=0):
        return self.js(
            "const box = document.querySelectorAll(arguments[0])[arguments[1]].getBoundingClientRect();"
            "return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)]",
            selector,
            number,
        )


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def site(fake, tmp_path):
    """The server on a free port of this machine -> its address."""
    port = free_port()
    pages = server.make_app(Desk(tmp_path / "desk", fake.load), app.allowed_hosts("127.0.0.1", port, []), 1_000_000)
    running = uvicorn.Server(uvicorn.Config(pages, port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    until(lambda: running.started)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(20)


@pytest.fixture
def browser(site):
    port = free_port()
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        one = Browser(port)
        one.ask("/url", url=site)
        yield one
        one.client.delete(one.path)
    finally:
        driver.terminate()
        driver.wait(20)


# Where the drape's own corners are drawn, and where the map says that the places are; bottom left and so on, pixels.
DRAWN = """
const image = document.querySelector(".drape"), move = new DOMMatrix(getComputedStyle(image).transform);
const [w, h] = [image.naturalWidth, image.naturalHeight];
return [[0, h], [0, 0], [w, 0], [w, h]].map(([x, y]) => {
  const point = move.transformPoint(new DOMPoint(x, y));
  return [point.x / point.w, point.y / point.w];
});
"""
MAPPED = "return arguments[0].map(corner => { const {x, y} = map.latLngToLayerPoint(corner); return [x, y]; })"


def settled(browser):
    """The map no longer flies: its centre is the same twice; and the photo is there."""
    until(lambda: browser.js("return document.querySelector('.drape').naturalWidth > 0"))
    where = lambda: browser.js("return JSON.stringify([map.getCenter(), map.getZoom()])")
    last = [where()]

    def is_still():
        time.sleep(0.15)
        last.append(where())
        return last[-1] == last[-2] == (last[-3] if len(last) > 2 else None)

    until(is_still)


def state(site):
    return httpx.get(f"{site}/api/photos").json()


def test_from_a_photo_to_a_corrected_place(browser, site, fake, tmp_path):
    photo = tmp_path / "alps.png"
    Image.effect_noise((300, 200), 80).convert("RGB").save(photo)

    # A nadir picked on the map goes with the upload.
    browser.click("#new-nadir .pick")
    x, y = browser.middle("#map")
    browser.press(x, y)
    picked = [
        float(browser.js(f"return document.querySelector('#new-nadir .{name}').value")) for name in ("lat", "lon")
    ]
    assert np.abs(np.array(picked) - [15, 0]).max() < 3  # the map's first centre
    browser.type("#files", str(photo))
    until(lambda: browser.text("#state .badge-text").startswith("verified"))
    assert fake.asked[0][1] == pytest.approx(tuple(picked)) and browser.text("#name") == "alps.png"
    assert browser.js("return document.querySelectorAll('#places li').length") == 2

    # The photo lies on its footprint, corner by corner, at any zoom.
    settled(browser)
    for zoom in (None, 5, 9):
        if zoom:
            browser.js(
                "map.setView(arguments[0], arguments[1], {animate: false})", FOOTPRINT.mean(axis=0).tolist(), zoom
            )
        drawn, mapped = browser.js(DRAWN), browser.js(MAPPED, FOOTPRINT.tolist())
        assert np.array(drawn) == pytest.approx(np.array(mapped), abs=1.5)
    # Over the antimeridian it stays in one piece.
    browser.js("document.querySelectorAll('#places li')[1].click()")
    settled(browser)
    whole = SQUARE + [[0, 0], [0, 0], [0, 360], [0, 360]]
    assert np.array(browser.js(DRAWN)) == pytest.approx(np.array(browser.js(MAPPED, whole.tolist())), abs=1.5)
    browser.js("document.querySelectorAll('#places li')[0].click()")
    settled(browser)

    # Opacity is the slider's.
    browser.js("const s = document.querySelector('#opacity'); s.value = 25; s.dispatchEvent(new Event('input'))")
    assert browser.js("return document.querySelector('.drape').style.opacity") == "0.25"

    # A dragged corner moves that corner alone; the accepted place has it.
    browser.click("#correct")
    x, y = browser.middle(".handle.corner", 0)
    browser.press(x, y, -60, 40)
    until(lambda: browser.text("#accept") == "Accept corrected")
    browser.click("#accept")
    until(lambda: state(site)[0]["decision"] == "accepted")
    corrected = np.array(state(site)[0]["corrected"])
    assert corrected[1:] == pytest.approx(FOOTPRINT[1:]) and (corrected[0] < FOOTPRINT[0]).all()
    until(lambda: browser.text("#photos .badge-text") == "accepted, corrected")
    assert np.array(browser.js(DRAWN)) == pytest.approx(np.array(browser.js(MAPPED, corrected.tolist())), abs=1.5)

    # Corners that fold the photo cannot be accepted.
    browser.click("#correct")
    (x, y), (over, beyond) = browser.middle(".handle.corner", 0), browser.middle(".handle.corner", 2)
    browser.press(x, y, (over - x) * 5 // 4, (beyond - y) * 5 // 4)
    until(lambda: browser.js("return document.querySelector('#accept').disabled"))
    browser.click("#correct")  # undo
    assert not browser.js("return document.querySelector('#accept').disabled")

    browser.click("#reject")
    until(lambda: state(site)[0]["decision"] == "rejected")
    browser.click("#remove")
    until(lambda: state(site) == [])
    assert browser.js("return document.querySelector('#panel').hidden")
    assert browser.ask("/se/log", type="browser") == []  # no error, and nothing that the page's own policy forbids


def test_what_is_refused_is_told_as_text(browser, site, fake, tmp_path):
    (tmp_path / "<img src=x onerror=alert(1)>.jpg").write_text("no picture")
    browser.type("#files", str(tmp_path / "<img src=x onerror=alert(1)>.jpg"))
    until(lambda: "cannot be read as an image" in browser.text("#toast"))
    assert "<img src=x" in browser.text("#toast") and state(site) == []
    fake.failure = "{}: shows <b>nothing</b>"
    Image.new("RGB", (40, 40)).save(tmp_path / "<b>sea<b>.jpg")
    browser.type("#files", str(tmp_path / "<b>sea<b>.jpg"))
    until(lambda: browser.text("#state .why") == "<b>sea<b>.jpg: shows <b>nothing</b>")
    assert json.loads(browser.js("return JSON.stringify(photos)"))[0]["state"] == "failed"
