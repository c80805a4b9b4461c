"""The members of a tar grouped into samples, for the pool reader and the exporter.

A sample has the members of one key: the path up to the first dot of the file name, as in webdataset. Its members need
not be neighbours. A suffix that occurs again starts another sample of that key. Of several images, the first is the
sample's image. Members with other suffixes neither start nor end a sample: those with its key belong to it, all others
belong to none.

A name such as `a.input.jpg` has the key `a` and the suffix `input.jpg`, which is no image. If a key has only such
members, they still count as one sample, or, if it has several images (`v1.0001.jpg`, `v1.0002.jpg`), as one sample for
each name up to its last dot. Such samples have no image, text or json, only `others`.

Here: which members form a sample. Not here: whether a sample is usable (`resources.pools.samples`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from resources.storage.tars import Member, TarIndex

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "avif"})
OTHER_IMAGE_SUFFIXES = frozenset(
    {"tif", "tiff", "heic", "heif", "jp2", "j2k", "jpx", "jxl", "ico", "svg", "psd", "tga", "ppm", "pgm", "pbm", "exr"}
)
"""Suffixes of images that are not read: a sample with one is rejected for its format."""

_KINDS = {**dict.fromkeys(IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES, "image"), "txt": "text", "json": "json"}


@dataclass(slots=True)
class TarSample:
    """The members of one sample.

    Attributes:
        key: path up to the first dot of the file name.
        image: the image.
        text: the .txt.
        json: the .json.
        others: members with other suffixes, each suffix once, and images after the first.
        cut: whether the tar ends inside the sample.
        scattered: whether members of other samples are between its own.
    """

    key: str
    image: Member | None = None
    text: Member | None = None
    json: Member | None = None
    others: list[Member] = field(default_factory=list)
    cut: bool = False
    scattered: bool = False
    suffixes: set[str] = field(default_factory=set)

    @property
    def kinds(self) -> set[str]:
        """The kinds of member it has: image, text, json."""
        return {kind for kind in ("image", "text", "json") if getattr(self, kind) is not None}

    @property
    def members(self) -> list[Member]:
        """All members in the order of the tar."""
        found = [self.image, self.text, self.json, *self.others]
        return sorted((member for member in found if member is not None), key=lambda member: member.offset)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its file name into key and suffix; a leading `./` is dropped."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem).removeprefix("./"), suffix


def group_samples(index: TarIndex) -> tuple[list[TarSample], list[str]]:
    """Group the members of a tar into samples.

    Returns:
        The samples in the order of the tar, and the names of the members that are no image, .txt or .json and do not
        count as a sample. Of samples with one key, the first is the one that `raw_pool` may keep.
    """
    samples: list[TarSample] = []
    by_key: dict[str, list[TarSample]] = {}
    other_names: list[str] = []
    current: TarSample | None = None
    for member in index.members if index.cut is None else [*index.members, index.cut]:
        key, suffix = split_name(member.name)
        kind = _KINDS.get(suffix.lower())
        unnamed = not key or key.endswith("/")
        if kind is None or unnamed:
            other_names.append(member.name)
            if unnamed or member is index.cut:
                continue
        if current is None or current.key != key or suffix in current.suffixes:
            of_key = by_key.setdefault(key, [])
            found = next((sample for sample in of_key if suffix not in sample.suffixes), None)
            if found is not None:
                found.scattered = True
            elif of_key and kind is None:
                continue  # such a member again
            else:
                found = TarSample(key)
                of_key.append(found)
                samples.append(found)
            current = found
        _add(current, member, kind, suffix)
        current.cut = current.cut or member is index.cut
    samples = [counted for sample in samples for counted in _counted(sample)]
    if index.fault is not None and len(samples) > 1:
        # A tar that ends between two members shows no cut: compare the kinds of members with those of another sample.
        if any(sample.scattered for sample in samples):
            for sample in samples:
                sample.cut = sample.cut or not sample.kinds >= samples[0].kinds
        else:
            samples[-1].cut = samples[-1].cut or not samples[-1].kinds >= samples[-2].kinds
    counted_names = {member.name for sample in samples if not sample.kinds for member in sample.others}
    return samples, [name for name in other_names if name not in counted_names]


def members_by_key(index: TarIndex) -> dict[str, list[Member]]:
    """Return the members of each sample by key, in the order of the tar; of samples with one key, the first."""
    found: dict[str, list[Member]] = {}
    for sample in group_samples(index)[0]:
        if sample.key not in found:
            found[sample.key] = sample.members
    return found


def _add(sample: TarSample, member: Member, kind: str | None, suffix: str) -> None:
    sample.suffixes.add(suffix)
    if kind is None:
        sample.others.append(member)
    elif getattr(sample, kind) is None:
        setattr(sample, kind, member)
    elif kind == "image" and _unread(sample.image) and not _unread(member):
        assert sample.image is not None
        sample.others.append(sample.image)
        sample.image = member
    else:
        sample.others.append(member)


def _unread(image: Member | None) -> bool:
    return image is not None and split_name(image.name)[1].lower() in OTHER_IMAGE_SUFFIXES


def _counted(sample: TarSample) -> Iterator[TarSample]:
    """Yield the sample, or the samples that a key without image, text and json counts as; see the module."""
    if sample.kinds:
        yield sample
        return
    stems: dict[str, list[Member]] = {}
    images = 0
    for member in sample.others:
        stem, _, last = member.name.rpartition(".")
        kind = _KINDS.get(last.lower())
        if kind is not None:
            stems.setdefault(stem.removeprefix("./"), []).append(member)
            images += kind == "image"
    if images > 1:
        for stem, members in stems.items():
            yield TarSample(stem, others=members)
    elif stems:
        yield sample
