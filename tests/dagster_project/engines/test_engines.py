"""Engines: the same files from one process, from worker processes and after their deaths; a bad shard fails alone."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from assets.base.asset import Step
from assets.base.context import Snapshot
from assets.base.engines import InProcess
from assets.scores import KINDS, clusters
from assets.settings import settings_model
from dagster_project.cli import main
from dagster_project.definitions import build_defs
from dagster_project.engines.choice import EngineError, opened_engine
from dagster_project.engines.processes import Processes, visible_gpu
from dagster_project.engines.work import WorkerError, describe
from dagster_project.headless import Outcome, materialize
from resources.lake.files import LakeError
from selection.scores import near_duplicates, norm_sim_dynamic
from tests.support.caption_length import CAPTION_LENGTH
from tests.support.dying_worker import Mortal, echoed, odd_part, running_workers
from tests.support.interrupting import data_files, stray_files
from tests.support.ray_head import ray_head
from tests.support.scenario import SHARDS, Scenario


def run(scenario: Scenario, engine, only: list[str] | None = None) -> Outcome:
    project, graph = scenario.open_graph()
    return materialize(project, graph, scenario.instance, notice=lambda *_: None, engine=engine, only=only)


def again(finished: Scenario) -> dict[str, bytes]:
    """Remove the lake of a finished pass, and return the files that it had."""
    before = data_files(finished.folder / "lake")
    shutil.rmtree(finished.folder / "lake")
    return before


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    """Yield two processes that the tests share, and check that they end."""
    engine = Processes(2)
    yield engine
    engine.close()
    assert running_workers() == []


@pytest.mark.slow
def test_two_processes_write_the_same_files(finished: Scenario, two: Processes) -> None:
    before = again(finished)
    assert run(finished, two).failures == {}
    assert data_files(finished.folder / "lake") == before


@pytest.mark.slow
def test_the_files_are_the_same_after_20_kills(scenario: Scenario) -> None:
    for number in range(3, 10):
        scenario.write_shard(f"{number:05d}")
    assert run(scenario, None).failures == {}
    before = again(scenario)
    engine = Mortal(2, {f"{number:05d}": 2 for number in range(10)})
    try:
        assert run(scenario, engine).failures == {}
    finally:
        engine.close()
    assert engine.killed == 20
    assert data_files(scenario.folder / "lake") == before
    assert stray_files(scenario.folder / "lake") == []


@pytest.mark.slow
def test_parts_of_unpartitioned_assets_have_the_same_bits_from_workers_and_after_kills(
    finished: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.set("scores", "clusters", value={"tiny": {"clusters": 3, "targets": ["pets"]}})
    finished.set("scores", "near_duplicates", value={"tiny": {"best": "clip_score/tiny"}})
    finished.set("scores", "norm_sim_dynamic", value={"tiny": {"keep": 0.5, "rounds": 3}})
    columns = ["clip_score/tiny", "norm_sim_inf/tiny/pets"]
    mix = {"encoder": "tiny", "columns": columns, "target": "pets", "steps": 2, "batch": 8, "seeds": 1}
    finished.set("scores", "learned_mix", value={"main": mix})
    keys = ["negatives/tiny", "centroids/tiny", "duplicate_search/tiny", "dynamic_rounds/tiny", "mix_weights/main"]

    def of_them() -> dict[str, bytes]:
        found = data_files(finished.folder / "lake")
        return {name: found[name] for name in found if any(name.startswith(key) for key in keys)}

    assert run(finished, None, keys).failures == {}
    before = of_them()
    for key in keys:
        shutil.rmtree(finished.folder / "lake" / key.partition("/")[0])
    # parts of a few rows, so that there are several
    monkeypatch.setattr(clusters, "CHUNK_ROWS", 4)
    monkeypatch.setattr(near_duplicates, "_BLOCK", {"cpu": 4})
    monkeypatch.setattr(norm_sim_dynamic, "GROUP_ROWS", 1)
    others = running_workers()
    engine = Mortal(2, {"2": 2})
    try:
        assert run(finished, engine, keys).failures == {}
    finally:
        engine.close()
    assert engine.killed == 2
    assert all(engine.parts[key] >= 3 for key in keys)
    assert len(before) >= 5
    assert of_them() == before
    assert running_workers() == others


def test_a_part_that_fails_has_the_error_of_its_function_and_the_workers_go_on(scenario: Scenario) -> None:
    project, graph = scenario.open_graph()
    step = Step(graph.nodes[0], Snapshot(project), {})
    others = running_workers()
    engine = Processes(2)
    try:
        with pytest.raises(LakeError, match="part 3 is odd"):
            list(engine.map(step, odd_part, ((number,) for number in range(1_000))))
        assert list(engine.map(step, echoed, ((number,) for number in (0, 2, 4)))) == [0, 2, 4]
        with pytest.raises(WorkerError, match="The result can't be sent"):
            list(engine.map(step, echoed, [(7,)]))
    finally:
        engine.close()
    assert running_workers() == others


@pytest.mark.slow
def test_a_local_ray_writes_the_same_files(finished: Scenario) -> None:
    pytest.importorskip("dagster_ray", reason="Ray is not installed: pip install 'clip-data-selection[ray]'")
    from dagster_project.engines.ray_cluster import RayCluster

    before = again(finished)
    engine = RayCluster(2)
    try:
        assert run(finished, engine).failures == {}
    finally:
        engine.close()
    assert data_files(finished.folder / "lake") == before


@pytest.mark.slow
def test_the_cluster_at_ray_address_computes_with_its_token(finished: Scenario) -> None:
    pytest.importorskip("dagster_ray", reason="Ray is not installed: pip install 'clip-data-selection[ray]'")
    config = finished.folder / "project.yaml"
    before = data_files(finished.folder / "lake")
    shutil.rmtree(finished.folder / "lake/clip_score")
    finished.open()
    command = "import sys; from dagster_project.cli import main; sys.exit(main(sys.argv[1:]))"
    with tempfile.TemporaryDirectory(prefix="ray") as folder, ray_head(Path(folder)) as access:
        done = subprocess.run(
            [sys.executable, "-c", command, "compute", str(config), "--asset", "clip_score/tiny", "--engine", "ray"],
            env={**os.environ, **access},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "3 shards computed" in done.stdout
    found = data_files(finished.folder / "lake")
    assert {name for name in before if found.get(name) != before[name]} == set()


@pytest.mark.parametrize(
    ("gpus", "workers", "share"), [(0, 4, 0.0), (8, 8, 1.0), (8, 3, 1.0), (2, 3, 0.5), (1, 3, 0.3333)]
)
def test_workers_of_ray_share_the_gpus_of_the_cluster(gpus: int, workers: int, share: float) -> None:
    ray_cluster = pytest.importorskip("dagster_project.engines.ray_cluster")
    assert ray_cluster.gpu_share(gpus, workers) == share


@pytest.mark.parametrize(
    ("gpus", "visible", "wanted"),
    [
        (2, None, ["0", "1", "0"]),
        (2, "", ["0", "1", "0"]),
        (2, "5, 3", ["5", "3", "5"]),
        (1, "MIG-ab,MIG-cd", ["MIG-ab", "MIG-ab", "MIG-ab"]),
    ],
)
def test_each_worker_sees_one_of_the_gpus_that_the_main_process_sees(
    gpus: int, visible: str | None, wanted: list[str]
) -> None:
    assert [visible_gpu(place, gpus, visible) for place in range(3)] == wanted


def test_kinds_of_score_that_workers_do_not_know_are_refused(scenario: Scenario) -> None:
    scenario.kinds = (*KINDS, CAPTION_LENGTH)
    project, graph = scenario.open_graph()
    step = Step(graph.nodes[0], Snapshot(project), {})
    with pytest.raises(WorkerError, match="and not caption_length"):
        next(Processes(2).compute(graph.nodes[0], step, ["00000"]))


def test_overridden_resources_that_workers_do_not_have_are_refused(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, graph = scenario.open_graph()
    defs = build_defs(project, graph, resource_overrides={"lake": project.lake})
    chosen = defs.resources["engine"]
    with dg.build_resources({"engine": chosen}) as resources:
        assert isinstance(resources.engine, InProcess)
    monkeypatch.setenv("CLIP_SELECTION_ENGINE", "processes")
    with pytest.raises(dg.DagsterResourceFunctionError) as error, dg.build_resources({"engine": chosen}):
        pass
    assert "lake: overridden resources, which workers don't have" in str(error.value.__cause__)


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_fails_alone(scenario: Scenario) -> None:
    engine = Mortal(2, {SHARDS[1]: 3})
    try:
        outcome = run(scenario, engine)
    finally:
        engine.close()
    assert outcome.failed_shards["raw_pool"] == [SHARDS[1]]
    assert "3 workers died" in outcome.failures["raw_pool"]
    assert scenario.open().lake.shards("clip_score/tiny") == [SHARDS[0], SHARDS[2]]


@pytest.mark.slow
def test_a_bad_shard_fails_alone_with_its_own_error(scenario: Scenario, two: Processes) -> None:
    (scenario.folder / "pool" / f"{SHARDS[1]}.tar").write_bytes(b"not a tar" * 200)
    outcome = run(scenario, two)
    assert outcome.failed_shards["raw_pool"] == [SHARDS[1]]
    assert f"{SHARDS[1]}.tar" in outcome.failures["raw_pool"]
    assert scenario.open().lake.shards("raw_pool") == [SHARDS[0], SHARDS[2]]


def test_a_worker_opens_the_same_settings(scenario: Scenario) -> None:
    project = scenario.open()
    opening = describe(project)
    found = settings_model().model_validate(opening.settings, context={"base": project.config.parent})
    assert found.model_dump() == project.settings.model_dump()


def test_the_environment_chooses_the_engine() -> None:
    environment = {"CLIP_SELECTION_ENGINE": "processes", "CLIP_SELECTION_WORKERS": "3"}
    with opened_engine(environment=environment) as engine:
        assert isinstance(engine, Processes)
        assert engine.workers == 3
    with (
        pytest.raises(EngineError, match="no engine 'threads'"),
        opened_engine(environment={**environment, "CLIP_SELECTION_ENGINE": "threads"}),
    ):
        pass
    with (
        pytest.raises(EngineError, match="not a number of workers"),
        opened_engine(environment={"CLIP_SELECTION_WORKERS": "0"}),
    ):
        pass


def test_parts_together_compute_what_a_pass_does(finished: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    before = again(finished)
    config = str(finished.folder / "project.yaml")
    finished.open()
    assert main(["compute", config, "--asset", "embeddings/tiny", "--part", "1/2"]) == 1
    assert "raw_pool of shard 00000 is not there yet" in capsys.readouterr().err
    for asset in ("raw_pool", "embeddings/tiny", "clip_score/tiny"):
        for part in ("1/2", "2/2"):
            assert main(["compute", config, "--asset", asset, "--part", part]) == 0
    found = data_files(finished.folder / "lake")
    assert found == {name: before[name] for name in found}
    assert {f"clip_score/tiny/{shard}.parquet" for shard in SHARDS} <= found.keys()
    capsys.readouterr()
    assert main(["compute", config, "--asset", "raw_pool", "--part", "1/2"]) == 0
    assert "0 shards computed, 2 were up to date" in capsys.readouterr().out


def recorded(instance: dg.DagsterInstance, key: str) -> dict[str, dg.EventLogRecord]:
    """Return the latest materialization of each shard."""
    found = instance.fetch_materializations(dg.AssetKey(key.split("/")), limit=100).records
    return {record.partition_key: record for record in reversed(found) if record.partition_key}


def test_a_pass_records_what_compute_wrote_with_its_exact_version_and_computes_nothing_again(
    scenario: Scenario,
) -> None:
    project, graph = scenario.open_graph()
    config = str(scenario.folder / "project.yaml")
    for asset in ("raw_pool", "embeddings/tiny"):
        assert main(["compute", config, "--asset", asset]) == 0
    instance = scenario.instance
    outcome = materialize(project, graph, instance, notice=lambda *_: None, only=["raw_pool", "embeddings/tiny"])
    assert set(outcome.computed) == {"catalog"}
    pool, embeddings = recorded(instance, "raw_pool"), recorded(instance, "embeddings/tiny")
    for key, found in (("raw_pool", pool), ("embeddings/tiny", embeddings)):
        assert tuple(sorted(found)) == SHARDS
        for shard, record in found.items():
            event, stored = record.asset_materialization, project.lake.stored(key, shard)
            assert event.tags["dagster/data_version"] == stored.fingerprint
            assert event.metadata["dagster/partition_row_count"].value == stored.rows
            assert event.metadata["computed"].value is False
    for shard, record in embeddings.items():
        tags = record.asset_materialization.tags
        assert tags["dagster/input_data_version/raw_pool"] == project.lake.stored("raw_pool", shard).fingerprint
        assert tags["dagster/input_event_pointer/raw_pool"] == str(pool[shard].storage_id)
    checks = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey(["embeddings", "tiny"]), "rows_aligned"), limit=10
    )
    assert {check.event.dagster_event.asset_check_evaluation_data.partition for check in checks} == set(SHARDS)
    before = len(instance.fetch_materializations(dg.AssetKey("raw_pool"), limit=100).records)
    materialize(project, graph, instance, notice=lambda *_: None, only=["raw_pool"])
    assert len(instance.fetch_materializations(dg.AssetKey("raw_pool"), limit=100).records) == before


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b"])
def test_a_wrong_part_is_refused(scenario: Scenario, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    scenario.open()
    assert main(["compute", str(scenario.folder / "project.yaml"), "--asset", "raw_pool", "--part", part]) == 2
    assert "is not a part" in capsys.readouterr().err
