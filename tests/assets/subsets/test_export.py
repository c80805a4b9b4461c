"""Exported shards hold the selected samples, byte for byte, and nothing else."""

import tarfile
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from assets.graph import build_graph
from assets.settings import open_project
from dagster_project.on_demand import write_export
from dagster_project.staleness import RANGE_END, RANGE_START
from resources.pools.formats import open_pool
from resources.settings import PoolSettings
from resources.storage.tar_writer import copies
from tests.support.pool_factory import datacomp_shard
from tests.support.pool_factory import write_tar as write_source
from tests.support.scenario import SHARDS, Scenario

EXPORT = "export/clip_third"


@pytest.fixture
def scenario(scenario: Scenario) -> Scenario:
    """Return a project with one score and one recipe."""
    scenario.set("scores", value={"clip_score": ["tiny"], "neg_clip_loss": {}, "norm_sim": {}})
    scenario.set("recipes", value={"clip_third": scenario.document["recipes"]["clip_third"]})
    return scenario


def export(scenario: Scenario, shards: tuple[str, ...] = SHARDS) -> dg.ExecuteInProcessResult:
    """Materialize the export of some shards in one run."""
    return scenario.execute(EXPORT, tags={RANGE_START: shards[0], RANGE_END: shards[-1]})


def folder(scenario: Scenario) -> Path:
    """Return the folder of the exported version."""
    return scenario.folder / "lake" / EXPORT / scenario.subset("clip_third").name


def members(path: Path) -> dict[str, bytes]:
    """Read a tar with the standard library."""
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


@pytest.mark.usefixtures("finished")
def test_an_export_holds_the_selected_samples_byte_for_byte(scenario: Scenario) -> None:
    scenario.run()
    assert not (scenario.folder / "lake/export").exists()  # a pass leaves exports alone
    assert export(scenario).success
    written = {}
    for shard in SHARDS:
        wanted = {m["key"] for m in scenario.manifest("clip_third").filter(shard=shard).to_dicts()}
        source = members(scenario.folder / "pool" / f"{shard}.tar")
        kept = {name: data for name, data in source.items() if name.split(".")[0] in wanted}
        assert len(kept) == 3 * len(wanted)
        path = folder(scenario) / f"{shard}.tar"
        found = members(path) if path.exists() else {}
        assert list(found.items()) == list(kept.items())
        written |= found
    assert len(written) == 3 * len(scenario.array("clip_third"))


@pytest.mark.usefixtures("finished")
def test_another_machines_dagster_instance_exports_every_shard(scenario: Scenario) -> None:
    scenario.run()
    project, graph = scenario.open_graph()
    with dg.DagsterInstance.ephemeral() as instance:
        outcome = write_export(project, graph, instance, "clip_third", notice=lambda _: None)
    assert outcome.failures == {}
    assert outcome.computed[EXPORT] == list(SHARDS)
    exported = {member.split(".")[0] for tar in folder(scenario).glob("*.tar") for member in members(tar)}
    assert exported == set(scenario.manifest("clip_third")["key"])


@pytest.mark.usefixtures("finished")
def test_an_exported_folder_is_a_pool_of_the_same_uids(scenario: Scenario) -> None:
    scenario.run()
    export(scenario)
    encoders = scenario.open().settings.encoders
    pool = open_pool(PoolSettings(path=str(folder(scenario))), encoders)
    read = [pool.read_shard(shard) for shard in pool.list_shards()]
    assert sum(shard.rejects.num_rows for shard in read) == 0
    found = pl.concat([pl.DataFrame(shard.rows) for shard in read]).sort("uid")
    assert found["uid"].to_list() == sorted(scenario.manifest("clip_third")["uid"])


@pytest.mark.usefixtures("finished")
def test_the_same_version_gives_the_same_bytes_and_is_not_written_twice(scenario: Scenario) -> None:
    scenario.run()
    export(scenario)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder(scenario).glob("*")}
    assert export(scenario).success
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder(scenario).glob("*")} == before
    event = scenario.instance.get_latest_materialization_event(dg.AssetKey(EXPORT.split("/")))
    assert event.asset_materialization.metadata["computed"].value is False

    name = max(name for name in before if name.endswith(".tar"))
    (folder(scenario) / name).unlink()  # as after a run that was killed, or by a person's hand
    assert export(scenario).success
    again = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder(scenario).glob("*")}
    assert {n: data for n, (data, _) in again.items()} == {n: data for n, (data, _) in before.items()}
    assert [n for n in before if again[n][1] != before[n][1] and n.endswith(".tar")] == [name]


def test_a_version_that_was_not_chosen_from_the_shard_as_it_is_is_refused(scenario: Scenario) -> None:
    assert not export(scenario).success  # there is no version yet
    scenario.run()
    scenario.write_shard("00001", text=b"another caption")
    scenario.execute("raw_pool", shard="00001")
    result = export(scenario)
    assert not result.success
    failure = next(e for e in result.all_events if e.is_step_failure).step_failure_data.user_failure_data
    assert failure.metadata["failed_shards"].value == ["00001"]
    text = "was not selected from shard 00001 as it is now. Remedy: materialize subset/clip_third"
    assert text in failure.description
    assert {path.stem for path in folder(scenario).glob("*.parquet")} == {"00000", "00002"}

    scenario.run()
    assert export(scenario).success
    assert folder(scenario).name == "v0002"
    assert (folder(scenario).parent / "v0001").is_dir()  # every version stays


@pytest.mark.usefixtures("finished")
def test_a_shard_that_goes_leaves_the_current_export_and_stays_in_the_versions_own(scenario: Scenario) -> None:
    scenario.run()
    assert export(scenario).success
    before = {path.name: path.read_bytes() for path in folder(scenario).iterdir()}
    exported, first = folder(scenario), SHARDS[0]
    assert first in {Path(name).stem for name in before}
    (scenario.folder / "pool" / f"{first}.tar").unlink()
    scenario.run()
    assert scenario.open().lake.shards(EXPORT) == list(SHARDS[1:])
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_a_pool_without_images_has_no_export(tmp_path: Path) -> None:
    datacomp_shard(tmp_path / "pool")
    (tmp_path / "project.yaml").write_text(
        "{name: a, lake: lake, pool: {path: pool, format: datacomp}, "
        "encoders: {b32: {precomputed: b32, temperature: 0.01}}, recipes: {a: {steps: []}}}"
    )
    assert build_graph(open_project(tmp_path / "project.yaml")).exports == ()


def test_a_copys_key_is_nobody_elses() -> None:
    given = [copy.key for copy in copies([("a", 3), ("a_1", 2), ("b", 1), ("c", 0)])]
    assert given == ["a", "a_2", "a_3", "a_1", "a_1_1", "b"]


@pytest.mark.parametrize("stray", ["._{name}", "log-{name}.md", "{key}.thumb.png"])
def test_stray_members_between_those_of_a_sample_do_not_cost_the_export_any(scenario: Scenario, stray: str) -> None:
    for shard in SHARDS:
        path = scenario.folder / "pool" / f"{shard}.tar"
        mixed = []
        for name, data in members(path).items():
            mixed += [(stray.format(name=name, key=name.split(".")[0]), b"stray"), (name, data)]
        write_source(path, mixed)
    scenario.run()
    assert export(scenario).success
    for shard in SHARDS:
        keys = {row["key"] for row in scenario.manifest("clip_third").filter(shard=shard).to_dicts()}
        path = folder(scenario) / f"{shard}.tar"
        found = members(path) if path.exists() else {}
        suffixes = ["jpg", "json", "txt", *(["thumb.png"] if "thumb" in stray else [])]
        assert set(found) == {f"{key}.{suffix}" for key in keys for suffix in suffixes}
