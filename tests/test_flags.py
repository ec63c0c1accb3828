"""Flags out of a main's annotated parameters, and what every command of experiments/ and benchmarks/ takes."""

import importlib
import inspect
from pathlib import Path
from typing import Annotated, Literal

import pytest

from utils.flags import OTHERS, call, command, parse

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = ["datasets.overlap", "retrieval.earth_index"] + [
    f"{folder}.{path.stem}"
    for folder in ("experiments", "benchmarks")
    for path in sorted((REPOSITORY / folder).glob("*.py"))
    if "\n    command(main)\n" in path.read_text()
]


def source(*, table: Annotated[Path, "a file"], depth: Annotated[int, "how deep"] = 2):
    return table, depth


def main(
    names: Annotated[list[str], "some"],
    size: Annotated[tuple[float, float] | None, "width and height"] = None,
    kind: Annotated[Literal["a", "b"], "which"] = "a",
    quick: Annotated[bool, "not whole"] = False,
    word: Annotated[str, "under another name", {"option": "--other", "metavar": "WORD"}] = "x",
    private: int = 7,
    **more: Annotated[object, source],
):
    return names, size, kind, quick, word, private, more


def test_parameters_are_flags_of_their_kind():
    found = call(main, "n m --size 2 3.5 --kind b --quick --other y --table t.csv".split())
    assert found == (["n", "m"], [2, 3.5], "b", True, "y", 7, {"table": Path("t.csv"), "depth": 2})
    assert call(main, "n --table t".split()) == (["n"], None, "a", False, "x", 7, {"table": Path("t"), "depth": 2})


@pytest.mark.parametrize("words", ["n", "--table t", "n --table t --kind c", "n --table t --private 3", "n --size 2"])
def test_what_does_not_fit_ends_the_command(words, capsys):
    with pytest.raises(SystemExit) as end:
        call(main, words.split())
    assert end.value.code == 2 and "usage" in capsys.readouterr().err


def test_flags_of_another_command_are_handed_on():
    def trains(others: Annotated[list[str], OTHERS], seeds: Annotated[list[int], "of runs"] = (0,)):
        return others, seeds

    assert call(trains, "--lr 1 --seeds 2 3 --deep".split()) == (["--lr", "1", "--deep"], [2, 3])
    assert call(trains, []) == ([], (0,))


def test_an_expected_error_is_one_line_unless_its_traceback_is_wanted(monkeypatch, capsys):
    def fails():
        raise ValueError("no such thing")

    monkeypatch.setattr("sys.argv", ["fails"])
    with pytest.raises(SystemExit) as end:
        command(fails)
    assert end.value.code == 2 and capsys.readouterr().err == "error: no such thing\n"
    monkeypatch.setattr("sys.argv", ["fails", "--traceback"])
    with pytest.raises(ValueError, match="no such thing"):
        command(fails)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_lists_its_flags(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        parse(module.main, ["--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0 and "--traceback" in told
    assert module.__doc__.split()[0] in told
    parameters = inspect.signature(module.main).parameters
    flags = [each for each in parameters.values() if each.default is not each.empty or each.kind is each.KEYWORD_ONLY]
    words = ["format" if each.name == "formats" else each.name for each in flags]
    assert [word for word in words if f"--{word} " not in told.replace("\n", " ")] == []
