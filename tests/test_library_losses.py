"""The library's losses on our batches, against plain loops over plain numbers, with and without neutral pairs."""

import math

import pytest
import torch
from torch.nn import functional as F

import train
from losses import LOSSES
from utils.checkpoint import load_checkpoint
from utils.settings import settings_of

torch.set_num_threads(1)
REGIONS, YEARS = 4, 3
CLASSES = ("arcface", "cosface", "sphereface")
PAIRS = ("triplet", "lifted_structure", "ntxent", "supcon", "circle")


def batch(spread=0.5):
    """Descriptors (12, 5) float64, labels, and neutral pairs: regions 0 and 1, 1 and 3."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(REGIONS, 1, 5, generator=generator, dtype=torch.float64)
    points = centers + spread * torch.randn(REGIONS, YEARS, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(REGIONS).repeat_interleave(YEARS)
    shared = torch.zeros(REGIONS, REGIONS, dtype=torch.bool)
    for a, b in ((0, 1), (1, 3)):
        shared[a, b] = shared[b, a] = True
    return F.normalize(points.flatten(0, 1), dim=1), labels, shared[labels][:, labels]


class Plain:
    """Pairs of a batch: `near[i]`, `far[i]` are the positives and negatives of i."""

    def __init__(self, descriptors, labels, neutral):
        points, self.count = descriptors.tolist(), len(labels)
        every = range(self.count)
        self.cos = [[sum(x * y for x, y in zip(points[i], points[j])) for j in every] for i in every]
        self.distance = [[math.dist(points[i], points[j]) for j in every] for i in every]
        self.near = [[j for j in every if j != i and labels[i] == labels[j]] for i in every]
        self.far = [
            [j for j in every if labels[i] != labels[j] and not (neutral is not None and neutral[i, j])] for i in every
        ]
        self.positives = [(i, j) for i in every for j in self.near[i]]

    def triplet(self, margin=0.05):
        losses = [
            max(0, self.distance[i][p] - self.distance[i][n] + margin) for i, p in self.positives for n in self.far[i]
        ]
        losses = [each for each in losses if each > 0]
        return sum(losses) / len(losses)

    def lifted_structure(self, neg_margin=1.0):
        total = 0
        for i, p in self.positives:
            pushed = sum(math.exp(neg_margin - self.distance[a][n]) for a in (i, p) for n in self.far[a])
            total += max(0, math.log(pushed) + self.distance[i][p]) ** 2 / 2
        return total / len(self.positives)

    def ntxent(self, temperature=0.07):
        total = 0
        for i, p in self.positives:
            own = math.exp(self.cos[i][p] / temperature)
            total -= math.log(own / (own + sum(math.exp(self.cos[i][n] / temperature) for n in self.far[i])))
        return total / len(self.positives)

    def supcon(self, temperature=0.1):
        losses = []
        for i in range(self.count):
            whole = sum(math.exp(self.cos[i][j] / temperature) for j in self.near[i] + self.far[i])
            losses.append(
                -sum(self.cos[i][p] / temperature - math.log(whole) for p in self.near[i]) / len(self.near[i])
            )
        return sum(losses) / self.count

    def circle(self, m=0.4, gamma=80.0):
        losses = []
        for i in range(self.count):
            pull = [-gamma * max(0, 1 + m - self.cos[i][p]) * (self.cos[i][p] - (1 - m)) for p in self.near[i]]
            push = [gamma * max(0, self.cos[i][n] + m) * (self.cos[i][n] - m) for n in self.far[i]]
            losses.append(math.log(1 + sum(map(math.exp, pull)) * sum(map(math.exp, push))))
        losses = [each for each in losses if each > 0]
        return sum(losses) / len(losses)

    def fastap(self, bins=10):
        width, losses = 4 / bins, []
        for i in range(self.count):
            soft = lambda others, k: sum(max(0, 1 - abs(self.distance[i][j] ** 2 - k * width) / width) for j in others)
            near, far = ([soft(others, k) for k in range(bins + 1)] for others in (self.near[i], self.far[i]))
            precision = [
                near[k] * sum(near[: k + 1]) / (sum(near[: k + 1]) + sum(far[: k + 1]))
                for k in range(bins + 1)
                if near[k] > 0
            ]
            losses.append(1 - sum(precision) / len(self.near[i]))
        return sum(losses) / self.count


@pytest.mark.parametrize("with_neutral", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_losses_over_pairs(name, with_neutral):
    descriptors, labels, neutral = batch()
    neutral = neutral if with_neutral else None
    found = LOSSES[name]()(descriptors, labels, neutral).item()
    assert math.isclose(found, getattr(Plain(descriptors, labels, neutral), name)(), rel_tol=1e-9)
    assert with_neutral == (not math.isclose(found, LOSSES[name]()(descriptors, labels).item(), rel_tol=1e-6))


@pytest.mark.parametrize(
    "name, settings, plain",
    [
        ("triplet", {"margin": 0.4}, {"margin": 0.4}),
        ("lifted_structure", {"neg_margin": 0.5}, {"neg_margin": 0.5}),
        ("ntxent", {"temperature": 0.5}, {"temperature": 0.5}),
        ("supcon", {"temperature": 0.5}, {"temperature": 0.5}),
        ("circle", {"relaxation": 0.2, "gamma": 10.0}, {"m": 0.2, "gamma": 10.0}),
        ("fastap", {"num_bins": 6}, {"bins": 6}),
    ],
)
def test_settings_reach_the_loss(name, settings, plain):
    descriptors, labels, neutral = batch()
    neutral = None if name == "fastap" else neutral
    found = LOSSES[name](**settings)(descriptors, labels, neutral).item()
    assert math.isclose(found, getattr(Plain(descriptors, labels, neutral), name)(**plain), rel_tol=1e-9)


def test_fastap_takes_neutral_pairs_as_negatives():
    descriptors, labels, neutral = batch()
    expected = Plain(descriptors, labels, None).fastap()
    assert math.isclose(LOSSES["fastap"]()(descriptors, labels, neutral).item(), expected, rel_tol=1e-9)


def own_cosine(name, cosine, margin):
    """The cosine to the own region, with the margin."""
    angle = math.acos(cosine)
    if name == "arcface":
        margin = math.radians(margin)
        return math.cos(angle + margin) if angle <= math.pi - margin else cosine - margin * math.sin(margin)
    if name == "cosface":
        return cosine - margin
    steps = math.floor(angle / (math.pi / margin))
    return (-1) ** steps * math.cos(margin * angle) - 2 * steps


@pytest.mark.parametrize(
    "name, settings",
    [
        ("arcface", {}),
        ("arcface", {"margin": 20.0, "scale": 5.0}),
        ("cosface", {}),
        ("cosface", {"margin": 0.2, "scale": 5.0}),
        ("sphereface", {}),
        ("sphereface", {"margin": 3.0, "scale": 5.0}),
    ],
)
def test_losses_over_regions(name, settings):
    torch.manual_seed(0)
    descriptors, _, neutral = batch()
    labels = torch.tensor([5, 5, 5, 0, 0, 0, 8, 8, 8, 3, 3, 3])  # rows in the data set, which has 9 regions
    loss_fn = LOSSES[name](num_regions=9, descriptor_dim=5, **settings).double()
    margin = settings.get("margin", {"arcface": 28.6, "cosface": 0.35, "sphereface": 4.0}[name])
    scale = settings.get("scale", 64.0)
    (weights,) = loss_fn.parameters()
    assert weights.shape == (5, 9)
    directions, total = F.normalize(weights.detach(), dim=0).T.tolist(), 0
    for point, label in zip(descriptors.tolist(), labels.tolist()):
        cosines = [sum(x * y for x, y in zip(point, each)) for each in directions]
        cosines[label] = own_cosine(name, cosines[label], margin)
        total += math.log(sum(math.exp(scale * (each - cosines[label])) for each in cosines))
    assert math.isclose(loss_fn(descriptors, labels, neutral).item(), total / len(labels), rel_tol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_gradient_and_no_state_but_its_weights(name):
    descriptors, labels, neutral = batch()
    descriptors = descriptors.float().requires_grad_()
    known = dict(num_regions=REGIONS, descriptor_dim=5) if name in CLASSES else {}
    loss_fn = LOSSES[name](**known)
    loss = loss_fn(descriptors, labels, neutral)
    loss.backward()
    assert loss.dim() == 0 and torch.isfinite(descriptors.grad).all() and descriptors.grad.abs().sum() > 0
    assert [*loss_fn.state_dict()] == [key for key, _ in loss_fn.named_parameters()]
    assert settings_of(LOSSES[name])


@pytest.mark.parametrize("name", PAIRS)
def test_a_batch_of_neutral_pairs_alone_is_no_error(name):
    descriptors, labels, _ = batch()
    descriptors.requires_grad_()
    loss = LOSSES[name]()(descriptors, labels, labels[:, None] != labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(descriptors.grad).all()


def test_a_sphereface_margin_is_whole():
    with pytest.raises(ValueError, match="--margin 1.5"):
        LOSSES["sphereface"](9, 5, margin=1.5)


def test_weights_over_regions_are_trained_and_kept(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (
        "--backbone resnet18 --weights none --cut_after layer1 --aggregator gem --descriptor_dim 16 --image_size 32 "
        "--num_workers 0 --device cpu --precision fp32 --recluster_every 2 --batch_size 4 --num_clusters 3 "
        "--augmentation none --loss cosface --scale 8 --validate_every 9"
    ).split()
    folder = train.main(
        train.parse_arguments(["--dataset_path", str(world.path), "--iterations", "1", "--save_every", "1", *flags])
    )
    state = load_checkpoint(folder / "last.pt")
    weights = state["loss"]["loss.W"]
    assert (
        weights.shape == (16, 24)
        and len(state["optimizer"]["state"])
        == len([key for key in state["model"] if key.endswith(("weight", "bias", ".p"))]) + 1
    )
    again = train.main(
        train.parse_arguments(
            ["--dataset_path", str(world.path), "--iterations", "2", "--resume", str(folder / "last.pt"), *flags]
        )
    )
    assert not torch.equal(load_checkpoint(again / "last.pt")["loss"]["loss.W"], weights)
