"""The catalog of a small lake whose subsets were selected by `select`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.uids import format_uids, subset_array
from resources.catalog.build import build_catalog, read_catalog
from resources.lake.files import Lake, LakeError
from tests.support.small_lake import CLIP, CLIP_SCORE, LABELS, NEAR, RECIPES, SCORES, TARGETS, SmallLake, fetch


@pytest.fixture
def lake(tmp_path):
    """Return a lake of two shards that share some uids, and one version of each recipe."""
    small = SmallLake(tmp_path / "the [lake]'s")
    small.add_shard("00000", [i * 2**59 for i in range(20)])
    small.add_shard("00001", [1, 2, 2**59, 3, 3, 2**63, *range(5, 15)])
    small.add_targets()
    small.members = {
        "wide": small.add_version("wide", 1),
        "narrow": small.add_version("narrow", 1),
    }
    half = [(row["f0"], row["f1"]) for row in small.rows["00000"][::2] + small.rows["00001"][::2]]
    f0, f1 = np.array(half, dtype=np.uint64).T
    small.listed = set(half)
    small.members["listed"] = small.add_version("listed", 1, listed={"list.npy": subset_array(f0, f1)})
    return small


def expected_verdicts(lake, uid):
    """Compute a uid's verdicts in plain Python: for each recipe those of step 0, 1, ..."""
    row = next(r for shard in sorted(lake.rows) for r in lake.rows[shard] if (r["f0"], r["f1"]) == uid)
    unique = {}
    for shard in sorted(lake.rows):
        for r in lake.rows[shard]:
            unique.setdefault((r["f0"], r["f1"]), r)

    def best(rows, score, count):
        return sorted(rows, key=lambda r: (-r[score], r["f0"], r["f1"]))[:count]

    pool = list(unique.values())
    wide1 = [r for r in pool if r["width"] >= 202]
    wide2 = best(wide1, CLIP, len(pool) // 2)
    listed0 = [r for r in pool if (r["f0"], r["f1"]) in lake.listed]
    listed1 = [r for r in listed0 if r[NEAR] >= 0.5]
    stages = {
        "listed": [listed0, listed1, [r for r in listed1 if "1" in r["caption"]]],
        "narrow": [wide2, best(wide2, NEAR, 4)],
        "wide": [pool, wide1, wide2],
    }
    verdicts = {}
    for recipe, kept in stages.items():
        inside = [row in stage for stage in kept]
        verdicts[recipe] = [
            "kept" if inside[n] else "dropped" if n == 0 or inside[n - 1] else "not reached" for n in range(len(kept))
        ]
    return row, verdicts


def without_filters(lake, *shards):
    """Write shards of the pool again without Bloom filters, as earlier versions did."""
    for shard in shards:
        path = lake.root / "raw_pool" / f"{shard}.parquet"
        pq.write_table(pq.read_table(path), path, compression="zstd")


@pytest.mark.parametrize("old", [(), ("00001",), ("00000", "00001")])
def test_explain_agrees_with_brute_force_for_every_uid(lake, old):
    without_filters(lake, *old)
    uids = {(row["f0"], row["f1"]) for rows in lake.rows.values() for row in rows}
    seen = set()
    with lake.build() as con:
        for f0, f1 in uids:
            row, verdicts = expected_verdicts(lake, (f0, f1))
            told = fetch(con, "FROM explain(?)", f"{f0:016X}{f1:016x}")
            found = {}
            for line in told:
                found.setdefault(line["recipe"], []).append(line["verdict"])
                assert line["version"] == "v0001"
                if line["score"] is None:
                    assert (line["value"], line["threshold"], line["rank"]) == (None, None, None)
                else:
                    assert line["value"] == row[line["score"]]
                if line["score"] == NEAR:
                    label = LABELS[row["nearest"]]
                    assert line["nearest_target"] == row["nearest"]
                    assert (line["nearest_label"], line["nearest_name"]) == (label, f"{label}/000.jpg")
                else:
                    assert line["nearest_label"] is None
            assert found == verdicts
            assert list(found) == sorted(found)
            for recipe, members in lake.members.items():
                assert ((f0, f1) in members) == (verdicts[recipe][-1] == "kept")
            seen |= {verdict for verdicts in found.values() for verdict in verdicts}
    assert seen == {"kept", "dropped", "not reached"}


def test_explain_gives_rank_and_threshold_of_the_lineage_record(lake):
    with lake.build() as con:
        manifest = lake.root / "subset/wide/v0001/manifest.parquet"
        record = json.loads((manifest.parent / "lineage.json").read_text())
        for row in pq.read_table(manifest).to_pylist():
            uid, rank = row["uid"], row["step2_rank"]
            (line,) = fetch(con, "FROM explain(?) WHERE recipe = 'wide' AND step = 2", uid)
            assert line["rank"] == rank
            assert line["threshold"] == record["steps"][1]["threshold"]
            assert line["text"] == record["steps"][1]["text"]
        texts = fetch(con, "SELECT DISTINCT recipe, text FROM explain(?) WHERE step = 0 ORDER BY 1", uid)
    assert [line["text"] for line in texts] == [
        "from the uid list list.npy",
        "from recipe wide v0001",
        "from the pool",
    ]


@pytest.mark.parametrize("uid", ["f" * 32, "", "not a uid", "0x" + "0" * 30])
def test_an_unknown_uid_gets_one_row_that_says_so(lake, uid):
    with lake.build() as con:
        (line,) = fetch(con, "FROM explain(?)", uid)
    assert line["verdict"] == "unknown uid"
    assert line["recipe"] is None


def test_a_rejected_key_gets_its_reason(lake):
    with lake.build() as con:
        (line,) = fetch(con, "FROM explain('000009999')")
    assert (line["verdict"], line["text"]) == ("rejected: broken image", "cut off")


def test_a_sample_of_a_shard_that_was_missing_from_a_version_was_not_in_its_pool(lake):
    lake.add_shard("00007", [77], scored=False)
    uid = f"{77:016x}{2**64 - 1 - 77:016x}"
    with lake.build() as con:
        told = fetch(con, "FROM explain(?) WHERE recipe = 'wide'", uid)
    assert [line["verdict"] for line in told] == ["dropped", "not reached", "not reached"]


def test_scores_that_changed_since_a_version_are_told_from_a_verdict(lake):
    row = next(r for r in lake.rows["00000"] if expected_verdicts(lake, (r["f0"], r["f1"]))[1]["wide"][-1] == "dropped")
    uid = f"{row['f0']:016x}{row['f1']:016x}"
    path = Path(lake.lake.path("clip_score/b32", "00000"))
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, "clip_score", pa.array([9.0] * len(table), pa.float32())), path)
    with lake.build() as con:
        assert fetch(con, "FROM explain(?) WHERE recipe = 'wide'", uid)[-1]["verdict"] == "changed"
    path.unlink()
    with lake.build() as con:
        assert fetch(con, "FROM explain(?) WHERE recipe = 'wide'", uid)[-1]["verdict"] == "unknown"


def test_a_score_that_left_the_project_leaves_the_other_recipes_explained(lake):
    build_catalog(
        Lake(str(lake.root)),
        lake.catalog,
        scores=[CLIP_SCORE],
        targets=[],
        recipes=list(RECIPES),
    )
    uids = [(row["f0"], row["f1"]) for row in lake.rows["00000"]]
    with read_catalog(lake.catalog) as con:
        for f0, f1 in uids:
            _, verdicts = expected_verdicts(lake, (f0, f1))
            told = fetch(con, "FROM explain(?)", f"{f0:016x}{f1:016x}")
            assert [line["verdict"] for line in told if line["recipe"] == "wide"] == verdicts["wide"]
            narrow = [line["verdict"] for line in told if line["recipe"] == "narrow"]
            assert narrow == [v.replace("dropped", "unknown") if n else v for n, v in enumerate(verdicts["narrow"])]


def test_overlap_counts_current_versions(lake):
    with lake.build() as con:
        for a, b in [("wide", "narrow"), ("listed", "wide"), ("wide", "wide")]:
            first, second = set(lake.members[a]), set(lake.members[b])
            (counts,) = fetch(con, "FROM overlap(?, ?)", a, b)
            assert counts == {
                "rows_a": len(first),
                "rows_b": len(second),
                "rows_both": len(first & second),
                "jaccard": pytest.approx(len(first & second) / len(first | second)),
            }
        (none,) = fetch(con, "FROM overlap('no', 'such')")
        assert none == {"rows_a": 0, "rows_b": 0, "rows_both": 0, "jaccard": None}


def test_a_new_version_becomes_the_current_one_without_a_new_catalog(lake):
    with lake.build() as con:
        lake.add_shard("00002", list(range(1000, 1040)))
        newer = set(lake.add_version("wide", 2))
        versions = fetch(con, "SELECT version, rows, current FROM subsets WHERE recipe = 'wide'")
        assert versions == [
            {"version": "v0001", "rows": len(lake.members["wide"]), "current": False},
            {"version": "v0002", "rows": len(newer), "current": True},
        ]
        (counts,) = fetch(con, "FROM overlap('wide', 'narrow')")
        assert counts["rows_a"] == len(newer)
    with lake.build() as con:
        uid = format_uids(*(np.array([word], dtype=np.uint64) for word in next(iter(newer))))[0]
        told = fetch(con, "FROM explain(?) WHERE recipe = 'wide'", uid)
        assert {line["version"] for line in told} == {"v0002"}


def test_version_ten_thousand_is_newer_than_version_nine_thousand(lake):
    for number in ("v9999", "v10000"):
        folder = lake.root / "subset/wide" / number
        folder.mkdir()
        record = json.loads((lake.root / "subset/wide/v0001/lineage.json").read_text())
        (folder / "lineage.json").write_text(json.dumps({**record, "version": number}))
        (folder / "manifest.parquet").write_bytes((lake.root / "subset/wide/v0001/manifest.parquet").read_bytes())
    uid = format_uids(*(np.array([word], dtype=np.uint64) for word in lake.members["wide"][0]))[0]
    with lake.build() as con:
        (current,) = fetch(con, "FROM subsets WHERE current AND recipe = 'wide'")
        assert current["version"] == "v10000"
        assert fetch(con, "FROM explain(?) WHERE recipe = 'wide'", uid)[0]["version"] == "v10000"


def test_a_version_without_a_lineage_record_and_temporary_files_are_not_seen(lake):
    with lake.build() as con:
        before = [fetch(con, f"SELECT count(*) AS n FROM {v}") for v in ("pool", "subset_members", "subsets")]
        folder = lake.root / "subset/wide/v0002"
        folder.mkdir()
        (folder / "manifest.parquet").write_bytes((folder.parent / "v0001/manifest.parquet").read_bytes())
        pool = lake.root / "raw_pool"
        (pool / ".00009.parquet").write_bytes((pool / "00000.parquet").read_bytes())
        (pool / ".00009.parquet.1.tmp").write_bytes(b"half")
        (lake.root / "subset/wide/.v0003").mkdir()
        (lake.root / "subset/wide/.v0003/lineage.json").write_text("{")
        after = [fetch(con, f"SELECT count(*) AS n FROM {v}") for v in ("pool", "subset_members", "subsets")]
    assert after == before


def test_views_show_what_the_files_hold(lake):
    with lake.build() as con:
        rows = [row for shard in lake.rows.values() for row in shard]
        scores = fetch(con, f'SELECT shard, key, f0, "{CLIP}" AS a, "{NEAR}" AS b FROM scores')
        key = "key"
        assert sorted(scores, key=lambda r: r[key]) == sorted(
            ({"shard": r["shard"], "key": r["key"], "f0": r["f0"], "a": r[CLIP], "b": r[NEAR]} for r in rows),
            key=lambda r: r[key],
        )
        (counts,) = fetch(con, 'SELECT count(*) AS n FROM "norm_sim/b32/flowers"')
        assert counts["n"] == len(rows)
        assert fetch(con, "FROM shards") == [
            {"shard": shard, "rows": len(lake.rows[shard]), "rejected": 1} for shard in sorted(lake.rows)
        ]
        funnel = fetch(con, "FROM funnel WHERE recipe = 'wide'")
        record = json.loads((lake.root / "subset/wide/v0001/lineage.json").read_text())
        for line, step in zip(funnel, record["steps"], strict=True):
            assert {name: step[name] for name in line if name in step} == {
                name: value for name, value in line.items() if name in step
            }
            assert {"entered", "kept", "left", "threshold", "text"} <= line.keys() & step.keys()
        shards = fetch(con, "FROM subset_shards WHERE recipe = 'wide' ORDER BY shard, input")
        assert [(s["shard"], s["input"], s["fingerprint"], s["missing"]) for s in shards] == [
            ("00000", "clip_score/b32", "fq", None),
            ("00000", "raw_pool", "fp", None),
            ("00001", "clip_score/b32", "fq", None),
            ("00001", "raw_pool", "fp", None),
            ("00007", None, None, "not scored"),
        ]
        members = fetch(con, "SELECT f0, f1 FROM subset_members WHERE recipe = 'narrow' ORDER BY ALL")
        assert [(m["f0"], m["f1"]) for m in members] == lake.members["narrow"]


def test_a_catalog_over_nothing_is_empty_and_fills_up_by_itself(tmp_path):
    small = SmallLake(tmp_path / "lake")
    small.root.mkdir()
    with small.build() as con:
        views = [name for (name,) in con.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()]
        assert {"pool", "rejects", "scores", "subsets", "subset_members", "funnel", "shards"} <= set(views)
        for view in views:
            assert fetch(con, f'FROM "{view}"') == []
        assert fetch(con, "FROM explain('0')")[0]["verdict"] == "unknown uid"
        types = {line["column_name"]: line["column_type"] for line in fetch(con, "DESCRIBE scores")}
        assert types["f0"] == "UBIGINT"
        assert types[NEAR] == "FLOAT"
        assert types["nearest_target/b32/flowers"] == "BIGINT"
        small.add_shard("00000", [5, 6])
        small.add_version("wide", 1)
        assert fetch(con, f'SELECT f0, "{CLIP}" AS v FROM scores ORDER BY f0') == [
            {"f0": 5, "v": 0.0},
            {"f0": 6, "v": float(np.float32(0.1))},
        ]
        assert [line["recipe"] for line in fetch(con, "FROM subsets")] == ["wide"]
        assert fetch(con, "FROM explain(?)", f"{5:016x}{2**64 - 6:016x}")[0]["verdict"] == "no subset"


def test_a_missing_catalog_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no catalog"):
        read_catalog(tmp_path / "catalog.duckdb")


READER = """
import sys
from pathlib import Path
from resources.catalog.build import read_catalog
with read_catalog(Path(sys.argv[1])) as con:
    for line in sys.stdin:
        print(con.execute(line).fetchall(), flush=True)
"""


def test_readers_in_other_processes_go_on_while_the_catalog_is_swapped(lake):
    lake.build().close()
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(lake.catalog)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[3],
        )
        for _ in range(2)
    ]

    def ask(reader, sql):
        reader.stdin.write(sql + "\n")
        reader.stdin.flush()
        return reader.stdout.readline().strip()

    try:
        count = f"[({len(lake.members['wide'])},)]"
        question = "SELECT count(*) FROM subset_members WHERE recipe = 'wide'"
        assert [ask(reader, question) for reader in readers] == [count, count]
        lake.build(recipes=["wide"]).close()
        assert [ask(reader, question) for reader in readers] == [count, count]
        told = f"SELECT count(DISTINCT recipe) FROM explain('{'0' * 16}{'f' * 16}')"
        assert [ask(reader, told) for reader in readers] == ["[(3,)]", "[(3,)]"]
        with read_catalog(lake.catalog) as con:
            assert con.execute(told).fetchall() == [(1,)]
    finally:
        for reader in readers:
            reader.stdin.close()
            reader.wait(timeout=60)
            reader.stdout.close()
    assert [reader.returncode for reader in readers] == [0, 0]
    assert [path.name for path in lake.root.iterdir() if path.name.startswith((".", "catalog.duckdb."))] == []


def test_a_build_that_fails_leaves_the_old_catalog(lake):
    lake.build().close()
    before = lake.catalog.read_bytes()
    (lake.root / "subset/wide/v0002").mkdir()
    (lake.root / "subset/wide/v0002/lineage.json").write_text("{")
    with pytest.raises(LakeError, match="not a lineage record"):
        lake.build()
    assert lake.catalog.read_bytes() == before


def test_explain_reads_only_the_row_groups_that_may_hold_the_uid(lake):
    groups = {}
    for file in ("raw_pool/00000", "clip_score/b32/00000", "subset/wide/v0001/manifest"):
        path = lake.root / f"{file}.parquet"
        pq.write_table(pq.read_table(path), path, row_group_size=2)
        groups[file] = pq.ParquetFile(path).num_row_groups
    f0, f1 = max(lake.members["wide"])
    with lake.build(recipes=["wide"]) as con:
        plan = con.execute(f"EXPLAIN ANALYZE FROM explain('{f0:016x}{f1:016x}')").fetchall()[0][1]
    scans = [(int(read), int(all_)) for read, all_ in re.findall(r"Row Groups Scanned: (\d+) / (\d+)", plan)]
    n = groups["raw_pool/00000"]
    manifest_groups = groups["subset/wide/v0001/manifest"]
    assert sorted(scan for scan in scans if scan[1] != 2) == sorted(  # two: the rejects
        [(1, n + 1), (1, n), (1, n), (1, 1), (1, manifest_groups)]
    )


def test_explain_opens_no_file_of_another_shard(lake):
    """Only files of the pool are searched; of other assets the first file is opened too, for its columns."""
    for score in SCORES:
        (lake.root / score.asset / "00002.parquet").write_bytes(b"not parquet")
    f0, f1 = lake.rows["00001"][0]["f0"], lake.rows["00001"][0]["f1"]
    with lake.build() as con:
        told = fetch(con, "FROM explain(?) WHERE score IS NOT NULL", f"{f0:016x}{f1:016x}")
        assert {line["score"]: line["value"] for line in told} == {
            score: lake.rows["00001"][0][score] for score in (CLIP, NEAR)
        }
        with pytest.raises(duckdb.Error, match="00002"):
            con.execute("SELECT count(*) FROM scores").fetchall()


def test_explain_finds_the_scores_however_the_lakes_path_is_written(lake):
    row = lake.rows["00001"][0]
    root = lake.root / ".." / lake.root.name
    build_catalog(Lake(str(root)), lake.catalog, scores=SCORES, targets=TARGETS, recipes=["wide"])
    with read_catalog(lake.catalog) as con:
        assert fetch(con, "FROM explain(?)", f"{row['f0']:016x}{row['f1']:016x}")[2]["value"] == row[CLIP]


def test_the_pools_filters_tell_in_which_shard_a_uid_may_be(lake):
    for number in range(3):
        lake.add_shard(f"1000{number}", [f0 << 40 for f0 in range(number, 3000, 3)], scored=False)
        lake.lake.remove("rejects", f"1000{number}")
    f0, f1 = 1501 << 40, 2**64 - 1 - (1501 << 40)

    def shards_read(con):
        plan = con.execute(f"EXPLAIN ANALYZE FROM explain('{f0:016x}{f1:016x}')").fetchall()[0][1]
        return max(int(read) for read in re.findall(r"Row Groups Scanned: (\d+) / 5", plan))

    with lake.build() as con:
        assert shards_read(con) == 1
        without_filters(lake, "10000", "10001", "10002")
        assert shards_read(con) == 3


def test_uids_that_share_their_first_half_are_told_apart(tmp_path):
    small = SmallLake(tmp_path / "lake")
    halves = {"00000": [(7, 1), (7, 2), (8, 3)], "00001": [(8, 2), (7, 3), (7, 2), (9, 1)]}
    values = {}
    for shard, uids in halves.items():
        f0s, f1s = (list(words) for words in zip(*uids, strict=True))
        small.add_shard(shard, f0s, f1s=f1s)
        scores = [len(values) + 0.5 + i for i in range(len(uids))]
        identity = {"shard": [shard] * len(uids), "f0": pa.array(f0s, pa.uint64()), "f1": pa.array(f1s, pa.uint64())}
        small.write("clip_score/b32", shard, {**identity, "clip_score": pa.array(scores, pa.float32())})
        for uid, score in zip(uids, scores, strict=True):
            values.setdefault(uid, score)
    small.add_version("all", 1, recipe={"steps": [{"keep_top": {"score": CLIP, "count": 1}}]})
    with small.build(recipes=["all"]) as con:
        for (f0, f1), value in values.items():
            assert fetch(con, "FROM explain(?)", f"{f0:016x}{f1:016x}")[-1]["value"] == value
        assert fetch(con, "FROM explain(?)", f"{9:016x}{2:016x}")[0]["verdict"] == "unknown uid"


def test_explain_sees_shards_that_came_changed_or_went_after_the_catalog_was_built(lake):
    def told(uid):
        return fetch(con, "FROM explain(?)", f"{uid[0]:016x}{uid[1]:016x}")

    with lake.build() as con:
        first, second = ([(row["f0"], row["f1"]) for row in lake.rows[shard]] for shard in ("00000", "00001"))
        gone = next(u for u in first if u not in second and not any(u in m for m in lake.members.values()))
        assert told(gone)[0]["recipe"] is not None
        lake.add_shard("00002", [100, 101])
        assert [line["verdict"] for line in told((100, 2**64 - 101))][:2] == ["dropped", "not reached"]
        lake.add_shard("00001", [f0 for f0, _ in reversed(second)], clip=lambda f0: f0 % 11 + 20)
        for asset in ("raw_pool", *(score.asset for score in SCORES)):
            lake.lake.remove(asset, "00000")
        for uid in second:
            (line,) = (line for line in told(uid) if line["recipe"] == "wide" and line["step"] == 2)
            if uid not in lake.members["wide"]:
                assert line["value"] == uid[0] % 11 + 20
        assert told(gone)[0]["verdict"] == "unknown uid"


def test_every_score_leads_to_its_asset_and_an_unknown_one_to_itself(lake):
    named = {
        "norm_sim_2/b32/flowers": "norm_sim/b32/flowers",
        NEAR: "norm_sim/b32/flowers",
        CLIP: "clip_score/b32",
        "it's gone": "it's gone",
    }
    with lake.build() as con:
        found = con.execute("SELECT list_transform(?, lambda score: score_asset(score))", [list(named)]).fetchone()
    assert found == (list(named.values()),)
