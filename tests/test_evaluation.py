"""Who is in a set and which images are right, against plain loops; an evaluation from descriptors to files."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import sets
from datasets.names import Catalogue, ImageName
from datasets.overlap import Positives
from retrieval import evaluation
from retrieval.describe import ROTATIONS, Describer
from retrieval.evaluation import Descriptors
from retrieval.recall import orientation_error
from utils import geo

QUERY = "ISS001-E-{:05d}"
REAL_NAMES = Path(__file__).parents[2] / "shared" / "names" / "queries.txt"  # the public data set's query names


def square(lat, lon, half=0.5):
    return ((lat - half, lon - half), (lat + half, lon - half), (lat + half, lon + half), (lat - half, lon + half))


def query_name(number, lat, lon, nadir, orientation=0.0):
    return str(ImageName(square(lat, lon), QUERY.format(number), "20200101", nadir, 12000, orientation))


def database_path(number, lat, lon):
    name = ImageName(square(lat, lon), f"09_{number:04d}_0000", "2021", (lat, lon), 12000, 0)
    return f"database/2021_09/0_0/{name}"


def catalogue(paths):
    return Catalogue.from_paths("/nowhere", paths)


def loop_distance(a, b):
    """Spherical law of cosines with radius 6371 km, one pair."""
    la, lo, lb, mo = map(math.radians, (*a, *b))
    cosine = math.sin(la) * math.sin(lb) + math.cos(la) * math.cos(lb) * math.cos(lo - mo)
    return 6371.0 * math.acos(max(-1.0, min(1.0, cosine)))


def test_points_of_interest_are_table_1():
    assert list(sets.POINTS_OF_INTEREST.values()) == [(30, -95), (45, 10), (38, -122), (40, 105), (-3, -60), (23, 30)]


def test_selection_agrees_with_plain_loops():
    rng = np.random.default_rng(0)
    nadirs = np.stack([rng.uniform(-52, 52, 60), rng.uniform(-180, 180, 60)], axis=1)
    centers = np.stack([rng.uniform(-60, 60, 200), rng.uniform(-180, 180, 200)], axis=1)
    pairs = np.array(sorted({(int(rng.integers(60)), int(rng.integers(200))) for _ in range(1500)}))
    for name, center in sets.POINTS_OF_INTEREST.items():
        one = sets.select_set(name, center, nadirs, centers, pairs)
        near = [q for q in range(60) if loop_distance(nadirs[q], center) <= 2500]
        base = [d for d in range(200) if loop_distance(centers[d], center) <= 5000]
        right = {q: [base.index(d) for p, d in pairs.tolist() if p == q and d in base] for q in near}
        assert one.database_rows.tolist() == base
        assert one.query_rows.tolist() == [q for q in near if right[q]]
        assert one.left_out.tolist() == [q for q in near if not right[q]]
        assert [each.tolist() for each in one.positives] == [right[q] for q in near if right[q]]


def test_selection_reaches_over_the_antimeridian():
    # One degree on the equator is 111.2 km: 179.5 W is two degrees from 178.5 E, 0 E is half the globe away.
    nadirs, centers = np.array([(0, -179.5), (0, 0)]), np.array([(0, -179.0), (0, 176.0), (0, 0)])
    one = sets.select_set("seam", (0, 178.5), nadirs, centers, np.array([(0, 0)]), 223, 280)
    assert one.query_rows.tolist() == [0] and one.database_rows.tolist() == [0, 1]


def test_positives_match_by_file_name_and_missing_ones_are_counted():
    queries = catalogue(["queries/" + query_name(i, 30, -95 + i, (30, -95)) for i in range(3)])
    database = catalogue([database_path(i, 30, -95 + i) for i in range(2)])
    moved = "elsewhere/" + database.names[1]
    gone = database_path(9, 31, -95)
    pairs, notes = sets.positive_pairs(
        queries,
        database,
        {queries.names[0]: [(moved, 0.2), (database.paths[0], 0.5), (gone, 0.1)], queries.names[1]: []},
    )
    assert pairs.tolist() == [[0, 0], [0, 1]]
    assert notes[0].startswith("1 of 3 positives") and notes[1].startswith("1 of 3 queries are not listed")


def test_positives_in_columns_agree_with_plain_loops():
    """Tables that miss queries, name images twice or unknown ones, list queries of no catalogue."""
    rng = np.random.default_rng(0)
    queries = catalogue(["queries/" + query_name(i, 30, -95 + i, (30, -95)) for i in range(30)])
    database = catalogue([database_path(i, 30, -95 + i) for i in range(20)])
    for _ in range(20):
        images = [*database.paths, *(database_path(i, 40, 10) for i in range(5))]
        names = [*rng.permutation(list(queries.names))[:25].tolist(), "@stranger@.jpg"]
        table = {name: [(images[d], 0.5) for d in rng.integers(25, size=rng.integers(6))] for name in names}
        rows = {name: row for row, name in enumerate(database.names)}
        expected = sorted(
            {
                (q, rows[path.split("/")[-1]])
                for q, name in enumerate(queries.names)
                for path, _ in table.get(name, [])
                if path.split("/")[-1] in rows
            }
        )
        for given in (table, Positives.from_table(table)):
            pairs, notes = sets.positive_pairs(queries, database, given)
            assert list(map(tuple, pairs.tolist())) == expected
        gone = sum(path in images[20:] for name in names[:-1] for path, _ in table[name])
        assert [note.split(" of ")[0] for note in notes] == [str(gone)] * (gone > 0) + ["5"]
    assert sets.positive_pairs(queries.select([]), database, table)[0].shape == (0, 2)
    assert sets.positive_pairs(queries, database.select([]), {})[0].shape == (0, 2)


def make_texas():
    """Four queries over Texas (the third without a positive, the fourth outside validation) and five images."""
    queries = catalogue(
        [
            "queries/" + query_name(0, 30, -95, (30, -95), -92.0),
            "queries/" + query_name(1, 31, -94, (30, -95), 10.0),
            "queries/" + query_name(2, 20, -94, (30, -95)),
            "queries/" + query_name(3, 30, -95, (30, -105), 200.0),
        ]
    )
    database = catalogue([database_path(i, 30, -95 + i) for i in range(5)])
    right = {0: [0], 1: [0, 1], 2: [], 3: [4]}
    listed = {queries.names[q]: [(database.paths[d], 0.3) for d in found] for q, found in right.items()}
    return sets.make_evaluation_data(queries, database, listed)


def test_empty_sets_are_skipped_with_a_line_and_left_out_queries_counted():
    data = make_texas()
    # California reaches Texas's database but its queries lie 2,600 km off; the western query is within 2,500.
    assert [one.name for one in data.sets] == ["Texas", "California", sets.VALIDATION]
    assert sum("skipped" in note for note in data.notes) == 4
    assert any(note.startswith("Texas: 1 of 4 queries left out") for note in data.notes)
    assert str(data.sets[0]) == "< Texas - #q: 3; #db: 5 >"
    assert data.only(sets.VALIDATION).query_rows.tolist() == [0, 1]
    assert data.query_rows.tolist() == [0, 1, 3] and data.database_rows.tolist() == [0, 1, 2, 3, 4]


def test_the_validation_set_has_radii_of_its_own():
    """One degree on a meridian is 111.2 km: queries at 489 and 512 km, images at 1,190 and 1,212 km and closer."""
    queries = catalogue(["queries/" + query_name(i, 30, -95, (30 - south, -95)) for i, south in enumerate((4.4, 4.6))])
    database = catalogue([database_path(i, 30 + north, -95) for i, north in enumerate((0, 10.7, 10.9, 40))])
    listed = {name: [(path, 0.3) for path in database.paths] for name in queries.names}
    data = sets.make_evaluation_data(queries, database, listed)
    members = {one.name: (one.query_rows.tolist(), one.database_rows.tolist()) for one in data.sets}
    assert members[sets.VALIDATION] == ([0], [0, 1]) and members["Texas"] == ([0, 1], [0, 1, 2, 3])
    assert sets.VALIDATION not in [one.name for one in sets.make_evaluation_data(queries, database, listed, False).sets]


def test_unreadable_images_leave_and_take_their_queries_along():
    data = make_texas().without([1], [4])
    assert [(one.name, one.query_rows.tolist()) for one in data.sets] == [("Texas", [0]), (sets.VALIDATION, [0])]
    assert all(4 not in one.database_rows for one in data.sets)
    assert any(note.startswith("California: skipped") for note in data.notes)
    # Query 2 never had a positive, query 3 lost its only one; the unreadable query 1 is no longer counted.
    assert [one.left_out.tolist() for one in data.sets] == [[2, 3], [2]]


def hand_made():
    """Descriptors in a plane: image d at angle 10 d, its copies turned by 90 at 90 + 10 d, and so on."""
    data = make_texas()
    unit = lambda degrees: np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=-1)
    layers = np.stack([unit(90 * k + 10 * np.arange(5)) for k in range(4)]).astype(np.float32)
    queries = unit(np.array([91, 14, 0.0])).astype(np.float32)  # query 0 looks like image 0 turned by 90, and so on
    return data, Descriptors(queries, np.array([0, 1, 3]), layers, np.arange(5), (0, 90, 180, 270))


def test_score_by_hand():
    data, descriptors = hand_made()
    result = evaluation.score_sets(data, descriptors, ks=(1, 2, 5))
    texas = result["Texas"]
    # Query 0: image 0 at 90. Query 1 at 14: image 1 (10), then 2 (20). Query 3 at 0: images 0, 1, 2, 3, then 4.
    assert texas.database_images[:, 0].tolist() == [0, 1, 0]
    assert texas.rotations[:, 0].tolist() == [90, 0, 0]
    assert texas.correct[:, 0].tolist() == [True, True, False]
    assert texas.recalls == pytest.approx({1: 200 / 3, 2: 200 / 3, 5: 100})
    # A copy turned by 90 has north at its left: label -92 is 2 degrees off; label 10 is 10 off 0; the third is wrong.
    assert texas.orientation == {"queries": 2, "within_45": 100.0, "mean_error": pytest.approx(6.0)}
    # Expected by chance with 5 images: 1, 2 and 1 positives.
    assert texas.random_choice[1] == pytest.approx(100 * (1 / 5 + 2 / 5 + 1 / 5) / 3)
    # Nearest centres: image 0 lies at the nadir (30, -95) of queries 0 and 1, and nearest to (30, -105) of query 3.
    assert texas.nearest_to_nadir[1] == pytest.approx(200 / 3)
    assert result.average() == pytest.approx(
        {k: (texas.recalls[k] + result["California"].recalls[k]) / 2 for k in (1, 2, 5)}
    )


def test_fewer_images_than_ranks_is_said_and_does_not_fail():
    data, descriptors = hand_made()
    result = evaluation.score_sets(data, descriptors, ks=(1, 100))
    assert result["Texas"].distinct[100] == 100
    assert result["Texas"].positions.shape == (3, 400) and (result["Texas"].positions[:, 20:] == -1).all()
    assert any("has 5 images" in note for note in result.notes)


def test_lines_have_the_form_users_parse():
    line = evaluation.recall_line(
        "Alps", "< Alps - #q: 2394; #db: 53012 >", {1: 58.4, 5: 71.0, 10: 76.8, 20: 80.9, 100: 89.4}
    )
    assert line == (
        "Recalls on Alps            < Alps - #q: 2394; #db: 53012 >: "
        "R@1: 58.4, R@5: 71.0, R@10: 76.8, R@20: 80.9, R@100: 89.4"
    )
    lines = evaluation.score_sets(*hand_made()).lines()
    assert lines[0].startswith("Recalls on Texas           < Texas - #q: 3; #db: 5 >: R@1: 66.7, ")
    for title in ("Recalls", "Distinct", "Nearest centre to the nadir", "Random  "):
        assert any(text.startswith(f"{title} on average         < 2 sets - #q: 4; #db: 5 >: R@1: ") for text in lines)


def test_files_hold_every_prediction_and_its_distance(tmp_path):
    result = evaluation.score_sets(*hand_made())
    evaluation.write_results(tmp_path / "results.json", result, checkpoint="none")
    evaluation.write_predictions(tmp_path / "predictions.csv", result, depth=3)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["sets"]["Texas"]["recalls"]["1"] == pytest.approx(200 / 3)
    assert stored["sets"]["Texas"]["nearest_to_nadir"]["1"] == pytest.approx(200 / 3)
    assert stored["average"]["over"] == ["Texas", "California"]
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(rows) == 3 * (3 + 1 + 2)
    first = rows[3]  # Texas, query 1 at (31, -94), predicted image 1 at (30, -94): one degree of latitude
    assert (first["rank"], first["rotation"], first["correct"]) == ("1", "0", "1")
    assert float(first["km"]) == pytest.approx(math.pi / 180 * 6371, abs=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.csv", "results.json"]


class Quadrants(torch.nn.Module):
    def forward(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return torch.nn.functional.normalize(pooled - pooled.mean(dim=1, keepdim=True), dim=1)


def test_from_files_to_recalls_with_unreadable_images(tmp_path):
    """Query i shows image i turned by 90 i degrees; a broken query and a broken database image are left out."""
    rng = np.random.default_rng(0)
    data = make_texas()
    for row, path in enumerate(data.database.paths):
        pixels = np.kron(rng.integers(0, 256, (2, 2, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / path, quality=95)
        if row < 4:
            (tmp_path / "queries").mkdir(exist_ok=True)
            Image.fromarray(pixels).rotate(90 * row).save(tmp_path / data.queries.paths[row], quality=95)
    (tmp_path / data.database.paths[4]).write_bytes(b"broken")
    (tmp_path / data.queries.paths[0]).write_bytes(b"broken")
    listed = {
        data.queries.names[q]: [(data.database.paths[d], 0.3) for p, d in data.pairs.tolist() if p == q]
        for q in range(4)
    }
    torch.save(listed, tmp_path / sets.INTERSECTIONS_FILE)

    result = evaluation.evaluate(Describer(Quadrants(), 32, rotations=ROTATIONS), sets.load_evaluation_data(tmp_path))
    texas = result["Texas"]
    found = result.data.database.paths[texas.database_images[0, 0]]
    assert [result.data.queries.paths[row] for row in texas.set.query_rows] == [data.queries.paths[1]]
    assert len(texas.set.database_rows) == 4 and texas.database_images[0, -1] == -1
    assert (found, texas.rotations[0, 0], texas.recalls[1]) == (data.database.paths[1], 90, 100)
    assert sum(note.startswith("left out: ") for note in result.notes) == 2
    # The one query of the one set: its first prediction is drawn as it matched, so that both look the same.
    sheet = np.asarray(evaluation.evaluation_figure(result, queries_per_set=2, size=128), dtype=np.float64)
    query, first, second = (sheet[32 : 32 + 108, 10 + 138 * column :][:, :128] for column in range(3))
    assert np.abs(query - first).mean() < 3 < 20 < np.abs(query - second).mean()

    plain = evaluation.evaluate(Describer(Quadrants(), 32), sets.load_evaluation_data(tmp_path))
    assert plain["Texas"].orientation is None and not any("Distinct" in line for line in plain.lines())


@pytest.mark.skipif(not REAL_NAMES.is_file(), reason="the public names are not here")
def test_the_public_queries_fill_the_sets_of_table_1():
    """Selection by nadir alone; the paper leaves out at most one query a set for want of a positive."""
    queries = catalogue(REAL_NAMES.read_text().split())
    none = np.zeros((0, 2))
    counts = [
        len(sets.select_set(name, center, queries.nadirs, none, none.astype(int)).left_out)
        for name, center in sets.POINTS_OF_INTEREST.items()
    ]
    assert np.array(counts) == pytest.approx(np.array([6142, 2394, 3568, 726, 682, 2164]), abs=1)


@pytest.mark.skipif(not REAL_NAMES.is_file(), reason="the public names are not here")
def test_minus_the_public_orientation_is_the_azimuth_of_up():
    """Corners run top-left, bottom-left, bottom-right, top-right in three of four names: up is from edge 1-2 to 3-0."""
    queries = catalogue(REAL_NAMES.read_text().split())
    corners = geo.unwrap_footprints(queries.footprints)
    (lat_a, lon_a), (lat_b, lon_b) = corners[:, [1, 2]].mean(axis=1).T, corners[:, [3, 0]].mean(axis=1).T
    up = np.degrees(np.arctan2((lon_b - lon_a) * np.cos(np.radians((lat_a + lat_b) / 2)), lat_b - lat_a))
    assert (orientation_error(-up, queries.orientations) < 45).mean() > 0.7
    assert (orientation_error(up, queries.orientations) < 45).mean() < 0.3


def test_turned_queries_find_what_a_turned_database_finds():
    """Descriptors that turn with the image, (4, 12): layer k is layer 0 moved by 3 k. Then both ways are the same."""
    data, rng = make_texas(), np.random.default_rng(4)
    turned = lambda vectors: np.stack([np.roll(vectors, 3 * k, axis=1) for k in range(4)])
    images, photos = rng.normal(size=(5, 12)).astype(np.float32), rng.normal(size=(3, 12)).astype(np.float32)
    rows, turns = np.array([0, 1, 3]), (0, 90, 180, 270)
    usual = Descriptors(photos, rows, turned(images), np.arange(5), turns)
    other = Descriptors(turned(photos), rows, images[None], np.arange(5), turns)
    first, second = (evaluation.score_sets(data, each, ks=(1, 2, 7)) for each in (usual, other))
    for a, b in zip(first.results, second.results):
        assert a.scores == pytest.approx(b.scores, abs=1e-6)
        assert np.array_equal(a.positions, b.positions) and np.array_equal(a.rotations, b.rotations)
        assert (a.recalls, a.distinct, a.orientation) == (b.recalls, b.distinct, b.orientation)
        assert (a.positions[:, 20:] == -1).all() and len(set(a.rotations[:, :20].ravel().tolist())) == 4


@pytest.mark.parametrize("search", ["exact", "compressed"])
def test_every_search_scores_as_the_flat_one(search):
    data, descriptors = hand_made()
    flat, other = (evaluation.score_sets(data, descriptors, (1, 2), each) for each in ("flat", search))
    assert [each.recalls for each in flat.results] == [each.recalls for each in other.results]
    assert np.array_equal(flat["Texas"].positions, other["Texas"].positions)
