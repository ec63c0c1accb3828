"""retrieval/pose.py: the camera above a known nadir that sees points where a photo shows them."""

import cv2
import numpy as np
import pytest

from datasets.build.camera import Camera, footprint, ground_points
from experiments.registration import iou
from retrieval.homographies import corners_of, project
from retrieval.pose import footprint_by_pose
from utils import geo

SIZE = (512, 512)  # a 3:2 photo, squashed


def points_of(camera, low, high, noise=0.7, count=60, seed=0):
    """Points in a part of the photo, shares low to high of its sides, with noise in pixels -> (N, 2), (N, 2)."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(low, high, (count, 2))
    return places * SIZE + rng.normal(size=places.shape) * noise, ground_points(camera, *places.T)


def by_homography(here, there):
    """Least squares in Web Mercator -> footprint."""
    flat = geo.to_mercator(geo.unwrap_footprints(there))
    middle, scale = flat.mean(axis=0), 500
    found, _ = cv2.findHomography(here, (flat - middle) / scale * [1, -1], 0)
    return geo.from_mercator(project(found, corners_of(SIZE)) * [scale, -scale] + middle)


@pytest.mark.parametrize("tilt", [5, 30, 50])
def test_the_footprint_of_a_camera_is_found_from_a_corner_of_its_photo(tilt):
    camera = Camera((-20.03, 179.54), 421.0, tilt, 75.0, 33.0, 120.0)
    nadir, truth = (-20.0, 179.5), footprint(camera)  # the nadir rounded, as names have it
    pose, homography = [], []
    for seed in range(5):
        here, there = points_of(camera, 0.6, 0.95, count=30, noise=1, seed=seed)
        guess = by_homography(here, there)
        found, off = footprint_by_pose(here, there, SIZE, nadir, guess)
        pose.append(iou(truth, found))
        homography.append(iou(truth, guess))
        assert off.shape == (30,) and np.median(off) < 1.6
    assert min(pose) > 0.95 and np.mean(pose) > np.mean(homography)
    # All of the photo: nothing is lost.
    here, there = points_of(camera, 0, 1)
    assert iou(truth, footprint_by_pose(here, there, SIZE, nadir, by_homography(here, there))[0]) > 0.99


def test_a_crop_is_seen_by_its_residuals():
    camera = Camera((20.0, 10.0), 415.0, 45.0, 75.0, 180.0, 35.0)
    here, there = points_of(camera, 0.0, 0.4, noise=0.2, count=150)
    whole, off_whole = footprint_by_pose(here, there, SIZE, camera.nadir, footprint(camera))
    crop = here / 0.4  # as if that corner were the photo
    found, off_crop = footprint_by_pose(crop, there, SIZE, camera.nadir, by_homography(crop, there))
    assert iou(footprint(camera), whole) > 0.99
    assert np.median(off_whole) < 0.4 and np.median(off_crop) > 2 * np.median(off_whole) / 0.4


def test_too_few_points_say_nothing():
    camera = Camera((20.0, 10.0), 415.0, 20.0, 75.0, 33.0, 100.0)
    here, there = points_of(camera, 0, 1, count=8)
    assert footprint_by_pose(here, there, SIZE, camera.nadir, footprint(camera)) is None
