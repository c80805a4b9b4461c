"""External scores and uid lists, from their files to a subset."""

import json
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from assets.reproduction import choose_again, rebuild
from assets.settings import ConfigError
from core.uids import format_uids, parse_uids, subset_array
from resources.inputs.external import ExternalError, find, opened
from resources.lake.files import LakeError
from selection.recipes.sampling import soft_cap_sample
from tests.support.pool_factory import datacomp_shard, uid
from tests.support.scenario import ROWS, SHARDS, Scenario, keep

EXAMPLE = Path(__file__).resolve().parents[3] / "examples/flyt.yaml"
UIDS = [uid(shard, row) for shard in SHARDS for row in range(ROWS)]
ELSEWHERE = [uid("elsewhere", number) for number in range(5)]


def value(text: str) -> float:
    """Return a score that differs for every uid and is the same in every run."""
    return int(text[:8], 16) / 2**32


def write_parquet(path: Path, uids: list[str], **columns: list) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"uid": uids, **columns}), path)
    return path


def without_pictures(scenario: Scenario) -> None:
    """Change the scenario to a pool of metadata without scores."""
    for shard in SHARDS:
        datacomp_shard(scenario.folder / "metadata", shard, ROWS)
    scenario.document["pool"] = {"path": "metadata", "format": "datacomp"}
    scenario.document["encoders"] = {"b32": {"precomputed": "b32", "temperature": 0.01}}
    scenario.document["targets"] = {}
    scenario.document["scores"] = {"clip_score": [], "neg_clip_loss": {}, "norm_sim": {}}


def scored(scenario: Scenario, uids: list[str] = UIDS, **settings: object) -> None:
    """Add an external score to the scenario, and a recipe that ranks by it."""
    write_parquet(scenario.folder / "given" / "a.parquet", uids, dfn=[value(text) for text in uids])
    without_pictures(scenario)
    scenario.document["external_scores"] = {"given": {"files": "given/a.parquet", "columns": "dfn", **settings}}
    scenario.document["recipes"] = {
        "best": {
            "steps": [{"where": 'isfinite("external_scores/given")'}, keep("external_scores/given", fraction=0.25)]
        }
    }


def words(uids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return parse_uids(uids)


def look_up(files: str, uids: list[str], **columns: str) -> dict[str, list]:
    with opened(find([files]), columns=columns) as table:
        values, differs = table.look_up(*words(uids))
    assert not differs.any()
    return {column: [None if np.isnan(x) else x for x in found] for column, found in values.items()}


# Files


@pytest.mark.parametrize("kind", ["parquet", "csv", "npy"])
def test_the_same_scores_are_read_from_every_kind_of_file(tmp_path, kind):
    path = tmp_path / f"scores.{kind}"
    scores = [0.25, -1.5, 3.0]
    if kind == "parquet":
        write_parquet(path, UIDS[:3], a=scores)
    elif kind == "csv":
        rows = [f"{text},words,{score}" for text, score in zip(UIDS[:3], scores, strict=True)]
        path.write_text("\n".join(["uid,caption,a", *rows]))
    else:
        array = np.zeros(3, dtype=[("f0", "u8"), ("f1", "u8"), ("a", "f4")])
        array["f0"], array["f1"] = words(UIDS[:3])
        array["a"] = scores
        np.save(path, array)
    assert look_up(str(path), [UIDS[2], ELSEWHERE[0], UIDS[0]], mine="a") == {"mine": [3.0, None, 0.25]}


def test_uids_may_be_two_numbers_and_in_capitals(tmp_path):
    f0, f1 = words(UIDS[:2])
    pq.write_table(pa.table({"f0": f0, "f1": f1, "a": [1, 2]}), tmp_path / "numbers.parquet")
    assert look_up(str(tmp_path / "numbers.parquet"), UIDS[:3], a="a") == {"a": [1.0, 2.0, None]}
    write_parquet(tmp_path / "capitals.parquet", [text.upper() for text in UIDS[:2]], a=[1, 2])
    assert look_up(str(tmp_path / "capitals.parquet"), UIDS[:3], a="a") == {"a": [1.0, 2.0, None]}


def test_a_folder_or_a_pattern_stands_for_its_files(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / "scores" / f"part_{number}.parquet", [UIDS[number]], a=[float(number)])
    (tmp_path / "scores" / "README.md").write_text("not a score")
    assert look_up(str(tmp_path / "scores"), UIDS[:3], a="a") == {"a": [0.0, 1.0, 2.0]}
    assert look_up(str(tmp_path / "scores" / "part_[01].parquet"), UIDS[:3], a="a") == {"a": [0.0, 1.0, None]}


def test_what_is_no_number_is_no_value(tmp_path):
    write_parquet(tmp_path / "a.parquet", UIDS[:4], a=[float("nan"), float("inf"), None, 1.0])
    assert look_up(str(tmp_path / "a.parquet"), UIDS[:4], a="a") == {"a": [None, None, None, 1.0]}


def test_a_uid_with_two_values_is_told_and_one_with_the_same_twice_is_not(tmp_path):
    write_parquet(tmp_path / "a.parquet", [UIDS[0], UIDS[0], UIDS[1], UIDS[1]], a=[1.0, 1.0, 2.0, 3.0])
    with opened(find([str(tmp_path)]), columns={"a": "a"}) as table:
        _, differs = table.look_up(*words(UIDS[:3]))
    assert differs.tolist() == [False, True, False]


def test_a_file_of_floats_of_half_precision_or_of_repeated_texts_is_read(tmp_path):
    uids = pa.array(UIDS[:2]).dictionary_encode()
    pq.write_table(pa.table({"uid": uids, "a": np.array([0.5, 2], np.float16)}), tmp_path / "a.parquet")
    assert look_up(str(tmp_path), UIDS[:2], a="a") == {"a": [0.5, 2.0]}


def test_a_column_may_have_any_name(tmp_path):
    names = ["place", "select", "wanted", "w", "l", "listed", "read"]
    write_parquet(tmp_path / "a.parquet", UIDS[:1], **{name: [float(i)] for i, name in enumerate(names)})
    found = look_up(str(tmp_path), UIDS[:2], **{name: name for name in names})
    assert found == {name: [float(i), None] for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ({"uid": ["no uid"], "a": [1.0]}, {"a": "a"}, "no uid.*is no uid.*Remedy"),
        ({"uid": UIDS[:1], "a": [1.0]}, {"b": "b"}, "no column b; it has uid, a.*Remedy"),
        ({"uid": UIDS[:1], "a": ["x"]}, {"a": "a"}, "column a is string.*Remedy: a column of numbers"),
        ({"uid": [1], "a": [1.0]}, {"a": "a"}, "column uid is int64.*Remedy: a column of texts"),
        ({"uid": pa.array([], pa.string()), "a": pa.array([], pa.float64())}, {"a": "a"}, "no row.*Remedy"),
    ],
)
def test_a_wrong_file_is_one_error_with_its_name_and_a_remedy(tmp_path, content, columns, message):
    pq.write_table(pa.table(content), tmp_path / "wrong.parquet")
    with (
        pytest.raises(ExternalError, match=f"wrong.parquet: .*{message}"),
        opened(find([str(tmp_path)]), columns=columns),
    ):
        pass


def test_a_damaged_file_a_pickle_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    for name, message in (("bad.parquet", "cannot be read"), ("pickled.npy", "pickle"), ("plain.npy", "f0 and f1")):
        with pytest.raises(ExternalError, match=message), opened(find([str(tmp_path / name)])):
            pass
    with pytest.raises(ExternalError, match=r"gone.*no such file.*Remedy"):
        find([str(tmp_path / "gone.parquet")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": ["f0"]}, "name of another column"),
        ({"columns": ["UID"]}, "name of another column"),
        ({"columns": {"a": "x", "A": "y"}}, "name of another column"),
        ({"columns": ["dfn score"]}, "columns.dfn score"),
        ({"columns": []}, "columns"),
        ({"files": []}, "files"),
        ({"minimum_coverage": 2}, "minimum_coverage"),
    ],
)
def test_the_yaml_says_what_is_wrong_with_it(scenario, change, message):
    scored(scenario, **change)
    with pytest.raises(ConfigError, match=message):
        scenario.open()


# Scores in the graph


def test_a_score_from_elsewhere_is_ranked_by_and_explained(scenario):
    scored(scenario)
    assert not scenario.run().failures
    best = sorted(UIDS, key=lambda text: -value(text))[: len(UIDS) // 4]
    assert sorted(best) == scenario.manifest("best")["uid"].to_list()
    rows = scenario.scores("external_scores/given")
    assert rows["dfn"].to_list() == [value(text) for text in UIDS]
    catalog = scenario.folder / "lake" / "catalog.duckdb"
    with duckdb.connect(str(catalog), read_only=True) as con:
        last = con.sql(f"SELECT verdict, value FROM explain('{best[0]}') ORDER BY step").fetchall()[-1]
        assert last == ("kept", value(best[0]))
        ((found,),) = con.sql(f"SELECT \"external_scores/given\" FROM scores WHERE uid = '{UIDS[5]}'").fetchall()
        assert found == value(UIDS[5])


def test_several_columns_are_called_by_their_names(scenario):
    columns = {"a": [value(text) for text in UIDS], "b": [-value(text) for text in UIDS]}
    without_pictures(scenario)
    write_parquet(scenario.folder / "flyt.parquet", UIDS, **columns)
    scenario.document["external_scores"] = {"flyt": {"files": "flyt.parquet", "columns": {"first": "a", "second": "b"}}}
    scenario.document["recipes"] = {
        "up": {"steps": [keep("external_scores/flyt/first", count=3)]},
        "down": {"steps": [keep("external_scores/flyt/second", count=3)]},
    }
    assert not scenario.run().failures
    ordered = sorted(UIDS, key=value)
    assert scenario.manifest("down")["uid"].to_list() == sorted(ordered[:3])
    assert scenario.manifest("up")["uid"].to_list() == sorted(ordered[-3:])

    columns = {name: [-number for number in numbers] for name, numbers in columns.items()}
    write_parquet(scenario.folder / "flyt.parquet", UIDS, **columns)
    assert not scenario.run().failures
    assert scenario.manifest("up")["uid"].to_list() == sorted(ordered[:3])
    with duckdb.connect(str(scenario.folder / "lake" / "catalog.duckdb"), read_only=True) as con:
        told = con.sql(
            "SELECT DISTINCT step FROM diff('up', 'v0001', 'v0002') WHERE reason = 'score changed'"
        ).fetchall()
    assert told == [(1,)]


M_FLYT = {  # columns and weights as the authors' notebook prints them
    "vit-b-32": 0.08,
    "vit-l-14": 0.21,
    "DFN-Base": 0.60,
    "DFN-FT": 0.80,
    "CC2M-Classifier": 0.17,
    "IN1K-Classifier": 0.36,
    "FLYT": 0.65,
    "normsim_inf": 0.55,
    "negCLIPLoss": 0.51,
    "hype_lorentzian_distance": 0.45,
    "hype_image_specificity": -0.05,
    "hype_text_specificity": 0.02,
}


def test_the_flyt_example_keeps_the_largest_weighted_sums_of_its_twelve_columns(scenario):
    known, rng = UIDS[5:], np.random.default_rng(0)
    table = {name: rng.normal(10 * n, 10.0 ** (n - 6), len(known)) for n, name in enumerate(M_FLYT)}
    for number, rows in enumerate((slice(0, 9), slice(9, None))):
        columns = {name: values[rows] for name, values in table.items()}
        write_parquet(scenario.folder / f"table/train-0000{number}.parquet", known[rows], **columns)
    unknown = {name: [1e9] for name in M_FLYT}
    write_parquet(scenario.folder / "table/train-00002.parquet", ELSEWHERE[:1], **unknown)
    without_pictures(scenario)
    example = yaml.safe_load(EXAMPLE.read_text())
    flyt = example["external_scores"]["flyt"] | {"files": "table/*.parquet"}
    scenario.document |= {"external_scores": {"flyt": flyt}, "recipes": example["recipes"]}
    assert scenario.run().failures == {}
    value = sum(weight * (table[name] - table[name].mean()) / table[name].std() for name, weight in M_FLYT.items())
    best = dict(sorted(zip(known, value, strict=True), key=lambda pair: -pair[1])[: len(UIDS) // 5])
    chosen = dict(scenario.manifest("flyt_20").select("uid", "step2_value").rows())
    assert chosen == pytest.approx(best, abs=1e-9)
    drawn = soft_cap_sample(value, *words(known), samples=len(UIDS), batch=100_000, penalty=0.15)
    found = dict(scenario.manifest("flyt_soft_cap").select("uid", "copies").rows())
    assert found == {text: times for text, times in zip(known, drawn.tolist(), strict=True) if times}


def test_a_uid_that_the_files_lack_has_no_score_and_can_not_be_ranked(scenario):
    scored(scenario, UIDS[: ROWS * 2] + ELSEWHERE)
    scenario.document["recipes"]["unmasked"] = {"steps": [keep("external_scores/given", count=3)]}
    outcome = scenario.run()
    assert set(outcome.failures) == {"subset/unmasked"}
    assert "isfinite" in outcome.failures["subset/unmasked"]
    assert scenario.scores("external_scores/given")["dfn"].null_count() == ROWS
    assert set(scenario.manifest("best")["uid"]) <= set(UIDS[: ROWS * 2])


def test_coverage_is_told_over_the_pool_and_for_each_shard(scenario):
    scored(scenario, UIDS[: ROWS + 3] + ELSEWHERE, minimum_coverage=0.4)
    assert not scenario.run().failures
    lake = scenario.open().lake
    stored = lake.stored("external_files/given")
    assert stored is not None
    pool = stored.summary["checks"]["pool_coverage"]
    assert pool["passed"]
    assert pool["figures"] == {
        "shards": 3,
        "rows": 36,
        "covered": ROWS + 3,
        "uids": ROWS + 3 + 5,
        "uids_unknown": 5,
        "coverage": (ROWS + 3) / 36,
    }
    found = [lake.stored("external_scores/given", shard) for shard in SHARDS]
    checks = [shard.summary["checks"]["coverage"] for shard in found if shard is not None]
    assert [check["figures"]["dfn/covered"] for check in checks] == [ROWS, 3, 0]
    assert [check["passed"] for check in checks] == [True, False, False]


@pytest.mark.parametrize(("uids", "minimum"), [(ELSEWHERE, 0.0), (UIDS[:ROWS], 0.5)])
def test_files_that_cover_too_little_of_the_pool_are_refused(scenario, uids, minimum):
    scored(scenario, uids, minimum_coverage=minimum)
    outcome = scenario.run()
    assert "minimum_coverage" in outcome.failures["external_files/given"]
    assert outcome.not_attempted["subset/best"] == "external_files/given"
    assert scenario.open().lake.shards("external_scores/given") == []


def test_a_higher_minimum_is_asked_of_files_that_are_there(scenario):
    scored(scenario, UIDS[:ROWS])
    assert not scenario.run().failures
    scenario.set("external_scores", "given", "minimum_coverage", value=0.5)
    outcome = scenario.run()
    assert set(outcome.failures) == {"external_files/given"}
    assert outcome.not_attempted["subset/best"] == "external_files/given (its earlier results are out of date)"
    scenario.set("external_scores", "given", "minimum_coverage", value=0.3)
    outcome = scenario.run()
    assert not outcome.failures
    assert not any(key.startswith("external_scores") for key in outcome.computed)


def test_a_file_that_was_touched_changes_nothing_and_one_that_changed_is_read_again(scenario):
    scored(scenario)
    scenario.run()
    before = scenario.files()
    (scenario.folder / "given" / "a.parquet").touch()
    assert set(scenario.run().computed) == {"external_files/given", "catalog"}
    changed = {name for name, stamp in scenario.files().items() if before.get(name) != stamp}
    assert not any(name.startswith(("external_scores", "subset/")) for name in changed)
    write_parquet(scenario.folder / "given" / "a.parquet", UIDS, dfn=[1 - value(text) for text in UIDS])
    assert scenario.run().computed["external_scores/given"] == list(SHARDS)
    assert scenario.subset("best").name == "v0002"
    assert scenario.run().computed == {}


def test_a_new_shard_is_joined_alone(scenario):
    scored(scenario)
    scenario.run()
    datacomp_shard(scenario.folder / "metadata", "00003", ROWS)
    assert scenario.run().computed["external_scores/given"] == ["00003"]


def test_a_conflict_costs_its_shard_alone(scenario):
    scored(scenario, [*UIDS, UIDS[ROWS]])
    path = scenario.folder / "given" / "a.parquet"
    table = pl.read_parquet(path)
    table[len(UIDS), "dfn"] = 7.0
    table.write_parquet(path)
    outcome = scenario.run()
    assert "more than one value" in outcome.failures["external_scores/given"]
    assert UIDS[ROWS] in outcome.failures["external_scores/given"]
    assert scenario.open().lake.shards("external_scores/given") == ["00000", "00002"]


def test_a_missing_file_is_named_with_its_field(scenario):
    scored(scenario)
    (scenario.folder / "given" / "a.parquet").unlink()
    assert "external_scores.given: " in scenario.run().failures["external_files/given"]


def test_what_scores_of_elsewhere_chose_is_made_again_from_its_record(scenario, tmp_path):
    scored(scenario)
    scenario.run()
    version = scenario.subset("best")
    record = json.loads((Path(version.folder) / "lineage.json").read_text())
    assert "external_files/given" in record["inputs"]
    assert record["encoders"] == {}
    choose_again(scenario.open().lake, record, tmp_path / "chosen")
    rebuild(record, tmp_path / "rebuilt")
    write_parquet(scenario.folder / "given" / "a.parquet", UIDS, dfn=[1.0 for _ in UIDS])
    with pytest.raises(LakeError, match="external_files/given"):
        rebuild(record, tmp_path / "changed")


# Uid lists in the graph


def write_list(path: Path, uids: list[str]) -> None:
    if path.suffix == ".npy":
        np.save(path, subset_array(*words(uids)))
    elif path.suffix == ".parquet":
        write_parquet(path, uids)
    else:
        header = ["uid"] if path.suffix == ".csv" else []
        path.write_text("\n".join([*header, *uids]) + "\n")


def listed(scenario: Scenario, name: str, uids: list[str], **settings: object) -> None:
    """Add a uid list to the scenario, a recipe that starts from it, and one that drops its rows."""
    write_list(scenario.folder / name, uids)
    without_pictures(scenario)
    scenario.document["external_uids"] = {"dfn": {"files": name, **settings}}
    scenario.document["recipes"] = {
        "begun": {"from": "external_uids/dfn", "steps": []},
        "others": {"steps": [{"except": "external_uids/dfn"}]},
    }


@pytest.mark.parametrize("suffix", ["npy", "txt", "parquet", "csv"])
def test_a_uid_list_of_every_kind_is_read_alike(tmp_path, suffix):
    path = tmp_path / f"list.{suffix}"
    write_list(path, [*UIDS[:3], UIDS[0]])
    with opened(find([str(path)])) as table:
        uids = table.uids()
    assert format_uids(uids["f0"].to_numpy(), uids["f1"].to_numpy()) == sorted(UIDS[:3])


def test_a_recipe_names_a_uid_list_by_its_asset(scenario):
    listed(scenario, "dfn.npy", [*UIDS[3:9], *ELSEWHERE])
    assert not scenario.run().failures
    assert scenario.manifest("begun")["uid"].to_list() == sorted(UIDS[3:9])
    assert scenario.manifest("others")["uid"].to_list() == sorted(set(UIDS) - set(UIDS[3:9]))
    stored = scenario.open().lake.stored("external_uids/dfn")
    assert stored is not None
    figures = stored.summary["checks"]["pool_coverage"]["figures"]
    assert (figures["covered"], figures["uids_unknown"]) == (6, 5)
    graph = scenario.open_graph()[1]
    deps = {node.key: node.deps for node in graph.subsets}
    assert "external_uids/dfn" in deps["subset/begun"]
    with duckdb.connect(str(scenario.folder / "lake" / "catalog.duckdb"), read_only=True) as con:
        told = con.sql(f"SELECT recipe, verdict FROM explain('{UIDS[3]}') ORDER BY recipe, step").fetchall()
    assert ("begun", "kept") in told
    assert ("others", "dropped") in told


def test_a_uid_list_that_changed_is_read_again_and_a_touched_one_changes_nothing(scenario):
    listed(scenario, "dfn.txt", UIDS[:4])
    scenario.run()
    (scenario.folder / "dfn.txt").touch()
    assert set(scenario.run().computed) == {"external_uids/dfn", "catalog"}
    write_list(scenario.folder / "dfn.txt", UIDS[:5])
    assert not scenario.run().failures
    assert len(scenario.manifest("begun")) == 5


def test_a_uid_list_that_covers_too_little_is_refused(scenario):
    listed(scenario, "dfn.txt", UIDS[:4], minimum_coverage=0.5)
    outcome = scenario.run()
    assert "external_uids.dfn.minimum_coverage" in outcome.failures["external_uids/dfn"]
    assert outcome.not_attempted["subset/begun"] == "external_uids/dfn"


def test_a_list_that_is_refused_leaves_no_recipe_with_the_old_one(scenario):
    listed(scenario, "dfn.txt", UIDS[:4], minimum_coverage=0.1)
    assert not scenario.run().failures
    write_list(scenario.folder / "dfn.txt", UIDS[:1])
    outcome = scenario.run()
    assert set(outcome.failures) == {"external_uids/dfn"}
    needed = "external_uids/dfn (its earlier results are out of date)"
    assert outcome.not_attempted == {"subset/begun": needed, "subset/others": needed}


def test_a_recipe_that_names_an_unknown_list_is_refused(scenario):
    listed(scenario, "dfn.txt", UIDS[:4])
    scenario.set("recipes", "begun", "from", value="external_uids/dnf")
    with pytest.raises(ConfigError, match="no uid list 'external_uids/dnf'; did you mean external_uids/dfn"):
        scenario.open()


def test_what_a_uid_list_chose_is_made_again_from_its_record(scenario, tmp_path):
    listed(scenario, "dfn.txt", UIDS[:4])
    scenario.run()
    record = json.loads((Path(scenario.subset("others").folder) / "lineage.json").read_text())
    choose_again(scenario.open().lake, record, tmp_path / "chosen")
    rebuild(record, tmp_path / "rebuilt")
    write_list(scenario.folder / "dfn.txt", UIDS[:5])
    with pytest.raises(LakeError, match="external_uids/dfn: its files hold other uids now"):
        rebuild(record, tmp_path / "changed")
