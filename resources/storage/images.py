"""Decoding images, for pools and encoders alike.

EXIF orientation is not applied, as open_clip does not apply it; width and height are those stored. A model's own
preprocessing converts to RGB: open_clip's `convert("RGB")` drops an alpha channel, transformers' puts white behind it.
`LOAD_TRUNCATED_IMAGES` stays off.
"""

import io
from dataclasses import dataclass

from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# scaling the shorter side of a thin line up to a model's input would make a huge image
MAX_ASPECT = 200


class ImageError(ValueError):
    """Bytes that are no usable image.

    Attributes:
        reason: image_empty, image_undecodable, image_truncated or image_bomb.
        detail: Pillow's message, or the numbers.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Size in pixels and format of a stored image."""

    width: int
    height: int
    format: str


def open_image(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    """Open an image from its header, without decoding pixels.

    Raises:
        ImageError: empty, unknown or unsupported bytes, more than `max_pixels`, or a line.
    """
    if not data:
        raise ImageError("image_empty", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("image_bomb", str(error)) from error
    except Exception as error:  # hostile bytes raise almost anything in Pillow
        raise ImageError("image_undecodable", _words(error)) from error
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("image_bomb", f"{width} x {height} px, thinner than 1 : {MAX_ASPECT}")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError("image_bomb", f"{width} x {height} px, more than {max_pixels:,} in all")
    return image


def load(image: ImageFile.ImageFile) -> None:
    """Decode all pixels.

    Raises:
        ImageError: the bytes are cut or damaged.
    """
    try:
        image.load()
    except Exception as error:  # hostile bytes raise almost anything in Pillow
        words = _words(error)
        cut = "truncated" in words.lower() or isinstance(error, EOFError)
        raise ImageError("image_truncated" if cut else "image_undecodable", words) from error


def check(data: bytes, max_pixels: int) -> ImageFacts:
    """Decode an image to find faults.

    JPEG is decoded at an eighth of its size: all of its data is still read, so the same faults show in less time.

    Raises:
        ImageError: see `open_image` and `load`.
    """
    image = open_image(data, max_pixels)
    width, height = image.size
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (max(1, width // 8), max(1, height // 8)))
    load(image)
    # MPO is a JPEG with more JPEGs behind it
    return ImageFacts(width, height, "JPEG" if image.format == "MPO" else str(image.format))


def picture(data: bytes, max_pixels: int | None = None, draft: int | None = None) -> ImageFile.ImageFile:
    """Return a decoded image, ready for a model's transform.

    Args:
        data: the image's bytes.
        max_pixels: a larger image is a fault.
        draft: pixels. A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as no side falls below this. The
            decoder then skips frequencies, which is faster than decoding and scaling down.

    Raises:
        ImageError: see `open_image` and `load`.
    """
    image = open_image(data, max_pixels)
    if draft is not None:
        image.draft(None, (draft, draft))
    load(image)
    return image


def _words(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not one of {', '.join(FORMATS)}"
    return f"{type(error).__name__}: {error}"
