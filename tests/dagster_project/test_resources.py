"""The resources that the UI lists: they open what the YAML names, and show no secret."""

import json

import dagster as dg
import pytest
from dagster._core.remote_representation.external_data import RepositorySnap

from assets.settings import ConfigError
from dagster_project.resources import CatalogResource, LakeResource, ModelsResource, PoolResource, build_resources
from resources.lake.files import Lake
from tests.support.scenario import SHARDS, Scenario


def test_each_resource_opens_what_the_yaml_names(scenario: Scenario) -> None:
    assert scenario.run().failures == {}
    project = scenario.open()
    found = build_resources(project.settings)
    lake, pool, models, catalog = (found[key] for key in ("lake", "pool", "models", "catalog"))
    assert isinstance(lake, LakeResource)
    assert isinstance(pool, PoolResource)
    assert isinstance(models, ModelsResource)
    assert isinstance(catalog, CatalogResource)
    assert lake.open().shards("raw_pool") == list(SHARDS)
    assert pool.open().list_shards() == project.pool.list_shards()
    assert models.open().encoder("tiny").settings == project.settings.encoders["tiny"]
    assert catalog.sql("SELECT count(*) AS rows FROM pool WHERE shard = $shard", shard=SHARDS[0])["rows"][0] == 12


def test_the_ui_lists_the_resources_with_their_settings(scenario: Scenario) -> None:
    """The Resources tab shows what this snapshot of the code location holds; Dagster has no public name for it."""
    project = scenario.open()
    defs = dg.Definitions(resources=build_resources(project.settings))
    snap = RepositorySnap.from_def(defs.get_repository_def())
    shown = {
        resource.name: {key: json.loads(value) for key, value in resource.configured_values.items()}
        for resource in snap.resources or []
    }
    assert set(shown) == {"lake", "pool", "models", "catalog", "run", "engine"}
    assert shown["lake"] == {"root": str(scenario.folder / "lake")}
    assert shown["catalog"] == {"path": str(scenario.folder / "lake" / "catalog.duckdb")}
    assert shown["pool"]["settings"]["path"] == str(scenario.folder / "pool")
    assert shown["models"]["encoders"]["tiny"]["batch_size"] == 5


def test_an_asset_gets_a_resource_and_a_test_may_replace_it(scenario: Scenario) -> None:
    seen: list[str] = []

    @dg.asset
    def reads(lake: dg.ResourceParam[Lake]) -> None:
        seen.append(lake.root)

    for resources in (build_resources(scenario.open().settings), {"lake": LakeResource(root="/elsewhere")}):
        assert dg.materialize([reads], resources={"lake": resources["lake"]}).success
    assert seen == [str(scenario.folder / "lake"), "/elsewhere"]


@pytest.mark.parametrize("field", [("lake",), ("pool", "path")])
def test_a_password_in_a_url_is_refused_because_the_ui_would_show_it(
    scenario: Scenario, field: tuple[str, ...]
) -> None:
    settings = scenario.open().settings
    url = "ftp://reader:hunter2@example.org/pool"
    changed = {"lake": url} if field == ("lake",) else {"pool": settings.pool.model_copy(update={"path": url})}
    with pytest.raises(ConfigError, match=rf"{'.'.join(field)}: the URL contains a password.*Remedy") as error:
        build_resources(settings.model_copy(update=changed))
    assert "hunter2" not in str(error.value)
