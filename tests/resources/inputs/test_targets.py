"""Targets: images of a downstream task, their classes, and precomputed features."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resources.inputs.targets import Target, TargetError, open_target
from resources.models.encoders import Encoder, EncoderError
from resources.settings import EncoderSettings, TargetSettings
from tests.support.pool_factory import (
    SHARED,
    class_folders,
    picture,
    sample,
    unit_rows,
    write_shard,
    write_tar,
)

REAL = SHARED / "data" / "targets"
PRECOMPUTED = Encoder("b32", EncoderSettings(precomputed="b32", temperature=0.01))


def target(path: Path) -> Target:
    return open_target("pets", TargetSettings(path=str(path)))


def features(files: Any, **options: Any) -> Target:
    settings = {"features": {"b32": {"files": files, **options} if options else files}}
    return open_target("pets", TargetSettings.model_validate(settings))


@pytest.fixture
def model(tiny_clip: Path) -> Encoder:
    return Encoder("tiny", EncoderSettings(model=f"local-dir:{tiny_clip}", workers=0, batch_size=4))


def listed(found: Target) -> list[tuple[str, str]]:
    return [(image.label, image.name) for image in found.images()]


def test_a_folder_of_class_folders_gives_classes_and_paths(tmp_path: Path) -> None:
    class_folders(tmp_path, images=2)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "dog" / ".001.jpg").write_bytes(b"a trace that macOS leaves")
    found = list(target(tmp_path).images())
    assert [(image.label, image.name) for image in found] == [
        ("cat", "cat/000.jpg"),
        ("cat", "cat/001.jpg"),
        ("dog", "dog/000.jpg"),
        ("dog", "dog/001.jpg"),
    ]
    assert found[2].data == picture(1002)


def test_a_tar_of_class_folders_is_the_same_as_the_folder(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets")
    members = [(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob("*.jpg"))]
    tar = write_tar(tmp_path / "pets.tar", members)
    assert list(target(tar).images()) == list(target(folder).images())


def test_a_webdataset_gives_keys_and_the_classes_it_has(tmp_path: Path) -> None:
    write_shard(tmp_path / "many", [sample(0), sample(1)], "a")
    write_tar(tmp_path / "many" / "b.tar", [("x.jpg", picture(5)), ("x.cls", b"7\n")])
    assert listed(target(tmp_path / "many")) == [
        ("", "000000000.jpg"),
        ("", "000000001.jpg"),
        ("7", "x.jpg"),
    ]
    assert listed(target(tmp_path / "many" / "b.tar")) == [("7", "x.jpg")]


@pytest.mark.parametrize("form", ["folder", "tar", "webdataset", "npz", "pt"])
def test_labels_are_found_without_decoding(tmp_path: Path, form: str) -> None:
    """The images are no images, so decoding one would fail."""
    names = ["cat/1.jpg", "dog/1.jpg"]
    if form == "folder":
        for name in names:
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(b"no image")
        found = target(tmp_path)
    elif form == "tar":
        found = target(write_tar(tmp_path / "pets.tar", [(name, b"no image") for name in names]))
    elif form == "webdataset":
        members = [(f"{n}.{kind}", data) for n in "ab" for kind, data in (("jpg", b"no image"), ("cls", n.encode()))]
        found = target(write_tar(tmp_path / "pets.tar", members))
    else:
        rows, labels = unit_rows(1, 2).astype(np.float32), np.arange(2)
        np.savez(tmp_path / "f.npz", image_features=rows, labels=labels)
        torch.save({"image_features": torch.from_numpy(rows), "labels": torch.from_numpy(labels)}, tmp_path / "f.pt")
        found = features(f"{tmp_path}/f.{form}")
    found.require_labels("b32")


def test_a_target_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    write_tar(tmp_path / "empty.tar", [("notes.txt", b"no image")])
    for path in (tmp_path / "empty", tmp_path / "empty.tar"):
        with pytest.raises(TargetError, match=rf"pets: there is no image in {path}.*class folders"):
            list(target(path).images())
    with pytest.raises(TargetError, match=r"no does not exist"):
        list(target(tmp_path / "no").images())
    with pytest.raises(TargetError, match=r"neither a folder nor a \.tar"):
        list(target(tmp_path / "empty" / "notes.txt").images())


def test_a_cut_tar_is_an_error_because_a_target_must_be_whole(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "pets.tar", [("cat/0.jpg", picture(0)), ("cat/1.jpg", picture(1))])
    tar.write_bytes(tar.read_bytes()[: 1024 + len(picture(0)) + 600])
    with pytest.raises(TargetError, match=r"pets\.tar is incomplete"):
        list(target(tar).images())


def test_a_fingerprint_follows_every_file_and_is_cheap(tmp_path: Path) -> None:
    class_folders(tmp_path)
    found = target(tmp_path)
    before = found.fingerprint("tiny")
    assert found.fingerprint("other") == before
    file = tmp_path / "dog" / "000.jpg"
    os.utime(file, ns=(0, 0))
    touched = found.fingerprint("tiny")
    assert touched != before
    file.rename(tmp_path / "cat" / "009.jpg")
    assert found.fingerprint("tiny") not in (before, touched)


def test_images_are_embedded_in_order_with_their_classes(tmp_path: Path, model: Encoder) -> None:
    class_folders(tmp_path)
    found = target(tmp_path).embed(model)
    assert found.labels == ["cat"] * 3 + ["dog"] * 3
    assert found.names[-1] == "dog/002.jpg"
    assert found.notes == []
    alone = model.embed_images([("x", picture(1005))]).image[0]
    np.testing.assert_allclose(found.image[-1], alone, atol=5e-4)


def test_an_image_that_cannot_be_decoded_is_left_out_by_name(tmp_path: Path, model: Encoder) -> None:
    class_folders(tmp_path)
    (tmp_path / "cat" / "001.jpg").write_bytes(picture(0)[:-200])
    found = target(tmp_path).embed(model)
    assert found.names == ["cat/000.jpg", "cat/002.jpg", *(f"dog/{i:03d}.jpg" for i in range(3))]
    assert len(found.image) == len(found.labels) == 5
    (note,) = found.notes
    assert "1 of 6" in note
    assert "cat/001.jpg (image_truncated" in note
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(TargetError, match="not one image"):
        target(tmp_path).embed(model)


def test_images_need_an_encoder_with_a_model(tmp_path: Path) -> None:
    class_folders(tmp_path)
    with pytest.raises(EncoderError, match=r"pets is images, and encoder b32 has no model.*features"):
        target(tmp_path).embed(PRECOMPUTED)


@pytest.mark.parametrize("form", ["npy", "npz", "pt", "bare.pt"])
def test_features_are_read_as_stored(tmp_path: Path, form: str) -> None:
    rows = unit_rows(3, 5)
    path = tmp_path / f"features.{form}"
    if form == "npy":
        np.save(path, rows)
    elif form == "npz":
        np.savez(path, image_features=rows, labels=np.arange(5), other=np.zeros(3))
    elif form == "pt":
        torch.save({"image_features": torch.tensor(rows), "labels": torch.arange(5)}, path)
    else:
        torch.save(torch.tensor(rows), path)
    found = features(str(path)).embed(PRECOMPUTED)
    assert np.array_equal(found.image, rows)
    assert found.image.dtype == np.float16
    assert found.labels == ([str(i) for i in range(5)] if form in ("npz", "pt") else [""] * 5)
    assert found.names[4] == f"features.{form}:4"
    assert found.notes == []


def test_several_files_are_one_target_in_the_order_of_their_names(tmp_path: Path) -> None:
    for i in (1, 0, 2):
        np.save(tmp_path / f"part_{i}.npy", unit_rows(i, 2))
    pattern = features(str(tmp_path / "part_*.npy"))
    whole = np.concatenate([unit_rows(i, 2) for i in range(3)])
    assert np.array_equal(pattern.embed(PRECOMPUTED).image, whole)
    chosen = features([str(tmp_path / "part_2.npy"), str(tmp_path / "part_0.npy")])
    assert np.array_equal(chosen.embed(PRECOMPUTED).image, whole[[4, 5, 0, 1]])
    before = pattern.fingerprint("b32")
    assert before != chosen.fingerprint("b32")
    np.save(tmp_path / "part_3.npy", unit_rows(3, 2))
    assert pattern.fingerprint("b32") != before


def test_features_of_another_norm_are_normalised_and_noted(tmp_path: Path) -> None:
    rows = unit_rows(3, 5).astype(np.float32)
    scaled = rows * np.array([[1], [7], [0.5], [1], [1.001]], np.float32)
    np.save(tmp_path / "f.npy", scaled)
    found = features(str(tmp_path / "f.npy")).embed(PRECOMPUTED)
    exact = scaled[:3].astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(found.image[:3], exact, atol=5e-4)
    assert found.notes == ["2 rows were not of unit norm and were normalised"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_features_without_a_direction_are_refused_by_row(tmp_path: Path, value: float) -> None:
    rows = unit_rows(3, 5).astype(np.float32)
    rows[[1, 3]] = value
    np.save(tmp_path / "f.npy", rows)
    with pytest.raises(TargetError, match=r"2 rows of .*f\.npy.*rows 1, 3"):
        features(str(tmp_path / "f.npy")).embed(PRECOMPUTED)


def test_a_key_chooses_among_arrays_and_a_wrong_one_lists_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", a=unit_rows(1, 4), b=unit_rows(2, 4))
    path = str(tmp_path / "f.npz")
    assert np.array_equal(features(path, key="b").embed(PRECOMPUTED).image, unit_rows(2, 4))
    with pytest.raises(TargetError, match=r"f\.npz has no array 'c'; it has: a, b"):
        features(path, key="c").embed(PRECOMPUTED)
    with pytest.raises(TargetError, match=r"not the only one; it has: a, b"):
        features(path).embed(PRECOMPUTED)


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, Any]:
            return (Path.touch, (tmp_path / "sprung",))

    out = io.BytesIO()
    pickle.dump({"image_features": Trap()}, out, protocol=2)
    (tmp_path / "plain.pt").write_bytes(out.getvalue())
    torch.save({"image_features": Trap()}, tmp_path / "f.pt")
    np.save(tmp_path / "f.npy", np.array([Trap()], dtype=object))
    np.savez(tmp_path / "f.npz", image_features=np.array([Trap()], dtype=object))
    for name in ("plain.pt", "f.pt", "f.npy", "f.npz"):
        with pytest.raises(TargetError, match=rf"{name}.*pickle.*refused"):
            features(str(tmp_path / name)).embed(PRECOMPUTED)
    assert not (tmp_path / "sprung").exists()


def test_odd_features_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "ints.npy", np.ones((3, 4), int))
    np.save(tmp_path / "four.npy", unit_rows(0, 2, 4))
    np.save(tmp_path / "eight.npy", unit_rows(0, 2, 8))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "what.csv").write_text("1,2")
    torch.save([1, 2], tmp_path / "list.pt")
    for files, words in (
        ("ints.npy", r"int64 of shape \(3, 4\)"),
        ("broken.npy", "cannot be read"),
        ("broken.pt", "cannot be read"),
        ("what.csv", r"\.npy, \.npz or \.pt"),
        ("list.pt", "holds a list"),
        ("none.npy", "no features file"),
        ("none_*.npy", "no features file"),
    ):
        with pytest.raises(TargetError, match=words):
            features(str(tmp_path / files)).embed(PRECOMPUTED)
    with pytest.raises(TargetError, match=r"eight\.npy have 8 numbers, and 4"):
        features([str(tmp_path / "four.npy"), str(tmp_path / "eight.npy")]).embed(PRECOMPUTED)


def test_features_serve_their_own_encoder_only(tmp_path: Path, model: Encoder) -> None:
    np.save(tmp_path / "f.npy", unit_rows(0, 2))
    with pytest.raises(TargetError, match=r"features for b32 and no images.*encoder tiny"):
        features(str(tmp_path / "f.npy")).embed(model)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real targets are not at {REAL}")
def test_the_real_targets_are_read() -> None:
    cifar = listed(target(REAL / "cifar10.tar"))
    assert (len(cifar), cifar[0]) == (600, ("airplane", "airplane/000.jpg"))
    flickr = listed(target(REAL / "flickr_dev.tar"))
    assert (len(flickr), flickr[0]) == (200, ("", "000000000.jpg"))
