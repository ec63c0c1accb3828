"""NAME.kmz: the photo draped over the globe (Google Earth's gx:LatLonQuad), and the outline of every place."""

import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree as xml

import numpy as np
from PIL import Image

from datasets.images import decode, open_image, orientation_of, read_bytes
from utils import geo
from utils.files import printable, replacing
from utils.mercator import require_view
from utils.outlines import outlines

KML, GX = "http://www.opengis.net/kml/2.2", "http://www.google.com/kml/ext/2.2"
MAX_SIDE = 8192  # pixels: what graphics cards take
OUTLINE, BEST_OUTLINE = "ffffffff", "ff3cd7ff"  # alpha, blue, green, red


def write(folder: Path, photo: Path, places: Sequence[dict], footprints: np.ndarray, *_: object) -> Path:
    """The first place's drape is shown, the others' can be switched on. ValueError where the first one's corners are no
    view of a camera (`require_view`)."""
    require_view(footprints[0])
    file = folder / f"{photo.name}.kmz"
    with replacing(file, sync=False) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("doc.kml", document(printable(photo.name), places, footprints))
        archive.writestr("photo.jpg", upright_jpeg(photo), zipfile.ZIP_STORED)
    return file


def document(name: str, places: Sequence[dict], footprints: np.ndarray) -> bytes:
    """-> KML that refers to photo.jpg beside it."""
    xml.register_namespace("", KML)
    xml.register_namespace("gx", GX)
    root = xml.Element(f"{{{KML}}}kml")
    top = _add(root, "Document")
    _add(top, "name", name)
    for style, colour in (("place", OUTLINE), ("best", BEST_OUTLINE)):
        one = _add(top, "Style", id=style)
        line = _add(one, "LineStyle")
        _add(line, "color", colour)
        _add(line, "width", "2")
        _add(_add(one, "PolyStyle"), "fill", "0")
    for number, (place, footprint) in enumerate(zip(places, footprints)):
        title = f"{place.get('rank', number + 1)}: {place['latitude']:.3f} {place['longitude']:.3f}"
        group = _add(top, "Folder")
        _add(group, "name", title)
        _overlay(group, footprint, shown=number == 0)
        _outline(group, place, footprint, title, "place" if number else "best")
    return xml.tostring(root, encoding="utf-8", xml_declaration=True)


def upright_jpeg(photo: Path) -> bytes:
    """A photo's file -> JPEG as a viewer shows it: the file itself where it is that already, else anew."""
    content = read_bytes(photo)
    pixels = decode(content, photo, upright=True).numpy()  # also where the file is taken: it must be sound
    with open_image(io.BytesIO(content)) as image:
        as_it_is = image.format == "JPEG" and image.mode in ("RGB", "L") and orientation_of(image) == 1
        if as_it_is and max(image.size) <= MAX_SIDE:
            return content
    return to_jpeg(pixels, MAX_SIDE, quality=95)


def to_jpeg(pixels: np.ndarray, max_side: int, quality: int = 85) -> bytes:
    """uint8 (H, W, 3) -> JPEG, made smaller where a side is longer than max_side."""
    image, out = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _overlay(group: xml.Element, footprint: np.ndarray, shown: bool):
    try:
        corners = require_view(footprint)
    except ValueError:
        return  # its outline is there
    overlay = _add(group, "GroundOverlay")
    _add(overlay, "name", "photo")
    _add(overlay, "visibility", str(int(shown)))
    _add(_add(overlay, "Icon"), "href", "photo.jpg")
    # Counter-clockwise from the lower left. Of overlays, longitudes may pass ±180, and jumps there would fold it.
    quad = corners[[0, 3, 2, 1]]
    quad[:, 1] += geo.wrap_longitude(quad[:, 1].mean()) - quad[:, 1].mean()
    _add(_add(overlay, "LatLonQuad", space=GX), "coordinates", _coordinates(quad[:, ::-1]))


def _outline(group: xml.Element, place: dict, footprint: np.ndarray, title: str, style: str):
    mark = _add(group, "Placemark")
    _add(mark, "name", title)
    _add(mark, "styleUrl", f"#{style}")
    data = _add(mark, "ExtendedData")
    for key, value in place.items():
        if value is not None:
            _add(_add(data, "Data", name=printable(str(key))), "value", printable(str(value)))
    shape = outlines(footprint)[0]
    parts = [shape] if shape.geom_type == "Polygon" else shape.geoms
    several = _add(mark, "MultiGeometry")
    for part in parts:
        polygon = _add(several, "Polygon")
        _add(polygon, "tessellate", "1")
        ring = _add(_add(polygon, "outerBoundaryIs"), "LinearRing")
        _add(ring, "coordinates", _coordinates(part.exterior.coords))


def _coordinates(points: Iterable):
    return " ".join(f"{lon:.7f},{lat:.7f}" for lon, lat in points)


def _add(parent: xml.Element, tag: str, text: str | None = None, space: str = KML, **attributes):
    child = xml.SubElement(parent, f"{{{space}}}{tag}", attributes)
    child.text = text
    return child
