"""How probable it is that a registered place is right, and from where on it counts as verified.

A logistic regression on what the matcher found, fitted to synthetic photos, on none of the real ones:

    python -m experiments.confidence --raster august.tif --months months/ --register sift --photos 200 --keep fit/
    python -m experiments.confidence --raster august.tif --months months/ --register sift xfeat --photos 145 --keep fit/

94 right places by SIFT and 29 by XFeat are set against the 29 wrong ones that XFeat found; SIFT found none in 600 false
candidates. The wrong ones had not to be found again in the ground drawn anew, which a registration has to: so it is
careful. ALIKED and DISK have XFeat's numbers, as LightGlue matches them, too.

For vismatch's matchers nothing is fitted: they get the least of the others' probabilities, and are never verified.
RoMa, for one, draws its 2,048 matches from any two pictures, so that inliers say less there than these numbers suppose.
To fit one: `--register vismatch:NAME` above; the last line that it prints goes into COEFFICIENTS.

Each fifth of the photos judged by a fit to the others: what is said to be right with 0.99 is right for all of 86 places
(SIFT) and 26 (XFeat); Brier scores 0.018 and 0.032. From 0.9 on count as verified 86 of 94 and 26 of 29 right places,
and no wrong one of 1,035 false candidates; from 0.5 on there would be one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from retrieval.registration import Registration

VERIFIED = 0.9  # a place is given to the user as sure from here on: fewer than 1 in 1,000 false candidates get there

FEATURES = ("inliers", "spread", "bent")
# matcher: intercept, and a coefficient a feature.
COEFFICIENTS = {"sift": (-5.03, 3.07, 0.53, -2.43), "xfeat": (-3.13, 2.03, 0.72, -1.38)}
COEFFICIENTS |= {"aliked": COEFFICIENTS["xfeat"], "disk": COEFFICIENTS["xfeat"]}
UNFITTED = 0.89  # at most, by a matcher without coefficients: below VERIFIED, as its false places are not counted


def features(registration: Registration) -> np.ndarray:
    """Registration -> (3,) float64: logarithms of the inliers, of the share of the photo that they cover, and of how
    far the footprint is from a photo straight from above: stretch times slant."""
    found = registration
    return np.log([found.inliers, found.spread + 1e-3, found.stretch * found.slant])


def probability(registration: Registration | None) -> float:
    """Registration, or None -> the probability in [0, 1] that the photo was taken there; 0 where there is none."""
    if registration is None:
        return 0.0
    values = features(registration)
    if registration.matcher in COEFFICIENTS:
        return logistic(values, *COEFFICIENTS[registration.matcher])
    return min(UNFITTED, *(logistic(values, *each) for each in COEFFICIENTS.values()))


def logistic(values: np.ndarray, intercept: float, *coefficients: float) -> float:
    """(F,), and a coefficient each -> the probability."""
    return float(1 / (1 + np.exp(-(intercept + values @ coefficients))))
