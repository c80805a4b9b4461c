"""Decoding images, for pools and encoders alike.

EXIF orientation is not applied, as open_clip does not apply it; width and height are those stored. Pictures are RGB
before any resizing, as webdataset's `pilrgb` makes them for training: an alpha channel is dropped, and 16 bits of grey
are scaled to 8 (Pillow would clip them). `LOAD_TRUNCATED_IMAGES` stays off.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, features

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", *(("AVIF",) if features.check("avif") else ()))
# scaling the shorter side of a thin line up to a model's input would make a huge image
MAX_ASPECT = 200
# Each scan of a progressive JPEG costs a pass over all pixels and may be a few bytes long. Encoders write 10 or so.
_USUAL_SCANS = 16
_MAX_SCANNED = 500_000_000  # scans times pixels, about 2 seconds
_GREY_16 = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_UNCHANGED = frozenset({"RGB", "L"})
_OTHER_FORMATS = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"8BPS": "PSD",
    b"<svg": "SVG",
    b"<!DO": "HTML",
    b"<htm": "HTML",
}


class ImageError(ValueError):
    """Bytes that are no usable image.

    Attributes:
        reason: image_empty, image_undecodable, image_truncated, image_too_thin or image_bomb.
        detail: Pillow's message, or the numbers.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Size in pixels and format of a stored image, and whether `picture` converts it to RGB in a way that matters.

    Grey images of 8 bits are the same whether they become RGB before or after resizing.
    """

    width: int
    height: int
    format: str
    converted: bool = False


def open_image(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    """Open an image from its header, without decoding pixels.

    Raises:
        ImageError: empty, unknown or unsupported bytes, more than `max_pixels`, a line, or too many scans.
    """
    if not data:
        raise ImageError("image_empty", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("image_bomb", str(error)) from error
    except Exception as error:  # hostile bytes raise almost anything in Pillow
        raise ImageError("image_undecodable", _words(error, data)) from error
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("image_too_thin", f"{width} x {height} px, thinner than 1 : {MAX_ASPECT}")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError("image_bomb", f"{width} x {height} px, more than {max_pixels:,} in all")
    if image.format in ("JPEG", "MPO"):
        scans = data.count(b"\xff\xda")
        if scans > _USUAL_SCANS and scans * width * height > _MAX_SCANNED:
            raise ImageError("image_bomb", f"{scans} scans of {width} x {height} px, which take too long to decode")
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
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    return ImageFacts(width, height, kind, converted=image.mode not in _UNCHANGED)


def picture(data: bytes, max_pixels: int | None = None, draft: int | None = None) -> Image.Image:
    """Return a decoded image in RGB, ready for a model's transform.

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
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB; the image itself if it is already."""
    if image.mode == "RGB":
        return image
    if image.mode in _GREY_16:
        levels = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns otherwise
    return image.convert("RGB")


def _words(error: Exception, data: bytes = b"") -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        start = data[:16]
        found = next((name for magic, name in _OTHER_FORMATS.items() if start.startswith(magic)), None)
        if start[4:8] == b"ftyp":
            found = "AVIF" if start[8:12] in (b"avif", b"avis") else "HEIF or a video"
        return f"not one of {', '.join(FORMATS)}" + (f", but {found}" if found else "")
    return f"{type(error).__name__}: {error}"
