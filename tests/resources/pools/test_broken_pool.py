"""One damaged shard: every fault has its own reason, and costs only its own sample."""

from collections import Counter
from pathlib import Path

import pytest

from resources.pools.base import RAW_POOL_SCHEMA, REJECTS_SCHEMA, ShardRead
from resources.pools.formats import open_pool
from resources.settings import PoolSettings
from tests.support.pool_factory import SHARED, BrokenCase, broken_shard

REAL = SHARED / "data" / "pools" / "broken"


@pytest.fixture
def cases(tmp_path: Path) -> list[BrokenCase]:
    return broken_shard(tmp_path)


@pytest.fixture
def read(tmp_path: Path, cases: list[BrokenCase]) -> ShardRead:
    assert cases  # written before they are read
    return open_pool(PoolSettings(path=str(tmp_path)), {}).read_shard("00000")


def test_each_sample_is_kept_or_rejected_for_its_own_fault(read: ShardRead, cases: list[BrokenCase]) -> None:
    found = dict.fromkeys(read.rows["source_row"].to_pylist())
    found |= dict(zip(read.rejects["source_row"].to_pylist(), read.rejects["reason"].to_pylist(), strict=True))
    expected = {row: case.reason for row, case in enumerate(cases)}
    assert found == expected


def test_samples_seen_are_rows_plus_rejects(read: ShardRead, cases: list[BrokenCase]) -> None:
    assert read.samples == read.rows.num_rows + read.rejects.num_rows == len(cases)
    assert read.rows.schema == RAW_POOL_SCHEMA
    assert read.rejects.schema == REJECTS_SCHEMA


def test_keys_are_those_of_the_tar(read: ShardRead, cases: list[BrokenCase]) -> None:
    assert read.rows["key"].to_pylist() == [case.sample.key for case in cases if case.reason is None]
    assert read.rejects["key"].to_pylist() == [case.sample.key for case in cases if case.reason is not None]


def test_the_cut_and_the_stray_member_are_noted(read: ShardRead) -> None:
    cut, stray = read.notes
    assert "00000.tar" in cut
    assert "cut inside" in cut
    assert "README.nfo" in stray


def test_invalid_utf8_is_repaired_and_marked(read: ShardRead) -> None:
    repaired = [row for row in read.rows.to_pylist() if row["caption_repaired"]]
    assert [row["caption"] for row in repaired] == ["caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}"]


def test_every_reject_says_what_was_found(read: ShardRead) -> None:
    assert all(read.rejects["detail"].to_pylist())


def test_format_is_what_the_bytes_are(read: ShardRead, cases: list[BrokenCase]) -> None:
    formats = dict(zip(read.rows["key"].to_pylist(), read.rows["image_format"].to_pylist(), strict=True))
    for case in cases:
        if case.reason is None:
            assert case.sample.image is not None
            magic = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"RI": "WEBP"}
            assert formats[case.sample.key] == magic[case.sample.image[:2]]


def test_a_good_sample_after_the_faults_still_has_its_bytes(
    read: ShardRead, cases: list[BrokenCase], tmp_path: Path
) -> None:
    data = (tmp_path / "00000.tar").read_bytes()
    images = {case.sample.key: case.sample.image for case in cases if case.reason is None}
    for row in read.rows.to_pylist():
        start = row["image_offset"]
        assert data[start : start + row["image_size"]] == images[row["key"]]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the damaged shard is not at {REAL}")
def test_the_downloaded_damaged_shard_gives_what_its_notes_expect() -> None:
    read = open_pool(PoolSettings(path=str(REAL)), {}).read_shard("00000")
    expected: dict[str, list[str]] = {}
    for line in (REAL / "EXPECTED.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 4 and cells[1].startswith("`"):
            expected.setdefault(cells[1].strip("`"), []).append(f"{cells[3]} {cells[4]}".strip())
    for row in read.rejects.to_pylist():
        assert any(row["reason"] in words for words in expected[row["key"]]), row
    for key in read.rows["key"].to_pylist():
        assert any(words.startswith("accept") for words in expected[key]), key
    judged = Counter(read.rows["key"].to_pylist()) + Counter(read.rejects["key"].to_pylist())
    of_samples = {key: len(words) for key, words in expected.items() if "README" not in key}
    assert judged == Counter(of_samples)
    assert len(read.notes) == 2
