"use strict";
// A picture whose four corners lie anywhere on the map. Web Mercator is flat, so the browser's own perspective
// transform lays it down by the very homography with which it was registered.

/** Size of a picture and where its corners go (top left, top right, bottom right, bottom left; {x, y}) -> CSS. */
function perspective(width, height, [p0, p1, p2, p3]) {
  const dx1 = p1.x - p2.x, dx2 = p3.x - p2.x, dx3 = p0.x - p1.x + p2.x - p3.x;
  const dy1 = p1.y - p2.y, dy2 = p3.y - p2.y, dy3 = p0.y - p1.y + p2.y - p3.y;
  const scale = dx1 * dy2 - dx2 * dy1;
  const g = (dx3 * dy2 - dx2 * dy3) / scale, h = (dx1 * dy3 - dx3 * dy1) / scale;
  const a = p1.x - p0.x + g * p1.x, b = p3.x - p0.x + h * p3.x;
  const d = p1.y - p0.y + g * p1.y, e = p3.y - p0.y + h * p3.y;
  return `matrix3d(${[a / width, d / width, 0, g / width, b / height, e / height, 0, h / height,
    0, 0, 1, 0, p0.x, p0.y, 0, 1].join(",")})`;
}

/** Corners ([lat, lon] of bottom left, top left, top right, bottom right) of a photo that is neither mirrored nor folded. */
function isView(corners) {
  const points = corners.map(([lat, lon]) => L.CRS.EPSG3857.project(L.latLng(lat, lon)));
  return points.every((here, k) => {
    const next = points[(k + 1) % 4], after = points[(k + 2) % 4];
    return (next.x - here.x) * (after.y - next.y) - (next.y - here.y) * (after.x - next.x) < 0;
  });
}

const Drape = L.Layer.extend({
  initialize(url, corners, options) {
    this.url = url;
    this.corners = corners;
    L.setOptions(this, options);
  },
  onAdd() {
    const image = this.image = L.DomUtil.create("img", "drape leaflet-zoom-animated", this.getPane());
    image.alt = "the photo on the map";
    image.onload = () => this.lay();
    image.src = this.url;
    image.style.opacity = this.options.opacity ?? 1;
  },
  onRemove() { this.image.remove(); },
  getEvents() { return { zoom: this.lay, viewreset: this.lay, zoomanim: this.follow }; },
  setCorners(corners) { this.corners = corners; this.lay(); },
  setOpacity(opacity) { this.options.opacity = opacity; if (this.image) this.image.style.opacity = opacity; },
  lay() { this.place(corner => this._map.latLngToLayerPoint(corner)); },
  follow(event) { this.place(corner => this._map._latLngToNewLayerPoint(L.latLng(corner), event.zoom, event.center)); },
  place(toPoint) {
    if (!this.image.naturalWidth) return;
    const [bl, tl, tr, br] = this.corners.map(toPoint);
    this.image.hidden = !isView(this.corners);
    this.image.style.transform = perspective(this.image.naturalWidth, this.image.naturalHeight, [tl, tr, br, bl]);
  },
});
