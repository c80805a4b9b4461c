"""Target sets: a downstream task's images with their classes, or ready-made features of them.

Layouts of images: a folder of class folders; a tar of one; a webdataset tar; a folder of webdataset tars. In a
webdataset the label is the sample's .cls member, else "". Ready-made features are .npy, .npz or .pt; pickles are
refused. Rows are sorted by name (in a tar, in the order of its members), so they do not depend on the file system.
"""

import contextlib
import fnmatch
import glob
import posixpath
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.errors import UserError
from resources.models.encoders import Encoder, EncoderError
from resources.settings import TargetFeatures, TargetSettings
from resources.storage import files, tars
from resources.storage.arrays import ArrayError, array_names, open_array
from resources.storage.tar_samples import IMAGE_SUFFIXES

_KEY = "image_features"
_LABELS = ("labels", "label", "targets")
_SHOWN = 5


class TargetError(UserError, ValueError):
    """A target cannot be read; the message names the path and the remedy."""


@dataclass(frozen=True, slots=True)
class TargetEmbeddings:
    """A target's embeddings.

    Attributes:
        image: float16 [n, d], unit norm.
        labels: class of each, or "".
        names: file, key or row of each.
        notes: remarks for the user, one sentence each.
    """

    image: np.ndarray
    labels: list[str]
    names: list[str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TargetImage:
    """One image of a target: its class (or ""), its name and its bytes."""

    label: str
    name: str
    data: bytes


class Target:
    """One target set.

    Args:
        name: its name in the project.
        settings: paths of its images and features.
    """

    def __init__(self, name: str, settings: TargetSettings) -> None:
        self.name = name
        self.settings = settings

    def fingerprint(self, encoder_name: str) -> str:
        """Return a hash of name, size and time of all files for an encoder, as 32 hexadecimal digits.

        Raises:
            TargetError: a file is missing.
        """
        features = self.settings.features.get(encoder_name)
        if features is not None:
            return files.fingerprint(self._feature_files(features))
        return files.fingerprint([file for _, file in self._listing()])

    def count(self, encoder_name: str) -> int | None:
        """Return how many images there are to embed; None where they are in tars, or features are read.

        Raises:
            TargetError: a file is missing.
        """
        if encoder_name in self.settings.features:
            return None
        listed = self._listing()
        return None if any(file.name.endswith(".tar") for _, file in listed) else len(listed)

    def require_labels(self, encoder_name: str) -> None:
        """Check that the images have classes, as far as this needs no decoding and no reading of features.

        Raises:
            TargetError: they have not, or a file is missing.
        """
        features = self.settings.features.get(encoder_name)
        if features is None:
            labels: list[str] = []
            for label, file in self._listing():
                if file.name.endswith(".tar"):
                    with self._tar(file) as (_, members):
                        labels += [label for label, _ in members]
                else:
                    labels.append(label)
            require_classes(self.name, labels)
            return
        for file in self._feature_files(features):
            named = array_names(file.url) if file.url.endswith(".npz") else []
            if file.url.endswith((".npy", ".npz")) and not set(_LABELS) & set(named):
                require_classes(self.name, [""])

    def images(self, on_listed: Callable[[int], None] | None = None) -> Iterator[TargetImage]:
        """Yield all images; bytes are read one image at a time.

        Args:
            on_listed: called once with the number of images, unless they are in tars.

        Raises:
            TargetError: there is no image.
        """
        none = True
        listed = self._listing()
        if on_listed is not None and not any(file.name.endswith(".tar") for _, file in listed):
            on_listed(len(listed))
        for label, file in listed:
            if file.name.endswith(".tar"):
                for image in self._tar_images(file):
                    none = False
                    yield image
            else:
                none = False
                with files.open_binary(file.url) as opened:
                    yield TargetImage(label, file.name, opened.read())
        if none:
            raise self._no_images()

    def embed(
        self,
        encoder: Encoder,
        on_rows: Callable[[int], None] | None = None,
        on_listed: Callable[[int], None] | None = None,
    ) -> TargetEmbeddings:
        """Return the target's image embeddings: its features for this encoder, else embeddings of its images.

        Args:
            encoder: the encoder.
            on_rows: called with the number of images just embedded.
            on_listed: called once with the number of images to embed, unless they are in tars.

        Raises:
            TargetError: no images or features, features with NaN, or no readable image.
            EncoderError: the encoder has no model or cannot be loaded.
        """
        features = self.settings.features.get(encoder.name)
        if features is not None:
            return self._features(features)
        if self.settings.path is None:
            raise TargetError(
                f"target {self.name} has features for {', '.join(self.settings.features)} and no "
                f"images, so it has no embeddings for encoder {encoder.name}. Add features for it, or "
                "set the target's `path`."
            )
        if encoder.settings.model is None:
            raise EncoderError(
                f"target {self.name} is images, and encoder {encoder.name} has no model to embed "
                "them. Set the encoder's `model`, or give the target `features` for it."
            )
        labels: list[str] = []
        names: list[str] = []

        def named() -> Iterator[tuple[str, bytes]]:
            for image in self.images(on_listed):
                labels.append(image.label)
                names.append(image.name)
                yield image.name, image.data

        found = encoder.embed_images(named(), max_pixels=self.settings.max_pixels, on_rows=on_rows)
        kept = found.kept.tolist()
        notes = list(found.notes)
        if found.faults:
            shown = "; ".join(f"{name} ({reason})" for name, reason in found.faults[:_SHOWN])
            more = len(found.faults) - _SHOWN
            notes.append(
                f"skipped {len(found.faults)} of {len(names)} images that cannot be decoded: "
                f"{shown}{f'; and {more} more' if more > 0 else ''}"
            )
        if not kept:
            raise TargetError(
                f"target {self.name}: not one image in {self.settings.path} can be decoded: "
                f"{notes[-1]}. Replace the files."
            )
        return TargetEmbeddings(found.image, [labels[i] for i in kept], [names[i] for i in kept], notes)

    # --- images -----------------------------------------------------------------------------

    def _listing(self) -> list[tuple[str, files.Listed]]:
        """List image files with their class, or tars with ""; names are paths in the target."""
        path = self.settings.path
        if path is None:
            raise TargetError(f"target {self.name} has no `path` to images. Set it.")
        try:
            if path.endswith(".tar"):
                return [("", files.stat(path))]
            top = files.list_folder(path)
            listed = [("", file) for file in top if file.name.endswith(".tar")]
            if not listed:
                listed = [(_label(file.name), file) for file in files.list_tree(path) if _is_image(file.name)]
        except FileNotFoundError as error:
            raise TargetError(
                f"target {self.name}: {path} does not exist. Set the target's `path`; a relative "
                "one starts at the config file."
            ) from error
        except NotADirectoryError as error:
            raise TargetError(
                f"target {self.name}: {path} is neither a folder nor a .tar. Set the target's "
                "`path` to one, or give `features`."
            ) from error
        if not listed:
            raise self._no_images()
        return listed

    def _tar_images(self, file: files.Listed) -> Iterator[TargetImage]:
        with self._tar(file) as (view, members):
            for label, member in members:
                name = member.name.encode("utf-8", "replace").decode()
                yield TargetImage(label, name, bytes(view[member.offset : member.offset + member.size]))

    @contextlib.contextmanager
    def _tar(self, file: files.Listed) -> Iterator[tuple[memoryview, list[tuple[str, tars.Member]]]]:
        """Yield a tar's bytes, and its images' classes and places."""
        with files.mapped(file.url) as view:
            try:
                index = tars.walk(view, file.url)
            except tars.TarError as error:
                raise TargetError(f"target {self.name}: {error}") from error
            if index.fault is not None:
                raise TargetError(
                    f"target {self.name}: {file.url} is incomplete ({index.fault}). Download or write it again."
                )
            classes = {
                member.name[: -len(".cls")]: bytes(view[member.offset : member.offset + member.size])
                .decode(errors="replace")
                .strip()
                for member in index.members
                if member.name.endswith(".cls")
            }
            webdataset = bool(classes) or any(member.name.endswith((".txt", ".json")) for member in index.members)
            members = []
            for member in index.members:
                if _is_image(member.name):
                    stem = member.name.rpartition(".")[0]
                    label = classes.get(stem, "") if webdataset else _label(member.name)
                    members.append((label.encode("utf-8", "replace").decode(), member))
            yield view, members

    def _no_images(self) -> TargetError:
        return TargetError(
            f"target {self.name}: there is no image in {self.settings.path}; looked for class "
            f"folders with files ending in {', '.join(sorted(IMAGE_SUFFIXES))}, and for tars of them. Set "
            "the target's `path` to such a folder or tar, or give `features`."
        )

    # --- features ---------------------------------------------------------------------------

    def _feature_files(self, features: TargetFeatures) -> list[files.Listed]:
        found: list[files.Listed] = []
        for pattern in features.files:
            if glob.has_magic(pattern):
                folder, _, last = pattern.rpartition("/")
                with contextlib.suppress(FileNotFoundError):
                    matches = [file for file in files.list_folder(folder) if fnmatch.fnmatchcase(file.name, last)]
                    found += matches
                    if matches:
                        continue
            else:
                with contextlib.suppress(FileNotFoundError):
                    found.append(files.stat(pattern))
                    continue
            raise TargetError(
                f"target {self.name}: there is no features file {pattern}. Correct the path; a "
                "relative one starts at the config file."
            )
        return found

    def _features(self, features: TargetFeatures) -> TargetEmbeddings:
        blocks: list[np.ndarray] = []
        labels: list[str] = []
        names: list[str] = []
        scaled = 0
        for file in self._feature_files(features):
            try:
                array, classes = _read_features(file, features.key)
            except ArrayError as error:
                raise TargetError(f"target {self.name}: {error}") from error
            if array.ndim != 2 or array.dtype.kind != "f" or not len(array):
                raise TargetError(
                    f"target {self.name}: {file.url} holds {array.dtype} of shape {array.shape}, "
                    "and features are floating-point numbers [images, d]. Set its `key`."
                )
            if blocks and array.shape[1] != blocks[0].shape[1]:
                raise TargetError(
                    f"target {self.name}: features in {file.url} have {array.shape[1]} numbers, "
                    f"and {blocks[0].shape[1]} in the file before. Give files of one encoder."
                )
            full = array.astype(np.float32)
            norms = np.linalg.norm(full, axis=1)
            bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
            if len(bad):
                shown = ", ".join(map(str, bad[:_SHOWN].tolist()))
                raise TargetError(
                    f"target {self.name}: {len(bad)} rows of {file.url} have NaN or infinity, or "
                    f"are all zero (rows {shown}{' …' if len(bad) > _SHOWN else ''}). Remove them."
                )
            off = np.abs(norms - 1) > 1e-2
            scaled += int(off.sum())
            # rows of unit norm are kept bit for bit
            full[off] /= norms[off, None]
            blocks.append(full.astype(np.float16))
            labels += classes if classes is not None else [""] * len(full)
            names += [f"{file.name}:{row}" for row in range(len(full))]
        notes = [f"{scaled} rows were not of unit norm and were normalised"] if scaled else []
        return TargetEmbeddings(np.concatenate(blocks), labels, names, notes)


def open_target(name: str, settings: TargetSettings) -> Target:
    """Return a target set; nothing is read yet."""
    return Target(name, settings)


def require_classes(target: str, labels: Collection[str]) -> None:
    """Check that every image of a target has a class, and that there are at least two classes.

    Raises:
        TargetError: not so.
    """
    without = sum(not label for label in labels)
    if without or len(set(labels)) < 2:
        found = f"{without} of its {len(labels)} images have none" if without else "its images have one class in all"
        raise TargetError(
            f"target {target} has no class labels to learn from: {found}. Remedy: class folders, .cls members in a "
            "tar, or `labels` beside the features"
        )


def _is_image(path: str) -> bool:
    name = posixpath.basename(path)
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def _label(path: str) -> str:
    """Return the name of an image's folder; "" at the top."""
    return posixpath.basename(posixpath.dirname(path))


def _read_features(file: files.Listed, key: str | None) -> tuple[np.ndarray[Any, Any], list[str] | None]:
    """Read an array of features and, if the file has them, the labels."""
    if file.url.endswith(".npy"):
        with open_array(file.url) as stream:
            return stream.all(), None
    if file.url.endswith(".npz"):
        names = array_names(file.url)
        with open_array(file.url, _choose(names, key, file.url)) as stream:
            array = stream.all()
        for name in _LABELS:
            if name in names and name != key:
                with open_array(file.url, name) as stream:
                    if stream.shape == array.shape[:1]:
                        return array, [str(label) for label in stream.all().tolist()]
        return array, None
    if file.url.endswith((".pt", ".pth")):
        return _read_torch(file, key)
    raise ArrayError(f"{file.url}: features are .npy, .npz or .pt files. Save them as one of these.")


def _read_torch(file: files.Listed, key: str | None) -> tuple[np.ndarray[Any, Any], list[str] | None]:
    import pickle

    import torch

    try:
        with files.open_binary(file.url) as opened:
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArrayError(
            f"{file.url} holds more than tensors: a pickle, which can run code when it is loaded, "
            "and is refused. Save a dict of tensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ArrayError(f"{file.url} cannot be read ({error}). Write the file again.") from error
    if isinstance(content, torch.Tensor):
        return content.float().numpy(), None
    if not isinstance(content, dict):
        raise ArrayError(f"{file.url} holds a {type(content).__name__}. Save a dict of tensors.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    array = tensors[_choose(list(tensors), key, file.url)].float().numpy()
    for name in _LABELS:
        if name in tensors and tensors[name].shape == array.shape[:1]:
            return array, [str(label) for label in tensors[name].tolist()]
    return array, None


def _choose(names: list[str], key: str | None, url: str) -> str:
    """Choose an array: by its key, else image_features, else the only one."""
    if key is None and _KEY in names:
        return _KEY
    if key is None and len(names) == 1:
        return names[0]
    if key is None or key not in names:
        wanted = f"{key!r}" if key is not None else f"{_KEY!r}, and it is not the only one"
        raise ArrayError(f"{url} has no array {wanted}; it has: {', '.join(names) or 'none'}. Set `key`.")
    return key
