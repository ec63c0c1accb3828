"""Results on the disk: what a kill leaves, what the next run does, shards and what is made of them."""

import csv
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from retrieval import archive as archives
from retrieval.archive import (
    Archive,
    find_shards,
    merge,
    parse_shard,
    read_failures,
    read_places,
    read_progress,
    shard_folder,
    shard_rows,
)

COLUMNS = {"image": str, "rank": int, "score": float, "probability": float, "verified": bool} | {
    "latitude": float,
    "longitude": float,
}
SETTINGS = {"top_k": 2}


def places_of(image, count=2):
    """Two places of a photo, that say which."""
    number = int(image.split(".")[0]) if image[0].isdigit() else 0
    for rank in range(1, count + 1):
        lat, lon = number % 80, number % 170 + rank
        footprint = np.array([(lat, lon), (lat + 1, lon), (lat + 1, lon + 2), (lat, lon + 2)], dtype=float)
        values = (image, rank, 1 / rank, None, False, lat + 0.5, lon + 1.0)
        yield dict(zip(COLUMNS, values)), footprint


def add(archive, images, failures=()):
    archive.add([place for image in images for place in places_of(image)], failures)


def names(first, last):
    return [f"{number}.jpg" for number in range(first, last)]


def images_in(folder):
    return [properties["image"] for properties, _ in read_places(folder) if properties["rank"] == 1]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(archives, "PART", 10)


def test_all_files_hold_the_same_places(tmp_path):
    with Archive.open(tmp_path / "out", SETTINGS, COLUMNS) as archive:
        for first in range(0, 21, 3):
            add(archive, names(first, first + 3), [(f"bad{first}.jpg", 'broken, "so"')])
        archive.finish()
    folder = tmp_path / "out"
    expected = [place for image in names(0, 21) for place in places_of(image)]
    assert [properties for properties, _ in read_places(folder)] == [properties for properties, _ in expected]
    assert all((a == b).all() for (_, a), (_, b) in zip(read_places(folder), expected))
    listed = json.loads((folder / "predictions.json").read_text())
    assert listed == [properties for properties, _ in expected]
    features = json.loads((folder / "predictions.geojson").read_text())["features"]
    assert [each["properties"] for each in features] == listed
    for each, (_, footprint) in zip(features, expected):
        assert shapely.geometry.shape(each["geometry"]).equals(shapely.Polygon(footprint[:, ::-1]))
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["probability"], int(row["rank"])) for row in rows] == [
        (each["image"], "", each["rank"]) for each in listed
    ]
    table = pq.read_table(folder / "predictions.parquet")  # as one, though it is several files
    assert len(list((folder / "predictions.parquet").iterdir())) == 4
    assert table.select(list(COLUMNS)).to_pylist() == listed
    corners = np.stack([table[f"{axis}{corner}"] for corner in range(1, 5) for axis in ("lat", "lon")], axis=1)
    assert (corners.reshape(-1, 4, 2) == [footprint for _, footprint in expected]).all()
    for outline, (_, footprint) in zip(shapely.from_wkb(table["geometry"].to_pylist()), expected):
        assert outline.equals(shapely.Polygon(footprint[:, ::-1]))
    assert json.loads(pq.read_schema(folder / "predictions.parquet" / "part-000000.parquet").metadata[b"geo"])
    assert list(read_failures(folder)) == [(f"bad{first}.jpg", 'broken, "so"') for first in range(0, 21, 3)]


@pytest.mark.parametrize("batches", range(8))
def test_a_run_that_was_killed_anywhere_leaves_whole_batches_and_the_next_goes_on(tmp_path, batches):
    """Killed after some batches and in the middle of writing the next: half a line, half a batch, a part too many."""
    folder = tmp_path / "out"
    archive = Archive.open(folder, SETTINGS, COLUMNS)
    for first in range(0, 3 * batches, 3):
        add(archive, names(first, first + 3), [("bad.jpg", "why")])
    archive.__exit__()
    with open(folder / "predictions.jsonl", "a") as file:
        place, footprint = next(places_of("77.jpg"))
        file.write(json.dumps(place | {"footprint": footprint.tolist()}) + '\n{"image": "78.jp')
    (folder / "predictions.parquet" / "part-000009.parquet").write_bytes(b"half")
    with Archive.open(folder, SETTINGS, COLUMNS) as archive:
        done = [archive.is_done(image) for image in names(0, 24)]
        assert done == [True] * 3 * batches + [False] * (24 - 3 * batches)
        assert not archive.is_done("bad.jpg") and not archive.is_done("77.jpg")
        add(archive, names(3 * batches, 24))
        archive.finish()
    assert images_in(folder) == names(0, 24) and list(read_failures(folder)) == []
    table = pq.read_table(folder / "predictions.parquet")
    assert table["image"].to_pylist() == [image for image in names(0, 24) for _ in range(2)]


def test_a_finished_folder_takes_more_photos(tmp_path):
    with Archive.open(tmp_path, SETTINGS, COLUMNS) as archive:
        add(archive, names(0, 7))
        archive.finish()
    assert read_progress(tmp_path)["finished"]
    with Archive.open(tmp_path, SETTINGS, COLUMNS) as archive:
        assert not read_progress(tmp_path)["finished"]
        add(archive, names(7, 9))
        archive.finish()
    assert images_in(tmp_path) == names(0, 9)
    assert pq.read_table(tmp_path / "predictions.parquet")["image"].to_pylist()[::2] == names(0, 9)


def test_other_settings_files_and_processes_are_refused(tmp_path):
    with Archive.open(tmp_path / "a", SETTINGS, COLUMNS) as archive:
        with pytest.raises(ValueError, match="another process writes there"):
            Archive.open(tmp_path / "a", SETTINGS, COLUMNS)
        add(archive, names(0, 2))
    with pytest.raises(ValueError, match="made with top_k 2, now it is 3; give the same, or another --output"):
        Archive.open(tmp_path / "a", {"top_k": 3}, COLUMNS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "predictions.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="but no progress.json"):
        Archive.open(tmp_path / "b", SETTINGS, COLUMNS)
    assert (tmp_path / "b" / "predictions.jsonl").read_text() == "mine\n"
    (tmp_path / "c").write_text("")
    with pytest.raises(ValueError, match="--output .*c: cannot be a folder"):
        Archive.open(tmp_path / "c", SETTINGS, COLUMNS)
    (tmp_path / "a" / "progress.json").write_text("{")
    with pytest.raises(ValueError, match="progress.json: damaged"):
        Archive.open(tmp_path / "a", SETTINGS, COLUMNS)
    with Archive.open(tmp_path / "d", SETTINGS, COLUMNS) as archive:
        add(archive, names(0, 2))
    (tmp_path / "d" / "predictions.jsonl").write_text("")
    with pytest.raises(ValueError, match="predictions.jsonl: was cut short"):
        Archive.open(tmp_path / "d", SETTINGS, COLUMNS)
    Archive.open(tmp_path / "e", SETTINGS, COLUMNS).__exit__()  # the lock went with the error


def test_names_with_stray_bytes_and_quotes_pass(tmp_path):
    image = os.fsdecode(b'caf\xe9 "1",\n.jpg')
    with Archive.open(tmp_path, SETTINGS, COLUMNS) as archive:
        add(archive, [image])
        archive.finish()
    assert images_in(tmp_path) == [image]
    with Archive.open(tmp_path, SETTINGS, COLUMNS) as archive:
        assert archive.is_done(image)
    assert pq.read_table(tmp_path / "predictions.parquet")["image"][0].as_py() == 'caf\\udce9 "1",\n.jpg'


def test_shards_from_the_flag_slurm_and_torchrun():
    assert parse_shard(None, {}) == (0, 1) and parse_shard("2/5", {"RANK": "1", "WORLD_SIZE": "2"}) == (2, 5)
    assert parse_shard(None, {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "RANK": "0", "WORLD_SIZE": "1"}
    assert parse_shard(None, slurm) == (3, 4)
    assert parse_shard(None, slurm | {"SLURM_ARRAY_TASK_MIN": "1"}) == (2, 4)
    spread = {"SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_STEP": "5", "SLURM_ARRAY_TASK_ID": "15"}
    assert parse_shard(None, slurm | spread) == (2, 4)
    for text in ("4/4", "-1/4", "1", "a/b", "0/0", "1/2/3"):
        with pytest.raises(ValueError, match=f"--shard {text}: "):
            parse_shard(text, {})
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID/SLURM_ARRAY_TASK_COUNT 4/4"):
        parse_shard(None, slurm | {"SLURM_ARRAY_TASK_ID": "4"})


@pytest.mark.parametrize("count, shards", [(10, 3), (2, 5), (0, 2), (7, 7), (1_000_003, 64)])
def test_shards_are_stretches_that_cover_all_once(count, shards):
    stretches = [shard_rows(count, (number, shards)) for number in range(shards)]
    assert [row for each in stretches for row in each] == list(range(count))
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 1


def run_shard(folder, number, images, failures=(), count=3, settings=SETTINGS):
    with Archive.open(shard_folder(folder, (number, count)), settings, COLUMNS) as archive:
        add(archive, images, failures)
        archive.finish()


def test_merged_shards_are_what_one_run_had_made(tmp_path):
    for number, (first, last) in enumerate(((0, 12), (12, 12), (12, 30))):
        run_shard(tmp_path / "m", number, names(first, last), [(f"bad{number}.jpg", "why")])
    with Archive.open(tmp_path / "one", SETTINGS, COLUMNS) as archive:
        add(archive, names(0, 30), [(f"bad{number}.jpg", "why") for number in range(3)])
        archive.finish()
    counts = {"photos": 30, "places": 60, "failures": 3}
    for _ in range(2):  # and it can be done again
        assert merge(tmp_path / "m", lambda _: COLUMNS) == counts
        for file in ("predictions.jsonl", "predictions.json", "predictions.csv", "predictions.geojson", "failures.csv"):
            assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
        tables = [pq.read_table(tmp_path / each / "predictions.parquet") for each in ("m", "one")]
        assert tables[0].equals(tables[1])


def test_a_photo_of_two_shards_counts_once(tmp_path):
    """As when photos came in between the shards' runs; a failure of one that another could read is none."""
    run_shard(tmp_path, 0, names(0, 5))
    run_shard(tmp_path, 1, names(3, 8), [("9.jpg", "why"), ("10.jpg", "why")])
    run_shard(tmp_path, 2, names(8, 10))
    assert merge(tmp_path, lambda _: COLUMNS) == {"photos": 10, "places": 20, "failures": 1}
    assert images_in(tmp_path) == names(0, 10) and list(read_failures(tmp_path)) == [("10.jpg", "why")]


def test_a_merge_waits_for_all_shards_and_loses_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="--merge .*: no folders shard_"):
        find_shards(tmp_path)
    run_shard(tmp_path, 0, names(0, 2))
    with Archive.open(shard_folder(tmp_path, (2, 3)), SETTINGS, COLUMNS) as archive:
        add(archive, names(4, 6))
    with pytest.raises(ValueError, match="not finished: --shard 1/3, 2/3; run them again"):
        merge(tmp_path, lambda _: COLUMNS)
    run_shard(tmp_path, 2, [])
    run_shard(tmp_path, 1, names(2, 4), settings={"top_k": 3})
    with pytest.raises(ValueError, match="shard_1_of_3: was made with other settings"):
        merge(tmp_path, lambda _: COLUMNS)
    run_shard(tmp_path / "n", 0, names(0, 2), count=2)
    run_shard(tmp_path / "n", 1, names(0, 2), count=2)
    with Archive.open(tmp_path / "n", SETTINGS, COLUMNS) as archive:
        add(archive, names(50, 52))
    with pytest.raises(ValueError, match="holds results of its own"):
        merge(tmp_path / "n", lambda _: COLUMNS)
    assert images_in(tmp_path / "n") == names(50, 52)
    run_shard(tmp_path / "n", 0, names(0, 2), count=4)
    with pytest.raises(ValueError, match="shards of 2 and of 4"):
        merge(tmp_path / "n", lambda _: COLUMNS)


def test_parts_keep_their_types_where_nothing_is_known(tmp_path):
    """A part of which no place has a probability is of the same types as one that has."""
    table = archives.as_table([{**p, "footprint": f.tolist()} for p, f in places_of("1.jpg")], COLUMNS)
    assert table.schema.field("probability").type == pa.float64() and table["probability"].null_count == 2
    assert table.schema.equals(archives.as_table([], COLUMNS).schema)
