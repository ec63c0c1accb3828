"""Augmentation by pixels: who shares a draw, no black wedge, colours as torchvision's."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torchvision.transforms import functional as TF

import train
from augmentations.year_wise import SQUARE, Augmentation, Draws, apply, homographies_of, turn_hue, warp
from experiments.chain import as_one, chain, draw_chain, geometry, shown
from utils.settings import chosen_settings

HARD = dict(rotation=180.0, perspective=0.66, min_crop=0.2, aspect=2.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same_picture(batch=3, years=4, size=40):
    """One smooth picture at every place, so that outputs differ by their draws alone."""
    picture = torch.rand(1, 3, 6, 6, generator=generator(9))
    picture = torch.nn.functional.interpolate(picture, size=(size, size), mode="bilinear") * 255
    return picture.to(torch.uint8).expand(batch, years, -1, -1, -1)


def of_quad(quad):
    """A Draws of this geometry alone."""
    return Draws(quad[None], torch.ones(1, 4), torch.empty(1, 0, dtype=torch.long))


def geometry_of(images, draws, size, samples=None):
    """One draw's warp of images (N, 3, H, W)."""
    if samples:
        return warp(images[:, None], homographies_of(draws.quads), size, [samples])[:, 0]
    return apply(images[:, None], draws._replace(order=draws.order[:, :0]), size)[0][:, 0]


def colours_of(images, draws):
    """One draw's colour jitter of images (N, 3, S, S): the whole of the image is warped to itself."""
    return apply(images[:, None], draws._replace(quads=SQUARE[None]), images.shape[-1])[0][:, 0]


def alike(a, b):
    return bool(torch.allclose(a, b, atol=1e-5))


@pytest.mark.parametrize("group", ["none", "image", "batch", "year"])
def test_who_shares_a_draw(group):
    views = Augmentation(32, group)(same_picture(), generator())
    assert views.shape == (3, 4, 3, 32, 32) and views.dtype == torch.float32
    assert 0 <= views.min() and views.max() <= 1
    places = [(b, y) for b in range(3) for y in range(4)]
    for b, y in places:
        for c, z in places:
            shared = {"none": True, "batch": True, "year": y == z, "image": (b, y) == (c, z)}[group]
            assert alike(views[b, y], views[c, z]) == shared, ((b, y), (c, z))


def test_year_wise_draws_do_not_depend_on_the_batch():
    augment = Augmentation(32)
    one, many = (augment(same_picture(batch), generator()) for batch in (1, 5))
    assert alike(one[0], many[4])


def test_the_same_generator_state_gives_the_same_output():
    augment, images = Augmentation(32, "image", hue=0.3), same_picture()
    torch.manual_seed(1)
    first = augment(images, generator(4))
    torch.manual_seed(2)
    assert torch.equal(first, augment(images, generator(4)))
    assert not alike(first, augment(images, generator(5)))


@pytest.mark.parametrize("settings", [{}, HARD, {**HARD, "perspective": 0.0}, {**HARD, "min_crop": 1.0}])
def test_the_sampled_quadrilateral_lies_inside_and_keeps_its_turn(settings):
    state = generator()
    quads = Augmentation(32, **settings).draw(300, state).quads
    assert quads.shape == (300, 4, 2) and quads.abs().max() <= 1 + 1e-5
    for quad in quads:
        edges = quad.roll(-1, 0) - quad
        following = edges.roll(-1, 0)
        assert (edges[:, 0] * following[:, 1] - edges[:, 1] * following[:, 0] > 0).all()  # convex, not mirrored


def test_white_stays_white_without_colour_jitter():
    white = torch.full((1, 1, 3, 40, 40), 255, dtype=torch.uint8)
    augment = Augmentation(32, "image", **HARD, brightness=0.0, contrast=0.0, saturation=0.0)
    state = generator()
    assert min(augment(white, state).min().item() for _ in range(60)) > 1 - 1e-5


def test_no_black_pixel_from_a_white_image_with_everything_on():
    white = torch.full((1, 1, 3, 40, 40), 255, dtype=torch.uint8)
    augment, state = Augmentation(32, "image", **HARD, hue=0.5), generator()
    for _ in range(60):
        view = augment(white, state)
        assert view.min() >= 0.1 - 1e-4 and view.max() - view.min() < 1e-4


def test_a_quad_that_is_the_image_changes_nothing():
    images = torch.rand(2, 3, 24, 24, generator=generator())
    assert torch.allclose(geometry_of(images, of_quad(SQUARE), 24), images, atol=1e-5)


def test_a_quarter_turn_is_a_quarter_turn():
    images = torch.rand(1, 3, 24, 24, generator=generator())
    turned = geometry_of(images, of_quad(SQUARE.roll(1, 0)), 24)
    # The output's upper left corner shows the source's lower left one.
    assert torch.allclose(turned, torch.rot90(images, -1, (2, 3)), atol=1e-4)


def test_a_linear_picture_is_sampled_where_the_quad_says():
    x = (torch.arange(64) + 0.5) / 32 - 1
    picture = torch.stack([x.expand(64, 64), x[:, None].expand(64, 64), torch.zeros(64, 64)])[None]
    quad = torch.tensor([[-0.5, -0.25], [0.5, -0.25], [0.5, 0.25], [-0.5, 0.25]])
    view = geometry_of((picture + 1) / 2, of_quad(quad), 10) * 2 - 1
    expected = (torch.arange(10) + 0.5) / 5 - 1
    assert torch.allclose(view[0, 0], expected.mul(0.5).expand(10, 10), atol=1e-4)
    assert torch.allclose(view[0, 1], expected.mul(0.25)[:, None].expand(10, 10), atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_colours_are_torchvisions(seed):
    images = torch.rand(3, 3, 20, 20, generator=generator(seed))
    draws = Augmentation(20, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5).draw(1, generator(seed))
    factors, expected = draws.colours[0].tolist(), images
    functions = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for step in draws.order[0].tolist():
        alone = colours_of(images, draws._replace(order=torch.tensor([[step]])))
        assert (alone - functions[step](images, factors[step])).abs().max() < 1e-3, functions[step].__name__
        expected = functions[step](expected, factors[step])
    assert (colours_of(images, draws) - expected).abs().max() < 1e-3
    assert 0.1 <= min(factors[:3]) and abs(factors[3]) <= 0.5


def test_many_draws_at_once_are_each_alone():
    """Draws of several numbers of samples and all orders of colours, beside each other as one by one."""
    draws = Augmentation(20, hue=0.5, min_crop=0.3).draw(60, generator())
    images = torch.randint(0, 256, (2, 60, 3, 70, 70), dtype=torch.uint8, generator=generator(1))
    together = apply(images, draws, 20)[0]
    kinds = set()
    for row in range(60):
        one = draws.rows(slice(row, row + 1))
        assert (apply(images[:, row : row + 1], one, 20)[0] - together[:, row : row + 1]).abs().max() < 1e-5
        kinds.add(one.order[0].tolist().index(3))
    assert kinds == {0, 1, 2, 3}


def uniform(low, high, state):
    return low + (high - low) * torch.rand((), generator=state).item()


def test_draws_are_distributed_as_one_by_one():
    """Every quantity's quantiles against a plain loop that draws one augmentation after the other."""
    settings = dict(rotation=45.0, perspective=0.5, min_crop=0.7, aspect=1.5, brightness=0.5, contrast=1.5, hue=0.1)
    augment, state, count = Augmentation(32, saturation=0.9, **settings), generator(1), 3000
    rows = []
    for _ in range(count):
        quad = [[x * (1 - uniform(0, 0.5, state)), y * (1 - uniform(0, 0.5, state))] for x, y in SQUARE.tolist()]
        stretch = 1.5 ** uniform(-0.5, 0.5, state)
        angle = math.radians(uniform(-45, 45, state))
        quad = [[x * stretch, y / stretch] for x, y in quad]
        quad = [[x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)] for x, y in quad]
        low, high = ([choose(column) for column in zip(*quad)] for choose in (min, max))
        scale = min(1, *(2 / (b - a) for a, b in zip(low, high))) * uniform(0.7, 1, state)
        at = [uniform(0, 1, state) for _ in range(2)]
        quad = [
            [(v - a) * scale - 1 + (2 - (b - a) * scale) * u for v, a, b, u in zip(point, low, high, at)]
            for point in quad
        ]
        factors = [uniform(max(0, 1 - each), 1 + each, state) for each in (0.5, 1.5, 0.9)]
        order = torch.randperm(4, generator=state).tolist()
        rows.append([*sum(quad, []), *factors, uniform(-0.1, 0.1, state), *order])
    expected, draws = torch.tensor(rows), augment.draw(count, generator(2))
    found = torch.cat([draws.quads.flatten(1), draws.colours, draws.order], dim=1)
    levels = torch.linspace(0.02, 0.98, 25)
    spread = expected.std(dim=0)
    off = (expected[:, :12].quantile(levels, dim=0) - found[:, :12].quantile(levels, dim=0)).abs() / spread[:12]
    assert off.max() < 0.15
    counts = [sum(tuple(row[12:].int().tolist()) == order for row in found) for order in permutations(range(4))]
    assert min(counts) > 80 and max(counts) < 175  # 125 expected, spread 11
    assert (torch.corrcoef(expected.T) - torch.corrcoef(found.T)).abs().max() < 0.12


PLAIN = dict(rotation=0.0, perspective=0.0, brightness=0.0, contrast=0.0, saturation=0.0)


@pytest.mark.parametrize("group", ["image", "batch", "year"])
def test_turns_and_mirrors_are_of_pixels_and_of_each_image(group):
    images = torch.randint(0, 256, (32, 2, 3, 6, 6), dtype=torch.uint8, generator=generator())

    def which(turns, flip):
        views = Augmentation(6, group, turns=turns, flip=flip, **PLAIN)(images, generator(1)).flatten(0, 1)
        found = []
        for before, after in zip(images.flatten(0, 1).float() / 255, views):
            turned = [torch.rot90(before, quarters, (-2, -1)) for quarters in range(4)]
            alike = [(each - after).abs().max() < 1e-5 for each in (*turned, *(each.flip(-1) for each in turned))]
            assert sum(alike) == 1
            found.append(alike.index(True))
        return found

    turned, flipped, both = which(True, False), which(False, True), which(True, True)
    assert set(turned) == {0, 1, 2, 3} and set(flipped) == {0, 4} and set(both) == set(range(8))
    assert min(map(turned.count, range(4))) >= 7 and 20 < flipped.count(4) < 44  # 16 and 32 expected


def test_turned_images_are_warped_and_coloured_as_those_that_lie_so():
    images = same_picture(2, 1)
    turning = Augmentation(32, "batch", turns=True, flip=True, hue=0.2)
    views = turning(images, generator(3))[:, 0]
    draws, state = turning.draw(1, generator(3)), generator(3)
    turning.draw(1, state)
    quarters, mirrored = (torch.rand(2, 2, generator=state) * torch.tensor([4, 2])).long().unbind(1)
    for image, view, quarter, mirror in zip(images[:, 0], views, quarters.tolist(), mirrored.tolist()):
        lying = torch.rot90(image, quarter, (-2, -1))
        lying = lying.flip(-1) if mirror else lying
        assert (apply(lying[None, None], draws, 32)[0][0, 0] - view).abs().max() < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [{"group": "month"}, {"perspective": 0.67}, {"min_crop": 0.0}, {"clouds": 1.5}, {"haze": -0.1}, {"exposure": 2.0}],
)
def test_wrong_settings_name_their_flag(wrong):
    with pytest.raises(ValueError, match="--augmentation|--perspective|--min_crop|--clouds|--haze|--exposure"):
        Augmentation(32, **wrong)


def psnr(a, b):
    return (-10 * torch.log10((a - b).square().mean())).item()


def soft_pictures(count, size, cells=12):
    """Smooth enough that resampling once or five times hardly differs, so what differs is where it samples."""
    coarse = torch.rand(count, 3, cells, cells, generator=generator(3))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_one_warp_is_torchvisions_chain(seed, released):
    drawn, images = draw_chain(40, generator(seed), released=released), soft_pictures(2, 100)
    inside = geometry(torch.ones(1, 3, 100, 100), drawn) > 0.999  # not in a black wedge of the released chain
    assert inside.all() or released and inside.float().mean() > 0.5
    expected = geometry(images, drawn) * inside
    assert expected.std() > 0.05
    found = geometry_of(images, as_one(drawn), 40) * inside
    assert psnr(found, expected) > 40
    # Half a pixel of the output, or a degree, is seen.
    for quad in (
        as_one(drawn).quads[0] + torch.tensor([0.5, 0.0]) * drawn.last / drawn.size * 2 / drawn.resized,
        as_one(replace(drawn, angle=drawn.angle + 1)).quads[0],
    ):
        assert psnr(geometry_of(images, of_quad(quad), 40) * inside, expected) < psnr(found, expected) - 3


def test_the_papers_preset_shows_as_much_of_an_image_as_the_released_code():
    def side(quad):
        """Of a square of the quad's area, where the image's is 1; the area is that of its two triangles."""
        (a, b, c, d), halves = quad.double().tolist(), 0
        for p, q, r in ((a, b, c), (a, c, d)):
            halves += abs((q[0] - p[0]) * (r[1] - p[1]) - (r[0] - p[0]) * (q[1] - p[1])) / 2
        return halves**0.5 / 2

    augment, state = (
        Augmentation(320, **chosen_settings(train.parse_arguments(["@presets/paper.args"]), Augmentation)),
        generator(),
    )
    ours = [side(quad) for quad in augment.draw(800, state).quads]
    released = [side(as_one(draw_chain(320, state, released=True)).quads[0]) for _ in range(800)]
    assert sum(ours) / 800 == pytest.approx(0.71, abs=0.01) and sum(released) / 800 == pytest.approx(0.72, abs=0.01)
    zoomed = [side(quad) for quad in replace(augment, min_crop=0.7).draw(800, state).quads]
    assert sum(zoomed) / 800 == pytest.approx(0.60, abs=0.01)


def test_what_is_shown_by_plain_squares():
    """The whole image and its left half squeezed to a square, of two years; then a quarter twice."""
    x = torch.tensor([0.5, 1.0])
    quads = SQUARE, SQUARE * x - torch.tensor([0.5, 0.0]), SQUARE / 2, SQUARE / 2 + 0.8
    side, upsampled, overlap, beyond = shown(torch.stack(quads), 320, 512)
    assert side == pytest.approx((1 + 0.5**0.5 + 0.5 + 0.5) / 4) and upsampled == 0.5 and beyond == 0.25
    small = 0.2**2 / (2 - 0.2**2)  # squares of side 1 that share 0.2 × 0.2
    assert overlap == pytest.approx((0.5 + small) / 2, abs=1e-6)


def test_geometry_and_colours_together_are_torchvisions_chain():
    drawn, images = draw_chain(40, generator(7), colours=(0.5, 0.5, 0.5, 0.2)), soft_pictures(3, 100)
    draw = as_one(drawn)
    expected = chain(images, drawn)
    assert (colours_of(geometry(images, drawn), draw) - expected).abs().max() < 1e-4
    assert (
        psnr(apply(images[:, None], draw, 40)[0][:, 0], expected) > 34
    )  # these colours stretch differences by up to 1.8


def test_bytes_are_warped_as_floats_are():
    images = torch.randint(0, 256, (2, 60, 50, 3), dtype=torch.uint8, generator=generator()).permute(0, 3, 1, 2)
    for seed in range(5):
        draw = Augmentation(24, **HARD).draw(1, generator(seed))
        found = geometry_of(images, draw, 24)
        assert torch.allclose(found, geometry_of(images.float() / 255, draw, 24), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_grid_samples_where_the_homography_says(seed):
    """Bilinear sampling recomputed in float64, pixel by pixel, on a picture whose quad touches the border."""
    pixels = torch.rand(1, 3, 20, 28, generator=generator(seed))
    draw = Augmentation(9, min_crop=1.0).draw(1, generator(seed))
    found = geometry_of(pixels, draw, 9, samples=1)[0].double()
    equations, right = [], []
    for (u, v), (x, y) in zip(SQUARE.double().tolist(), draw.quads[0].double().tolist()):
        equations += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        right += [x, y]
    h = torch.linalg.solve(torch.tensor(equations, dtype=torch.float64), torch.tensor(right, dtype=torch.float64))
    matrix = torch.cat([h, torch.ones(1, dtype=torch.float64)]).view(3, 3)
    for row in range(9):
        for column in range(9):
            place = matrix @ torch.tensor([(column + 0.5) / 4.5 - 1, (row + 0.5) / 4.5 - 1, 1], dtype=torch.float64)
            x = ((place[0] / place[2] + 1) * 14 - 0.5).clamp(0, 27)
            y = ((place[1] / place[2] + 1) * 10 - 0.5).clamp(0, 19)
            left, top = min(int(x), 26), min(int(y), 18)
            a, b = x - left, y - top
            four = pixels[0, :, top : top + 2, left : left + 2].double()
            expected = (1 - b) * ((1 - a) * four[:, 0, 0] + a * four[:, 0, 1]) + b * (
                (1 - a) * four[:, 1, 0] + a * four[:, 1, 1]
            )
            assert (found[:, row, column] - expected).abs().max() < 1e-4


def test_a_coarse_output_does_not_alias():
    stripes = torch.zeros(1, 3, 96, 96)
    stripes[..., ::2] = 1
    draw = of_quad(SQUARE)
    assert (geometry_of(stripes, draw, 31)[..., 1:-1] - 0.5).abs().max() < 0.2
    assert (geometry_of(stripes, draw, 31, samples=1) - 0.5).abs().max() > 0.45
    assert torch.equal(geometry_of(stripes, draw, 80), geometry_of(stripes, draw, 80, samples=1))


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.1, 0.5])
def test_hue_is_torchvisions(turn):
    images = torch.rand(2, 3, 30, 30, generator=generator())
    images[0, :, :8] = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (3, 8, 30), generator=generator())]  # ties, grey
    assert (
        turn_hue(images[:, None].clone(), torch.tensor([turn]))[:, 0] - TF.adjust_hue(images, turn)
    ).abs().max() < 1e-5
