"""How probable it is that a registered place is right, and from where on it counts as verified."""

import numpy as np

VERIFIED = 0.5


def features(registration):
    """Registration -> (F,) float64: what speaks for and against it."""
    r = registration
    return np.array(
        [
            np.log(r.inliers),
            np.log(r.inliers / r.matches),
            np.log(r.spread + 1e-3),
            np.log(min(r.moved, 1) + 1e-3),
            np.log(r.stretch),
            np.log(r.slant),
        ]
    )


def probability(registration):
    return 0.0 if registration is None else float(registration.inliers >= 30)
