"""The progress of a pass: on a real terminal while a step is in progress, and as plain lines everywhere else."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dagster_project.headless import Stage
from dagster_project.progress import Lines, shown_progress
from tests.support.scenario import SHARDS, Scenario
from tests.support.terminal import CONTROL, Terminal, plain, resize
from tests.support.waiting_score import PIPE


class Waiting:
    """A finished project to which a score that waits and a target without a readable image are added."""

    def __init__(self, scenario: Scenario) -> None:
        self.config = str(scenario.folder / "project.yaml")
        os.mkfifo(scenario.folder / PIPE)
        self.pipe = os.open(scenario.folder / PIPE, os.O_RDWR)  # open for both, so that nobody waits to open it
        (scenario.folder / "broken").mkdir()
        (scenario.folder / "broken/a.jpg").write_bytes(b"no image")
        scenario.set("targets", "broken", value={"path": "broken"})
        scenario.open()

    def command(self, *options: str) -> list[str]:
        """Return the command that runs it."""
        return [sys.executable, "-m", "tests.support.waiting_score", self.config, *options]

    def let_go(self, shards: int = 1) -> None:
        """Let the score go on, for some shards."""
        os.write(self.pipe, b"." * shards)


@pytest.fixture
def waiting(finished: Scenario) -> Iterator[Waiting]:
    waiting = Waiting(finished)
    yield waiting
    os.close(waiting.pipe)


def test_the_bar_moves_on_a_terminal_while_a_step_is_in_progress(waiting: Waiting) -> None:
    terminal = Terminal(waiting.command())
    before = terminal.wait_for(lambda text: "6 of 36 rows" in text)
    assert re.search(r"step \d+ of \d+: target_embeddings/tiny/broken: FAILED after", before)
    assert re.search(r"step \d+ of \d+: norm_sim/tiny/broken: not attempted: needs target_embedd", before)
    assert re.search(r"step \d+ of \d+ waits .* 6 of 36 rows", before)
    assert "\x1b[1;31mstep" in terminal.raw  # failed: bold red
    waiting.let_go()
    terminal.wait_for(lambda text: re.search(r"18 of 36 rows +[\d,]+ rows/s +\d:\d\d:\d\d left", text))
    terminal.resize(50)
    narrow = re.compile(r"\n(step \d+ of \d+ waits +\d:\d\d:\d\d left *)\n")
    frame = narrow.search(terminal.wait_for(narrow.search))
    assert frame is not None
    assert len(frame[1]) <= 50
    waiting.let_go()
    waiting.let_go()
    assert terminal.finish() == 1
    assert re.search(r"step \d+ of \d+: waits: computed in [\d.]+ s, 36 rows, ", plain(terminal.raw))
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")  # the cursor is shown again


@pytest.mark.parametrize("columns", [20, 200])
def test_a_bar_fits_a_narrow_terminal_and_has_no_colour_where_the_environment_refuses_it(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, other = pty.openpty()
    resize(main, columns)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    with os.fdopen(other, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        with shown_progress() as shown:
            stage = Stage("neg_clip_loss/a_long_name", 3, 9, shards=2, rows=1_000, state="begins")
            shown.notice(stage)
            shown.advance(stage.asset, "00000", 400)
            shown.progress.refresh()
            shown.notice(replace(stage, state="failed", failed=1))
        raw = ""
        while "FAILED after" not in raw:  # a terminal passes on what it got in parts
            raw += os.read(main, 65536).decode(errors="replace")
    os.close(main)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", raw)
    drawn = [line for line in plain(raw).split("\n") if "FAILED" not in line]
    assert max(map(len, drawn)) <= columns
    assert any(line.startswith("step 3 of 9 neg_cl") for line in drawn)
    assert ("400 of 1,000 rows" in "".join(drawn)) is (columns == 200)
    assert "step 3 of 9: neg_clip_loss/a_long_name: 1 of 2 shards FAILED after" in plain(raw)


def test_without_a_terminal_there_are_plain_lines_and_stdout_is_one_json_document(waiting: Waiting) -> None:
    process = subprocess.Popen(
        waiting.command("--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "FORCE_COLOR": "1"},
    )
    waiting.let_go(len(SHARDS))
    out, err = process.communicate()
    assert process.returncode == 1
    assert not CONTROL.search(err)
    assert "\r" not in err
    assert re.search(r"(?m)^step \d+ of \d+: waits: 3 shards, 36 rows$", err)
    assert re.search(r"(?m)^step \d+ of \d+: waits: computed in [\d.]+ s, 36 rows, \d+ rows/s$", err)
    assert "what a library prints" in err
    assert re.search(r"(?m)^step (\d+) of (\d+): target_embeddings/tiny/broken: begins$", err)
    assert re.search(r"(?m)^step \d+ of \d+: target_embeddings/tiny/broken: FAILED after ", err)
    found = json.loads(out)
    assert (found["exit_status"], found["error"]) == (1, None)
    (computed,) = (row for row in found["computed"] if row["asset"] == "waits")
    assert (computed["shards"], computed["rows"]) == (list(SHARDS), 36)
    assert [row["asset"] for row in found["failed"]] == ["target_embeddings/tiny/broken"]
    assert "broken" in found["failed"][0]["reason"]
    assert found["not_attempted"] == [{"asset": "norm_sim/tiny/broken", "needs": "target_embeddings/tiny/broken"}]


def test_ctrl_c_during_a_step_ends_the_pass_and_not_only_the_step(finished: Scenario) -> None:
    finished.write_shard(SHARDS[0], rows=5)
    began: list[str] = []

    def interrupt(asset: str, shard: str, rows: int) -> None:
        del shard, rows
        began.append(asset)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finished.run(progress=interrupt)
    assert began == ["raw_pool"]
    assert finished.run().failures == {}
    assert len(finished.scores("clip_score/tiny", SHARDS[:1])) == 5


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_run_goes_on_when_its_terminal_or_pipe_goes_away(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = os.pipe() if kind == "pipe" else pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    stage = Stage("raw_pool", 1, 9, state="begins")
    with os.fdopen(writes, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        with shown_progress() as shown:
            shown.notice(stage)
            os.close(reads)
            shown.advance("raw_pool", "00000", 7)
            shown.notice(replace(stage, state="computed"))


def test_plain_lines_count_the_shards_that_failed() -> None:
    text = io.StringIO()
    lines = Lines(text)
    stage = Stage("raw_pool", 1, 9, shards=5, state="begins", began=time.monotonic())
    lines.notice(stage)
    lines.advance("raw_pool", "00000", 7)
    lines.advance("embeddings/b32", "00000", 1_000)  # of another asset
    lines.notice(Stage("raw_pool", 1, 9, shards=5, state="failed", failed=2, began=stage.began))
    lines.notice(Stage("clip_score/b32", 3, 9, state="not attempted", needs="embeddings/b32"))
    began, ended, left = text.getvalue().splitlines()
    assert began == "step 1 of 9: raw_pool: 5 shards"
    assert re.fullmatch(r"step 1 of 9: raw_pool: 2 of 5 shards FAILED after 0\.\d s, 7 rows, [\d,]+ rows/s", ended)
    assert left == "step 3 of 9: clip_score/b32: not attempted: needs embeddings/b32"
