"""The samples of a subset as a source for webdataset pipelines."""

import json
from collections import Counter

import polars as pl
import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from dagster_project.notebook import NotebookError, Project
from dagster_project.notebook import open_project as open_notebook
from resources.pools.base import PoolError
from tests.support.pool_factory import picture
from tests.support.scenario import Scenario


@pytest.fixture
def notebook(finished: Scenario) -> Project:
    finished.open()
    return open_notebook(finished.folder / "project.yaml")


def by_uid(rows: pl.DataFrame) -> dict[str, str]:
    return dict(zip(rows["uid"], rows["caption"], strict=True))


def test_every_sample_comes_once_with_its_own_image_and_caption(finished: Scenario, notebook: Project) -> None:
    samples = notebook.training_samples("clip_third")
    found = list(samples)
    captions = by_uid(notebook.pool())
    assert len(found) == len(samples) == finished.subset("clip_third").lineage["rows"]
    assert {json.loads(sample["json"])["uid"] for sample in found} == set(finished.manifest("clip_third")["uid"])
    for sample in found:
        assert sample["txt"].decode() == captions[json.loads(sample["json"])["uid"]]
        assert sample["jpg"] == picture(int(sample["__key__"]))


def test_a_sample_that_was_drawn_several_times_comes_that_often(finished: Scenario) -> None:
    draws = {"score": "clip_score/tiny", "count": 50, "batch": 20, "penalty": 0.1}
    finished.set("recipes", "drawn", value={"steps": [{"soft_cap_sample": draws}]})
    assert finished.run().failures == {}
    samples = open_notebook(finished.folder / "project.yaml").training_samples("drawn")
    came = Counter(json.loads(sample["json"])["uid"] for sample in samples)
    manifest = finished.manifest("drawn")
    assert came == dict(zip(manifest["uid"], manifest["copies"], strict=True))
    assert sum(came.values()) == len(samples) == 50


def test_epochs_differ_in_order_and_repeat_with_the_seed(notebook: Project) -> None:
    def keys(epoch: int, seed: int = 0, *, shuffle: bool = True) -> list[str]:
        samples = notebook.training_samples("clip_third", seed=seed, shuffle=shuffle)
        samples.set_epoch(epoch)
        return [sample["__key__"] for sample in samples]

    assert keys(0) == keys(0)
    assert sorted(keys(0)) == sorted(keys(1)) == keys(0, shuffle=False) == keys(1, shuffle=False)
    assert len({tuple(keys(0)), tuple(keys(1)), tuple(keys(0, seed=1))}) == 3


def test_processes_and_workers_share_the_samples(notebook: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = notebook.training_samples("clip_third")
    wanted = sorted(sample["__key__"] for sample in samples)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        found += [sample["__key__"] for sample in DataLoader(samples, batch_size=None, num_workers=2)]
    assert sorted(found) == wanted


def test_webdataset_decodes_them(notebook: Project) -> None:
    samples = notebook.training_samples("clip_third")
    pipeline = wds.DataPipeline(samples, wds.shuffle(5), wds.decode("pilrgb"), wds.to_tuple("jpg", "txt", "json"))
    captions = by_uid(notebook.pool())
    for image, caption, record in pipeline:
        assert image.mode == "RGB"
        assert caption == captions[record["uid"]]


def test_an_image_that_changed_since_the_selection_is_refused(finished: Scenario, notebook: Project) -> None:
    key = finished.manifest("clip_third")["key"][0]
    shard = finished.manifest("clip_third")["shard"][0]
    path = finished.folder / "pool" / f"{shard}.tar"
    image = picture(int(key))
    path.write_bytes(path.read_bytes().replace(image, image[:-40] + bytes(40)))
    with pytest.raises(PoolError, match=rf"key {key} has changed since subset/clip_third v0001 .* clip-select run"):
        list(notebook.training_samples("clip_third"))


def test_a_recipe_without_a_version_is_an_error(notebook: Project) -> None:
    with pytest.raises(NotebookError, match="no version yet"):
        notebook.training_samples("nothing")
