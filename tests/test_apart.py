"""The locator's own process: what happens to it, and what the page says of it.

The process imports this file, so what it does not need is imported where it is used.
"""

import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from web.apart import NICE, Apart

ENDINGS = {"killed": signal.SIGKILL, "crashed": signal.SIGSEGV}


def make(failure=""):
    if failure:
        raise FileNotFoundError(failure)
    return locate, "2 places"


def locate(file, nadir):
    if nadir in ENDINGS:
        os.kill(os.getpid(), ENDINGS[nadir])
    if nadir == "broken":
        raise ValueError(f"{file}: cannot be read")
    return os.getpid(), os.nice(0), (file, nadir)


def test_questions_are_answered_by_one_other_process():
    with Apart(make) as make_locate:
        ask, text = make_locate()
        first, second = ask("a", None), ask("b", (1, 2))
        assert text == "2 places" and first[2] == ("a", None) and second[2] == ("b", (1, 2))
        assert first[0] == second[0] != os.getpid()
        assert first[1] - os.nice(0) == NICE
    assert not make_locate.process.is_alive()


def test_an_error_is_told_and_costs_nothing():
    with Apart(make) as make_locate:
        ask, _ = make_locate()
        before = ask("a", None)
        with pytest.raises(RuntimeError, match="^b: cannot be read$"):
            ask("b", "broken")
        assert ask("c", None)[0] == before[0]


def test_what_cannot_be_loaded_is_told():
    with Apart(partial(make, "weights.pt: no such file")) as make_locate:
        with pytest.raises(RuntimeError, match="^weights.pt: no such file$"):
            make_locate()


@pytest.mark.parametrize(("how", "told"), [("killed", "SIGKILL; too little memory"), ("crashed", "SIGSEGV")])
def test_the_next_question_after_its_end_gets_a_new_process(how, told):
    with Apart(make) as make_locate:
        ask, _ = make_locate()
        before = ask("a", None)
        with pytest.raises(RuntimeError, match=f"the process that locates ended .{told}"):
            ask("b", how)
        after = ask("c", None)
        assert after[0] != before[0] and after[2] == ("c", None)


def test_it_ends_with_the_page():
    apart = Apart(make)
    apart()
    apart.pipe.close()  # as the system does when the page's process ends, however that is
    apart.process.join(30)
    assert apart.process.exitcode == 0


def test_a_photo_that_ends_it_fails_and_the_desk_goes_on(tmp_path):
    from PIL import Image

    from web.desk import Desk

    with Apart(make) as make_locate:
        ended, free = threading.Event(), threading.Event()

        def load():
            ask, text = make_locate()

            def one(file: Path, nadir):
                if not ended.is_set():
                    ended.set()
                    ask(str(file), "killed")
                ask(str(file), None)
                free.set()
                return [], "nothing there", nadir

            return one, text

        with Desk(tmp_path / "desk", load) as desk:
            for name in ("a.png", "b.png"):
                folder = desk.place_for_upload()
                Image.new("RGB", (8, 8)).save(folder / "photo", "PNG")
                desk.add(folder, name)
            desk.queue.join()
            first, second = desk.listed()
            assert "ended (SIGKILL" in first["error"] and second["error"] == "nothing there" and free.is_set()
