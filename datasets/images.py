"""Reading one image into a uint8 tensor, whatever its mode, or an error that names the file.

JPEGs are decoded by simplejpeg, at the power-of-two scale that is just enough; what it refuses goes to PIL, which
reads more kinds and words the errors. Pixels are the same as PIL's alone. benchmarks/speed_input.py compares decoders.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.nn import functional as F

from utils.files import replacing

MAX_PIXELS = 178_956_970  # more is refused before decoding, by Pillow, too: no camera on the station comes near
MIN_SIDE = 4  # pixels; what is smaller shows no ground
# Not all that Pillow can: for some formats it would start other programs (EPS), whatever the file is called.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "JPEG2000", "GIF", "BMP", "PPM")
BITS, PLANES = 258, 284  # tags of TIFFs: BitsPerSample, PlanarConfiguration
UNTURN = {6: 8, 8: 6}  # EXIF orientations that undo others; the rest undo themselves


def read_image(path: str | Path, size: int | None = None, upright: bool = False) -> torch.Tensor:
    """File -> uint8 (3, H, W) RGB tensor; size squashes it to size × size (antialiased), whatever its aspect.

    Grey, palette, CMYK, 16-bit and transparent images become RGB, of several frames the first: see to_rgb. upright: as
    a viewer shows it, by its EXIF orientation; without, the stored pixels, to which a data set's corners belong.
    Raises ValueError or FileNotFoundError naming the file.
    """
    return read_pixels(path, size, upright=upright).permute(2, 0, 1).contiguous()


def read_pixels(
    path: str | Path, size: int | None = None, into: torch.Tensor | None = None, upright: bool = False
) -> torch.Tensor:
    """As read_image, but (H, W, 3), the order in which pixels are decoded: no turning round, a tenth of the time. What
    had to be resized still lies in memory as read_image gives it, see `resize`.

    into: contiguous uint8 (size, size, 3) to be filled and returned; what it holds after an error is undefined.
    """
    return decode(read_bytes(path), path, size, into, upright)


def read_within(path: str | Path, longest: int) -> torch.Tensor:
    """As read_image as a viewer shows it, in its aspect, its longer side at most `longest` pixels."""
    content = read_bytes(path)
    with errors_name(path):
        with open_image(io.BytesIO(content)) as image:
            short = max(1, round(min(image.size) * longest / max(image.size)))
            orientation = orientation_of(image)
        pixels = decode_jpeg(content, short)
        pixels = torch.from_numpy(decode_any(content, short) if pixels is None else pixels)
    return within(turn(pixels, orientation).permute(2, 0, 1), longest)


def within(image: torch.Tensor, longest: int) -> torch.Tensor:
    """uint8 (3, H, W) -> the same, or smaller in its aspect: the longer side at most `longest` pixels."""
    scale = longest / max(image.shape[1:])
    if scale < 1:
        size = [max(1, round(scale * side)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    return image.contiguous()


def read_header(path: str | Path) -> tuple[tuple[int, int], str]:
    """File -> (width, height) and the kind, such as "JPEG". Raises as read_image at what the header tells."""
    with errors_name(path):
        require_file(path)
        with open_image(path) as image:
            return image.size, image.format


def read_bytes(path: str | Path) -> bytes:
    """File -> its bytes. Raises as read_image."""
    with errors_name(path):
        require_file(path)
        return Path(path).read_bytes()


def require_file(path: str | Path) -> None:
    """ValueError at what is no file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would be waited for
        raise ValueError("not a regular file")


def decode(
    content: bytes, path: str | Path, size: int | None = None, into: torch.Tensor | None = None, upright: bool = False
) -> torch.Tensor:
    """The bytes of an image file -> as read_pixels. path: for errors."""
    with errors_name(path):
        pixels = decode_jpeg(content, size, into)
        pixels = torch.from_numpy(decode_any(content, size) if pixels is None else pixels)
        if upright:
            with open_image(io.BytesIO(content)) as image:
                pixels = turn(pixels, orientation_of(image))
    if size is not None and pixels.shape[:2] != (size, size):
        pixels = resize(pixels, size)
    return pixels if into is None or pixels.data_ptr() == into.data_ptr() else into.copy_(pixels)


@contextmanager
def errors_name(path: str | Path) -> Iterator[None]:
    """What goes wrong with an image inside becomes a ValueError, or a FileNotFoundError, that names its file."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except Exception as error:  # at broken files PIL raises nearly every kind there is
        why = (
            "of no known kind, or of bands or bits that are not a picture's"
            if isinstance(error, UnidentifiedImageError)
            else f"{str(error).partition(', could be')[0]}: scale it down"
            if isinstance(error, Image.DecompressionBombError)
            else str(error) or type(error).__name__
        )
        raise ValueError(f"{path}: cannot be read as an image ({why}); replace or remove the file") from error


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """Path or binary stream -> PIL image, only its header read. ValueError where its pixels should not be."""
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS:,}: scale it down")
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width} × {image.height} pixels, too small for an image")
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
        raise ValueError(
            f"its values are {'floating point' if image.mode == 'F' else 'signed or of 32 bits'}, and "
            f"nothing says which are black and white: gdal_translate -ot Byte -scale LOW HIGH"
        )
    if image.format == "TIFF" and image.tag_v2.get(PLANES) == 2 and max(image.tag_v2[BITS]) > 8:  # PIL reads noise
        raise ValueError("16 bits, and a plane for each colour: gdal_translate -co INTERLEAVE=PIXEL")
    return image


def decode_jpeg(content: bytes, size: int | None = None, into: torch.Tensor | None = None) -> np.ndarray | None:
    """Bytes -> uint8 (H, W, 3) at the smallest power-of-two scale that holds size × size; None if it is not for us.

    Where the scale gives size × size, the pixels are written to `into`, uint8 (size, size, 3), if there is one.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if height * width > MAX_PIXELS or min(height, width) < MIN_SIDE or colours not in ("YCbCr", "Gray", "RGB"):
            return None
        factor = 1 if size is None else next((f for f in (8, 4, 2) if min(height, width) // size >= f), 1)
        height, width = -(-height // factor), -(-width // factor)
        buffer = None if into is None or (height, width) != (size, size) else into.numpy()
        return simplejpeg.decode_jpeg(content, min_height=height, min_width=width, buffer=buffer)
    except ValueError:  # another format, or broken: PIL tells
        return None


def decode_any(content: bytes, size: int | None = None) -> np.ndarray:
    """Bytes -> uint8 (H, W, 3) by PIL, JPEGs at the same scale. Raises ValueError, or what PIL raises."""
    with open_image(io.BytesIO(content)) as image:
        if size is not None:
            image.draft("RGB", (size, size))
        turned = orientation_of(image) if image.format == "TIFF" else 1  # PIL turns these by itself, as it loads them
        pixels = np.array(to_rgb(image))
    return turn(torch.from_numpy(pixels), UNTURN.get(turned, turned)).numpy()


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image, not yet loaded -> RGB. Where it is transparent, it lies over black; 16 bits are cut to 8.

    White is 65,535, or 4,095 in a TIFF that says to have 12 bits. Values below 4,096 in 16 bits would be a black
    picture: ValueError.
    """
    layout = str(image.tile)  # holds how the file stores its values, e.g. RGB;16B
    has_16_bits = ";16" in layout or image.mode.startswith("I") and "I;12" not in layout
    if image.mode.startswith("I"):
        white = 65535 if has_16_bits else 4095
        grey = np.rint(np.asarray(image, dtype=np.float32) * np.float32(255 / white)).astype(np.uint8)
        rgb = Image.fromarray(grey).convert("RGB")
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if has_16_bits and 0 < max(high for _, high in rgb.getextrema()) <= 16:
        raise ValueError(
            "its 16-bit values reach no more than a sixteenth of 65,535, as those of 12 bits do: "
            "gdal_translate -ot Byte -scale 0 4095"
        )
    return rgb


def orientation_of(image: Image.Image) -> int:
    """PIL image, not yet loaded -> its EXIF orientation, 1 to 8; 1 (as stored) where it says none that makes sense."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # PIL raises all sorts at broken EXIF, which is no reason to refuse sound pixels
        return 1
    return value if value in range(1, 9) else 1


def turn(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """uint8 (H, W, 3) as stored -> as a viewer shows it: (H, W, 3), or (W, H, 3) for the orientations 5 to 8."""
    if orientation == 1:
        return pixels
    pixels = pixels.transpose(0, 1) if orientation >= 5 else pixels
    return pixels.flip([0] * (orientation in (3, 4, 7, 8)) + [1] * (orientation in (2, 3, 6, 7))).contiguous()


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (H, W, 3) -> (size, size, 3), bicubic and antialiased: PIL's filter, a fifth of its time. In memory
    band lies after band, as it was made: whoever wants another order copies once."""
    planes = F.interpolate(pixels.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True)
    return planes[0].permute(1, 2, 0)


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """uint8 (H, W, 3) -> a JPEG's bytes, in half of PIL's time."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="420")


def save_jpeg(path: Path, image: Image.Image, quality: int) -> None:
    """PIL image -> file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=False) as file:
        image.save(file, "JPEG", quality=quality)
