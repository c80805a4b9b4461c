"""The notebook API, and every snippet of docs/python.md, on a real project."""

import re
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
import yaml

from assets.settings import ConfigError
from dagster_project.notebook import NotebookError, Project, open_project
from resources.lake.files import LakeError
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
SCORES = {
    "clip_score/tiny",
    "neg_clip_loss/tiny",
    "neg_clip_loss_stderr/tiny",
    "norm_sim_2/tiny/pets",
    "norm_sim_inf/tiny/pets",
    "nearest_target/tiny/pets",
}
PAPER = "neg_clip_loss_30_norm_sim_20"


@pytest.fixture(scope="module")
def project_with_two_versions(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Iterator[Scenario]:
    """The scenario under the names of the demo, as config/demo.yaml, with two versions of each subset; only read."""
    scenario = Scenario(tmp_path_factory.mktemp("notebook"), tiny_clip)
    scenario.set(
        "recipes",
        value={
            "clip_score_30": {"steps": [keep("clip_score/tiny", fraction=0.3)]},
            PAPER: {"steps": [keep("neg_clip_loss/tiny", fraction=0.5), keep("norm_sim_inf/tiny/pets", fraction=0.25)]},
            "never": {"steps": [keep("clip_score/tiny", fraction=0.3)]},
        },
    )
    assert scenario.run().failures == {}
    scenario.write_shard("00003")
    assert scenario.run().failures == {}
    document = dict(scenario.document)
    document["lake"] = str(scenario.folder / "lake")
    document["pool"] = {"path": str(scenario.folder / "pool")}
    document["targets"] = {"pets": {"path": str(scenario.folder / "pets")}}
    (scenario.folder / "config").mkdir()
    (scenario.folder / "config" / "demo.yaml").write_text(yaml.safe_dump(document))
    yield scenario
    scenario.instance.dispose()


@pytest.fixture
def made(project_with_two_versions: Scenario, monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """The same, with its folder as the current one."""
    monkeypatch.chdir(project_with_two_versions.folder)
    return project_with_two_versions


def test_every_snippet_of_the_page_runs_and_every_method_is_in_its_table(made: Scenario) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)
    assert isinstance(names["table"], pa.Table)
    assert names["table"].num_rows == (len(SHARDS) + 1) * ROWS
    assert names["rows"]["uid"].to_list() == made.manifest(PAPER)["uid"].to_list()
    assert names["first"].columns == ["uid", "shard"]
    assert set(names["changes"]["change"]) <= {"entered", "left"}
    public = {name for name, value in vars(Project).items() if not name.startswith("_") and callable(value)}
    assert public == set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE)) | set(re.findall(r"`(scan_\w+)`", text))


def test_rows_are_those_of_the_files(made: Scenario) -> None:
    project = open_project("config/demo.yaml")
    assert len(project.pool()) == (len(SHARDS) + 1) * ROWS
    some = project.pool(columns=["uid", "shard"], where="shard = '00001' -- a comment")
    assert some.columns == ["uid", "shard"]
    lake = made.open().lake
    assert some["uid"].to_list() == lake.read("raw_pool", "00001", ["uid"])["uid"].to_pylist()

    scores = project.scores("clip_score/tiny", where="shard = '00001'").sort("uid")
    assert scores.columns == ["uid", "shard", "key", "clip_score/tiny"]
    wanted = made.scores("clip_score/tiny", ["00001"]).with_columns(uid=pl.Series(some["uid"])).sort("uid")
    assert scores["clip_score/tiny"].to_list() == wanted["clip_score"].to_list()
    everything = project.scores(limit=3)
    assert set(everything.columns) == {"uid", "shard", "key", *SCORES}
    assert len(everything) == 3


@pytest.mark.usefixtures("made")
def test_lazy_frames_return_what_the_methods_return() -> None:
    project = open_project("config/demo.yaml")
    for lazy, eager in (
        (project.scan_pool(where="width > 8"), project.pool(where="width > 8")),
        (project.scan_scores("neg_clip_loss/tiny"), project.scores("neg_clip_loss/tiny")),
        (project.scan_subset(PAPER, "v0001"), project.subset(PAPER, "v0001")),
    ):
        assert isinstance(lazy, pl.LazyFrame)
        assert lazy.collect().sort("uid").equals(eager.sort("uid"))
    chosen = project.scan_pool().filter(pl.col("shard") == "00002").select("uid", "width").collect()
    assert chosen.sort("uid").equals(project.pool(columns=["uid", "width"], where="shard = '00002'").sort("uid"))


def test_subsets_and_their_history(made: Scenario) -> None:
    project = open_project("config/demo.yaml")
    newest = dict(project.subsets().select("recipe", "version").iter_rows())
    assert newest == {"clip_score_30": "v0002", PAPER: "v0002", "never": "v0002"}
    assert project.versions(PAPER)["version"].to_list() == ["v0001", "v0002"]
    members = {version: set(project.subset(PAPER, version)["uid"]) for version in ("v0001", "v0002")}
    changes = project.diff(PAPER, "v0001", "v0002")
    assert set(changes.filter(change="entered")["uid"]) == members["v0002"] - members["v0001"]
    assert project.overlap("clip_score_30", "never")["jaccard"][0] == 1.0
    verdicts = project.explain(next(iter(members["v0002"]))).filter(recipe=PAPER)["verdict"]
    assert verdicts.to_list() == ["kept", "kept", "kept"]  # step 0 is the pool
    assert made.subset(PAPER).name == "v0002"


def test_a_large_result_is_an_error_and_not_a_full_memory(made: Scenario) -> None:
    few = open_project("config/demo.yaml", max_rows=10)
    with pytest.raises(NotebookError, match=r"more than 10 rows\. Remedy: `where` or `limit`.*max_rows=None"):
        few.pool()
    assert len(few.pool(limit=10)) == 10
    assert len(few.scan_pool().collect()) > 10
    assert len(open_project("config/demo.yaml", max_rows=None).pool()) > 10
    assert made.folder == Path.cwd()


def test_an_unknown_name_is_an_error_with_a_remedy(made: Scenario) -> None:
    project = open_project("config/demo.yaml")
    with pytest.raises(NotebookError, match=r"clip_score/huge: no such score\. Remedy: one of clip_score/tiny, "):
        project.scores("clip_score/huge")
    with pytest.raises(NotebookError, match=r"absent: this recipe has no version yet\. Remedy"):
        project.subset("absent")
    with pytest.raises(LakeError, match="v0009"):
        project.subset(PAPER, "v0009")
    with pytest.raises(ConfigError, match="no such file"):
        open_project(made.folder / "absent.yaml")


def test_without_a_catalog_the_message_says_how_to_get_one(scenario: Scenario) -> None:
    scenario.open()
    with pytest.raises(FileNotFoundError, match=r"there is no catalog\. Remedy"):
        open_project(scenario.folder / "project.yaml").subsets()
