"""Held-out pairs of image and caption: a webdataset tar, or a folder of them."""

from collections.abc import Iterator

from core.errors import UserError
from resources.storage import files, tars
from resources.storage.tar_samples import group_samples

MOST = 10_000
"""Pairs at most: retrieval compares every image with every caption."""


class PairsError(UserError, ValueError):
    """Pairs cannot be read; the message names the path and the remedy."""


def list_pairs(path: str) -> list[files.Listed]:
    """List the tars of held-out pairs.

    Raises:
        PairsError: there is none.
    """
    try:
        if path.endswith(".tar"):
            return [files.stat(path)]
        found = [file for file in files.list_folder(path) if file.name.endswith(".tar")]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PairsError(f"tasks.retrieval: {path} does not exist. Remedy: a tar, or a folder of tars") from error
    if not found:
        raise PairsError(f"tasks.retrieval: there is no .tar in {path}. Remedy: a tar, or a folder of tars")
    return found


def read_pairs(path: str) -> Iterator[tuple[bytes, str]]:
    """Yield the bytes of each image, and its caption, the sample's .txt.

    Raises:
        PairsError: a tar cannot be read, a sample has no caption, or there are none or too many.
    """
    pairs = 0
    for file in list_pairs(path):
        with files.mapped(file.url) as view:
            try:
                index = tars.walk(view, file.url)
            except tars.TarError as error:
                raise PairsError(f"tasks.retrieval: {error}") from error
            for sample in group_samples(index)[0]:
                if sample.image is None:
                    continue
                if sample.text is None or sample.cut:
                    what = "is cut off" if sample.cut else "has no .txt"
                    raise PairsError(f"tasks.retrieval: {file.url}: {sample.key} {what}. Remedy: write the tar again")
                image, text = (
                    bytes(view[member.offset : member.offset + member.size]) for member in (sample.image, sample.text)
                )
                pairs += 1
                if pairs > MOST:
                    raise PairsError(f"tasks.retrieval: more than {MOST:,} pairs in {path}. Remedy: fewer pairs")
                yield image, text.decode("utf-8", "replace").strip()
    if not pairs:
        raise PairsError(f"tasks.retrieval: there is no image in {path}. Remedy: a webdataset of .jpg and .txt")
