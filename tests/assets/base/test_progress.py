"""The figures of a step in progress: rows, rate and time remaining, and the lines in Dagster's log."""

import pytest

from assets.base import progress
from assets.base.progress import Meter
from tests.support.scenario import ROWS, SHARDS, Scenario


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def test_the_rate_counts_from_the_first_report_so_that_loading_a_model_does_not_slow_it() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.expect(1_000, shards=2)
    clock.now += 60
    meter.advance(100, "00000")
    assert str(meter) == "100 of 1,000 rows"
    clock.now += 10
    meter.advance(200, "00000")
    assert str(meter) == "300 of 1,000 rows, 20 rows/s, 0:00:35 left"
    meter.advance(700, "00001")
    assert str(meter) == "1,000 of 1,000 rows, 90 rows/s"


def test_shards_are_counted_where_their_rows_are_not_known() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    meter.expect(None, shards=4)
    for shard, rows in (("00000", 10), ("00001", 30)):
        clock.now += 5
        meter.advance(rows, shard)
    assert str(meter) == "shard 2 of 4, 40 rows, 6 rows/s, 0:00:10 left"
    unknown = Meter()
    unknown.advance(5)
    assert (str(unknown), unknown.fraction) == ("5 rows", None)


def test_more_rows_than_expected_and_none_at_all_are_all_that_is_due() -> None:
    meter = Meter()
    meter.expect(10)
    meter.advance(12)
    assert (meter.amount, meter.fraction, meter.remaining) == ("10 of 10 rows", 1.0, "")
    meter = Meter()
    meter.expect(0, shards=1)
    assert meter.fraction == 1.0


def test_a_line_is_logged_once_in_each_interval() -> None:
    clock, lines = Clock(), list[str]()
    meter = Meter(lines.append, interval=30, clock=clock)
    meter.expect(1_000)
    for _ in range(10):
        clock.now += 10
        meter.advance(100)
    assert [line.split(",")[0] for line in lines] == ["300 of 1", "600 of 1", "900 of 1"]


def test_a_step_that_is_run_from_the_ui_logs_its_progress(finished: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)  # each report is a line
    finished.write_shard(SHARDS[1], rows=ROWS - 2)
    result = finished.execute("raw_pool", "embeddings/tiny", shard=SHARDS[1])
    assert result.success
    messages = [record.user_message for record in finished.instance.all_logs(result.run_id)]
    lines = [message for message in messages if message.startswith("embeddings/tiny: ")]
    assert [line.partition(",")[0] for line in lines] == [
        "embeddings/tiny: 5 of 10 rows",
        "embeddings/tiny: 10 of 10 rows",
    ]
