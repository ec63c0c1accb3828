"""How probable it is that a registered place is right, and from where on it counts as verified.

A logistic regression on what the matcher found, fitted to synthetic photos, on none of the real ones:

    python -m experiments.confidence --raster august.tif --months months/ --register sift xfeat --photos 200 --keep fit/

The wrong places that it learns from had not to be found again in the ground drawn anew, which a registration has to:
so it is careful. Of 600 false candidates none came out with SIFT, so both are set against XFeat's wrong ones. ALIKED
and DISK have XFeat's numbers, as LightGlue matches them, too.
"""

import numpy as np

VERIFIED = 0.9  # a place is given to the user as sure from here on

FEATURES = ("inliers", "spread", "bent")
# matcher: intercept, and a coefficient a feature.
COEFFICIENTS = {"sift": (-2.57, 2.71, 0.81, -2.90), "xfeat": (-0.84, 1.71, 0.97, -1.78)}
COEFFICIENTS |= {"aliked": COEFFICIENTS["xfeat"], "disk": COEFFICIENTS["xfeat"]}


def features(registration) -> np.ndarray:
    """Registration -> (3,) float64: logarithms of the inliers, of the share of the photo that they cover, and of how
    far the footprint is from a photo straight from above: stretch times slant."""
    found = registration
    return np.log([found.inliers, found.spread + 1e-3, found.stretch * found.slant])


def probability(registration) -> float:
    """Registration, or None -> the probability in [0, 1] that the photo was taken there; 0 where there is none."""
    if registration is None:
        return 0.0
    intercept, *coefficients = COEFFICIENTS[registration.matcher]
    return float(1 / (1 + np.exp(-(intercept + features(registration) @ coefficients))))
