"""The lake holds complete files with their provenance."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from resources.lake.files import (
    METADATA_KEY,
    Lake,
    LakeError,
    Provenance,
    column_to_vectors,
    sample_digest,
    vectors_to_column,
)
from resources.lake.owners import token


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def provenance(**changes: object) -> Provenance:
    given = {"asset": "clip_score/b32", "shard": "00000", "code_version": "1", "parameters": {}, "inputs": {}}
    return Provenance(**{**given, **changes})


def test_a_file_reads_back_with_its_provenance_rows_and_summary(lake: Lake) -> None:
    made_from = provenance(parameters={"temperature": 0.01}, inputs={"embeddings/b32": "ab"})
    written = lake.write(pa.table({"x": [1, 2, 3]}), made_from, summary={"mean": 2.0})
    stored = lake.stored("clip_score/b32", "00000")
    assert stored == written
    assert stored.provenance.digest() == made_from.digest()
    assert (stored.rows, stored.summary) == (3, {"mean": 2.0})
    assert lake.read("clip_score/b32", "00000")["x"].to_pylist() == [1, 2, 3]


def test_what_another_process_wrote_removed_or_broke_is_seen_at_the_next_look(lake: Lake) -> None:
    other = Lake(lake.root)
    first = lake.write(pa.table({"x": [1, 2, 3]}), provenance())
    assert lake.stored("clip_score/b32", "00000") == first
    second = other.write(pa.table({"x": [3, 2, 1]}), provenance(code_version="2"))
    assert second != first
    assert lake.stored("clip_score/b32", "00000") == second
    other.remove("clip_score/b32", "00000")
    assert lake.stored("clip_score/b32", "00000") is None
    lake.write(pa.table({"x": [1, 2, 3]}), provenance())
    assert lake.stored("clip_score/b32", "00000") == first
    Path(lake.path("clip_score/b32", "00000")).write_bytes(b"broken")
    assert lake.stored("clip_score/b32", "00000") is None


@pytest.mark.parametrize("name", ["a::b", "a b", "50% [1]*?#"])
def test_a_lake_lies_where_its_path_says(tmp_path: Path, name: str) -> None:
    Lake(str(tmp_path / name)).write(pa.table({"x": [1]}), provenance())
    assert (tmp_path / name / "clip_score" / "b32" / "00000.parquet").is_file()
    assert Lake(str(tmp_path / name)).shards("clip_score/b32") == ["00000"]


@pytest.mark.parametrize(
    "change",
    [
        {"asset": "clip_score/l14"},
        {"shard": "00001"},
        {"code_version": "2"},
        {"parameters": {"temperature": 0.02}},
        {"inputs": {"embeddings/b32": "cd"}},
    ],
)
def test_every_part_of_a_provenance_changes_its_digest(change: dict[str, object]) -> None:
    assert provenance(**change).digest() != provenance().digest()


def test_the_fingerprint_is_the_contents_where_the_asset_gives_one(lake: Lake) -> None:
    table = pa.table({"x": [1, 2]})
    first = lake.write(table, provenance(inputs={"source": "yesterday"}), content=sample_digest(table))
    second = lake.write(table, provenance(inputs={"source": "today"}), content=sample_digest(table))
    assert first.provenance != second.provenance
    assert first.fingerprint == second.fingerprint


def test_a_digest_depends_on_values_and_not_on_chunks() -> None:
    whole = pa.table({"x": ["a", "b", None, "d"], "y": [1.0, 2.0, 3.0, 4.0]})
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    other = pa.table({"x": ["a", "b", None, "e"], "y": [1.0, 2.0, 3.0, 4.0]})
    assert sample_digest(chunked) == sample_digest(whole)
    assert sample_digest(other) != sample_digest(whole)


def test_writing_the_same_again_gives_the_same_bytes(lake: Lake) -> None:
    for asset in ("clip_score/b32", "embeddings/b32"):
        given = provenance(asset=asset)
        path = Path(lake.path(asset, "00000"))
        lake.write(pa.table({"x": [1.5, 2.5]}), given)
        first = path.read_bytes()
        lake.write(pa.table({"x": [1.5, 2.5]}), given)
        assert path.read_bytes() == first


def test_a_pools_file_tells_by_filters_that_it_has_no_such_row(lake: Lake) -> None:
    """Other files have no filters, which would be as large as a score itself."""
    numbers = np.random.default_rng(0).integers(0, 2**64, 150_000, dtype=np.uint64)
    written, others = numbers[:140_000], numbers[140_000:]  # two row groups
    for asset in ("raw_pool", "clip_score/b32"):
        lake.write(pa.table({"f0": written, "f1": written}), provenance(asset=asset))
    probe = "SELECT count(*) FILTER (NOT bloom_filter_excludes) FROM parquet_bloom_probe(?, ?, ?::UBIGINT)"

    def groups_left(asset: str, column: str, value: int) -> int:
        (count,) = duckdb.execute(probe, [lake.path(asset, "00000"), column, value]).fetchone() or ()
        return int(count)

    assert all(groups_left("raw_pool", "f0", int(value)) >= 1 for value in written[::10_000])
    assert sum(groups_left("raw_pool", "f0", int(value)) for value in others[:1000]) < 40  # 2000 at one in a hundred
    assert groups_left("raw_pool", "f1", int(others[0])) == 2
    assert groups_left("clip_score/b32", "f0", int(others[0])) == 2


def test_embeddings_are_mapped_and_not_copied(lake: Lake) -> None:
    vectors = np.arange(12, dtype=np.float16).reshape(4, 3)
    table = pa.table({"image": vectors_to_column(vectors)})
    lake.write(table, provenance(asset="embeddings/b32"))
    before = pa.total_allocated_bytes()
    read = column_to_vectors(lake.read("embeddings/b32", "00000")["image"])
    np.testing.assert_array_equal(read, vectors)
    assert pa.total_allocated_bytes() - before < vectors.nbytes


def test_only_float16_vectors_make_a_column() -> None:
    with pytest.raises(ValueError, match="float16"):
        vectors_to_column(np.zeros((2, 3), np.float32))


def test_a_missing_file_is_an_error_that_names_asset_shard_and_remedy(lake: Lake) -> None:
    assert lake.stored("clip_score/b32", "00000") is None
    with pytest.raises(LakeError, match=r"clip_score/b32 of shard 00000 is not there yet.*materialize"):
        lake.read("clip_score/b32", "00000")


@pytest.mark.parametrize("asset", ["clip_score/b32", "embeddings/b32"])
def test_a_foreign_file_is_set_aside_and_counts_as_missing(lake: Lake, asset: str) -> None:
    path = Path(lake.path(asset, "00000"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not one of ours")
    assert lake.stored(asset, "00000") is None
    assert lake.shards(asset) == []
    assert path.with_name(f".{path.name}.damaged").read_bytes() == b"not one of ours"
    assert lake.damaged == {str(path): "it does not end as a Parquet or Arrow file does"}


def test_a_file_without_provenance_is_set_aside(lake: Lake) -> None:
    path = Path(lake.path("clip_score/b32", "00000"))
    lake.write(pa.table({"x": [1]}), provenance())
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({METADATA_KEY: json.dumps({})}), path)
    assert lake.stored("clip_score/b32", "00000") is None
    assert "not a file of this lake" in lake.damaged[str(path)]


def test_shards_are_listed_without_temporary_files(lake: Lake) -> None:
    for shard in ("00001", "00000"):
        lake.write(pa.table({"x": [1]}), provenance(shard=shard))
    (Path(lake.root) / "clip_score/b32/.00002.parquet.1.tmp").write_bytes(b"half")
    assert lake.shards("clip_score/b32") == ["00000", "00001"]
    assert lake.shards("neg_clip_loss/b32") == []


def test_an_error_while_writing_leaves_the_old_file_and_no_temporary_one(lake: Lake) -> None:
    lake.write(pa.table({"x": [1]}), provenance())
    path = lake.path("clip_score/b32", "00000")
    with pytest.raises(RuntimeError, match="stop"), lake.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("stop")
    assert lake.read("clip_score/b32", "00000")["x"].to_pylist() == [1]
    assert [p.name for p in Path(path).parent.iterdir()] == ["00000.parquet"]


def test_a_writer_that_is_killed_leaves_the_old_file_and_its_litter_is_cleared(lake: Lake) -> None:
    lake.write(pa.table({"x": [1]}), provenance())
    script = textwrap.dedent(
        f"""
        import os, signal
        from resources.lake.files import Lake
        lake = Lake({lake.root!r})
        with lake.replacing(lake.path("clip_score/b32", "00000")) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    folder = Path(lake.path("clip_score/b32", "00000")).parent
    assert len(list(folder.iterdir())) == 2
    assert lake.read("clip_score/b32", "00000")["x"].to_pylist() == [1]
    lake.refresh()
    lake.write(pa.table({"x": [2]}), provenance())
    assert [p.name for p in folder.iterdir()] == ["00000.parquet"]


def test_only_files_of_ended_or_long_silent_writers_are_cleared(lake: Lake) -> None:
    lake.write(pa.table({"x": [1]}), provenance())
    folder = Path(lake.path("clip_score/b32", "00000")).parent
    place, ended = token().partition("-")[0], subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        "running": f"{place}-{os.getppid()}-aa",
        "ended": f"{place}-{ended.pid}-aa",
        "in another container": f"0123456789ab-{ended.pid}-aa",
        "by a process id alone": str(ended.pid),
    }
    paths = {who: folder / f".00000.parquet.{name}.tmp" for who, name in names.items()}
    for path in paths.values():
        path.write_bytes(b"half")
    lake.refresh()
    lake.write(pa.table({"x": [2]}), provenance())
    assert {who for who, path in paths.items() if path.exists()} == paths.keys() - {"ended"}
    for path in paths.values():
        if path.exists():
            os.utime(path, (0, 0))
    lake.refresh()
    lake.write(pa.table({"x": [3]}), provenance())
    assert [path.name for path in folder.iterdir()] == ["00000.parquet"]


def test_two_writers_of_one_process_do_not_share_a_temporary_file(lake: Lake) -> None:
    path = lake.path("clip_score/b32", "00000")
    with lake.replacing(path) as first, lake.replacing(path) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert Path(path).read_bytes() == b"first"  # whose block ended last


def test_a_writer_whose_temporary_name_exists_already_takes_another_one(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = iter(["00", "00", "00", "01"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    path = lake.path("clip_score/b32", "00000")
    with lake.replacing(path) as first:
        first.write_bytes(b"first")
        with lake.replacing(path) as second:
            second.write_bytes(b"second")
            assert first.read_bytes() == b"first"
        assert Path(path).read_bytes() == b"second"
    assert Path(path).read_bytes() == b"first"


CONTAINER = """
import os, sys
from resources.lake.files import Lake
lake = Lake(sys.argv[1])
with lake.replacing(lake.path("clip_score/b32", "00000")) as temporary, open(temporary, "wb") as file:
    for part in range(3):
        file.write(sys.argv[2].encode() * 1000)
        file.flush()
        print(os.getpid(), temporary.name.split("-")[0], flush=True)
        sys.stdin.readline()
"""


def test_two_containers_whose_writers_have_the_same_process_id_do_not_mix_their_bytes(lake: Lake) -> None:
    inside = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine lets no process start namespaces of process ids")
    writers = [
        subprocess.Popen(
            [*inside, sys.executable, "-c", CONTAINER, lake.root, letter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for letter in "ab"
    ]
    path = Path(lake.path("clip_score/b32", "00000"))
    for _ in range(3):  # both write a part before either writes the next
        said = [writer.stdout.readline().split() for writer in writers if writer.stdout is not None]
        (pid, place), (other_pid, other_place) = said
        assert pid == other_pid
        assert place != other_place
        # A process here, to which both writers' process ids are unknown or another process's, clears neither file.
        lake.write(pa.table({"x": [1]}), provenance(shard="00001"))
        assert len(list(path.parent.glob(".*.tmp"))) == 2
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    assert path.read_bytes() in (b"a" * 3000, b"b" * 3000)
    assert sorted(name.name for name in path.parent.iterdir()) == ["00000.parquet", "00001.parquet"]


def test_the_litter_of_a_killed_writer_is_cleared_by_the_next_steps_write_in_the_folder(lake: Lake) -> None:
    lake.write(pa.table({"x": [1]}), provenance())
    folder = Path(lake.path("clip_score/b32", "00000")).parent
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = f".removed.{token().partition('-')[0]}-{ended.pid}-aa.tmp"
    for stray in (name, f"{name}.wal"):
        (folder / stray).write_bytes(b"half")
    lake.refresh()
    lake.write(pa.table({"x": [2]}), provenance())
    assert [path.name for path in folder.iterdir()] == ["00000.parquet"]
