"use strict";
const $ = selector => document.querySelector(selector);
const EXPORTS = {
  geojson: "GeoJSON", kmz: "KMZ", cog: "GeoTIFF on the map", geotiff: "GeoTIFF with corners",
  geoparquet: "GeoParquet", report: "Report", zip: "All, with STAC",
};

// ---- state: what the server says, and what this page alone knows
let photos = [], selected = null, place = 0, moved = null, editing = false, picking = null, shownKey = "", about = {};

const current = () => photos.find(each => each.id === selected);
const percent = value => value == null ? "" : value > 0.9995 ? "> 99.9 %"
  : value > 0.9 ? `${(value * 100).toFixed(1)} %` : `${Math.round(value * 100)} %`;
const degrees = ([lat, lon]) =>
  `${Math.abs(lat).toFixed(2)}° ${lat < 0 ? "S" : "N"}, ${Math.abs(lon).toFixed(2)}° ${lon < 0 ? "W" : "E"}`;

/** EarthLoc's file names are long: of them, the number of the photo. */
const shortName = name => /@([A-Z0-9]+-E-\d+)@/.exec(name)?.[1] ?? name;

/** CSS that turns a north-up square like the photo, and lets it fill its frame. */
function upright(rotation) {
  const angle = rotation * Math.PI / 180;
  return `transform: rotate(${-rotation}deg) scale(${Math.abs(Math.cos(angle)) + Math.abs(Math.sin(angle))})`;
}

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

function toast(text, isError = false) {
  const box = $("#toast");
  box.textContent = text;
  box.className = isError ? "error" : "";
  box.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { box.hidden = true; }, isError ? 8000 : 2500);
}

async function ask(path, options = {}) {
  const response = await fetch(path, options);
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const detail = typeof body.detail === "string" ? body.detail : `${response.status} ${response.statusText}`;
    throw new Error(detail);
  }
  return body;
}

const put = (path, body) => ask(path, { method: "PUT", body: JSON.stringify(body) });

// ---- map
const map = L.map("map", { center: [15, 0], zoom: 2, minZoom: 1, maxZoom: 16, zoomControl: false, attributionControl: true,
  maxBounds: [[-85.06, -540], [85.06, 540]], maxBoundsViscosity: 0.8, zoomSnap: 0.25, wheelPxPerZoomLevel: 110 });
map.attributionControl.setPrefix("Leaflet");
L.control.zoom({ position: "bottomleft" }).addTo(map);
L.control.scale({ position: "bottomleft", imperial: false }).addTo(map);
map.createPane("pictures").style.zIndex = 350;
map.createPane("drapes").style.zIndex = 380;
const layers = L.layerGroup().addTo(map), handles = L.layerGroup().addTo(map), pickMark = L.layerGroup().addTo(map);
let drape = null, picture = null, outline = null;

/** Corners -> the same, longitudes within half a turn of the first one's, which lies between -180 and 180. */
function unwrapped(corners) {
  const first = corners[0][1];
  return corners.map(([lat, lon]) => [lat, lon - 360 * Math.round((lon - first) / 360)]);
}

function corners() {
  const photo = current();
  if (!photo || !photo.places.length) return null;
  if (moved) return moved;
  const isChosen = photo.decision === "accepted" && photo.chosen === place;
  return unwrapped(isChosen && photo.corrected ? photo.corrected : photo.places[place].footprint);
}

function drawMap() {
  layers.clearLayers();
  handles.clearLayers();
  drape = picture = outline = null;
  const photo = current();
  if (!photo) return;
  if (photo.nadir) {
    const icon = L.divIcon({ className: "nadir-mark", html: "✛", iconSize: [24, 24] });
    L.marker(photo.nadir, { icon, interactive: false }).addTo(layers);
    L.circle(photo.nadir, { radius: 1000 * (about.near_km ?? 2500), className: "reach", interactive: false }).addTo(layers);
  }
  photo.places.forEach((each, k) => {
    if (k === place) return;
    const footprint = unwrapped(each.footprint), badge = String(each.rank);
    L.polygon(footprint, { className: "other" }).on("click", () => choose(k)).addTo(layers);
    L.marker(L.latLngBounds(footprint).getCenter(), { icon: L.divIcon({ className: "badge", html: badge, iconSize: [22, 22] }) })
      .on("click", () => choose(k)).addTo(layers);
  });
  const footprint = corners();
  if (!footprint) return;
  const shown = photo.places[place];
  if (shown.picture && shown.picture_footprint) {
    picture = L.imageOverlay(`/api/photos/${photo.id}/places/${place}.jpg?run=${photo.run}`,
      L.latLngBounds(unwrapped(shown.picture_footprint)), { pane: "pictures", opacity: $("#under").value / 100 }).addTo(layers);
  }
  drape = new Drape(`/api/photos/${photo.id}/shown.jpg`, footprint,
    { pane: "drapes", opacity: $("#opacity").value / 100 }).addTo(layers);
  outline = L.polygon(footprint, { className: shown.verified ? "best verified" : "best", fill: false, interactive: false })
    .addTo(layers);
  if (editing) drawHandles(footprint);
}

function drawHandles(footprint) {
  handles.clearLayers();
  const icon = name => L.divIcon({ className: `handle ${name}`, iconSize: [18, 18] });
  const marks = footprint.map((corner, k) =>
    L.marker(corner, { icon: icon("corner"), draggable: true, autoPan: true }).on("drag", event => {
      const { lat, lng } = event.latlng;
      move(footprint.map((each, other) => other === k ? [lat, lng] : each));
    }).addTo(handles));
  let start = null, from = null;
  const middle = L.marker(center(footprint), { icon: icon("middle"), draggable: true }).on("dragstart", () => {
    start = footprint.map(corner => map.project(corner));
    from = map.project(middle.getLatLng());
  }).on("drag", event => {
    const shift = map.project(event.latlng).subtract(from);
    move(start.map(point => map.unproject(point.add(shift))).map(({ lat, lng }) => [lat, lng]));
  }).addTo(handles);

  function move(wanted) {
    const isFirst = !moved;
    footprint = moved = wanted;
    if (isFirst) drawPanel();
    drape.setCorners(footprint);
    outline.setLatLngs(footprint);
    const isSound = isView(footprint);
    outline.getElement()?.classList.toggle("folded", !isSound);
    $("#accept").disabled = !isSound;
    marks.forEach((mark, k) => mark.setLatLng(footprint[k]));
    if (!start || !middle.dragging._draggable._moving) middle.setLatLng(center(footprint));
    hint();
  }
}

/** Where the diagonals' middles meet on the map: good enough for a handle. */
function center(footprint) {
  const points = footprint.map(corner => map.project(corner));
  const { lat, lng } = map.unproject(points.reduce((sum, point) => sum.add(point), L.point(0, 0)).divideBy(4));
  return [lat, lng];
}

function look() {
  const footprint = corners();
  const photo = current();
  const room = { paddingTopLeft: [40, 40], paddingBottomRight: [innerWidth > 900 ? 400 : 40, 60], animate: true, duration: 0.5 };
  if (footprint) map.flyToBounds(L.latLngBounds(footprint).pad(0.35), room);
  else if (photo?.nadir) map.flyTo(photo.nadir, 4, room);
}

// ---- list and panel
function badge(photo) {
  if (photo.state === "waiting") return ["wait", photo.ahead ? `${photo.ahead} before it` : "next"];
  if (photo.state === "locating") return ["work", "locating …"];
  if (photo.state === "failed") return ["bad", "not located"];
  if (photo.decision === "accepted") return ["good", photo.corrected ? "accepted, corrected" : "accepted"];
  if (photo.decision === "rejected") return ["bad", "rejected"];
  const best = photo.places[0];
  if (best.verified) return ["good soft", `verified, ${percent(best.probability)}`];
  if (best.probability != null && !best.inliers) return ["doubt", "no match"];
  return ["doubt", best.probability == null ? "to be judged" : `not verified, ${percent(best.probability)}`];
}

function drawList() {
  $("#photos").replaceChildren(...photos.map(photo => {
    const [kind, text] = badge(photo);
    const item = element("li", { className: photo.id === selected ? "selected" : "", tabIndex: 0 },
      element("img", { src: `/api/photos/${photo.id}/thumb.jpg`, alt: "", loading: "lazy" }),
      element("div", {}, element("b", { textContent: shortName(photo.name), title: photo.name }),
        element("span", { className: `badge-text ${kind}`, textContent: text })));
    item.dataset.id = photo.id;
    item.onclick = () => select(photo.id);
    item.onkeydown = event => { if (event.key === "Enter") select(photo.id); };
    return item;
  }));
  const decided = photos.filter(each => each.decision !== "open").length;
  const accepted = photos.filter(each => each.decision === "accepted").length;
  $("#count").textContent = photos.length ? `${photos.length} photo${photos.length > 1 ? "s" : ""}, ${decided} judged` : "";
  $("#export-all").hidden = !accepted;
}

function drawPanel() {
  const photo = current();
  $("#panel").hidden = !photo;
  if (!photo) return;
  $("#photo").src = `/api/photos/${photo.id}/shown.jpg`;
  $("#name").textContent = shortName(photo.name);
  $("#name").title = photo.name;
  const [kind, text] = badge(photo);
  $("#state").replaceChildren(element("span", { className: `badge-text ${kind}`, textContent: text }),
    element("span", { className: "why", textContent: photo.error || `${photo.width} × ${photo.height}` }));
  const [lat, lon] = photo.nadir ?? ["", ""];
  if (!$("#own-nadir").contains(document.activeElement)) {
    $("#own-nadir .lat").value = lat;
    $("#own-nadir .lon").value = lon;
  }
  $("#nadir-note").textContent = photo.nadir ? `searched within ${(about.near_km ?? 2500).toLocaleString("en")} km of it` : "unknown: the whole Earth is searched";
  const has = photo.places.length > 0;
  $("#found").hidden = !has;
  if (!has) return;
  $("#places").replaceChildren(...photo.places.map((each, k) => {
    const facts = [each.inliers ? `${each.inliers} inliers` : null, `similarity ${each.score.toFixed(2)}`].filter(Boolean).join(" · ");
    const picture = each.picture
      ? element("img", { src: `/api/photos/${photo.id}/places/${k}.jpg?run=${photo.run}`, alt: "",
        style: upright(each.rotation) })
      : element("span", { className: "none" });
    const item = element("li", { className: k === place ? "selected" : "", tabIndex: 0 },
      element("span", { className: "frame" }, picture), element("div", {},
        element("b", { textContent: degrees([each.latitude, each.longitude]) }),
        element("span", { textContent: facts }),
        element("span", { className: `badge-text ${each.verified ? "good" : "doubt"}`,
          textContent: each.probability == null ? "not registered" : !each.inliers ? "no match"
            : `${each.verified ? "verified" : "not verified"}, ${percent(each.probability)}` })),
      element("kbd", { textContent: k + 1 }));
    item.onclick = () => choose(k);
    item.onkeydown = event => { if (event.key === "Enter") choose(k); };
    return item;
  }));
  $("#picture-line").hidden = !photo.places[place].picture;
  const isAccepted = photo.decision === "accepted" && photo.chosen === place && !moved;
  $("#accept").textContent = isAccepted ? "Accepted ✓" : moved ? "Accept corrected" : "Accept";
  $("#accept").classList.toggle("on", isAccepted);
  $("#accept").disabled = Boolean(moved && !isView(moved));
  $("#reject").textContent = photo.decision === "rejected" ? "Rejected ✓" : "Reject";
  $("#correct").textContent = editing ? (moved ? "Undo" : "Stop moving") : "Move corners";
  $("#correct").classList.toggle("on", editing);
  $("#exports").replaceChildren(element("span", { className: "title", textContent: "Export" }),
    ...Object.entries(EXPORTS).map(([kind, label]) => {
      const link = element("a", { href: `/api/photos/${photo.id}/export/${kind}`, textContent: label });
      link.onclick = event => { event.preventDefault(); download(link.href); };
      return link;
    }));
  hint();
}

function hint() {
  $("#hint").textContent = !editing ? "" : moved && !isView(moved)
    ? "These corners fold or mirror the photo." : "Drag a corner, or the middle to move all of it.";
}

function draw() { drawList(); drawPanel(); drawMap(); }

async function download(href) {  // fetched first, so that an error is told here and not in a file
  try {
    const response = await fetch(href);
    if (!response.ok) throw new Error((await response.json()).detail);
    const name = /filename\*?=(?:utf-8'')?"?([^";]+)/i.exec(response.headers.get("content-disposition") ?? "")?.[1] ?? "export";
    const link = element("a", { href: URL.createObjectURL(await response.blob()), download: decodeURIComponent(name) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } catch (error) { toast(error.message, true); }
}

// ---- what a person does
function select(id) {
  if (id === selected) { look(); return; }
  const photo = photos.find(each => each.id === id);
  selected = id; moved = null; editing = false;
  place = photo?.decision === "accepted" ? photo.chosen : 0;
  stopPicking();
  draw();
  look();
  $(`#photos [data-id="${id}"]`)?.scrollIntoView({ block: "nearest" });
}

function choose(k) {
  if (!current()?.places[k]) return;
  place = k; moved = null; editing = false;
  draw();
  look();
}

async function decide(decision) {
  const photo = current();
  if (!photo?.places.length) return;
  const kept = corners(), was = moved || (photo.decision === "accepted" && photo.chosen === place && photo.corrected);
  try {
    await put(`/api/photos/${photo.id}/decision`, decision === "accepted"
      ? { decision, chosen: place, corrected: was ? kept : null } : { decision });
    moved = null; editing = false;
    toast(decision === "open" ? "open again" : decision);
    await refresh();
  } catch (error) { toast(error.message, true); }
}

function edit() {
  if (!current()?.places.length) return;
  if (editing && moved) moved = null;
  else editing = !editing;
  draw();
}

async function upload(files) {
  const [lat, lon] = fields("#new-nadir");
  if ((lat === "") !== (lon === "")) { toast("A nadir has a latitude and a longitude.", true); return; }
  for (const file of files) {
    if (about.max_mb && file.size > about.max_mb * 1e6) {
      toast(`${file.name}: larger than ${about.max_mb} MB`, true);
      continue;
    }
    const query = new URLSearchParams(lat === "" ? { name: file.name } : { name: file.name, lat, lon });
    try {
      const made = await ask(`/api/photos?${query}`, { method: "POST", body: file,
        headers: { "Content-Type": "application/octet-stream" } });
      await refresh();
      if (!selected) select(made.id);
    } catch (error) { toast(error.message, true); }
  }
}

const fields = form => ["lat", "lon"].map(name => $(`${form} .${name}`).value.trim().replace(",", "."));

function pick(form) {
  if (picking === form) { stopPicking(); return; }
  stopPicking();
  picking = form;
  $(`${form} .pick`).classList.add("on");
  map.getContainer().classList.add("picking");
  toast("Click on the map: the point below the camera");
}

function stopPicking() {
  if (!picking) return;
  $(`${picking} .pick`).classList.remove("on");
  map.getContainer().classList.remove("picking");
  picking = null;
}

map.on("click", event => {
  if (!picking) return;
  const { lat, lng } = event.latlng.wrap();
  $(`${picking} .lat`).value = lat.toFixed(2);
  $(`${picking} .lon`).value = lng.toFixed(2);
  markPicked(picking);
  stopPicking();
});

function markPicked(form) {
  pickMark.clearLayers();
  const [lat, lon] = fields(form).map(Number);
  if (form !== "#new-nadir" || fields(form).includes("") || !Number.isFinite(lat) || !Number.isFinite(lon)) return;
  L.marker([lat, lon], { icon: L.divIcon({ className: "nadir-mark new", html: "✛", iconSize: [24, 24] }), interactive: false })
    .addTo(pickMark);
}

async function again() {
  const given = fields("#own-nadir"), photo = current();
  if (!photo) return;
  if ((given[0] === "") !== (given[1] === "")) { toast("A nadir has a latitude and a longitude.", true); return; }
  const [lat, lon] = given.map(Number);
  if (given[0] !== "" && !(Math.abs(lat) <= 90 && Math.abs(lon) <= 180)) {
    toast("Latitude within ±90, longitude within ±180, in degrees.", true);
    return;
  }
  try {
    await put(`/api/photos/${photo.id}/nadir`, { nadir: given[0] === "" ? null : [lat, lon] });
    place = 0; moved = null; editing = false;
    document.activeElement?.blur();
    await refresh();
  } catch (error) { toast(error.message, true); }
}

async function remove() {
  const photo = current(), at = photos.indexOf(photo);
  try {
    await ask(`/api/photos/${photo.id}`, { method: "DELETE" });
    selected = null; moved = null; editing = false;
    await refresh();
    const next = photos[Math.min(at, photos.length - 1)];
    if (next) select(next.id); else draw();
  } catch (error) { toast(error.message, true); }
}

function step(by) {
  const at = photos.findIndex(each => each.id === selected);
  const next = photos[Math.max(0, Math.min(photos.length - 1, at + by))];
  if (next && next.id !== selected) select(next.id);
}

$("#accept").onclick = () => {
  const photo = current();
  decide(photo.decision === "accepted" && photo.chosen === place && !moved ? "open" : "accepted");
};
$("#reject").onclick = () => decide(current().decision === "rejected" ? "open" : "rejected");
$("#correct").onclick = edit;
$("#again").onclick = again;
$("#remove").onclick = remove;
$("#photo").onclick = look;
$("#opacity").oninput = event => drape?.setOpacity(event.target.value / 100);
$("#under").oninput = event => picture?.setOpacity(event.target.value / 100);
$("#files").onchange = event => { upload([...event.target.files]); event.target.value = ""; };
for (const form of ["#new-nadir", "#own-nadir"]) {
  $(`${form} .pick`).onclick = () => pick(form);
  $(`${form} .lat`).onchange = $(`${form} .lon`).onchange = () => markPicked(form);
  $(form).onkeydown = event => { if (event.key === "Enter" && form === "#own-nadir") again(); };
}
for (const name of ["dragover", "dragenter"]) {
  addEventListener(name, event => { event.preventDefault(); $("#drop").classList.add("over"); });
}
addEventListener("dragleave", event => { if (!event.relatedTarget) $("#drop").classList.remove("over"); });
addEventListener("drop", event => {
  event.preventDefault();
  $("#drop").classList.remove("over");
  upload([...event.dataTransfer.files]);
});
addEventListener("keydown", event => {
  if (event.target.matches("input") && event.target.type !== "range" || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { a: () => decide("accepted"), r: () => decide("rejected"), e: edit, ArrowDown: () => step(1),
    ArrowUp: () => step(-1), Escape: () => { stopPicking(); if (editing) { moved = null; editing = false; draw(); } } }[event.key];
  if (act) { event.preventDefault(); act(); }
  else if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
});

// ---- what the server says
async function refresh() {
  const told = await ask("/api/photos");
  const text = JSON.stringify(told);
  if (text === refresh.last) return;
  const before = current();
  refresh.last = text;
  photos = told;
  const now = current();
  if (selected && !now) selected = null;
  const isNew = now && (!before || before.state !== now.state || before.run !== now.run);
  if (isNew) { place = now.decision === "accepted" ? now.chosen : 0; moved = null; editing = false; }
  drawList();
  if (moved && !isNew) return;  // a corner is in a person's hand
  drawPanel();
  const key = JSON.stringify([selected, place, now?.run, now?.state, now?.decision, now?.corrected]);
  if (key !== shownKey) { shownKey = key; drawMap(); }
  if (isNew && now.state === "done") look();
}

async function poll() {
  try {
    if (!about.ready && !about.error) await tellAbout();
    await refresh();
    document.body.classList.remove("lost");
  } catch (error) {
    document.body.classList.add("lost");
    toast("The server does not answer.", true);
  }
  const isBusy = photos.some(each => ["waiting", "locating"].includes(each.state)) || !about.ready;
  setTimeout(poll, isBusy ? 700 : 3000);
}

async function tellAbout() {
  about = await ask("/api/about");
  $("#about").textContent = about.error ? `cannot locate: ${about.error}` : about.ready ? about.text ?? "ready" : "loading the model …";
  $("#about").className = about.error ? "error" : about.ready ? "" : "busy";
}

(async () => {
  try { await tellAbout(); } catch (error) { toast(error.message, true); }
  L.tileLayer("/tiles/{z}/{x}/{y}.jpg", { maxNativeZoom: about.max_zoom ?? 6, maxZoom: 16, minZoom: 1,
    attribution: "Blue Marble: NASA Earth Observatory" }).addTo(map);
  poll();
})();
