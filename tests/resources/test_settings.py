"""Settings of pools, encoders and targets: valid values and error messages."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from resources.settings import EncoderSettings, PoolSettings, TargetSettings


def test_a_relative_path_starts_at_the_config_file() -> None:
    context = {"base": Path("/configs/mine")}
    pool = PoolSettings.model_validate({"path": "../pool"}, context=context)
    assert pool.path == "/configs/pool"
    encoder = EncoderSettings.model_validate({"model": "local-dir:model"}, context=context)
    assert encoder.model == "local-dir:/configs/mine/model"
    encoder = EncoderSettings.model_validate({"model": "ViT-B-32", "pretrained": "./b32.pt"}, context=context)
    assert encoder.pretrained == "/configs/mine/b32.pt"
    target = TargetSettings.model_validate({"path": "images", "features": {"b32": "in1k_*.pt"}}, context=context)
    assert target.path == "/configs/mine/images"
    assert target.features["b32"].files == ["/configs/mine/in1k_*.pt"]


@pytest.mark.parametrize("place", ["/absolute/pool", "s3://bucket/pool", "memory://pool"])
def test_an_absolute_path_or_a_url_stays_as_it_is(place: str) -> None:
    context = {"base": Path("/configs")}
    assert PoolSettings.model_validate({"path": place}, context=context).path == place


def test_names_and_tags_are_not_taken_for_paths() -> None:
    context = {"base": Path("/configs")}
    for model, tag in (("ViT-L-14", "openai"), ("hf-hub:apple/DFN-public", None)):
        settings = EncoderSettings.model_validate({"model": model, "pretrained": tag}, context=context)
        assert (settings.model, settings.pretrained) == (model, tag)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (PoolSettings, {}, "path"),
        (PoolSettings, {"path": " "}, "the path is empty"),
        (PoolSettings, {"path": "p", "fromat": "webdataset"}, "fromat"),
        (PoolSettings, {"path": "p", "format": "tfds"}, "'webdataset', 'datacomp', 'parquet_images' or 'image_folder'"),
        (PoolSettings, {"path": "p", "max_pixels": 10**9}, "max_pixels"),
        (EncoderSettings, {}, "give `model`, or `precomputed`"),
        (EncoderSettings, {"precomputed": "b32"}, "needs `temperature`"),
        (EncoderSettings, {"precomputed": {"image": "a"}, "temperature": 1}, "text"),
        (EncoderSettings, {"precomputed": "b32", "temperature": 0}, "temperature"),
        (EncoderSettings, {"precomputed": "b32", "temperature": 1, "pretrained": "x"}, "`model`"),
        (EncoderSettings, {"model": "hf-hub:a/b", "pretrained": "x"}, "brings its weights"),
        (EncoderSettings, {"model": "local-dir:", "pretrained": None}, "the path is empty"),
        (EncoderSettings, {"model": "ViT-B-32", "device": "gpu"}, "device"),
        (EncoderSettings, {"model": "ViT-B-32", "precision": "int8"}, "precision"),
        (EncoderSettings, {"model": "ViT-B-32", "workers": -1}, "workers"),
        (TargetSettings, {}, "give `path` to images, or `features`"),
        (TargetSettings, {"features": {"b32": []}}, "files"),
        (TargetSettings, {"features": {"b32": 5}}, "features"),
        (TargetSettings, {"features": "b32.npy"}, "features"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(kind: type[BaseModel], data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(data)
    assert message in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    pool = PoolSettings(path="/p")
    with pytest.raises(ValidationError, match="frozen"):
        pool.path = "/q"


@pytest.mark.parametrize("kind", [PoolSettings, EncoderSettings, TargetSettings])
def test_every_field_is_described(kind: type[BaseModel]) -> None:
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("given", "files", "key"),
    [
        ("/a.npy", ["/a.npy"], None),
        (["/a.npy", "/b.npy"], ["/a.npy", "/b.npy"], None),
        ({"files": "/a.pt", "key": "image_features"}, ["/a.pt"], "image_features"),
    ],
)
def test_features_can_be_a_file_a_list_or_spelled_out(given: Any, files: list[str], key: str | None) -> None:
    features = TargetSettings(features={"b32": given}).features["b32"]
    assert (features.files, features.key) == (files, key)
