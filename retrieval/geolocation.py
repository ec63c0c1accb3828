"""Photos -> embeddings -> the nearest coordinates of a gallery -> distances and shares within 2500 … 1 km."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torchvision.transforms import functional as transforms
from tqdm import tqdm

from datasets.images import read_image
from retrieval.describe import Failures, ImageFiles, batches_of, evaluating, through
from retrieval.store import model_fingerprint
from utils import geo
from utils.files import replacing
from utils.precision import autocast

THRESHOLDS_KM = (2500, 750, 200, 25, 1)  # continent, country, region, city, street (paper, sec. 4)
CROPS = ("one", "ten", "turns")


def read_photo(path: str | Path, size: int, fit: str, upright: bool = False) -> Tensor:
    """File -> uint8 (3, size, size): fit "squash" (EarthLoc), or "crop": short side to size, then the middle (CLIP).
    upright: as a viewer shows it (EXIF), see read_image."""
    if fit == "squash":
        return read_image(path, size, upright)
    # Through PIL, as CLIP was trained: torchvision's resize of a tensor is off by up to 13 grey levels at edges.
    image = transforms.to_pil_image(read_image(path, upright=upright))
    image = transforms.resize(image, size, transforms.InterpolationMode.BICUBIC)
    return transforms.pil_to_tensor(transforms.center_crop(image, [size, size]))


class PhotoFiles(ImageFiles):
    """As ImageFiles, each photo made to fit: see `read_photo`."""

    def __init__(self, paths: Sequence[str | Path], size: int, fit: str, upright: bool = False) -> None:
        super().__init__(paths, size, upright)
        self.fit = fit

    def read(self, path: str) -> Tensor:
        return read_photo(path, self.size, self.fit, self.upright)


def views_of(images: Tensor, size: int, crops: str) -> list[Tensor]:
    """(B, 3, H, W) -> list of (B, 3, size, size) that are embedded and averaged.

    "ten": four corners and the middle, mirrored as well (paper's ten-crop). "turns": four rotations, for photos from
    orbit, which have no up and must not be mirrored.
    """
    if crops == "ten":
        return list(transforms.ten_crop(images, [size, size]))
    if crops == "turns":
        return [torch.rot90(images, turn, dims=(-2, -1)) for turn in range(4)]
    return [images]


def embed_photos(
    model: nn.Module,
    paths: Sequence[str | Path],
    batch_size: int = 32,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    crops: str = "one",
    progress: bool = True,
    upright: bool = False,
) -> tuple[np.ndarray, Failures]:
    """Image files -> embeddings (N, 512) float32, NaN rows for failures, and failures.

    crops: see `views_of`; the views' embeddings are averaged, which averages their logits. upright: see `read_photo`.
    """
    if crops not in CROPS:
        raise ValueError(f"--crops {crops}: choose one of {', '.join(CROPS)}")
    size = model.image_encoder.image_size
    margin = round(size * 8 / 7) if crops == "ten" else size  # 256 for crops of 224

    def forward(images: Tensor):
        views = views_of(images, size, crops)
        with autocast(device, precision):
            return sum(model.embed_images(view) for view in views) / len(views)

    files = PhotoFiles(paths, margin, model.image_encoder.fit, upright)
    batches = batches_of(np.arange(len(paths)), batch_size)
    embeddings, failures = np.full((len(paths), 512), np.nan, dtype=np.float32), []
    with evaluating(model):
        for rows, found, failed in through(
            forward, files, batches, num_workers, device, "embedding photos" if progress else ""
        ):
            embeddings[rows] = found
            failures += failed
    return embeddings, failures


@torch.inference_mode()
def embed_gallery(
    location_encoder: nn.Module,
    points: np.ndarray,
    device: str | torch.device = "cpu",
    block: int = 4096,
    progress: bool = True,
) -> np.ndarray:
    """(N, 2) degrees -> (N, 512) float32 of unit length. Some 100,000 points take most of a minute on two cores."""
    if not len(points):
        raise ValueError("the gallery is empty: no coordinates to choose from")
    parts = []
    for start in tqdm(range(0, len(points), block), desc="embedding gallery", disable=not progress, leave=False):
        part = torch.as_tensor(np.asarray(points[start : start + block]), dtype=torch.float32, device=device)
        parts.append(torch.nn.functional.normalize(location_encoder(part), dim=1).cpu().numpy())
    return np.concatenate(parts)


def cached_gallery(
    location_encoder: nn.Module,
    points: np.ndarray,
    cache_dir: str | Path | None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> np.ndarray:
    """As `embed_gallery`, kept in cache_dir/{digest of weights and points}.npy; None: not kept. A damaged file is made
    again."""
    if cache_dir is None:
        return embed_gallery(location_encoder, points, device, progress=progress)
    digest = hashlib.sha256(model_fingerprint(location_encoder, 0, "fp32").encode())
    digest.update(np.asarray(points, dtype=np.float32).tobytes())
    path = Path(cache_dir) / f"{digest.hexdigest()[:32]}.npy"
    if path.is_file():
        try:
            embeddings = np.load(path, allow_pickle=False)
            if embeddings.shape == (len(points), 512) and embeddings.dtype == np.float32:
                return embeddings
        except (ValueError, OSError, EOFError):
            pass
        logging.warning(f"{path}: damaged, the gallery is embedded again")
    embeddings = embed_gallery(location_encoder, points, device, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.save(file, embeddings)
    return embeddings


def check_top_k(top_k: int, size: int) -> None:
    """ValueError where top_k places cannot be picked from a gallery of that size: to be called before long work."""
    if not 1 <= top_k <= size:
        raise ValueError(f"--top_k {top_k}: must be between 1 and the gallery's {size} points")


def locate(
    embeddings: np.ndarray,
    gallery: np.ndarray,
    scale: float,
    top_k: int = 1,
    bias: Callable[[slice], np.ndarray] | None = None,
    block: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Photo embeddings (Q, 512), gallery embeddings (N, 512), scale -> rows (Q, k) of the gallery and probabilities.

    Probabilities are a softmax over the whole gallery, best first. bias: function of a slice of photos -> (q, N), added
    to the logits: log of what is known beforehand, such as the nadir. Raises ValueError on NaN embeddings, and where
    top_k is larger than the gallery.
    """
    check_top_k(top_k, len(gallery))
    if not np.isfinite(embeddings).all():
        raise ValueError(
            f"{int((~np.isfinite(embeddings).all(axis=1)).sum())} photos have no finite embedding: leave "
            "out those that could not be read"
        )
    gallery = torch.as_tensor(gallery)
    rows = np.zeros((len(embeddings), top_k), dtype=np.int64)
    probabilities = np.zeros((len(embeddings), top_k), dtype=np.float32)
    for start in range(0, len(embeddings), block):
        part = slice(start, min(start + block, len(embeddings)))
        logits = scale * (torch.as_tensor(embeddings[part]) @ gallery.T)
        if bias is not None:
            logits = logits + torch.as_tensor(bias(part), dtype=torch.float32)
        best, where = logits.softmax(dim=1).topk(top_k, dim=1)
        rows[part], probabilities[part] = where.numpy(), best.numpy()
    return rows, probabilities


def nadir_bias(nadirs: np.ndarray, points: np.ndarray, radius_km: float) -> Callable[[slice], np.ndarray]:
    """For `locate`: only points within radius_km of the photo's nadir. (Q, 2), (N, 2) degrees -> function.

    A photo with no such point keeps all of them.
    """
    nadir_vectors, vectors = geo.to_unit_vectors(nadirs), geo.to_unit_vectors(points)
    limit = np.cos(min(radius_km / geo.EARTH_RADIUS_KM, np.pi))

    def bias(part: slice):
        far = nadir_vectors[part] @ vectors.T < limit
        far[far.all(axis=1)] = False
        return np.where(far, -np.inf, 0)

    return bias


def accuracy(distances_km: ArrayLike, thresholds: Sequence[float] = THRESHOLDS_KM) -> dict[float, float]:
    """(Q,) km -> {km: percent of photos not farther off}. Raises ValueError on no photos or NaN."""
    distances_km = np.asarray(distances_km, dtype=np.float64)
    if not len(distances_km):
        raise ValueError("accuracy over no photos: were all of them left out?")
    if not np.isfinite(distances_km).all():
        raise ValueError("accuracy: a distance is not a number")
    return {km: 100 * float((distances_km <= km).mean()) for km in thresholds}


def accuracy_lines(distances_km: ArrayLike, thresholds: Sequence[float] = THRESHOLDS_KM) -> list[str]:
    """The log's lines, as their readers parse them: `Accuracy at 2500 km: 67.77`; then the median."""
    lines = [f"Accuracy at {km:g} km: {share:.2f}" for km, share in accuracy(distances_km, thresholds).items()]
    return lines + [f"Median error: {np.median(distances_km):.1f} km"]


def mean_point(points: np.ndarray) -> np.ndarray:
    """(N, 2) degrees -> (2,): the point nearest to all on the sphere, in the sense of the mean unit vector."""
    return geo.from_unit_vectors(geo.to_unit_vectors(points).mean(axis=0))
