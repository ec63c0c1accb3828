"""Reading one image into a uint8 tensor, whatever its mode, or an error that names the file."""

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 200_000_000  # refused before decoding: no camera on the station and no tile mosaic comes near
MIN_SIDE = 4  # pixels; what is smaller shows no ground
# Not all that Pillow can: for some formats it would start other programs (EPS), whatever the file is called.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "JPEG2000", "GIF", "BMP", "PPM")


def read_image(path, size=None):
    """File -> uint8 (3, H, W) RGB tensor; size squashes it to size × size (antialiased), as the released models expect.

    Grey, palette, CMYK, 16-bit and alpha images become RGB (alpha over black). EXIF rotation is not applied: a
    footprint's corners belong to the stored pixels. Raises ValueError or FileNotFoundError naming the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{path}: {image.width} × {image.height} pixels, more than {MAX_PIXELS:,}; "
                                 f"scale the image down")
            if min(image.size) < MIN_SIDE:
                raise ValueError(f"{path}: {image.width} × {image.height} pixels, too small for an image; replace it")
            if size is not None:
                image.draft("RGB", (size, size))  # JPEG: decode at the smallest power-of-two scale that is enough
            image = _to_rgb(image)
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.array(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _to_rgb(image):
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")
