"""How probable it is that a registered place is right, and from where on it counts as verified.

A logistic function of what the matcher found. experiments/confidence.py fits one a matcher to synthetic photos; its
numbers are not in yet. Until then all have the same plain ones, which are not calibrated: a place is verified where
inliers × their share of the matches × the share of the photo that they cover / its obliquity is 13.4 or more, which is
careful: true places may stay unverified.
"""

import numpy as np

# A place is given to the user as sure from here on. False places that pass the geometry have up to some 20 inliers.
VERIFIED = 0.99

FEATURES = ("inliers", "spread", "bent")
# matcher: intercept, and a coefficient a feature.
COEFFICIENTS = {
    "sift": (2.0, 1.0, 1.0, 1.0, -1.0),
    "xfeat": (2.0, 1.0, 1.0, 1.0, -1.0),
    "aliked": (2.0, 1.0, 1.0, 1.0, -1.0),
    "disk": (2.0, 1.0, 1.0, 1.0, -1.0),
}


def features(registration) -> np.ndarray:
    """Registration -> (3,) float64: logarithms of the inliers, of the share of the photo that they cover, and of how far
    the footprint is from a photo straight from above: stretch times slant."""
    found = registration
    return np.log([found.inliers, found.spread + 1e-3, found.stretch * found.slant])


def probability(registration) -> float:
    """Registration, or None -> the probability in [0, 1] that the photo was taken there; 0 where there is none."""
    if registration is None:
        return 0.0
    intercept, *coefficients = COEFFICIENTS[registration.matcher]
    return float(1 / (1 + np.exp(-(intercept + features(registration) @ coefficients))))
