"""Log folders and what the first lines say."""

import argparse
import json
import logging
import re
from datetime import datetime

from utils import logs
from utils.logs import make_log_dir, setup_logging


def test_folder_is_named_by_experiment_and_time(tmp_path):
    folder = make_log_dir("mine", tmp_path)
    assert folder.is_dir() and folder.parent == tmp_path / "mine"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    """As many as show whether the newest is the last by name."""

    class Stopped(datetime):
        now = classmethod(lambda cls: cls(2026, 1, 2, 3, 4, 5))

    monkeypatch.setattr(logs, "datetime", Stopped)
    made = [make_log_dir("mine", tmp_path).name for _ in range(13)]
    assert len(set(made)) == 13 and made == sorted(made) and made[0] == "2026-01-02_03-04-05"


def test_info_and_debug_logs_and_the_configuration(tmp_path, capsys):
    args = argparse.Namespace(lr=0.5, path=tmp_path)
    setup_logging(tmp_path, args)
    logging.info("for all")
    logging.debug("for the curious")
    info, debug = (tmp_path / "info.log").read_text(), (tmp_path / "debug.log").read_text()
    assert "for all" in info and "for all" in debug
    assert "for the curious" in debug and "for the curious" not in info
    out = capsys.readouterr().out
    assert "for all" in out and "for the curious" not in out
    lines = info.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d   ", line) for line in lines)
    assert "python" in lines[0] and "'lr': 0.5" in lines[1] and lines[2].endswith(f"The outputs are in {tmp_path}")
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.5, "path": str(tmp_path)}


def test_a_second_run_writes_to_its_own_file_only(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        setup_logging(tmp_path / name, argparse.Namespace())
        logging.info(f"this is the {name}")
    assert "the second" not in (tmp_path / "first" / "info.log").read_text()
    assert (tmp_path / "second" / "info.log").read_text().count("this is the second") == 1
