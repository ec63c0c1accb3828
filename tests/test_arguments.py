"""Flags files, and the model's flags."""

import argparse
from pathlib import Path

import pytest

import eval
import train
import train_geoclip
from augmentations.year_wise import Augmentation
from losses.multi_similarity import MultiSimilarityLoss
from models.config import ModelConfig, model_config
from utils.arguments import run
from utils.settings import chosen_settings, settings_of

REPOSITORY = Path(__file__).resolve().parents[1]
PRESETS = sorted((REPOSITORY / "presets").glob("*.args"))
GEOCLIP = [path for path in PRESETS if path.name.startswith("geoclip")]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("preset", [path.name for path in PRESETS if path not in GEOCLIP])
def test_presets_parse_and_describe_a_model(preset):
    assert isinstance(model_config(train.parse_arguments([f"@presets/{preset}"])), ModelConfig)


@pytest.mark.parametrize("preset", [path.name for path in GEOCLIP])
def test_presets_of_geoclip_parse(preset):
    args = train_geoclip.parse_arguments([f"@presets/{preset}"])
    assert Augmentation(96, args.augmentation, **chosen_settings(args, Augmentation)).size == 96 and args.queue_size > 0


def test_augmentation_flags_reach_the_augmentation():
    args = train.parse_arguments(
        [
            "--rotation",
            "1",
            "--hue",
            "0.2",
            "--clouds",
            "0.3",
            "--haze",
            "0.4",
            "--exposure",
            "0.5",
            "--aspect",
            "1.1",
            "--min_crop",
            "0.6",
            "--perspective",
            "0.1",
            "--brightness",
            "0.7",
            "--contrast",
            "0.8",
            "--saturation",
            "0.9",
        ]
    )
    assert Augmentation(64, args.augmentation, **chosen_settings(args, Augmentation)) == Augmentation(
        64, "year", 1.0, 0.1, 0.6, 1.1, 0.7, 0.8, 0.9, 0.2, 0.3, 0.4, 0.5
    )


def test_the_papers_preset_is_the_default_recipe():
    paper, default = vars(train.parse_arguments(["@presets/paper.args"])), vars(train.parse_arguments([]))
    # Spelled out where the default is None, which means the same.
    spelled = {"log_dir", "cut_after", "freeze_until", *settings_of(MultiSimilarityLoss)}
    assert {key for key in paper if paper[key] != default[key]} <= spelled
    paper, default = (chosen_settings(argparse.Namespace(**each), MultiSimilarityLoss) for each in (paper, default))
    assert paper == default == {"alpha": 1, "beta": 50, "base": 0, "epsilon": 0.1, "neutral_filter": "before"}


def test_the_demo_alone_zooms_in():
    for preset, least in (("paper", 1.0), ("released", 1.0), ("demo", 0.7), ("demo_long", 0.7)):
        assert train.parse_arguments([f"@presets/{preset}.args"]).min_crop == least
    assert Augmentation(32).min_crop == 1.0  # what the other ways to get one have


def test_a_preset_can_build_on_another_and_later_flags_win():
    released = train.parse_arguments(["@presets/released.args", "--lr", "0.5"])
    assert (released.batch_size, released.iterations, released.num_clusters) == (96, 10_000, 50)
    assert (released.descriptor_dim, released.lr, released.log_dir) == (4096, 0.5, "released")
    assert (released.cluster_draw, released.neutral_filter) == ("uniform", "after")


def test_frozen_batchnorm_is_the_papers_or_the_released_codes():
    found = {
        preset: model_config(train.parse_arguments([f"@presets/{preset}.args"])).frozen_batchnorm
        for preset in ("paper", "released")
    }
    assert found == {"paper": "fixed", "released": "adapt"}


def test_comments_quotes_and_empty_lines(tmp_path):
    (tmp_path / "mine.args").write_text("# all of it\n\n--lr 0.25 --seed 3  # why\n--log_dir 'a b'\n")
    args = train.parse_arguments([f"@{tmp_path / 'mine.args'}", "--seed", "4"])
    assert (args.lr, args.seed, args.log_dir) == (0.25, 4, "a b")


def test_a_missing_flags_file_and_a_wrong_flag_stop(tmp_path, capsys):
    for argv in ([f"@{tmp_path / 'none.args'}"], ["--augmentation", "month"], ["--no_such_flag"]):
        with pytest.raises(SystemExit) as stop:
            train.parse_arguments(argv)
        assert stop.value.code == 2
    assert "none.args" in capsys.readouterr().err


def test_default_model_is_the_papers():
    config = model_config(train.parse_arguments([]))
    assert config == ModelConfig()
    assert model_config(eval.parse_arguments(["--dataset_path", "data"])) == config


def test_expected_errors_are_one_line(capsys):
    def fails(args):
        raise ValueError("file.jpg: is broken; mend it")

    args = train.parse_arguments([])
    with pytest.raises(SystemExit) as stop:
        run(fails, args)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: file.jpg: is broken; mend it\n"
    args.traceback = True
    with pytest.raises(ValueError):
        run(fails, args)


@pytest.mark.parametrize(
    "flags, wrong",
    [
        (["--batch_size", "0"], "argument --batch_size: 0 is less than 1"),
        (["--num_workers", "-1"], "argument --num_workers: -1 is less than 0"),
        (["--image_size", "big"], "argument --image_size: 'big' is no integer"),
    ],
)
def test_impossible_numbers_are_refused_at_once(flags, wrong, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(flags)
    assert wrong in capsys.readouterr().err
