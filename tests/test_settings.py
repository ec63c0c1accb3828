"""Settings of classes as flags."""

from typing import Annotated, Literal

import pytest

from utils.arguments import make_parser
from utils.settings import add_settings, chosen_settings, make, settings_of


class Short:
    def __init__(self, channels, *, depth: Annotated[int, "mixers"] = 4, plain: int = 3):
        pass


class Long:
    def __init__(
        self, channels, depth: Annotated[int, "blocks"] = 2, power: Annotated[float | None, "exponent"] = None
    ):
        pass


def parsed(*flags):
    parser = make_parser("")
    add_settings(parser, {"short": Short, "long": Long})
    return parser.parse_args(flags), parser


def test_annotated_keywords_are_settings():
    assert settings_of(Short) == {"depth": (int, 4, "mixers")}
    assert settings_of(Long) == {"depth": (int, 2, "blocks"), "power": (float, None, "exponent")}


def test_each_class_has_its_default_and_takes_what_is_given():
    args, parser = parsed()
    assert chosen_settings(args, Short) == {"depth": 4} and chosen_settings(args, Long) == {"depth": 2, "power": None}
    args, _ = parsed("--depth", "0", "--power", "0")
    assert chosen_settings(args, Short) == {"depth": 0} and chosen_settings(args, Long) == {"depth": 0, "power": 0.0}
    told = " ".join(parser.format_help().split())
    assert "short: mixers (default: 4); long: blocks (default: 2)" in told and "default: None" not in told
    assert args.depth == 0 and parsed()[0].depth is None  # shared: each class has its own default


def test_a_setting_of_one_class_shows_its_default_and_another_can_be_given():
    parser = make_parser("")
    add_settings(parser, {"short": Short}, depth=7)
    assert parser.parse_args([]).depth == 7 and chosen_settings(parser.parse_args([]), Short) == {"depth": 7}
    assert "mixers (default: 7)" in " ".join(parser.format_help().split())


def test_a_setting_has_one_type():
    class Other:
        def __init__(self, depth: Annotated[float, "share"] = 0.5):
            pass

    with pytest.raises(TypeError, match="--depth is .*int.* for one class and .*float.* for Other"):
        add_settings(make_parser(""), {"short": Short, "other": Other})


def test_a_setting_may_be_a_choice(capsys):
    class Picky:
        def __init__(self, when: Annotated[Literal["before", "after"], "the mining"] = "before"):
            self.when = when

    parser = make_parser("")
    add_settings(parser, {"picky": Picky})
    assert chosen_settings(parser.parse_args(["--when", "after"]), Picky) == {"when": "after"}
    with pytest.raises(SystemExit):
        parser.parse_args(["--when", "never"])
    assert "invalid choice: 'never'" in capsys.readouterr().err


def test_make_gives_what_is_taken():
    class Takes:
        def __init__(self, regions, depth: Annotated[int, "mixers"] = 4):
            self.regions, self.depth = regions, depth

    made = make(Takes, {"depth": 2}, regions=7, descriptor_dim=512)
    assert (made.regions, made.depth) == (7, 2)
