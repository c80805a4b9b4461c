"""A kind of score that is declared in one file works everywhere: settings, asset, checks, catalog, recipes, lineage."""

from pathlib import Path

import dagster as dg
import polars as pl
import pyarrow as pa
import pytest

from assets.base.columns import Column
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind, require_encoders
from assets.base.shard import Shard
from assets.base.standard_checks import rows_aligned, within_bounds
from assets.reproduction import rebuild
from assets.scores import KINDS
from assets.settings import ConfigError, open_project, settings_model
from assets.study.figures import study
from dagster_project.definitions import build_defs
from resources.catalog.build import read_catalog
from tests.support.caption_length import CAPTION_LENGTH
from tests.support.scenario import ROWS, SHARDS, Scenario, keep
from tests.support.steps import findings

KEY = "caption_length/short"
PAGE = Path(__file__).resolve().parents[3] / "docs" / "extending.md"
MODULE = Path(__file__).resolve().parents[2] / "support" / "caption_length.py"


@pytest.fixture
def extended(scenario: Scenario) -> Scenario:
    """The scenario with the new kind, and a recipe that ranks by it."""
    scenario.kinds = (*KINDS, CAPTION_LENGTH)
    scenario.set("scores", "caption_length", value={"short": {"limit": 20}})
    scenario.set("recipes", value={"longest": {"steps": [keep(KEY, fraction=0.25)]}})
    return scenario


def test_a_wrong_setting_is_one_message_with_field_and_remedy(extended: Scenario) -> None:
    extended.set("scores", "caption_length", "short", value={"limit": 0, "unit": "words"})
    with pytest.raises(ConfigError) as caught:
        extended.open()
    assert "scores.caption_length.short.limit: " in str(caught.value)
    assert "scores.caption_length.short.unit: no such field; known: limit. Remedy: " in str(caught.value)


def test_a_project_without_the_kind_does_not_know_the_field(extended: Scenario) -> None:
    config = extended.open().config
    with pytest.raises(ConfigError, match=r"scores\.caption_length: no such field"):
        open_project(config)


def test_the_asset_its_checks_and_its_columns_are_dagsters_too(extended: Scenario) -> None:
    project, graph = extended.open_graph()
    repository = build_defs(project, graph).get_repository_def()
    (asset,) = (node.definition for node in graph.nodes if node.key == KEY)
    spec = asset.get_asset_spec(dg.AssetKey(KEY.split("/")))
    assert spec.description == "Length of each caption as a fraction of the limit of `short`, at most 1."
    columns = {column.name: column.description for column in spec.metadata["dagster/column_schema"].columns}
    assert list(columns) == ["shard", "f0", "f1", "caption_length"]
    assert columns["caption_length"] == "Characters of the caption over the limit, at most 1."
    checks = repository.asset_graph.get_check_keys_for_assets({dg.AssetKey(KEY.split("/"))})
    assert {check.name for check in checks} == {"rows_aligned", "within_bounds"}


def test_the_score_is_computed_checked_ranked_explained_and_in_the_lineage(extended: Scenario) -> None:
    outcome = extended.run()
    assert outcome.failures == {}
    assert outcome.computed[KEY] == list(SHARDS)
    pool = pl.concat([pl.from_arrow(extended.open().lake.read("raw_pool", shard)) for shard in SHARDS])
    lengths = pool["caption"].str.len_chars().clip(0, 20) / 20
    assert extended.scores(KEY)["caption_length"].to_list() == lengths.cast(pl.Float32).to_list()
    assert extended.manifest("longest").height == ROWS * len(SHARDS) // 4

    table = extended.open().lake.read(KEY, SHARDS[0])
    spoiled = table.set_column(3, "caption_length", pl.Series([2.0] * ROWS, dtype=pl.Float32).to_arrow())
    assert not findings(extended.open(), KEY, SHARDS[0], {KEY: spoiled})["within_bounds"]["passed"]

    chosen = extended.manifest("longest").row(0, named=True)
    with read_catalog(extended.open().catalog_path()) as con:
        ((column,),) = con.execute(f"SELECT \"{KEY}\" FROM scores WHERE uid = '{chosen['uid']}'").fetchall()
        explained = con.execute(f"SELECT verdict, score, value FROM explain('{chosen['uid']}') WHERE step = 1")
        assert explained.fetchall() == [("kept", KEY, pytest.approx(column))]

    lineage = extended.subset("longest").lineage
    assert lineage["scores"] == {KEY: {"limit": 20}}
    assert lineage["project"]["scores"]["caption_length"] == {"short": {"limit": 20}}


def test_a_changed_setting_computes_this_score_alone_and_diff_has_the_reason(extended: Scenario) -> None:
    assert extended.run().failures == {}
    extended.set("scores", "caption_length", "short", "limit", value=1000)
    computed = extended.run().computed
    assert set(computed) == {KEY, "subset/longest", "catalog"}
    with read_catalog(extended.open().catalog_path()) as con:
        changes = con.execute("SELECT DISTINCT change, reason, step, detail FROM diff('longest', 'v0001', 'v0002')")
        assert set(changes.fetchall()) == {
            # Every new value is below the old threshold, which diff tests first (docs/lineage.md).
            ("entered", "threshold moved", 1, f"made again between the two: {KEY}"),
            ("left", "score changed", 1, f"made again between the two: {KEY}"),
        }


def test_a_version_is_reproduced_from_its_record(extended: Scenario, tmp_path: Path) -> None:
    assert extended.run().failures == {}
    version = extended.subset("longest")
    rebuild(version.lineage, tmp_path / "again", kinds=extended.kinds)
    assert (tmp_path / "again/subset.npy").read_bytes() == Path(version.uids).read_bytes()


@partitioned(
    key="doubled/{encoder}",
    deps=["raw_pool", "clip_score/{encoder}"],
    columns=[
        Column(name="doubled", type=pa.float32(), description="CLIPScore, doubled.", direction="larger", bounds=(-3, 3))
    ],
    checks=[rows_aligned, within_bounds],
    code_version="1",
    group_name="doubled",
    kinds={"parquet"},
    description="Twice the CLIPScore by encoder `{encoder}`.",
)
def doubled(shard: Shard) -> Result:
    """Double a score."""
    return shard.scores(doubled=2 * shard.read("clip_score/{encoder}", ["clip_score"])["clip_score"].to_numpy())


DOUBLED = ScoreKind(
    name="doubled",
    asset=doubled,
    settings=tuple[str, ...],
    default=(),
    configured=lambda settings: settings.scores.doubled,
    instances=lambda settings: [{"encoder": encoder} for encoder in settings.scores.doubled],
    upstream=lambda settings: (),
    validate=lambda settings: require_encoders(settings, "scores.doubled", settings.scores.doubled),
    recorded=lambda settings, wanted: {
        "scores": {"doubled": [name for name in settings.scores.doubled if f"doubled/{name}" in wanted]}
    },
)


def test_a_score_made_from_another_is_recorded_with_it_and_reproduced(scenario: Scenario, tmp_path: Path) -> None:
    scenario.kinds = (*KINDS, DOUBLED)
    scenario.set("scores", "doubled", value=["tiny"])
    scenario.set("recipes", value={"longest": {"steps": [keep("doubled/tiny", fraction=0.25)]}})
    assert scenario.run().failures == {}
    version = scenario.subset("longest")
    assert set(version.lineage["scores"]) == {"doubled/tiny", "clip_score/tiny"}
    assert version.lineage["project"]["scores"]["clip_score"] == ["tiny"]
    rebuild(version.lineage, tmp_path / "again", kinds=scenario.kinds)
    assert (tmp_path / "again/subset.npy").read_bytes() == Path(version.uids).read_bytes()


def test_the_study_compares_it(extended: Scenario) -> None:
    assert extended.run().failures == {}
    assert KEY in study(extended.open(), resamples=10).scores


def test_every_kind_has_a_field_of_its_own_and_records_what_it_needs() -> None:
    fields = settings_model().model_fields["scores"].annotation.model_fields
    for kind in KINDS:
        assert kind.settings is None or kind.name in fields
        assert kind.asset.checks, f"{kind.name} has no checks"


def test_the_page_shows_this_very_file() -> None:
    assert f"```python\n{MODULE.read_text(encoding='utf-8')}```" in PAGE.read_text(encoding="utf-8")
