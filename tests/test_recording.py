"""The real loops of train.py and train_geoclip.py, recorded: what each iteration did against what it should have."""

import copy
import math
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
import train_geoclip
from augmentations.year_wise import Augmentation
from datasets.images import read_image
from datasets.names import ImageName
from losses.multi_similarity import MultiSimilarityLoss
from models.earthloc import EarthLoc

SYSTEM = "--num_workers 0 --device cpu --log_dir r --image_size 32 --weights none --cut_after layer2".split()
MODEL = "--backbone resnet18 --aggregator gem --descriptor_dim 32 --batch_size 4 --num_clusters 3".split()
WHITENED = (
    "--iterations 6 --recluster_every 3 --precision fp32 --lr 0.01 --lr_schedule cosine --warmup 3 "
    "--fc_init whitening --fc_regulariser 0 --fc_std 2"
).split()
RANDOM = "--iterations 4 --recluster_every 2 --precision bf16 --batches random --lr 0.01 --warmup 2".split()
GEOCLIP = (
    "--image_encoder resnet18 --precision fp32 --sigmas 1 16 --iterations 4 --batch_size 8 --queue_size 20 "
    "--validate_every 4 --lr 1e-3 --lr_step 2 --lr_gamma 0.5 --weight_decay 0.125 --noise_batch 0 --noise_queue 0"
).split()


def averages(model):
    """Copies of all BatchNorms' buffers."""
    return [
        each.clone() for module in model.modules() if isinstance(module, nn.BatchNorm2d) for each in module.buffers()
    ]


def recorded(world, folder, flags):
    """-> what a run of train.py did, in lists that are filled in its order."""
    seen = SimpleNamespace(
        augmented=[], updates=[], clusters=[], losses=[], groups=[], gathered=[], passes=[], fc=[], conv=[]
    )

    def wrap(patch, owner, name, after):
        """after(result, *its arguments) is told of each call."""
        function = getattr(owner, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            after(result, *args, **kwargs)
            return result

        patch.setattr(owner, name, call)

    def describe(model, regions):
        """(R, 32) descriptors of the last year, one image at a time, of a copy of the model."""
        model = copy.deepcopy(model).eval()
        images = [read_image(file, 32) for file in regions.files(2021)]
        with torch.no_grad():
            return torch.cat([model(each[None].float() / 255) for each in images]).numpy()

    def keep_start(run, args, regions, *_):
        seen.regions = regions
        run.model.fc.register_forward_hook(lambda _, given, out: seen.fc.append((given[0].dtype, out.dtype)))
        first = next(module for module in run.model.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(lambda _, given, out: seen.conv.append((run.model.training, out.dtype)))

    class RecordingAugmentation(Augmentation):
        def __call__(self, images, generator, *part):
            seen.augmented.append(SimpleNamespace(seed=generator.initial_seed(), images=images.clone()))
            seen.augmented[-1].views = super().__call__(images, generator, *part)
            return seen.augmented[-1].views

    def recording_whiten(model, *args):
        before = averages(model), model.fc.weight.clone()
        whiten(model, *args)
        after = averages(model), model.fc.weight.clone()
        seen.whitening = SimpleNamespace(before=before, after=after, fc=copy.deepcopy(model.fc), passes=seen.passes[:])
        seen.augmented.clear()

    def recording_update(run, views, labels, neutral, *rest):
        seen.updates.append(SimpleNamespace(views=views, labels=labels, fc=run.model.fc.weight.detach().clone()))
        return update(run, views, labels, neutral, *rest)

    def recording_clusters(describer, regions, *args):
        rows, shares = make_clusters(describer, regions, *args)
        if len(rows) > 1:
            seen.clusters.append(SimpleNamespace(descriptors=describe(describer.model, regions), rows=rows))
        return rows, shares

    whiten, update, make_clusters = (train.whiten, train.update, train.make_clusters)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.groups.append(optimizer.param_groups[0]["lr"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "Augmentation", RecordingAugmentation)
        patch.setattr(train, "whiten", recording_whiten)
        patch.setattr(train, "update", recording_update)
        patch.setattr(train, "make_clusters", recording_clusters)
        wrap(patch, train, "start", keep_start)
        wrap(
            patch,
            EarthLoc,
            "aggregate",
            lambda out, model, _: seen.passes.append(([module.training for module in model.modules()], out)),
        )
        wrap(
            patch,
            MultiSimilarityLoss,
            "forward",
            lambda _, loss, descriptors, labels, neutral: seen.losses.append((descriptors, labels, neutral)),
        )
        wrap(patch, train.distributed, "gather", lambda _, values: seen.gathered.append(values.dtype))
        try:
            train.main(train.parse_arguments(["--dataset_path", str(world.path), *SYSTEM, *MODEL, *flags]))
        finally:
            hook.remove()
    return seen


@pytest.fixture(scope="module")
def whitened(world, tmp_path_factory):
    return recorded(world, tmp_path_factory.mktemp("whitened"), WHITENED)


@pytest.fixture(scope="module")
def random_batches(world, tmp_path_factory):
    return recorded(world, tmp_path_factory.mktemp("random"), RANDOM)


def rows_of(update):
    return update.labels[::4].tolist()


def test_images_views_and_labels_belong_together(whitened):
    assert len(whitened.updates) == len(whitened.augmented) == 6
    for update, augmented in zip(whitened.updates, whitened.augmented):
        assert update.labels.tolist() == [row for row in rows_of(update) for _ in range(4)]
        assert torch.equal(update.views, augmented.views.flatten(0, 1))
        for images, row in zip(augmented.images, rows_of(update)):
            for image, year in zip(images, (2018, 2019, 2020, 2021)):
                file = whitened.regions.files(year)[row]
                assert torch.equal(image, read_image(file, image.shape[-1]))


def test_the_neutral_mask_of_the_batch_reaches_the_loss(whitened):
    kinds = set()
    tiles = [tuple(map(int, ImageName.parse(file.name).image_id.split("_"))) for file in whitened.regions.files(2021)]
    assert len(whitened.losses) == 6
    for update, (_, labels, neutral) in zip(whitened.updates, whitened.losses):
        assert torch.equal(labels, update.labels) and neutral.shape == (16, 16)
        for i, a in enumerate(labels.tolist()):
            for j, b in enumerate(labels.tolist()):
                # Regions are four tiles wide: nearer than that, they share ground.
                near = all(abs(x - y) < 4 for x, y in zip(tiles[a][1:], tiles[b][1:]))
                assert neutral[i, j].item() == (a != b and near)
                kinds.add((a == b, near))
    assert kinds == {(True, True), (False, True), (False, False)}


def test_cosine_with_warm_up_at_each_step_of_the_optimizer(whitened):
    expected = [0.01 * min(1, (i + 1) / 3) * math.cos(math.pi * i / 12) ** 2 for i in range(6)]
    assert whitened.groups == pytest.approx(expected)


def test_constant_with_warm_up_at_each_step_of_the_optimizer(random_batches):
    assert random_batches.groups == pytest.approx([0.005, 0.01, 0.01, 0.01])


def test_batches_are_of_one_cluster(whitened):
    first, second = whitened.clusters
    for number, update in enumerate(whitened.updates):
        rows = set(rows_of(update))
        assert len(rows) == 4
        assert any(rows <= set(cluster.tolist()) for cluster in (first, second)[number // 3].rows)


def groups_of(descriptors, seed):
    """faiss's k-means with three centres -> a label a row."""
    means = faiss.Kmeans(descriptors.shape[1], 3, niter=20, seed=seed, min_points_per_centroid=1)
    means.train(descriptors)
    return means.index.search(descriptors, 1)[1][:, 0]


def whole(labels, clusters):
    """Whether each group of labels lies in one cluster: small groups may have been merged."""
    return all(
        sum(bool(set(np.flatnonzero(labels == label)) & set(rows.tolist())) for rows in clusters) == 1
        for label in set(labels.tolist())
    )


def test_clusters_are_random_then_those_of_the_current_model(whitened):
    first, second = whitened.clusters
    for clusters in (first.rows, second.rows):
        assert sorted(np.concatenate(clusters).tolist()) == list(range(24))
    assert [len(rows) for rows in first.rows] == [8, 8, 8]
    assert not whole(groups_of(first.descriptors, 0), first.rows)
    assert len(second.rows) > 1
    labels = groups_of(second.descriptors, 1)
    assert whole(labels, second.rows)
    assert not np.allclose(first.descriptors, second.descriptors, atol=1e-3)
    assert not whole(groups_of(first.descriptors, 1), second.rows)  # a model of earlier would be noticed


def test_schedules_differ_from_period_to_period(random_batches):
    rows = [rows_of(update) for update in random_batches.updates]
    assert len(rows) == 4 and rows[:2] != rows[2:]


@pytest.mark.parametrize("run", ["whitened", "random_batches"])
def test_augmentation_seeds_differ_from_iteration_to_iteration(run, request):
    augmented = request.getfixturevalue(run).augmented
    assert len({each.seed for each in augmented}) == len(augmented) >= 4


def test_whitening_whitens_in_trainings_mode_and_moves_no_average(whitened):
    done = whitened.whitening
    assert not torch.equal(done.before[1], done.after[1])
    assert torch.equal(whitened.updates[0].fc, done.after[1])  # training starts from it
    assert all(map(torch.equal, done.before[0], done.after[0]))
    assert len(done.passes) == 6 and all(all(modes) for modes, _ in done.passes)
    features = torch.cat([features for _, features in done.passes]).double()
    outputs = features @ done.fc.weight.double().T + done.fc.bias.double()
    assert outputs.mean(0).abs().max() < 1e-2
    torch.testing.assert_close(torch.cov(outputs.T), 4 * torch.eye(32, dtype=torch.float64), atol=0.04, rtol=0)


def test_the_last_layer_and_the_gather_are_in_float32_under_bf16(random_batches):
    assert {dtype for training, dtype in random_batches.conv if training} == {torch.bfloat16}
    assert set(random_batches.fc) == {(torch.float32, torch.float32)}
    assert {each for each in random_batches.gathered if each.is_floating_point} == {torch.float32}
    assert {descriptors.dtype for descriptors, *_ in random_batches.losses} == {torch.float32}


@pytest.fixture(scope="module")
def geoclip(world, tmp_path_factory):
    """What a run of train_geoclip.py did."""
    seen = SimpleNamespace(updates=[], groups=[], rows=[])
    start, update, note = train_geoclip.start, train_geoclip.update, train_geoclip.note_unreadable

    def recording_start(args, training, *rest):
        run = start(args, training, *rest)
        seen.training, seen.queue = training, run.memory["queue"].copy()
        with torch.no_grad():
            run.model.logit_scale.fill_(math.log(100) + 1)
        return run

    def recording_update(run, lr, views, points, candidates, *rest):
        result = update(run, lr, views, points, candidates, *rest)
        scale = run.model.logit_scale.item()
        seen.updates.append(SimpleNamespace(points=points, candidates=candidates, scale=scale))
        return result

    def recording_note(rows, *rest):
        seen.rows.append(rows.tolist())
        return note(rows, *rest)

    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.groups.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("geoclip"))
        patch.setattr(train_geoclip, "start", recording_start)
        patch.setattr(train_geoclip, "update", recording_update)
        patch.setattr(train_geoclip, "note_unreadable", recording_note)
        try:
            train_geoclip.main(train_geoclip.parse_arguments(["--dataset_path", str(world.path), *SYSTEM, *GEOCLIP]))
        finally:
            hook.remove()
    return seen


def test_geoclip_meets_its_batch_and_a_queue_that_advances_by_it(geoclip):
    queue = geoclip.queue.tolist()
    assert len(queue) == 20 and len(geoclip.updates) == 4
    for update, rows in zip(geoclip.updates, geoclip.rows):
        points = geoclip.training.points[rows]
        np.testing.assert_allclose(update.points, points)
        np.testing.assert_allclose(update.candidates, np.array([*points.tolist(), *queue]), atol=1e-5)
        queue = queue[8:] + points.tolist()


def test_geoclip_clamps_the_temperature_after_each_update(geoclip):
    assert max(update.scale for update in geoclip.updates) <= math.log(100) + 1e-6


def test_geoclip_hands_steps_and_weight_decay_to_the_optimizer(geoclip):
    rates = [1e-3, 1e-3, 5e-4, 5e-4]
    assert geoclip.groups == [[(pytest.approx(rate), 0.125)] for rate in rates]
