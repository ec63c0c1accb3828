"""Texts in an array read like lists."""

import numpy as np
import pytest

from utils.strings import Strings, base_names, find

TEXTS = ["b", "", "Zürich/a@1", "b", "a" * 30]


def test_they_read_like_a_list():
    strings = Strings(TEXTS)
    assert list(strings) == TEXTS and len(strings) == 5 and strings == TEXTS and strings == tuple(TEXTS)
    assert [strings[i] for i in range(-5, 5)] == TEXTS + TEXTS and strings[np.int64(2)] == TEXTS[2]
    assert strings[1:3] == TEXTS[1:3] and strings[[4, 0]] == [TEXTS[4], "b"]
    assert strings[np.array([True] * 5)] == strings
    assert "b" in strings and "c" not in strings and 3 not in strings
    assert strings != TEXTS[:4] and strings != TEXTS[::-1] and not strings == "b"
    with pytest.raises(IndexError):
        strings[5]


def test_none_and_many():
    assert list(Strings()) == [] == Strings([]) and Strings() == Strings([])
    many = [str(i) for i in range(10_000)]
    assert list(Strings(many)) == many


def test_tuples():
    table = Strings(Strings(TEXTS).array[[[0, 2], [4, 1]]])
    assert table == [("b", TEXTS[2]), (TEXTS[4], "")] and table[1] == (TEXTS[4], "")
    assert table[:, [1, 1]][0] == (TEXTS[2],) * 2 and list(table[[1]]) == [(TEXTS[4], "")]


def test_find_gives_the_last_of_equals():
    assert find(Strings(TEXTS), Strings(["a", "b", "", "zz", "a" * 30, "a" * 31])).tolist() == [-1, 3, 1, -1, 4, -1]
    assert find(Strings(), Strings(["a"])).tolist() == [-1] and find(Strings(["a"]), Strings()).tolist() == []


def test_base_names():
    assert base_names(Strings(["a/b/c.jpg", "d.jpg", "e/"])) == ["c.jpg", "d.jpg", ""]


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="float64"):
        Strings(np.zeros(3))
