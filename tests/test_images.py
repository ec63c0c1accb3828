"""Pictures of every kind become RGB tensors; those that cannot be read are named."""

import io
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from datasets import images
from datasets.images import decode_any, decode_jpeg, read_header, read_image, read_pixels, resize


def save(path, array, mode=None, **how):
    Image.fromarray(array, mode).save(path, **how) if mode else Image.fromarray(array).save(path, **how)
    return path


def test_rgb_pixels_come_back_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    read = read_image(save(tmp_path / "a.png", pixels))
    assert read.dtype == torch.uint8 and np.array_equal(read.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize(
    "mode, suffix", [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png")]
)
def test_other_modes_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"{mode}.{suffix}"
    Image.new("RGB", (40, 30), (200, 200, 200)).convert(mode, dither=Image.Dither.NONE).save(path)
    read = read_image(path, 16)
    assert read.shape == (3, 16, 16) and read.dtype == torch.uint8
    # A palette holds only some greys, one bit only white.
    assert (read.float() - {"1": 255, "P": 204}.get(mode, 200)).abs().max() <= 3


def test_transparent_pixels_are_black(tmp_path):
    pixels = np.full((4, 4, 4), 255, dtype=np.uint8)
    pixels[:, 2:, 3] = 0
    read = read_image(save(tmp_path / "a.png", pixels))
    assert (read[:, :, :2] == 255).all() and (read[:, :, 2:] == 0).all()


def geotiff(path, array, **how):
    """(bands, H, W) of any type -> TIFF, in kinds that PIL cannot write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=len(array),
            height=array.shape[1],
            width=array.shape[2],
            dtype=array.dtype,
            **how,
        ) as file:
            file.write(array)
    return path


def test_every_palette_entry_that_is_transparent_is_black(tmp_path):
    picture = Image.fromarray(np.repeat(np.arange(3, dtype=np.uint8), 8).reshape(4, 6), "P")
    picture.putpalette([10, 20, 30, 200, 100, 50, 90, 90, 90])
    picture.save(tmp_path / "a.png", transparency=bytes([255, 0, 255]))
    expected = np.array([[10, 20, 30], [0, 0, 0], [90, 90, 90]])[np.repeat(np.arange(3), 8)].reshape(4, 6, 3)
    assert np.array_equal(read_pixels(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "premultiplied.tif"])
def test_half_transparent_pixels_are_half_as_bright(tmp_path, kind):
    pixels = np.full((4, 4, 4), 200, dtype=np.uint8)
    pixels[..., 3] = [0, 64, 128, 255]
    expected = np.round(200 / 255 * pixels[..., 3:]).repeat(3, axis=2)
    if kind.endswith("tif"):
        pixels[..., :3] = expected
        geotiff(tmp_path / kind, pixels.transpose(2, 0, 1), photometric="RGB", alpha="premultiplied")
    else:
        Image.fromarray(pixels).convert(kind.split(".")[0]).save(tmp_path / kind)
    assert np.abs(read_pixels(tmp_path / kind).numpy() - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm", "jp2"])
def test_of_sixteen_bits_65535_is_white(tmp_path, suffix):
    values = np.concatenate([np.arange(0, 65536, 97), [65535 - 128, 65535]]).astype(np.uint16)
    values = np.resize(values, (26, 26))
    how = {"irreversible": False} if suffix == "jp2" else {}
    read = read_image(save(tmp_path / f"a.{suffix}", values, **how))
    assert np.array_equal(read, np.round(values / 65535 * 255)[None].repeat(3, axis=0))


@pytest.mark.parametrize("interleave, compress", [("pixel", "none"), ("pixel", "lzw"), ("band", "none")])
@pytest.mark.parametrize("bands", [1, 3])
def test_of_sixteen_bits_that_are_twelve_nothing_is_guessed(tmp_path, bands, interleave, compress):
    how = {"interleave": interleave, "compress": compress, **({"photometric": "RGB"} if bands == 3 else {})}
    values = np.arange(64 * bands, dtype=np.uint16).reshape(bands, 8, 8) * (4095 // (64 * bands))
    planes = interleave == "band"  # which PIL would read as noise
    with pytest.raises(ValueError, match="a.tif: .*" + ("INTERLEAVE=PIXEL" if planes else "-scale 0 4095")):
        read_image(geotiff(tmp_path / "a.tif", values, **how))
    values *= 17
    if planes:
        with pytest.raises(ValueError, match="INTERLEAVE=PIXEL"):
            read_image(geotiff(tmp_path / "b.tif", values, **how))
    else:
        read = read_image(geotiff(tmp_path / "b.tif", values, **how)).numpy()
        assert np.abs(read - np.round(values / 257)).max() <= bands // 2  # colours are cut, grey is rounded
        assert not read_image(geotiff(tmp_path / "c.tif", values * 0, **how)).any()  # black may be black


def test_twelve_bits_in_a_file_that_says_so(tmp_path):
    values = np.linspace(0, 4095, 64).astype(np.uint16).reshape(1, 8, 8)
    read = read_image(geotiff(tmp_path / "a.tif", values, nbits=12))
    assert np.array_equal(read, np.round(values / 4095 * 255).repeat(3, axis=0))
    assert read_image(geotiff(tmp_path / "b.tif", values // 64, nbits=12)).max() == 4  # dark, and rightly so


@pytest.mark.parametrize(
    "dtype, message", [("float32", "floating point"), ("int16", "signed"), ("int32", "32 bits"), ("uint32", "32 bits")]
)
def test_values_of_which_nothing_says_what_is_white_are_refused(tmp_path, dtype, message):
    with pytest.raises(ValueError, match=f"a.tif: .*{message}.*-scale LOW HIGH"):
        read_image(geotiff(tmp_path / "a.tif", np.full((1, 8, 8), 100, dtype)), 8)


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp", "png"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(read_pixels(tmp_path / f"a.{suffix}").numpy().astype(int) - [255, 0, 0]).max() <= 3


def test_not_square_is_squashed_and_antialiased(tmp_path):
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    read = read_image(save(tmp_path / "a.png", stripes), 16)
    assert read.shape == (3, 16, 16) and (read[:, :, 2:-2].float() - 127.5).abs().max() < 12


# What EXIF's orientations say: (the side of the picture that the stored rows begin at, and the columns).
ORIENTATIONS = {
    1: "top left",
    2: "top right",
    3: "bottom right",
    4: "bottom left",
    5: "left top",
    6: "right top",
    7: "right bottom",
    8: "left bottom",
}


def stored_as(shown, orientation):
    """(H, W, 3) as shown -> stored so that its first row and its first column are the sides that EXIF says."""
    rows, columns = ORIENTATIONS[orientation].split()
    stored = shown[::-1] if "bottom" in (rows, columns) else shown
    stored = stored[:, ::-1] if "right" in (rows, columns) else stored
    return np.ascontiguousarray(stored.transpose(1, 0, 2) if rows in ("left", "right") else stored)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "cmyk.jpg"])
def test_upright_is_what_a_viewer_shows_and_otherwise_pixels_are_as_stored(tmp_path, orientation, suffix):
    corners = np.array([[[250, 20, 20], [20, 250, 20], [20, 20, 250]], [[250, 250, 20], [20, 20, 20], [250] * 3]])
    shown = np.kron(corners.astype(np.uint8), np.ones((32, 32, 1), dtype=np.uint8))
    stored, exif = stored_as(shown, orientation), Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if suffix == "webp" else {"quality": 95, "subsampling": 0} if "jpg" in suffix else {}
    picture = Image.fromarray(stored).convert("CMYK" if "cmyk" in suffix else "RGB")
    picture.save(tmp_path / f"a.{suffix}", exif=exif, **how)
    for size in (None, 32):
        for upright, expected in ((True, shown), (False, stored)):
            read = read_image(tmp_path / f"a.{suffix}", size, upright=upright).permute(1, 2, 0).numpy().astype(int)
            into = torch.zeros(32, 32, 3, dtype=torch.uint8) if size else None
            pixels = read_pixels(tmp_path / f"a.{suffix}", size, into, upright)
            assert np.array_equal(pixels, read) and (into is None or np.array_equal(into, read))
            height, width = expected.shape[:2]
            assert read.shape == ((size, size, 3) if size else expected.shape)
            rows, columns = (np.arange(16, side, 32) for side in (height, width))  # the middles of the squares
            there = read[np.ix_(rows * read.shape[0] // height, columns * read.shape[1] // width)]
            assert np.abs(there - expected[np.ix_(rows, columns)].astype(int)).max() <= 12


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", 0, 9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_orientation_without_sense_changes_nothing(tmp_path, exif):
    if not isinstance(exif, bytes):
        value, exif = exif, Image.Exif()
        exif[0x0112] = value
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "a.png", upright=True), pixels)


def test_a_truncated_file_is_named(tmp_path):
    path = save(tmp_path / "a.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ValueError, match="a.jpg"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"no picture at all"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="a.jpg.*replace or remove"):
        read_image(tmp_path / "a.jpg", 8)


def test_missing_and_huge_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="b.jpg"):
        read_image(tmp_path / "b.jpg")
    save(tmp_path / "a.png", np.zeros((11, 10, 3), dtype=np.uint8))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="a.png: .*10 × 11 pixels, more than 100"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_header_of_300_megapixels_is_refused_before_its_pixels(tmp_path, kind):
    picture = io.BytesIO()
    Image.new("RGB", (1234, 4321)).save(picture, kind)
    content, order = picture.getvalue(), "little" if kind == "TIFF" else "big"
    for side, huge in ((1234, 15_000), (4321, 20_000)):
        width = 2 if kind in ("JPEG", "TIFF") else 4
        content = content.replace(side.to_bytes(width, order), huge.to_bytes(width, order), 1)
    if kind == "PNG":
        content = content[:29] + zlib.crc32(content[12:29]).to_bytes(4, "big") + content[33:]
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_image, read_header):
        with pytest.raises(ValueError, match="a.jpg: .*300000000 pixels.*exceeds"):
            read(tmp_path / "a.jpg")


def test_pictures_are_opened_in_one_place():
    """Where MAX_PIXELS and FORMATS hold. The world map's background is a file of this repository, and of a photo's time
    no pixel is read."""
    root = Path(__file__).parents[1]
    found = {
        path.name
        for folder in ("", "datasets/**/", "utils/**/", "models/**/", "figures/**/")
        for path in root.glob(f"{folder}*.py")
        if "Image.open(" in path.read_text()
    }
    assert found == {"images.py", "nadirs.py", "world_map.py"}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_of_one_pixel_shows_no_ground(tmp_path, suffix):
    Image.new("RGB", (1, 1)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match=f"a.{suffix}: .*1 × 1 pixels, too small"):
        read_image(tmp_path / f"a.{suffix}", 32)


def jpeg(path, height, width, mode="RGB", **how):
    """A picture with edges and noise, saved as JPEG -> its bytes."""
    rng = np.random.default_rng(height)
    blocks = np.kron(rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)), np.ones((8, 8, 1)))[:height, :width]
    picture = (blocks + rng.normal(0, 10, blocks.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(picture).convert(mode).save(path, "JPEG", **how)
    return path.read_bytes()


@pytest.mark.parametrize("height, width", [(64, 64), (65, 71), (40, 200)])
@pytest.mark.parametrize(
    "how", [{}, {"subsampling": 0}, {"progressive": True, "quality": 95}, {"mode": "L"}, {"keep_rgb": True}]
)
@pytest.mark.parametrize("size", [None, 64, 32, 17, 8])
def test_the_fast_decoder_gives_pils_pixels(tmp_path, height, width, how, size):
    content = jpeg(tmp_path / "a.jpg", height, width, **how)
    assert np.array_equal(decode_jpeg(content, size), decode_any(content, size))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-40],
        lambda content: content[:3],
        lambda content: b"",
        lambda content: content[:900] + b"\xff\xd8" + content[902:],
    ],
)
def test_what_is_broken_goes_to_pil_which_says_what_is_wrong(tmp_path, damage):
    path = tmp_path / "a.jpg"
    path.write_bytes(damage(jpeg(path, 64, 64)))
    assert decode_jpeg(path.read_bytes(), 32) is None
    with pytest.raises(ValueError, match="a.jpg: cannot be read as an image"):
        read_image(path, 32)


def test_what_the_fast_decoder_cannot_do_goes_to_pil(tmp_path, monkeypatch):
    assert decode_jpeg(jpeg(tmp_path / "a.jpg", 64, 64, mode="CMYK")) is None
    content = jpeg(tmp_path / "a.jpg", 64, 64)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert decode_jpeg(content) is None


@pytest.mark.parametrize("size", [17, 40, 64, 90])
def test_resizing_is_pils_bicubic(tmp_path, size):
    jpeg(tmp_path / "a.jpg", 64, 56)
    pixels = read_pixels(tmp_path / "a.jpg")
    expected = np.array(Image.fromarray(pixels.numpy()).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(resize(pixels, size).numpy() - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.05


def test_pixels_are_the_image_in_another_order(tmp_path):
    jpeg(tmp_path / "a.jpg", 64, 56)
    for size in (None, 24):
        pixels, image = read_pixels(tmp_path / "a.jpg", size), read_image(tmp_path / "a.jpg", size)
        assert image.is_contiguous() and torch.equal(pixels.permute(2, 0, 1), image)
        # As it was made, without a copy: by pixels from the decoder, by bands from the resizing.
        assert (pixels if size is None else pixels.permute(2, 0, 1)).is_contiguous()


@pytest.mark.parametrize("size", [32, 24, 64])
@pytest.mark.parametrize("kind", ["jpg", "grey", "png", "cut"])
def test_pixels_can_be_read_into_a_place(tmp_path, size, kind):
    path = tmp_path / "a.jpg"
    content = jpeg(path, 64, 64, mode="L" if kind == "grey" else "RGB")
    if kind == "png":
        Image.open(io.BytesIO(content)).save(path, "PNG")
    places = torch.full((3, size, size, 3), 7, dtype=torch.uint8)
    if kind == "cut":
        path.write_bytes(content[:-40])
        with pytest.raises(ValueError, match="a.jpg"):
            read_pixels(path, size, places[1])
    else:
        found = read_pixels(path, size, places[1])
        assert found.data_ptr() == places[1].data_ptr() and torch.equal(places[1], read_pixels(path, size))
    assert (places[[0, 2]] == 7).all()  # what lies beside it is left alone


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an image .not a regular file"):
            read_image(tmp_path / name, 32)
