"""NAME.report.html: one page that needs nothing else: the photo, its places, the photo laid over the map, matches."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, ImageDraw

from datasets.images import read_pixels
from datasets.names import ImageName
from retrieval.exports.kmz import to_jpeg
from retrieval.exports.matches import Matches
from retrieval.exports.warp import warp
from utils import geo
from utils.files import printable, replacing
from utils.geo import from_mercator, to_mercator
from utils.mercator import bounds, require_view
from utils.world_map import candidates_map, mercator_view

MAP_SIDE, PHOTO_SIDE, CARD_SIDE = 720, 1440, 480  # pixels
AROUND = 2.2  # width of the map in widths of the footprint
LINES = 80  # of a match picture, at most
SHOWN = ("rank", "score", "inliers", "probability", "verified", "latitude", "longitude", "rotation")
STYLE = """
:root { --ink: #1c2430; --soft: #667085; --line: #e3e7ee; --good: #12805c; --doubt: #b25e09; --back: #f6f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 20px; margin: 0 0 4px; overflow-wrap: anywhere; line-height: 1.3; }
h2 { font-size: 16px; margin: 36px 0 10px; }
.badge { display: inline-block; padding: 1px 10px; border-radius: 99px; color: #fff; font-size: 13px; }
.good { background: var(--good); } .doubt { background: var(--doubt); }
.soft { color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 18px; margin-top: 18px;
  align-items: start; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figure img, figure svg { display: block; width: 100%; height: auto; }
figcaption { padding: 9px 13px; font-size: 13px; color: var(--soft); }
.stack { position: relative; } .stack img + img { position: absolute; inset: 0; height: 100%; }
.stack input { width: 100%; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px; }
table { width: 100%; border-collapse: collapse; background: #fff; border: 1px solid var(--line); font-size: 14px; }
th, td { padding: 7px 11px; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } td { font-variant-numeric: tabular-nums; }
td.long { white-space: normal; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
"""
SCRIPT = """
document.querySelectorAll('input[type=range]').forEach(input => input.addEventListener('input', () => {
  input.closest('figure').querySelector('img + img').style.opacity = input.value / 100;
}));
"""


def write(
    folder: Path,
    photo: Path,
    places: Sequence[dict],
    footprints: np.ndarray,
    pictures: Sequence = (),
    matches: Sequence = (),
) -> Path:
    pixels = read_pixels(photo, upright=True).numpy()
    file = folder / f"{photo.name}.report.html"
    with replacing(file, sync=False) as out:
        out.write(page(printable(photo.name), pixels, places, footprints, pictures, matches).encode())
    return file


def page(
    name: str,
    photo: np.ndarray,
    places: Sequence[dict],
    footprints: np.ndarray,
    pictures: Sequence = (),
    matches: Sequence = (),
) -> str:
    """photo uint8 (H, W, 3); the rest as for all exports -> HTML with everything inside."""
    pictures, matches = ([*each, *[None] * (len(places) - len(each))] for each in (pictures, matches))
    best = places[0]
    cards = "".join(_card(*each) for each in zip(places, footprints, pictures))
    shown = {}  # neighbours may have led to one and the same registration
    for place, footprint, each in zip(places, footprints, matches):
        if each is not None:
            shown.setdefault(np.asarray(footprint).tobytes(), (each, place))
    lines = "".join(_match_figure(photo, *each) for each in shown.values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title><style>{STYLE}</style></head><body><main>
<h1>{escape(name)}</h1>
<div>{verdict(best)} <span class="soft">{_place(best)}</span></div>
<div class="pair">
<figure><img alt="the photo" src="{_jpeg(photo, PHOTO_SIDE)}"><figcaption>The photo</figcaption></figure>
{_map_figure(photo, best, footprints[0], pictures[0])}
</div>
<h2>Candidates</h2><div class="cards">{cards}</div>
{f'<h2>Matches</h2><div class="pair">{lines}</div>' if lines else ""}
<h2>In the world</h2>
<figure><img alt="world map" src="{_image(_world(places), "JPEG")}"></figure>
<h2>In numbers</h2><div class="scroll">{_table(places)}</div>
</main><script>{SCRIPT}</script></body></html>
"""


def verdict(place: dict) -> str:
    """-> the first words of the page: is it found?"""
    if place.get("verified"):
        return '<span class="badge good">located</span>'
    if place.get("probability") is None:
        return '<span class="badge doubt">looks alike, not registered</span>'
    return '<span class="badge doubt">not verified</span>'


def map_layers(
    photo: np.ndarray,
    footprint: np.ndarray,
    picture: np.ndarray | None = None,
    picture_footprint: np.ndarray | None = None,
    side: int = MAP_SIDE,
) -> tuple:
    """-> uint8 (side, side, 3) of the ground around a footprint and uint8 (side, side, 4) of the photo on it.

    picture uint8 (3, h, w), north up, fills picture_footprint, which is map-aligned. ValueError as `require_view`.
    """
    corners = to_mercator(require_view(footprint))
    west, south, east, north = bounds(corners)
    reach = max(east - west, north - south) * AROUND / 2
    x, y = (west + east) / 2, (south + north) / 2
    box = (x - reach, y - reach, x + reach, y + reach)
    ground = mercator_view(box, side, side)
    if picture is not None and picture_footprint is not None:
        square = geo.unwrap_footprints(geo.ring(picture_footprint)[[0, 3, 2, 1]])
        square[:, 1] += np.round((from_mercator([x, y])[1] - square[:, 1].mean()) / 360) * 360
        there = warp(np.moveaxis(np.asarray(picture), 0, -1), square, box, side, side)
        share = there[..., 3:] / 255.0
        ground = np.rint(ground * (1 - share) + there[..., :3] * share).astype(np.uint8)
    return ground, warp(photo, footprint, box, side, side)


def _map_figure(photo: np.ndarray, place: dict, footprint: np.ndarray, picture: np.ndarray | None):
    try:
        ground, laid = map_layers(photo, footprint, picture, _footprint_of(place.get("database_image")))
    except ValueError as error:
        return f"<figure><figcaption>Cannot be laid on the map: {escape(str(error))}</figcaption></figure>"
    laid = _image(Image.fromarray(laid), "WEBP")
    return f"""<figure><div class="stack"><img alt="the map" src="{_jpeg(ground, MAP_SIDE)}">
<img alt="the photo on the map" src="{laid}"></div><figcaption>The photo on the map, north up ·
<label>opacity <input type="range" min="0" max="100" value="100"></label></figcaption></figure>"""


def _footprint_of(database_image: str | None):
    """A path -> (4, 2) where it is an EarthLoc name, else None."""
    try:
        return np.array(ImageName.parse(PurePath(database_image or "").name).footprint)
    except ValueError:
        return None


def _card(place: dict, footprint: np.ndarray, picture: np.ndarray | None):
    if picture is None:
        shown = f'<img alt="map" src="{_jpeg(_outline_picture(footprint), CARD_SIDE)}">'
    else:
        turned = torch.rot90(torch.as_tensor(picture), round((place.get("rotation") or 0) / 90), (1, 2))
        shown = f'<img alt="candidate" src="{_jpeg(turned.permute(1, 2, 0).numpy(), CARD_SIDE)}">'
    return f"<figure>{shown}<figcaption><b>{place.get('rank', '')}</b> · {_place(place)}</figcaption></figure>"


def _outline_picture(footprint: np.ndarray, side: int = CARD_SIDE):
    """The outline on the Blue Marble, four times as wide as it -> uint8 (side, side, 3)."""
    corners = to_mercator(geo.ring(footprint))
    west, south, east, north = bounds(corners)
    reach, middle = 2 * max(east - west, north - south), ((west + east) / 2, (south + north) / 2)
    picture = Image.fromarray(
        mercator_view((middle[0] - reach, middle[1] - reach, middle[0] + reach, middle[1] + reach), side, side)
    )
    points = (corners - middle) * (1, -1) / (2 * reach) * side + side / 2
    ImageDraw.Draw(picture).polygon([*map(tuple, points)], outline=(255, 215, 60), width=3)
    return np.asarray(picture)


def _match_figure(photo: np.ndarray, matches: Matches, place: dict):
    """The photo, the ground turned like it, and a line for each match."""
    quarters = round((place.get("rotation") or 0) / 90) % 4
    turned = torch.rot90(torch.as_tensor(matches.picture), quarters, (1, 2)).permute(1, 2, 0).numpy()
    ours, theirs = matches.photo, matches.ground
    for _ in range(quarters):  # counter-clockwise: what was at the right is at the top
        theirs = np.stack([theirs[:, 1], 1 - theirs[:, 0]], axis=1)
    picked = np.unique(np.linspace(0, len(ours) - 1, min(LINES, len(ours))).round().astype(int))
    sizes = [(600 * each.shape[1] / each.shape[0], 600.0) for each in (photo, turned)]
    shift = sizes[0][0] + 20
    lines = "".join(
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2 + shift:.1f}" y2="{y2:.1f}"/>'
        for (x1, y1), (x2, y2) in zip(ours[picked] * sizes[0], theirs[picked] * sizes[1])
    )
    width = shift + sizes[1][0]
    return f"""<figure><svg viewBox="0 0 {width:.0f} 600" role="img" aria-label="matches">
<image href="{_jpeg(photo, 900)}" width="{sizes[0][0]:.1f}" height="600"/>
<image href="{_jpeg(turned, 900)}" x="{shift:.1f}" width="{sizes[1][0]:.1f}" height="600"/>
<g stroke="#ffd73c" stroke-width="1.5" opacity="0.8">{lines}</g></svg>
<figcaption><b>{place.get("rank", "")}</b> · {len(picked)} of {len(ours)} matches</figcaption></figure>"""


def _world(places: Sequence[dict]):
    points = [(place["latitude"], place["longitude"]) for place in places]
    return candidates_map(points, [str(place.get("rank", "")) for place in places])


def _table(places: Sequence[dict]):
    names = [*SHOWN, *(name for name in dict.fromkeys(k for place in places for k in place) if name not in SHOWN)]
    names = [name for name in names if name != "image" and any(name in each for each in places)]
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    rows = "".join(
        "<tr>" + "".join(f"<td{_long(place.get(name))}>{_cell(place.get(name))}</td>" for name in names) + "</tr>"
        for place in places
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _long(value: object):
    return ' class="long"' if isinstance(value, str) and len(value) > 24 else ""


def _cell(value: object):
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(printable(f"{value:.6g}" if isinstance(value, float) else str(value)))


def _place(place: dict):
    parts = [f"{place['latitude']:.3f}, {place['longitude']:.3f}"]
    if place.get("probability") is not None:
        parts.append(f"probability {place['probability']:.3f}")
    if place.get("inliers"):
        parts.append(f"{place['inliers']} inliers")
    if place.get("score") is not None:
        parts.append(f"similarity {place['score']:.3f}")
    return escape(" · ".join(parts))


def _jpeg(pixels: np.ndarray, side: int):
    return _data(to_jpeg(pixels, side), "image/jpeg")


def _image(image: Image.Image, kind: str):
    out = io.BytesIO()
    image.save(out, kind, quality=88)
    return _data(out.getvalue(), f"image/{kind.lower()}")


def _data(content: bytes, kind: str):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
