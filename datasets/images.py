"""Reading one image into a uint8 tensor, whatever its mode, or an error that names the file.

JPEGs are decoded by simplejpeg, at the power-of-two scale that is just enough; what it refuses goes to PIL, which
reads more kinds and words the errors. Pixels are the same as PIL's alone. experiments/speed_input.py compares decoders.
"""

import io
import os
import stat
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

MAX_PIXELS = 200_000_000  # refused before decoding: no camera on the station and no tile mosaic comes near
MIN_SIDE = 4  # pixels; what is smaller shows no ground
# Not all that Pillow can: for some formats it would start other programs (EPS), whatever the file is called.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "JPEG2000", "GIF", "BMP", "PPM")


def read_image(path, size=None):
    """File -> uint8 (3, H, W) RGB tensor; size squashes it to size × size (antialiased), whatever its aspect.

    Grey, palette, CMYK, 16-bit and alpha images become RGB (alpha over black). EXIF rotation is not applied: a
    footprint's corners belong to the stored pixels. Raises ValueError or FileNotFoundError naming the file.
    """
    return read_pixels(path, size).permute(2, 0, 1).contiguous()


def read_pixels(path, size=None, into=None):
    """As read_image, but (H, W, 3), the order in which pixels are decoded: no turning round, a tenth of the time.

    into: contiguous uint8 (size, size, 3) to be filled and returned; what it holds after an error is undefined.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would be waited for
            raise ValueError(f"{path}: cannot be read as an image (not a regular file); replace or remove it")
        content = Path(path).read_bytes()
        pixels = decode_jpeg(content, size, into)
        pixels = torch.from_numpy(decode_any(content, path, size) if pixels is None else pixels)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be read as an image (of no known kind); replace or remove the file") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from error
    if size is not None and pixels.shape[:2] != (size, size):
        pixels = resize(pixels, size)
    return pixels if into is None or pixels.data_ptr() == into.data_ptr() else into.copy_(pixels)


def decode_jpeg(content, size=None, into=None):
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


def decode_any(content, path, size=None):
    """Bytes -> uint8 (H, W, 3) by PIL, JPEGs at the same scale. Raises ValueError, or what PIL raises."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{path}: {image.width} × {image.height} pixels, more than {MAX_PIXELS:,}; "
                             f"scale the image down")
        if min(image.size) < MIN_SIDE:
            raise ValueError(f"{path}: {image.width} × {image.height} pixels, too small for an image; replace it")
        if size is not None:
            image.draft("RGB", (size, size))
        return np.array(_to_rgb(image))


def resize(pixels, size):
    """uint8 (H, W, 3) -> (size, size, 3), bicubic and antialiased: PIL's filter, a fifth of its time."""
    planes = F.interpolate(pixels.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True)
    return planes[0].permute(1, 2, 0).contiguous()


def _to_rgb(image):
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")


def save_jpeg(path, image, quality):
    """PIL image -> file, whole or not at all; its folder is made. Several processes must not write one file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, "JPEG", quality=quality)
    os.replace(temporary, path)
