"""The members of a tar grouped into samples, for the pool reader and the exporter.

A sample is a run of members with one key and at most one image, one .txt and one .json. The key is the path up to the
first dot of the file name. Members of other kinds neither start nor end a sample: those with its key belong to it,
all others belong to none.

Here: which members form a sample. Not here: whether a sample is usable (`resources.pools.samples`).
"""

from dataclasses import dataclass, field

from resources.storage.tars import Member, TarIndex

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
_KINDS = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), "txt": "text", "json": "json"}


@dataclass(slots=True)
class TarSample:
    """The members of one sample.

    Attributes:
        key: path up to the first dot of the file name.
        image: the image.
        text: the .txt.
        json: the .json.
        others: members with other suffixes, each suffix once.
        cut: whether the tar ends inside the sample.
    """

    key: str
    image: Member | None = None
    text: Member | None = None
    json: Member | None = None
    others: list[Member] = field(default_factory=list)
    cut: bool = False

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
        The samples in the order of the tar, and the names of all members that are no image, .txt or .json. Of samples
        with one key, the first is the one that `raw_pool` may keep.
    """
    samples: list[TarSample] = []
    other_names: list[str] = []
    current: TarSample | None = None
    waiting: list[Member] = []  # members of other kinds, in case the next sample has their key
    for member in index.members if index.cut is None else [*index.members, index.cut]:
        key, suffix = split_name(member.name)
        kind = _KINDS.get(suffix.lower())
        if kind is None or not key or key.endswith("/"):
            other_names.append(member.name)
            if member is index.cut:
                continue
            if current is not None and current.key == key:
                _add_other(current, member)
            else:
                waiting.append(member)
            continue
        if current is None or current.key != key or getattr(current, kind) is not None:
            current = TarSample(key)
            samples.append(current)
            for other in waiting:
                if split_name(other.name)[0] == key:
                    _add_other(current, other)
            waiting = []
        setattr(current, kind, member)
        current.cut = member is index.cut
    if index.fault is not None and current is not None and len(samples) > 1:
        # A tar that ends between two members shows no cut: compare the last sample with the one before.
        current.cut = current.cut or not current.kinds >= samples[-2].kinds
    return samples, other_names


def members_by_key(index: TarIndex) -> dict[str, list[Member]]:
    """Return the members of each sample by key, in the order of the tar; of samples with one key, the first."""
    found: dict[str, list[Member]] = {}
    for sample in group_samples(index)[0]:
        if sample.key not in found:
            found[sample.key] = sample.members
    return found


def _add_other(sample: TarSample, member: Member) -> None:
    suffix = split_name(member.name)[1]
    if all(split_name(other.name)[1] != suffix for other in sample.others):
        sample.others.append(member)
