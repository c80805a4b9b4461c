"""Pictures are RGB before anything resizes them, and images that cost too much are refused before they are decoded."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from assets.pool.raw_pool import _content
from resources.lake.files import sample_digest
from resources.pools.formats import open_pool
from resources.settings import PoolSettings
from resources.storage import images
from tests.support.pool_factory import picture, sample, write_shard


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def colours() -> Image.Image:
    return Image.open(io.BytesIO(picture(1, 60, 40, "PNG")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pictures_are_the_rgb_version_of_the_stored_image(mode: str) -> None:
    stored = colours().convert(mode)
    found = images.picture(encoded(stored))
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(stored.convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    stored = colours().quantize(16)
    data = encoded(stored, transparency=bytes(range(0, 160, 10)))
    assert np.array_equal(np.asarray(images.picture(data)), np.asarray(stored.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = np.asarray(images.picture(encoded(Image.fromarray(levels))))
    expected = np.rint(levels.astype(np.float64) * 255 / 65535)
    assert found.shape == (256, 256, 3)
    assert np.array_equal(found, np.repeat(expected[:, :, None], 3, axis=2))


def test_only_pictures_that_the_conversion_changes_make_a_shard_stale(tmp_path: Path) -> None:
    for name, mode in (("same", "L"), ("other", "P")):
        kinds = [sample(0), sample(1, image=encoded(colours().convert(mode)), suffix="png")]
        write_shard(tmp_path, kinds, name)
    pool = open_pool(PoolSettings(path=str(tmp_path)), {})
    same, other = pool.read_shard("same"), pool.read_shard("other")
    assert (same.converted, other.converted) == ([], [1])
    assert _content(same) == sample_digest(same.rows)
    assert _content(other) != sample_digest(other.rows)


def test_a_jpeg_of_very_many_scans_is_refused_and_a_usual_progressive_one_is_not() -> None:
    usual = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    assert images.check(usual, 10**8).width == 4000
    last = usual[usual.rindex(b"\xff\xda") : -2]
    many = usual[:-2] + last * 500 + usual[-2:]
    assert len(many) < 300_000
    for look in (images.check, images.picture):
        with pytest.raises(images.ImageError, match="scans of 4000 x 4000") as error:
            look(many, 10**8)
        assert error.value.reason == "image_bomb"


def test_a_thin_line_is_not_called_a_bomb() -> None:
    assert images.check(picture(0, 16 * 200, 16), 10**8).width == 3200
    with pytest.raises(images.ImageError) as error:
        images.check(picture(0, 16 * 201, 16), 10**8)
    assert error.value.reason == "image_too_thin"


@pytest.mark.parametrize(("suffix", "kind"), [("jfif", "JPEG"), ("jpe", "JPEG"), ("avif", "AVIF"), ("jpg", "AVIF")])
def test_jpeg_and_avif_are_read_under_all_their_suffixes(tmp_path: Path, suffix: str, kind: str) -> None:
    write_shard(tmp_path, [sample(0, image=encoded(colours(), kind), suffix=suffix)])
    found = open_pool(PoolSettings(path=str(tmp_path)), {}).read_shard("00000")
    assert found.rows["image_format"].to_pylist() == [kind]


@pytest.mark.parametrize(("kind", "name"), [("TIFF", "TIFF"), ("JPEG2000", "JPEG 2000")])
def test_a_format_that_is_not_read_is_named(kind: str, name: str) -> None:
    with pytest.raises(images.ImageError, match=f"not one of JPEG.*but {name}"):
        images.check(encoded(colours(), kind), 10**8)
