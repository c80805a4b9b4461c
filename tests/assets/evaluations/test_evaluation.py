"""Evaluations: models trained on subsets of the shared scenario, with tiny settings."""

import json
import os
import select
import signal
import sys
from pathlib import Path

import polars as pl
import pytest

from dagster_project.queries import ask
from dagster_project.verify import verified_files
from resources.lake.files import LakeError
from resources.lake.versions import Versions
from tests.support.evaluations import TINY, reencoded, run_evaluation, small_evaluation, write_pairs
from tests.support.interrupting import END_SECONDS, Running
from tests.support.pool_factory import picture
from tests.support.scenario import ROWS, SHARDS, Scenario


def table(scenario: Scenario, name: str = "small") -> pl.DataFrame:
    found = pl.from_arrow(scenario.open().lake.read(f"evaluation/{name}"))
    assert isinstance(found, pl.DataFrame)
    return found


@pytest.mark.slow
def test_an_evaluation_trains_compares_and_reports(finished: Scenario) -> None:
    # two selected samples are evaluation images, one of them at another size
    first, second = (picture(int(key)) for key in finished.manifest("clip_third")["key"][:2])
    write_pairs(finished.folder / "held_out.tar", {"same": first, "alike": reencoded(second, 64)})
    small_evaluation(finished)
    assert run_evaluation(finished).failures == {}
    project, graph = finished.open_graph()

    rows = table(finished)
    final = rows.filter(pl.col("seen") == pl.col("samples_seen"))
    assert set(final["task"]) == {"pets", "retrieval", "mean of tasks"}
    assert rows["seen"].unique().sort().to_list() == [16, 32]
    assert all(len(values) == TINY["seeds"] and 0 <= min(values) <= max(values) <= 1 for values in rows["values"])
    sizes = dict(final.select("arm", "samples").unique().iter_rows())
    assert sizes == {"random": 10, "clip_third": 10}

    stored = project.lake.stored("evaluation/small")
    assert stored is not None
    assert stored.summary["evaluation_images_found_in_arms"] == {"pets": 0, "retrieval": 2}
    assert stored.summary["rows_removed_from_arms"] == 2
    version = finished.subset("clip_third")
    assert stored.provenance.inputs["subset/clip_third"] == version.lineage["fingerprint"]
    for row in final.filter(pl.col("arm") != "random").iter_rows(named=True):
        paired = [a - b for a, b in zip(row["values"], final_values(final, "random", row), strict=True)]
        assert row["difference"] == pytest.approx(sum(paired) / len(paired))
        assert row["baseline"] == "random"

    assert "| clip_third | " in stored.summary["table"]
    page = Path(project.lake.root, stored.summary["report"]).read_text()
    assert "samples seen" in page
    assert stored.summary["does_not_show"] in page
    assert "evaluation small" not in page
    assert "<h2>Evaluations</h2>" in Path(version.folder, "report", "index.html").read_text()
    assert not Versions(project.lake, "clip_third").report_damage(version)
    assert {file.state for file in verified_files(project, graph)} <= {"ok", "unverified"}
    asked = ask(project.catalog_path(), "SELECT arm, mean FROM evaluations WHERE task = 'pets' ORDER BY arm")
    assert [row["arm"] for row in asked] == ["clip_third", "random"]
    assert {file.name for file in Path(project.lake.root, "evaluation_work").rglob("*.npy")} == {"samples.npy"}

    before = finished.files()
    assert run_evaluation(finished).computed == {}
    assert finished.files() == before


def final_values(rows: pl.DataFrame, arm: str, like: dict[str, object]) -> list[float]:
    same = rows.filter(pl.col("arm") == arm, pl.col("task") == like["task"], pl.col("measure") == like["measure"])
    values: list[float] = same["values"].to_list()[0]
    return values


@pytest.mark.slow
def test_a_killed_evaluation_leaves_no_process_and_resumes_from_its_checkpoint(finished: Scenario) -> None:
    points = 6
    small_evaluation(
        finished,
        arms=["pool", "clip_third"],
        train={**TINY, "seeds": 1, "samples_seen": 8 * points, "checkpoints": points, "processes": 1},
        tasks={"zero_shot": ["pets"]},
    )
    finished.open()
    work = finished.folder / "lake" / "evaluation_work" / "small"
    config = str(finished.folder / "project.yaml")
    running = Running([sys.executable, "-m", "dagster_project.cli", "evaluate", config, "--name", "small"])
    running.wait_for(lambda: list(work.glob("*/runs/*/open_clip_train/checkpoints/epoch_latest.pt")))
    (folder,) = (path.parent for path in work.glob("*/runs/*/curve.jsonl"))
    trains = os.pidfd_open(process_with(str(folder)))
    status, _ = running.end(signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert select.select([trains], [], [], END_SECONDS)[0], "the training process outlives the one that started it"
    os.close(trains)

    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert 0 < len(lines) < points
    lines[0]["measures"]["pets"]["accuracy"] = 0.123  # shows that the point is not measured again
    (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_evaluation(finished).failures == {}
    resumed = table(finished).filter(pl.col("arm") == "pool").sort("seen")
    assert resumed["mean"][0] == 0.123
    assert len(resumed) == points


def process_with(argument: str) -> int:
    """Return the id of the process that has an argument."""
    (found,) = (
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if argument.encode() in path.read_bytes().split(b"\0")
    )
    return found


@pytest.mark.slow
def test_linear_heads_are_trained_on_the_embeddings_of_another_encoder(finished: Scenario) -> None:
    write_pairs(finished.folder / "held_out.tar", {"same": picture(0)})
    finished.set("recipes", "first", value={"steps": [{"where": "source_row % 2 = 0"}]})
    finished.set("recipes", "second", value={"steps": [{"where": "source_row % 2 = 1"}]})
    assert finished.run().failures == {}
    small_evaluation(
        finished,
        tier="heads",
        encoder="tiny",
        arms=["random", "first", "second", "pool"],
        train={**TINY, "samples_seen": [32, 64]},
        how_much={"arms": ["first", "second", "inside"], "samples_seen": 100},
        near_duplicate=1.0,
    )
    finished.set("recipes", "inside", value={"steps": [{"where": "source_row % 3 = 0"}]})
    assert finished.run().failures == {}
    assert run_evaluation(finished).failures == {}
    rows = table(finished)
    assert rows["tier"].unique().to_list() == ["heads"]
    assert rows.filter(pl.col("seen") == pl.col("samples_seen"))["samples_seen"].unique().sort().to_list() == [32, 64]
    assert rows.filter(pl.col("arm") == "pool")["samples"].unique().to_list() == [ROWS * len(SHARDS) - 1]
    stored = finished.open().lake.stored("evaluation/small")
    assert stored is not None
    assert "proxy" in stored.summary["shows"]
    assert stored.summary["evaluation_images_found_in_arms"]["retrieval"] == 1
    assert "100 samples seen" in stored.summary["how_much"][0]


def test_an_evaluation_of_subsets_that_are_out_of_date_says_what_to_run(finished: Scenario) -> None:
    write_pairs(finished.folder / "held_out.tar", {})
    small_evaluation(finished)
    finished.set("recipes", "clip_third", "steps", value=[{"where": "width > 0"}])
    with pytest.raises(LakeError, match=r"subset/clip_third is not there yet, or out of date.*clip-select run"):
        run_evaluation(finished)
