"""The paper's tables and figures as commands: their numbers by plain loops, and whole runs on the tiny world."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from datasets.conditions import write_conditions
from datasets.names import Catalogue
from experiments import figures, runs, table2, table4
from models.config import ModelConfig
from models.earthloc import EarthLoc, load_model
from models.weights import save_safetensors, weights_fingerprint
from retrieval.leaderboard import FIELDS, append_line
from utils.flags import call
from utils.logs import make_log_dir

PAPER = sorted((Path(__file__).resolve().parents[2] / "shared" / "seeds").glob("001*"))
FLAGS = ["--num_workers", "0", "--device", "cpu", "--precision", "fp32", "--descriptors", "none"]


def write_predictions(folder, first_right, extra=()):
    """{query: whether its first prediction is right}, all of the Alps -> an evaluation's folder."""
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"dataset": "nowhere", "checkpoint": None}))
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("set", "query", "rank", "database_image", "score", "rotation", "correct", "km"))
        for query, right in first_right.items():
            writer.writerow(("Alps", query, 1, "a.jpg", 0.9, 90, int(right), 1))
            writer.writerow(("Alps", query, 2, "b.jpg", 0.8, 0, int(not right), 1))
        writer.writerows(extra)
    return folder


def test_predictions_are_read_in_order_and_without_validation(tmp_path):
    extra = [("Texas-validation", "q1", 1, "c.jpg", 0.5, 0, 1, 0), ("Texas", "q1", 1, "c.jpg", 0.5, 270, 0, 0)]
    found = figures.read_predictions(write_predictions(tmp_path / "one", {"q1": True}, extra))
    assert found == {
        ("Alps", "q1"): [("a.jpg", 90, True), ("b.jpg", 0, False)],
        ("Texas", "q1"): [("c.jpg", 270, False)],
    }
    with pytest.raises(FileNotFoundError, match="eval.py"):
        figures.read_predictions(tmp_path)


def test_seeds_are_of_the_same_photos(tmp_path):
    folders = [write_predictions(tmp_path / str(seed), {"q1": seed == 0, "q2": True}) for seed in (0, 1)]
    _, found, right = figures.read_seeds(folders)
    assert list(found) == [("Alps", "q1"), ("Alps", "q2")] and right.tolist() == [[True, True], [False, True]]
    other = write_predictions(tmp_path / "other", {"q1": True})
    with pytest.raises(ValueError, match="other: evaluated on other photos"):
        figures.read_seeds([*folders, other])


def test_recall_by_a_condition_agrees_with_plain_loops():
    rng = np.random.default_rng(0)
    values, right = rng.uniform(0, 1000, 90), rng.uniform(size=(3, 90)) < 0.4
    values[::9] = np.nan
    edges, counts, medians, recalls = figures.recall_by(values, right)
    in_order = sorted((value, row) for row, value in enumerate(values) if value == value)
    assert counts.tolist() == [20] * 4 and edges[0] == in_order[0][0] and edges[-1] == in_order[-1][0]
    for each in range(4):
        members = in_order[20 * each : 20 * each + 20]
        assert medians[each] == pytest.approx((members[9][0] + members[10][0]) / 2)
        assert edges[each] <= members[0][0] and members[-1][0] <= edges[each + 1]
        for seed in range(3):
            assert recalls[seed, each] == pytest.approx(5 * sum(bool(right[seed, row]) for _, row in members))


def test_many_equal_values_share_a_bin():
    values = np.array([0.0] * 60 + [5.0] * 20 + [9.0] * 20)
    right = (values == 5.0)[None]
    edges, counts, medians, recalls = figures.recall_by(values, right)
    assert counts.tolist() == [60, 20, 20] and recalls.tolist() == [[0, 100, 0]] and medians.tolist() == [0, 5, 9]
    for everything in (np.zeros(50), np.zeros(3)):
        edges, counts, _, recalls = figures.recall_by(everything, np.ones((1, len(everything)), bool))
        assert edges.tolist() == [0, 0] and counts.tolist() == [len(everything)] and recalls.tolist() == [[100]]


def test_deviation_is_over_the_seeds_or_of_drawing_the_photos():
    assert figures.deviations(np.array([[20.0], [50.0]]), np.array([100])) == pytest.approx([450**0.5])
    assert figures.deviations(np.array([[20.0]]), np.array([100])) == pytest.approx([4.0])
    lines = figures.conditions_table("km", [0, 500, 2500], [30, 30], np.array([[20.0, 10.0], [50.0, 10.0]]))
    assert lines[2:] == ["| 0 to 500 | 30 | 35.0 ± 21.2 |", "| 500 to 2,500 | 30 | 10.0 ± 0.0 |"]


def test_the_map_has_the_recall_of_each_cell_at_its_place():
    centers = np.array([[45.1, 10.0], [49.9, 14.9], [-3.0, -60.1]])
    figure = figures.map_figure(centers, np.array([[True, False, False], [True, True, False]]))
    (dots,) = figure.axes[0].collections
    shown = dict(zip(map(tuple, dots.get_offsets().tolist()), dots.get_array().tolist()))
    assert shown == {(12.5, 47.5): 75.0, (-62.5, -2.5): 0.0}


def test_examples_have_found_photos_on_the_left_and_others_on_the_right(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "read_image", lambda path, size: str(path))
    monkeypatch.setattr(figures, "rotate", lambda image, degrees: f"{image} by {degrees}")
    monkeypatch.setattr(figures.pictures, "predictions_figure", lambda rows, size: shown.extend(rows))
    found = {("Alps", f"q{k}"): [("a.jpg", 90, k % 3 == 0), ("b.jpg", 0, True)] for k in range(12)}
    figures.examples_picture(Path("root"), found, 3, 0)
    assert [entries[0][1] for _, entries, _ in shown] == [True, False] * 3
    assert shown[0][1] == [("root/a.jpg by 90", True), ("root/b.jpg by 0", True)]
    assert len({query for query, _, _ in shown}) == 6 and shown[0][2] == "Alps"


def weights(path, seed=0):
    import torch

    torch.manual_seed(seed)
    save_safetensors(EarthLoc(ModelConfig("resnet18", "layer2", "none", "gem", 64, 32)), path)
    return str(path)


def test_all_figures_of_an_evaluation(own_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos = Catalogue.read(own_world.path, "queries")
    argv = ["--resume", weights("m.safetensors"), "--dataset_path", str(own_world.path), "--log_dir", "e", *FLAGS]
    evaluation.main(evaluation.parse_arguments(argv))
    (folder,) = Path("logs/e").iterdir()
    common = [str(folder), "--device", "cpu", "--points", "6", "--examples", "2"]
    made = call(figures.main, [*common, "--only", "conditions"])
    told = capsys.readouterr().out
    assert "Tilt or clouds are not known" in told and "tilt, degrees" not in told
    narrow = Image.open(made["conditions"]).width
    write_conditions(own_world.path, {photo: (row, 10 * row) for row, photo in enumerate(photos.ids)})
    made = call(figures.main, common)
    told = capsys.readouterr().out
    assert list(made) == list(figures.FIGURES)
    assert all(np.ptp(np.asarray(Image.open(path).convert("L"))) > 50 for path in made.values())
    assert Image.open(made["conditions"]).width > 1.8 * narrow
    results = json.loads((folder / "results.json").read_text())["sets"]
    photos = sum(results[name]["queries"] for name in results if name != "Texas-validation")
    right = sum(
        results[name]["queries"] * results[name]["recalls"]["1"] / 100 for name in results if name != "Texas-validation"
    )
    assert told.startswith(f"{photos} photos of {own_world.path}, 1 seed: R@1 {100 * right / photos:.1f}\n")
    assert "| tilt, degrees | photos | R@1 |" in told and f"| 0 to 9 | {photos} |" in told


def test_without_a_checkpoint_tsne_is_left_out(tmp_path, monkeypatch, capsys):
    folder = write_predictions(tmp_path / "one", {"@".join(["", *"11223344", "a", "20200101", *"0000", ".jpg"]): True})
    made = call(figures.main, [str(folder), "--only", "tsne", "map"])
    assert list(made) == ["map"] and "--resume names one" in capsys.readouterr().out


def test_table4_evaluates_each_once_and_prints_the_paper_beside(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*(weights(f"{seed}.safetensors", seed) for seed in (0, 1)), "--dataset_path", str(world.path), *FLAGS]
    call(table4.main, argv)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["none", "none, paper", "4x90", "4x90, paper"]
    assert rows[1][1:] == "32.6 30.9 31.1 30.4 27.2 39.1 31.9".split() and rows[3][-1] == "54.1"
    assert rows[0][4] == "-"  # no photo of the Gobi Desert
    for row, way in ((rows[0], "none"), (rows[2], "4x90")):
        found = [json.loads(path.read_text()) for path in Path("logs/table4", way).glob("*/results.json")]
        assert len(found) == 2 and len(found[0]["rotations"]) == (1 if way == "none" else 4)
        values = [each["sets"]["Alps"]["recalls"]["1"] for each in found]
        spread = abs(values[0] - values[1]) / 2**0.5
        assert row[2] == f"{sum(values) / 2:.1f} ± {spread:.1f}"

    monkeypatch.setattr(runs.evaluation, "main", None)
    call(table4.main, argv)
    assert "| 4x90, paper |" in capsys.readouterr().out


def evaluations(monkeypatch, fingerprint):
    """-> the (dataset, tta) that are evaluated from now on, by a stand-in whose results tell what fingerprint(weights)
    gives."""
    asked = []

    def evaluate(args):
        asked.append((args.dataset_path, args.tta))
        folder = make_log_dir(args.log_dir)
        (folder / "config.json").write_text(json.dumps(vars(args)))
        results = {"dataset": args.dataset_path, "number": len(asked)} | fingerprint(args.resume)
        (folder / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(runs.evaluation, "main", evaluate)
    return asked


def of_weights(path):
    return {"fingerprint": weights_fingerprint(load_model(path))}


def test_results_of_another_data_set_or_other_flags_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = evaluations(monkeypatch, of_weights)
    model = weights("m.safetensors")
    for dataset, *flags in (["one"], ["two"], ["one/"], ["one", "--tta", "none"], ["two", "--batch_size", "7"]):
        results, _ = runs.evaluated(model, "x", "--dataset_path", dataset, *flags)
        assert results["dataset"] == dataset.strip("/")
    assert asked == [("one", "4x90"), ("two", "4x90"), ("one", "none")]


def test_results_of_weights_that_were_there_before_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = evaluations(monkeypatch, of_weights)
    for seed, number in ((0, 1), (0, 1), (1, 2), (0, 1), (1, 2)):
        results, _ = runs.evaluated(weights("m.safetensors", seed), "x", "--dataset_path", "one")
        assert results["number"] == number
    assert len(asked) == 2


def test_results_that_do_not_tell_their_weights_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluations(monkeypatch, lambda path: {})
    model = weights("m.safetensors")
    with pytest.raises(RuntimeError, match="x: the evaluation of m.safetensors left no results.json"):
        runs.evaluated(model, "x", "--dataset_path", "one")  # as an older version left them
    asked = evaluations(monkeypatch, of_weights)
    for _ in range(2):
        assert runs.evaluated(model, "x", "--dataset_path", "one")[0]["number"] == len(asked) == 1


def test_a_training_is_done_again_only_where_what_changes_it_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def launch(_, args):
        args.processes = 1  # as the trainer does
        folder = make_log_dir(args.log_dir)
        known = vars(args) if args.pair_iou != 0.2 else vars(args).keys() - {"pair_iou"}  # of a version without it
        (folder / "config.json").write_text(json.dumps({name: vars(args)[name] for name in known}))
        if args.iterations != 13:  # one that was stopped
            (folder / "done").touch()
        return folder

    monkeypatch.setattr(runs.train, "launch", launch)
    trained = lambda *flags: runs.trained(runs.train.parse_arguments([*flags, "--log_dir", "t"]))
    one = trained("--dataset_path", "one")
    assert trained("--dataset_path", "./one", "--num_workers", "7", "--save_every", "3") == one
    assert capsys.readouterr().out == ""
    two = trained("--dataset_path", "two")
    assert capsys.readouterr().out == f"{one}: not what is asked for, --dataset_path differs\n"
    flags = "--seed", "--margin", "--pair_iou", "--gem_grid"
    others = [trained("--dataset_path", "one", flag, "7") for flag in flags]
    assert len({one, two, *others}) == 6
    assert trained("--dataset_path", "one") == one and trained("--dataset_path", "two") == two
    stopped = trained("--dataset_path", "one", "--iterations", "13")
    assert trained("--dataset_path", "one", "--iterations", "13") != stopped
    (one / "config.json").unlink()
    assert trained("--dataset_path", "one") != one


def test_table2_has_our_lines_under_the_papers(tmp_path, capsys):
    for method, told, r1, tta in (
        ("cosplace", "w", 5, "4x90"),
        ("megaloc", "w", 60, "none"),
        ("cosplace", "w", 6, "4x90"),
    ):
        line = dict.fromkeys(FIELDS, "") | {"method": method, "weights": told, "dataset": "data", "tta": tta}
        append_line(tmp_path / "r.csv", line | {"Alps R@1": str(r1), "Alps R@10": "7.25", "Alps R@100": "8"})
    call(table2.main, [str(tmp_path / "r.csv")])
    rows = capsys.readouterr().out.strip().splitlines()
    assert rows[0] == "data" and rows[2].startswith("| method | Texas | Alps |")
    where = rows.index(next(row for row in rows if row.startswith("| cosplace (paper)")))
    assert rows[where].split("|")[3].strip() == "5.9 / 19.3 / 45.2"
    assert rows[where + 1] == "| cosplace, w | - / - / - | 6.0 / 7.2 / 8.0 |" + " - / - / - |" * 4
    assert rows[where + 2].startswith("| mixvpr (paper)") and rows[-1].startswith("| megaloc, w, tta none |")
    with pytest.raises(ValueError, match="--dataset other.*there are data"):
        call(table2.main, [str(tmp_path / "r.csv"), "--dataset", "other"])


@pytest.mark.skipif(not PAPER, reason="shared/ is not there")
def test_the_papers_numbers_are_the_papers():
    text = PAPER[0].read_text().replace("<u>", "").replace("</u>", "")
    lines = [line.split("\t") for line in text.splitlines()]
    numbers = [" ".join(cell for cell in cells if cell.strip("0123456789.") in ("", "-")) for cells in lines]
    for method, row in table2.PAPER.items():
        if method == "EarthLoc, Table 3":
            (full,) = (each for each in numbers if each.endswith("57.1 88.9"))
            assert full.split()[:12] == [value for value in row.split() if value != "-"]
        else:
            assert row.replace(" -", "") in [each.replace(" -", "").removeprefix("- ") for each in numbers], method
    for row in table4.PAPER.values():
        assert " ".join(map(str, row)) in numbers
