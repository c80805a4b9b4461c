"""SIGINT and SIGTERM end a command within seconds, whatever it is doing, with one line and a status of their own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.interrupting import Running

COMMAND = """
import sys, time
from dagster_project import interrupts

def command(received):
    received.kept["raw_pool"] += 2
    {body}

interrupts.GRACE_SECONDS = {grace}
sys.exit(interrupts.run_interruptible(command, "clip-select run project.yaml"))
"""
READY = 'print("ready", flush=True)'
LINE = (
    "Interrupted by {}: kept all finished files, from this run raw_pool (2 files); no subset was selected. "
    "To resume: clip-select run project.yaml\n"
)


def start(*body: str, grace: float = 60, ignored: bool = False) -> Running:
    """Start a command that has two files of `raw_pool` written; it prints a line when the signal may come."""
    script = COMMAND.format(body="\n    ".join(body), grace=grace)
    running = Running([sys.executable, "-c", script], ignored=ignored)
    assert running.process.stdout is not None
    assert running.process.stdout.readline() == "ready\n"
    return running


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_that_waits_for_a_lock(tmp_path: Path, number: signal.Signals, ignored: bool) -> None:
    lock = tmp_path / "lock"
    wait = f"import fcntl; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    holds = subprocess.Popen(
        [sys.executable, "-c", f"{wait}; {READY}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holds.stdout is not None
    assert holds.stdout.readline() == b"ready\n"
    status, errors = start(READY, wait, ignored=ignored).end(number)
    assert status == 128 + number
    assert errors == LINE.format(number.name)
    holds.communicate(b"\n")


def test_a_signal_ends_a_command_that_computes_in_c_and_hears_nothing() -> None:
    status, errors = start(READY, "import hashlib; hashlib.pbkdf2_hmac('sha1', b'', b'', 2**31 - 1)", grace=0.01).end(
        signal.SIGTERM
    )
    assert status == 143
    assert errors == LINE.format("SIGTERM")


def test_a_second_signal_ends_a_command_at_once() -> None:
    running = start(
        "try:",
        f"    {READY}",
        "    time.sleep(600)",
        "except KeyboardInterrupt:",
        f"    {READY}",
        "    while True:",
        "        try: time.sleep(600)",
        "        except KeyboardInterrupt: pass",
    )
    running.process.send_signal(signal.SIGINT)
    assert running.process.stdout is not None
    assert running.process.stdout.readline() == "ready\n"
    status, errors = running.end(signal.SIGTERM)
    assert status == 130  # of the first
    assert errors == LINE.format("SIGINT")


def test_a_swallowed_interrupt_is_found_by_the_next_check() -> None:
    swallow = ["try:", f"    {READY}", "    time.sleep(600)", "except KeyboardInterrupt:", "    pass"]
    status, errors = start(*swallow, "received.check()", "print('not reached', file=sys.stderr)").end(signal.SIGINT)
    assert status == 130
    assert errors == LINE.format("SIGINT")


def test_an_error_that_an_interrupt_causes_is_not_reported() -> None:
    fail = [
        "try:",
        f"    {READY}",
        "    time.sleep(600)",
        "except KeyboardInterrupt:",
        "    raise OSError('a worker died')",
    ]
    status, errors = start(*fail).end(signal.SIGTERM)
    assert status == 143
    assert errors == LINE.format("SIGTERM")


def test_without_a_signal_status_and_errors_are_the_commands_and_handlers_are_as_before() -> None:
    script = COMMAND.format(body="return 7", grace=60)
    script = "import signal\nbefore = signal.getsignal(signal.SIGINT)\n" + script.replace("sys.exit(", "status = (")
    script += "assert signal.getsignal(signal.SIGINT) is before\nassert signal.set_wakeup_fd(-1) == -1\n"
    script += "sys.exit(status)\n"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")
    script = COMMAND.format(body="raise ValueError('wrong')", grace=60)
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: wrong\n")
