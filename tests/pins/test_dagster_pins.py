"""Behaviour of Dagster 1.13 that the design needs, so that an upgrade which changes it fails here and not in a lake."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster import AssetKey, DagsterEventType
from dagster._core.run_coordinator import QueuedRunCoordinator

import dagster_project

ROOT = Path(dagster_project.__file__).parents[1]
SHARDS = dg.DynamicPartitionsDefinition(name="pins")
RANGE = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("pins", ["a", "b", "c"])
        yield instance


def run(
    instance: dg.DagsterInstance, assets: list[dg.AssetsDefinition], tags: dict[str, str]
) -> dg.ExecuteInProcessResult:
    job = dg.Definitions(assets=assets).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(instance=instance, tags=tags, run_config=QUIET, raise_on_error=False)


def latest_tags(instance: dg.DagsterInstance, key: str) -> dict[str, str | None]:
    found = instance.event_log_storage.get_latest_tags_by_partition(
        AssetKey(key), DagsterEventType.ASSET_MATERIALIZATION, ["dagster/data_version"]
    )
    return {partition: tags.get("dagster/data_version") for partition, tags in found.items()}


@dg.asset(partitions_def=SHARDS, backfill_policy=dg.BackfillPolicy.single_run(), output_required=False)
def logged(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
    yield from ()
    for partition in context.partition_keys:
        context.log_event(
            dg.AssetMaterialization(
                "logged", partition=partition, tags={"dagster/data_version": f"version of {partition}"}
            )
        )


@dg.asset(partitions_def=SHARDS, backfill_policy=dg.BackfillPolicy.single_run(), output_required=False)
def yielded_then_logged(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
    yield dg.MaterializeResult(data_version=dg.DataVersion("one for all"))
    for partition in context.partition_keys:
        context.log_event(
            dg.AssetMaterialization(
                "yielded_then_logged", partition=partition, tags={"dagster/data_version": f"version of {partition}"}
            )
        )


def test_events_logged_in_a_range_run_keep_a_data_version_for_each_partition(instance: dg.DagsterInstance) -> None:
    assert run(instance, [logged], RANGE).success
    assert latest_tags(instance, "logged") == {p: f"version of {p}" for p in "abc"}
    assert instance.get_materialized_partitions(AssetKey("logged")) == {"a", "b", "c"}


def test_a_range_run_copies_a_yielded_data_version_to_all_its_partitions(instance: dg.DagsterInstance) -> None:
    @dg.asset(partitions_def=SHARDS, backfill_policy=dg.BackfillPolicy.single_run())
    def yielded() -> dg.MaterializeResult:
        return dg.MaterializeResult(data_version=dg.DataVersion("one for all"))

    assert run(instance, [yielded], RANGE).success
    assert set(latest_tags(instance, "yielded").values()) == {"one for all"}


def test_events_logged_after_the_yielded_ones_are_the_latest(instance: dg.DagsterInstance) -> None:
    assert run(instance, [yielded_then_logged], RANGE).success
    assert latest_tags(instance, "yielded_then_logged") == {p: f"version of {p}" for p in "abc"}


@pytest.mark.parametrize(("parent", "child_runs"), [(logged, False), (yielded_then_logged, True)])
def test_a_child_runs_in_the_same_run_only_behind_a_yielded_output(
    instance: dg.DagsterInstance, parent: dg.AssetsDefinition, child_runs: bool
) -> None:
    @dg.asset(deps=[parent], partitions_def=SHARDS, backfill_policy=dg.BackfillPolicy.single_run())
    def child() -> None: ...

    assert run(instance, [parent, child], RANGE).success
    assert bool(instance.get_materialized_partitions(AssetKey("child"))) is child_runs


def test_a_step_can_tell_which_assets_its_run_computes(instance: dg.DagsterInstance) -> None:
    seen: list[set[str]] = []

    @dg.asset
    def first(context: dg.AssetExecutionContext) -> None:
        layer = context.op_execution_context.job_def.asset_layer
        children = layer.asset_graph.get(AssetKey("first")).child_keys
        seen.append({key.to_user_string() for key in children & layer.selected_asset_keys})

    @dg.asset(deps=[first])
    def second() -> None: ...

    job = dg.Definitions(assets=[first, second]).resolve_implicit_global_asset_job_def()
    for selection in ([AssetKey("first")], [AssetKey("first"), AssetKey("second")]):
        assert job.execute_in_process(instance=instance, asset_selection=selection, run_config=QUIET).success
    assert seen == [set(), {"second"}]


def test_the_partitions_of_a_range_follow_the_order_in_which_they_were_added(instance: dg.DagsterInstance) -> None:
    instance.add_dynamic_partitions("pins", ["0"])
    seen: list[str] = []

    @dg.asset(partitions_def=SHARDS, backfill_policy=dg.BackfillPolicy.single_run())
    def keys(context: dg.AssetExecutionContext) -> None:
        seen.extend(context.partition_keys)

    tags = {**RANGE, "dagster/asset_partition_range_start": "b", "dagster/asset_partition_range_end": "0"}
    assert run(instance, [keys], tags).success
    assert seen == ["b", "c", "0"]


def test_telemetry_is_off_in_the_instances_that_the_project_makes(tmp_path: Path) -> None:
    settings = Path(dagster_project.__file__).with_name("dagster.yaml").read_text()
    assert yaml.safe_load(settings)["telemetry"] == {"enabled": False}
    (tmp_path / "dagster.yaml").write_text(settings)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert not instance.telemetry_enabled


def test_a_run_leaves_the_queue_within_a_second(tmp_path: Path) -> None:
    settings = Path(dagster_project.__file__).with_name("dagster.yaml").read_text()
    (tmp_path / "dagster.yaml").write_text(settings)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert isinstance(instance.run_coordinator, QueuedRunCoordinator)
        assert instance.run_coordinator.dequeue_interval_seconds == 1
        limits = instance.get_concurrency_config()
        assert limits.run_queue_config is not None
        assert limits.run_queue_config.max_concurrent_runs == 4


RAW_POOL_ALONE = """
import sys
from pathlib import Path
from assets.settings import open_project
from benchmarks.overhead import write_project
from dagster_project.definitions import build_defs
import dagster as dg

folder = Path(sys.argv[1])
project = open_project(write_project(folder, 1))
with dg.DagsterInstance.local_temp(str(folder)) as instance:
    instance.add_dynamic_partitions("shards", ["00000"])
    job = build_defs(project).resolve_implicit_global_asset_job_def()
    tags = {"dagster/partition": "00000"}
    assert job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("raw_pool")], tags=tags).success
assert project.lake.stored("raw_pool", "00000").rows == 4
print(*sys.modules)
"""


def test_a_step_without_a_model_does_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RAW_POOL_ALONE, str(tmp_path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    loaded = set(found.stdout.split())
    assert {"dagster", "assets.pool.embeddings"} <= loaded
    assert not {"torch", "open_clip", "transformers"} & loaded
