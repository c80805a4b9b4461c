"""Clicks in the UI, sent to Dagster's GraphQL as the page sends them: every click is safe."""

import asyncio
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
import pytest
from dagster._core.remote_origin import IN_PROCESS_NAME, InProcessCodeLocationOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster._daemon.backfill import execute_backfill_iteration
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon
from dagster_graphql.schema import create_schema

from assets.base.keys import SHARDS_NAME
from dagster_project.location import CONFIG_VARIABLE
from dagster_project.sqlite_event_log import kept_open
from tests.support.scenario import SHARDS, Scenario

# Of Dagster's own code, when it answers the page.
pytestmark = pytest.mark.filterwarnings("ignore:Function `AssetSelection.sources`:DeprecationWarning")
IN_THIS_PROCESS = {
    "run_launcher": {
        "module": "dagster._core.launcher.sync_in_memory_run_launcher",
        "class": "SyncInMemoryRunLauncher",
    },
    "event_log_storage": {
        "module": "dagster_project.sqlite_event_log",
        "class": "KeptOpenSqliteEventLogStorage",
    },
}
LAUNCH = """
mutation Launch($params: LaunchBackfillParams!) {
    launchPartitionBackfill(backfillParams: $params) {
        __typename
        ... on LaunchBackfillSuccess { backfillId }
        ... on PythonError { message }
    }
}
"""
LAUNCH_RUN = """
mutation Launch($params: ExecutionParams!) {
    launchRun(executionParams: $params) { __typename ... on PythonError { message } }
}
"""
CHECKS = """
query Checks($path: [String!]!) {
    assetNodeOrError(assetKey: {path: $path}) {
        ... on AssetNode {
            assetChecksOrError {
                ... on AssetChecks { checks { name executionForLatestMaterialization { status } } }
            }
        }
    }
}
"""
BACKFILL = """
query Backfill($id: String!) {
    partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status error { message } } }
}
"""
PARTITIONS = """
query Partitions($path: [String!]!) {
    assetNodeOrError(assetKey: {path: $path}) {
        ... on AssetNode { partitionStats { numPartitions numMaterialized numFailed } }
    }
}
"""
ASSETS = "{ assetNodes { assetKey { path } groupName kinds description isPartitioned } }"


class Server:
    """A scenario's Dagster server in this process: GraphQL, the backfill daemon, and runs."""

    def __init__(self, context: WorkspaceProcessContext) -> None:
        self.context = context
        self.schema = create_schema()

    def ask(self, query: str, **variables: Any) -> Any:
        """Answer a query of one field."""
        request = self.context.create_request_context()
        found = asyncio.run(self.schema.execute_async(query, context_value=request, variable_values=variables))
        assert not found.errors, found.errors
        (answer,) = found.data.values()
        return answer

    def materialize(self, assets: Sequence[str], shards: Sequence[str]) -> str:
        """Materialize assets as the button does, and return the backfill's status."""
        params = {
            "assetSelection": [{"path": key.split("/")} for key in assets],
            "partitionNames": list(shards),
            "tags": [],
        }
        launched = self.ask(LAUNCH, params=params)
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        for _ in range(30):
            assert not any(execute_backfill_iteration(self.context, logging.getLogger("backfill")))
            self.work()
            backfill = self.ask(BACKFILL, id=launched["backfillId"])
            if backfill["status"] != "REQUESTED":
                return backfill["status"]
        raise AssertionError("the backfill does not end")

    def work(self) -> None:
        """Execute the queued runs, as the daemon does."""
        assert not any(QueuedRunCoordinatorDaemon(interval_seconds=1).run_iteration(self.context))

    def assets(self) -> list[str]:
        """List every asset in the graph."""
        return ["/".join(node["assetKey"]["path"]) for node in self.ask(ASSETS)]


@pytest.fixture
def server(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(CONFIG_VARIABLE, str(scenario.open().config))
    origin = InProcessCodeLocationOrigin(
        LoadableTargetOrigin(executable_path=sys.executable, module_name="dagster_project.definitions")
    )
    with (
        dg.instance_for_test(overrides=IN_THIS_PROCESS) as instance,
        kept_open(instance),
        WorkspaceProcessContext(instance, InProcessWorkspaceLoadTarget(origin)) as context,
    ):
        instance.add_dynamic_partitions(SHARDS_NAME, list(SHARDS))
        scenario.instance.dispose()
        scenario.instance = instance
        yield Server(context)


def test_materialize_all_makes_everything_and_again_computes_nothing(scenario: Scenario, server: Server) -> None:
    assert server.materialize(server.assets(), SHARDS) == "COMPLETED_SUCCESS"
    for asset in ("raw_pool", "embeddings/tiny", "neg_clip_loss/tiny"):
        assert server.ask(PARTITIONS, path=asset.split("/"))["partitionStats"] == {
            "numPartitions": 3,
            "numMaterialized": 3,
            "numFailed": 0,
        }
    chosen = {recipe: scenario.array(recipe).tolist() for recipe in ("clip_third", "paper", "inside")}
    assert [len(rows) for rows in chosen.values()] == [12, 9, 3]

    outcome = scenario.run()
    assert (outcome.computed, outcome.failures) == ({}, {})

    before = {name: mark for name, mark in scenario.files().items() if not name.startswith("catalog")}
    assert server.materialize(server.assets(), SHARDS) == "COMPLETED_SUCCESS"
    assert {name: mark for name, mark in scenario.files().items() if not name.startswith("catalog")} == before


def test_a_subset_together_with_one_shards_scores_follows_them(scenario: Scenario, server: Server) -> None:
    assert scenario.run().failures == {}
    scenario.write_shard(SHARDS[1], rows=6)
    everything_of_the_shard = ["raw_pool", "embeddings/tiny", "clip_score/tiny"]
    assert server.materialize([*everything_of_the_shard, "subset/clip_third"], SHARDS[1:2]) == "COMPLETED_SUCCESS"
    lineage = scenario.subset("clip_third").lineage
    assert (lineage["source"]["rows"], lineage["shards_missing"]) == (30, {})
    assert len(scenario.array("clip_third")) == 10


def test_all_of_one_shard_of_a_pool_that_has_more_refuses_to_draw_negatives(scenario: Scenario, server: Server) -> None:
    assert server.materialize(server.assets(), SHARDS[:1]) == "COMPLETED_FAILED"
    instance = server.context.instance
    errors = [
        record.dagster_event.step_failure_data.error_display_string
        for run in instance.get_runs()
        for record in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    ]
    assert any("1 of the pool's 3 shards have embeddings/tiny" in error for error in errors), errors
    assert scenario.open().lake.shards("neg_clip_loss/tiny") == []
    assert scenario.run().failures == {}
    assert len(scenario.array("paper")) == 9


def test_a_check_that_is_asked_for_answers_without_its_asset(scenario: Scenario, server: Server) -> None:
    assert scenario.run().failures == {}
    before = scenario.files()
    launched = server.ask(
        LAUNCH_RUN,
        params={
            "selector": {
                "repositoryLocationName": IN_PROCESS_NAME,
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [],
                "assetCheckSelection": [{"assetKey": {"path": ["negatives", "tiny"]}, "name": "drift"}],
            },
            "mode": "default",
        },
    )
    assert launched["__typename"] == "LaunchRunSuccess", launched
    server.work()
    checks = server.ask(CHECKS, path=["negatives", "tiny"])["assetChecksOrError"]["checks"]
    found = {check["name"]: check["executionForLatestMaterialization"]["status"] for check in checks}
    assert found["drift"] == "SUCCEEDED"
    assert scenario.files().keys() - before.keys() == {"checks/negatives/tiny/drift.json"}
    assert {name: mark for name, mark in scenario.files().items() if name in before} == before
