"""Texts in an array read like lists; tables come back from their files as they were, or not at all."""

import numpy as np
import pyarrow as pa
import pytest

from utils.tables import Damaged, Strings, base_names, find, opened, read_rows, store

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
    table = Strings(TEXTS)[np.array([[0, 2], [4, 1]])]
    assert table == [("b", TEXTS[2]), (TEXTS[4], "")] and table[1] == (TEXTS[4], "")
    assert table[:, [1, 1]][0] == (TEXTS[2],) * 2 and list(table[[1]]) == [(TEXTS[4], "")]


def test_find_gives_the_last_of_equals():
    assert find(Strings(TEXTS), Strings(["a", "b", "", "zz", "a" * 30, "a" * 31])).tolist() == [-1, 3, 1, -1, 4, -1]
    assert find(Strings(), Strings(["a"])).tolist() == [-1] and find(Strings(["a"]), Strings()).tolist() == []


def test_base_names():
    assert base_names(pa.array([b"a/b/c.jpg", b"d.jpg", b"e/", b"f\n/\xff\n"])).to_pylist() == [
        b"c.jpg",
        b"d.jpg",
        b"",
        b"\xff\n",
    ]


def test_what_is_stored_comes_back_by_rows(tmp_path):
    parts = [pa.table({"n": list(range(k, k + 3)), "text": [f"{each}" for each in range(3)]}) for k in (0, 3, 6)]
    assert opened(tmp_path / "t") is None
    assert store(tmp_path / "t", parts, {"a": [1, "\udcff"]})
    file, state = opened(tmp_path / "t")
    assert state == {"a": [1, "\udcff"]}
    for start in range(10):
        for count in range(10 - start):
            assert read_rows(file, ["n"], start, count)["n"].to_pylist() == list(range(start, min(start + count, 9)))
    assert read_rows(file, ["text", "n"]).to_pydict() == {"text": [b"0", b"1", b"2"] * 3, "n": list(range(9))}
    with pytest.raises(Damaged, match="gone"):
        read_rows(file, ["n", "gone"])


def test_another_state_is_damage(tmp_path):
    store(tmp_path / "t", [pa.table({"n": [1]})], {"a": 1})
    data = (tmp_path / "t").read_bytes()
    assert data.count(b'{"a": 1}') == 1
    (tmp_path / "t").write_bytes(data.replace(b'{"a": 1}', b'{"a": 2}'))
    with pytest.raises(Damaged, match="wrong checksum"):
        opened(tmp_path / "t")
