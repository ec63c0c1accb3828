"""The schedule of batches, and the loader that serves them."""

import multiprocessing
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets.batches import BatchLoader, pool_note, random_clusters, schedule, spread
from datasets.images import read_image
from datasets.regions import RegionDataset, Regions
from datasets.training import serve_period

CLUSTERS = [np.arange(0, 10), np.arange(10, 17), np.arange(17, 40), np.arange(40, 44)]


def test_a_loader_serves_what_is_scheduled(world):
    regions, _ = Regions.read(world.path)
    loader = BatchLoader(RegionDataset(regions, 8), 0)
    for batches in (np.array([[3, 1], [7, 0]]), np.array([[5, 6]])):
        served = list(loader.serve(batches))
        assert [rows.tolist() for rows, _, _ in served] == batches.tolist()
        assert served[0][1].shape == (2, 4, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_the_images_as_they_were_decoded(world, workers):
    regions, _ = Regions.read(world.path)
    batches = BatchLoader(RegionDataset(regions, 40), workers).serve(np.array([[3, 1], [7, 3]]))
    for rows, images, errors in batches:
        assert not errors and images.dtype == torch.uint8 and images.permute(0, 1, 3, 4, 2).is_contiguous()
        for row, years in zip(rows.tolist(), images):
            for path, image in zip(regions.paths[row], years):
                assert torch.equal(image, read_image(regions.root / path, 40))


@pytest.mark.parametrize("workers", [0, 2])
def test_slots_are_used_again_when_their_batch_is_over(world, workers):
    regions, _ = Regions.read(world.path)
    scheduled = np.random.default_rng(0).integers(0, len(regions), (20, 3))
    with closing(BatchLoader(RegionDataset(regions, 16), workers)) as loader:
        for batches in (scheduled, scheduled[5:15], scheduled[:, :2]):  # the last one needs slots of another size
            places, before = [], None
            for wanted, (rows, images, _) in zip(batches, loader.serve(batches)):
                assert rows.tolist() == wanted.tolist()
                expected = torch.stack([RegionDataset(regions, 16)[row][1] for row in wanted])
                assert torch.equal(images, expected)
                if before is not None:  # still whole, for a copy that is under way
                    assert torch.equal(before[0], before[1])
                before = images, expected
                places.append(images.data_ptr())
            slots = 2 * workers + 2
            assert len(set(places)) == min(slots, len(batches)) and places[slots:] == places[:-slots]


def test_a_place_that_cannot_be_filled_leaves_the_others(own_world):
    regions, _ = Regions.read(own_world.path)
    for path in regions.paths[2]:
        (regions.root / path).unlink()
    ((rows, images, errors),) = BatchLoader(RegionDataset(regions, 16), 0).serve(np.array([[1, 2, 3]]))
    assert rows.tolist() == [1, -1, 3] and len(errors) == 1
    assert all(torch.equal(images[place], RegionDataset(regions, 16)[row][1]) for place, row in ((0, 1), (2, 3)))


def test_closing_ends_the_workers_whoever_holds_their_batches(world):
    regions, _ = Regions.read(world.path)
    before = set(multiprocessing.active_children())
    loader = BatchLoader(RegionDataset(regions, 16), 2)
    served = loader.serve(np.zeros((50, 2), dtype=np.int64))
    next(served)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    loader.close()
    assert not any(each.is_alive() for each in workers)
    loader.close()  # once more does no harm


def test_the_pool_is_pinned_for_a_gpu_and_unpinned_at_the_end(world, monkeypatch):
    pinned, answer = {}, 0

    class Driver:
        def cudaHostRegister(self, pointer, count, flags):
            pinned[pointer] = count
            return answer

        def cudaHostUnregister(self, pointer):
            del pinned[pointer]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() in pinned)
    regions, _ = Regions.read(world.path)
    on_cpu = BatchLoader(RegionDataset(regions, 16), 0)
    assert len(list(on_cpu.serve(np.array([[1, 2, 3]])))) == 1 and not pinned  # a GPU that is there, but not used
    on_cpu.close()
    loader = BatchLoader(RegionDataset(regions, 16), 0, "cuda:0")
    for batch in ([[1, 2, 3]], [[1, 2, 3]], [[1, 2]]):
        ((_, images, _),) = loader.serve(np.array(batch))
        ((pointer, count),) = pinned.items()
        assert pointer <= images.data_ptr() and images.data_ptr() + images.nbytes <= pointer + count
    loader.close()
    assert not pinned
    answer = 2
    with pytest.raises(RuntimeError, match=r"page-locked \(CUDA error 2\).*--num_workers"):
        BatchLoader(RegionDataset(regions, 16), 0, "cuda").serve(np.array([[1, 2]]))


PAPER = 32, (4, 512, 512, 3)  # a batch: 32 × 4 × 512 × 512 × 3 = 100,663,296 bytes


def test_the_pools_size_is_told():
    assert pool_note(*PAPER, 4, None) == "Batches: 10 of 100.7 MB each, 1007 MB of shared memory"
    assert pool_note(*PAPER, 0, 0) == "Batches: 2 of 100.7 MB each, 201 MB of memory"  # the main process needs none


def test_too_little_shared_memory_is_an_error_that_says_what_fits():
    with pytest.raises(
        ValueError, match=r"needs?.* 1007 MB of shared memory, /dev/shm has 64 MB .*--shm-size 3g"
    ) as no:
        pool_note(*PAPER, 4, 64_000_000)
    assert "--num_workers 0 (the main process decodes" in str(no.value) and "--source_size (now 512)" in str(no.value)
    told = set()
    for free in range(350_000_000, 1_100_000_000, 10_000_000):
        try:
            pool_note(*PAPER, 4, free)
            assert free > 10 * 100_663_296
        except ValueError as error:
            fitting = int(str(error).split("or --num_workers ")[1].split()[0].rstrip(","))
            told.add(fitting)
            taken = [(2 * workers + 2) * 100_663_296 for workers in (fitting, fitting + 1)]
            assert (not fitting or taken[0] < free) and taken[1] + 1_000_000 > free
    assert told == {0, 1, 2, 3}


def test_the_room_is_looked_at_before_the_pool_is_taken(world, monkeypatch):
    regions, _ = Regions.read(world.path)
    monkeypatch.setattr("datasets.batches.free_shared_memory", lambda: 20_000)
    loader = BatchLoader(RegionDataset(regions, 16), 1)
    with pytest.raises(ValueError, match="--shm-size"):
        loader.serve(np.array([[1, 2]]))
    assert loader.pool is None
    assert len(list(BatchLoader(RegionDataset(regions, 16), 0).serve(np.array([[1, 2]])))) == 1


def test_each_batch_is_of_one_cluster_without_repeats():
    owner = np.concatenate([np.full(len(rows), k) for k, rows in enumerate(CLUSTERS)])
    batches = schedule(CLUSTERS, 4, 500, 0)
    assert batches.shape == (500, 4)
    assert all(len(set(batch)) == 4 and len(set(owner[batch])) == 1 for batch in batches.tolist())


def test_no_two_batches_in_a_row_share_a_cluster():
    owner = np.concatenate([np.full(len(rows), k) for k, rows in enumerate(CLUSTERS)])
    for batch_size in (2, 3, 4):  # at 4 the third cluster alone would fill 5 of 9 batches
        for seed in range(20):
            clusters = owner[schedule(CLUSTERS, batch_size, 300, seed)[:, 0]]
            assert (clusters[1:] != clusters[:-1]).all()
    clusters = schedule([np.arange(4), np.arange(4, 100)], 4, 300, 0)[:, 0] >= 4
    assert (clusters[1:] != clusters[:-1]).all()


def test_the_schedule_is_a_function_of_the_seed():
    assert np.array_equal(schedule(CLUSTERS, 4, 50, [1, 2, 3]), schedule(CLUSTERS, 4, 50, [1, 2, 3]))
    assert not np.array_equal(schedule(CLUSTERS, 4, 50, [1, 2, 3]), schedule(CLUSTERS, 4, 50, [1, 2, 4]))
    np.random.seed(0)
    torch.manual_seed(0)
    first = schedule(CLUSTERS, 4, 50, 7)
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(first, schedule(CLUSTERS, 4, 50, 7))
    assert np.array_equal(first[:20], schedule(CLUSTERS, 4, 20, 7))


def shares(draw, count=4000):
    """How often each cluster comes up in a schedule of batches of 4 -> (4,)."""
    owner = np.concatenate([np.full(len(rows), k) for k, rows in enumerate(CLUSTERS)])
    return np.bincount(owner[schedule(CLUSTERS, 4, count, 0, draw)[:, 0]], minlength=4) / count


def test_clusters_are_drawn_by_size_or_all_alike():
    # A pass holds 2, 1, 5 and 1 batches, of which the third cluster gives 4, as many as the others together.
    assert shares("size") == pytest.approx([2 / 8, 1 / 8, 4 / 8, 1 / 8], abs=0.01)
    assert shares("uniform") == pytest.approx([1 / 4] * 4, abs=0.03)  # a spread of 0.007 for each


def test_a_uniform_draw_takes_regions_of_one_cluster_each_once_whatever_came_before():
    owner = np.concatenate([np.full(len(rows), k) for k, rows in enumerate(CLUSTERS)])
    batches = schedule(CLUSTERS, 4, 1000, 0, "uniform")
    assert batches.shape == (1000, 4) and set(batches.ravel().tolist()) == set(range(44))
    assert all(len(set(batch)) == 4 and len(set(owner[batch])) == 1 for batch in batches.tolist())
    clusters = owner[batches[:, 0]]
    assert 0.2 < (clusters[1:] == clusters[:-1]).mean() < 0.3  # independent: a quarter
    assert np.array_equal(batches, schedule(CLUSTERS, 4, 1000, 0, "uniform"))
    assert not np.array_equal(batches, schedule(CLUSTERS, 4, 1000, 1, "uniform"))


@pytest.mark.parametrize("draw", ["size", "uniform"])
def test_cluster_draw_reaches_the_schedule_of_training(draw):
    loader = SimpleNamespace(serve=lambda batches, spares: batches)
    served = serve_period(loader, CLUSTERS, 4, 0, 5000, 30, 3, slice(1, 3), draw)
    assert np.array_equal(served, schedule(CLUSTERS, 4, 30, [3, 2, 0], draw)[:, 1:3])


def test_every_region_comes_up():
    assert set(schedule(CLUSTERS, 4, 200, 0).ravel().tolist()) == set(range(44))


def test_one_cluster_still_makes_batches():
    batches = schedule([np.arange(9)], 4, 10, 0)
    assert batches.shape == (10, 4) and all(len(set(batch)) == 4 for batch in batches.tolist())


def test_a_cluster_smaller_than_a_batch_is_an_error():
    for draw in ("size", "uniform"):
        with pytest.raises(ValueError, match="--batch_size 5.*only 4"):
            schedule(CLUSTERS, 5, 10, 0, draw)


def test_spread_keeps_all_positions_and_separates_equal_labels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels = rng.integers(0, 4, 12).tolist()
        order = spread(labels, rng, last=2)
        assert sorted(order) == list(range(12))
        if max(labels.count(k) + (k == 2) for k in range(4)) <= 6:
            walk = [2] + [labels[k] for k in order]
            assert all(a != b for a, b in zip(walk, walk[1:])), labels


def test_random_clusters_split_all_regions():
    clusters = random_clusters(50, 6, 8, 0)
    assert sorted(np.concatenate(clusters).tolist()) == list(range(50)) and min(map(len, clusters)) >= 8
    assert len(random_clusters(50, 6, 20, 0)) == 2
    assert len(random_clusters(5, 6, 20, 0)) == 1
