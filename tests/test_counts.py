"""What an iteration asks of the host stays little."""

import pytest
import torch

from benchmarks import counts
from benchmarks.pretend_gpu import GPU, pretended_gpu

BOUNDS = {"paper.args": 330, "paper.args with weather": 480, "paper.args, --augmentation image": 400}


@pytest.mark.parametrize("name", BOUNDS)
def test_augmentation_asks_little_and_waits_for_nothing(name):
    found = counts.asked({name: counts.BATCHES[name]})
    operations, *rest = found[f"augmentation, {name}"]
    assert 100 < operations < BOUNDS[name] and rest == [0, 1, 0]
    assert found["labels and neutral pairs"][1:] == (0, 1, 0) and found["labels and neutral pairs"][0] < 50


def test_the_number_of_images_does_not_matter():
    """As GeoCLIP's 512 images, each with a draw, a turn and a mirror of its own; but for runs of one kind."""
    trainer, flags = counts.BATCHES["geoclip.args, 512 images"]
    many, few = (
        counts.asked({"": (trainer, [*flags, "--batch_size", str(size)])})["augmentation, "] for size in (512, 128)
    )
    assert many[0] < 650 and abs(many[0] - few[0]) < 100 and many[1:] == few[1:] == (0, 1, 0)


def test_updates_are_counted_on_the_cpu():
    found = counts.updates()
    assert 500 < min(found.values()) and max(found.values()) < 1000


def test_waits_and_copies_are_counted():
    with pretended_gpu() as gpu:
        torch.ones(3).to(GPU)
        torch.ones(3, device=GPU).sum().item()
        assert counts.seen(gpu)[1:] == (1, 1, 2)  # one that blocks, out of memory that is not page-locked
