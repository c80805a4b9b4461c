"""Versions of a subset: every writer gets a number of its own, and a killed one leaves nothing behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from resources.lake.files import Lake
from resources.lake.versions import Versions

WRITER = """
import os, signal, sys
import numpy as np, pyarrow as pa
from resources.lake.files import Lake
from resources.lake.versions import Manifest, Versions

root, writer, act = sys.argv[1], int(sys.argv[2]), sys.argv[3]
schema = pa.schema([("uid", pa.string()), ("f0", pa.uint64()), ("f1", pa.uint64()), ("shard", pa.string())])
table = pa.table([[f"{writer:032x}"], [0], [writer], ["00000"]], schema=schema)

def examine(version):
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "fail":
        raise RuntimeError("a check failed")

versions = Versions(Lake(root), "best")
print("ready", flush=True)
sys.stdin.read()  # until all writers are ready
for _ in range(5):
    manifest = Manifest(1, table.to_reader, {}, 1, {})
    versions.write(manifest, {"rows": 1, "writer": writer}, examine)
"""


def start(root: Path, writer: int, act: str = "write") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(writer), act], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.mark.slow
def test_of_many_writers_at_once_none_loses_a_version(tmp_path: Path) -> None:
    writers = [start(tmp_path, number) for number in range(8)]
    for process in writers:
        assert process.stdout is not None
        with process.stdout as output:
            assert output.readline() == b"ready\n"
    for process in writers:
        assert process.stdin is not None
        process.stdin.close()  # the start for all
    assert [process.wait() for process in writers] == [0] * len(writers)
    versions = Versions(Lake(str(tmp_path)), "best")
    assert versions.names() == [f"v{number:04d}" for number in range(1, 41)]
    written = [versions.read(name).lineage["writer"] for name in versions.names()]
    assert sorted(written) == sorted(list(range(8)) * 5)
    for name in versions.names():
        assert versions.read_uids(versions.read(name))["f1"].to_pylist() == [versions.read(name).lineage["writer"]]
        files = {path.name for path in (tmp_path / "subset/best" / name).iterdir()}
        assert files == {"manifest.parquet", "subset.npy", "lineage.json"}
    assert {path.name for path in (tmp_path / "subset/best").iterdir()} == {*versions.names(), ".claims.lock"}


def test_the_number_of_a_writer_that_was_killed_or_failed_is_used_again(tmp_path: Path) -> None:
    folder = tmp_path / "subset/best"
    for act, status, left in (("kill", -signal.SIGKILL, ["v0001"]), ("fail", 1, [])):
        process = start(tmp_path, 1, act)
        process.communicate()
        assert process.returncode == status
        assert [path.name for path in folder.iterdir() if path.name != ".claims.lock"] == left
        assert Versions(Lake(str(tmp_path)), "best").names() == []
    process = start(tmp_path, 2)
    process.communicate()
    assert Versions(Lake(str(tmp_path)), "best").names() == ["v0001", "v0002", "v0003", "v0004", "v0005"]
