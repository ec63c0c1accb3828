"""The file of results and its table."""

from types import SimpleNamespace

import pytest

from experiments import leaderboard as script
from retrieval.leaderboard import FIELDS, append_line, leaderboard, read_lines, result_line
from utils.flags import call

AVERAGE = {1: 12.344, 5: 20.0, 10: 30.5, 20: 40.0, 100: 90.0}


def evaluation():
    one = lambda name, recalls: SimpleNamespace(set=SimpleNamespace(name=name), recalls=recalls)
    return SimpleNamespace(
        average=lambda: AVERAGE, test_results=[one("Texas", AVERAGE), one("Toshka Lakes", {1: 1.0, 10: 2.0, 100: 3.0})]
    )


def line(method, r1, date="2026-01-01 00:00:00", dataset="data", weights="w"):
    return dict.fromkeys(FIELDS, "") | {
        "date": date,
        "method": method,
        "weights": weights,
        "dataset": dataset,
        "tta": "4x90",
        "average R@1": str(r1),
        "average R@10": "50",
        "average R@100": "75.25",
        "Alps R@1": "7.77",
        "Alps R@10": "8",
        "Alps R@100": "9",
    }


def test_lines_come_back_as_they_were_added(tmp_path):
    told = {"method": "a, b", "weights": 'say "x"', "dataset": "d\nd", "tta": "none", "command": "python eval.py 'a b'"}
    append_line(tmp_path / "new" / "r.csv", result_line(evaluation(), **told))
    append_line(tmp_path / "new" / "r.csv", result_line(evaluation(), **told | {"method": "second"}))
    first, second = read_lines(tmp_path / "new" / "r.csv")
    assert first["method"] == "a, b" and second["method"] == "second" and first["weights"] == 'say "x"'
    assert first["dataset"] == "d d" and first["command"] == told["command"] and len(first["date"]) == 19
    assert first["average R@1"] == "12.34" and first["Texas R@10"] == "30.50" and first["Toshka Lakes R@100"] == "3.00"
    assert first["Gobi Desert R@1"] == "" and (tmp_path / "new" / "r.csv").read_text().count("\n") == 3


def test_another_file_is_not_written_to(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="--results .*other.csv"):
        append_line(other, result_line(evaluation()))
    assert other.read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="other.csv"):
        read_lines(other)
    with pytest.raises(FileNotFoundError, match="none.csv.*eval.py --results"):
        read_lines(tmp_path / "none.csv")


def test_the_table_has_the_best_first_and_the_newest_of_each(tmp_path, capsys):
    for each in (
        line("worse", 10),
        line("better", 99, "2026-01-01 00:00:00"),
        line("better", 20, "2026-01-02 00:00:00"),
        line("other|data", 1, dataset="another"),
        line("worse", 5, weights="other weights"),
    ):
        append_line(tmp_path / "r.csv", each)
    call(script.main, [str(tmp_path / "r.csv")])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| data set | method | weights | tta | Alps | average | date |" and rows[1].count("---") == 7
    assert rows[2].startswith("| another | other\\|data | w |")
    assert rows[3] == "| data | better | w | 4x90 | 7.8 / 8.0 / 9.0 | 20.0 / 50.0 / 75.2 | 2026-01-02 |"
    assert [row.split(" | ")[2] for row in rows[4:]] == ["w", "other weights"]
    assert leaderboard([]).count("\n") == 1
