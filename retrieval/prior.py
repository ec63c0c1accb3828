"""Where a photo is likely to show before it is looked at: near the point below the camera.

Photos show ground up to 2,500 km from their nadir (paper, eq. 1), but half of the public ones within 323 km. By Bayes'
rule log p(place | photo, nadir) is log p(photo | place) + log p(place | nadir) up to a constant; a score, divided by
its spread over the places in reach, stands for the first. The paper's evaluation knows no nadir and has none of this.
"""

import numpy as np
from numpy.typing import ArrayLike

from datasets.nadirs import DISTANCE_SHARES, DISTANCES_KM
from utils import geo

PRIORS = ("archive", "uniform")
PRIOR_HELP = (
    "how far from the nadir photos look; archive: as the public ones, half within 323 km; uniform: any distance"
)
FARTHEST_KM = 2500
ANYWHERE = 0.05  # so many photos are taken to show any ground in reach: the public ones are those that could be placed
SPREADS = 0.43  # of the scores that a step of e in probability is worth: python -m experiments.nadir_prior


def _rings() -> tuple[np.ndarray, np.ndarray]:
    """-> mean radius (K,) km of rings around the nadir, log density (K,) per km² against the innermost."""
    edges = np.array([0, *DISTANCES_KM[1:], FARTHEST_KM])
    cap = lambda km: 2 * np.pi * geo.EARTH_RADIUS_KM**2 * (1 - np.cos(km / geo.EARTH_RADIUS_KM))
    shares = np.append(np.diff(DISTANCE_SHARES), 0)
    density = (1 - ANYWHERE) * shares / np.diff(cap(edges)) + ANYWHERE / cap(FARTHEST_KM)
    return (edges[1:] + edges[:-1]) / 2, np.log(density / density[0])


_RADII, _LOGS = _rings()


def log_prior(distances_km: ArrayLike) -> np.ndarray:
    """(…) km from the nadir to a place's centre -> (…) log density per km² against that right below, 0 or less."""
    return np.interp(distances_km, _RADII, _LOGS)


def weigh(
    scores: np.ndarray,
    rows: np.ndarray,
    rotations: np.ndarray,
    log_priors: np.ndarray,
    k: int,
    spreads: float = SPREADS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scores, rows, rotations (Q, R) of all places in reach, row -1 where there is none; log_priors (N,) by row -> the
    k that are most likely, (Q, min(k, R)) each. Scores stay what they were, so they need not fall any more."""
    there = rows >= 0
    spread = np.std(scores, axis=1, keepdims=True, where=there)
    likely = np.where(there, scores + spreads * spread * log_priors[rows], -np.inf)
    order = np.argsort(-likely, axis=1, kind="stable")[:, :k]
    return tuple(np.take_along_axis(each, order, axis=1) for each in (scores, rows, rotations))
