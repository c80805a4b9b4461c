"""Run parts in processes of their own, and keep their results in one JSON file.

A process is forked after torch was imported, which saves seconds for each part, and before CUDA was initialised. One
that crashes, hangs or leaves the GPU in an error state does not affect the others.
"""

import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import MACHINE, Part


class NoDeviceError(RuntimeError):
    """There is no GPU to measure."""


class Report:
    """The JSON file; each change is written at once.

    Args:
        path: the file.
        smoke: whether sizes are tiny and the numbers mean nothing.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, path: Path, *, smoke: bool) -> None:
        self.path = path
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.content: dict[str, Any] = {"started": started, "smoke": smoke, "finished": False, "machine": {}}
        self.content |= {"targets_on": "NVIDIA H200", "targets": [], "parts": {}}
        self._targets: dict[str, Part] = {}
        self.write()

    def write(self) -> None:
        """Write the file anew; a reader never finds half of it."""
        self.content["targets"] = [line for name, part in self._targets.items() for line in self._lines(name, part)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".part")
        new.write_text(json.dumps(_finite(self.content), indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def add(self, name: str, part: Part) -> dict[str, Any]:
        """Add a part without results, and return its entry, to be filled."""
        self._targets[name] = part
        entry: dict[str, Any] = {"seconds": None, "limit_seconds": part.limit, "error": None}
        self.content["parts"][name] = entry | {"sizes": dict(part.sizes), "results": {}}
        return self.content["parts"][name]

    def failed(self) -> list[str]:
        """Return the parts that failed."""
        return [name for name, entry in self.content["parts"].items() if entry["error"] is not None]

    def _lines(self, name: str, part: Part) -> list[dict[str, Any]]:
        lines = []
        for path, targets in part.targets.items():
            value: Any = self.content["parts"][name]["results"]
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            reached = [target for target in targets if value is not None and value >= target]
            line = {"part": name, "result": ", ".join(path), "value": value, "targets": list(targets)}
            lines.append(line | {"reached": reached})
        return lines


def measure(report: Report, device: str, parts: Mapping[str, Part]) -> None:
    """Run the parts one after the other.

    Args:
        report: gets the results.
        device: cpu or cuda.
        parts: by name.

    Raises:
        NoDeviceError: a GPU is wanted, and there is none.
    """
    import torch  # noqa: F401 - the processes are forked with it

    machine: dict[str, Any] = {"results": report.content["machine"], "error": None}
    _run(MACHINE, device, machine, report)
    if device == "cuda" and "gpu" not in machine["results"]:
        raise NoDeviceError(f"{machine['error']}. Remedy: run on a machine with an NVIDIA GPU; --smoke needs none")
    for name, part in parts.items():
        entry = report.add(name, part)
        print(f"{name} ...", flush=True)
        _run(part, device, entry, report)
        print(f"{name}: {entry['seconds']:.1f} s{', ' + entry['error'] if entry['error'] else ''}", flush=True)
        for result, value in entry["results"].items():
            print(f"  {result:46} {value}", flush=True)
    report.content["finished"] = True
    report.write()


def _run(part: Part, device: str, entry: dict[str, Any], report: Report) -> None:
    """Run a part in a process of its own; end it at its time limit."""
    context = multiprocessing.get_context("fork")
    started = time.monotonic()
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # a killed process leaves its files
        process = context.Process(target=_work, args=(part, device, scratch, theirs))
        process.start()
        theirs.close()
        try:
            entry["error"] = _receive(ours, started + part.limit, entry["results"], report)
        except EOFError:
            process.join()
            entry["error"] = f"its process ended with status {process.exitcode}"
        finally:
            process.kill()
            process.join()
    if entry["error"] == _LATE:
        entry["error"] += f" of {part.limit} s"
    entry["seconds"] = time.monotonic() - started
    report.write()


_LATE = "ended at its time limit"


def _receive(connection: Connection, until: float, results: dict[str, Any], report: Report) -> str | None:
    """Take results until the part ends or its time is over; return its error, or None."""
    while connection.poll(max(0, until - time.monotonic())):
        found, error = connection.recv()
        if found is None:
            return error
        results |= found
        report.write()
    return _LATE


def _work(part: Part, device: str, scratch: str, connection: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    tempfile.tempdir = scratch
    error = None
    try:
        for found in part.results(device):
            connection.send((found, None))
    except Exception as raised:  # noqa: BLE001 - recorded in the file
        error = f"{type(raised).__name__}: {raised}"
    connection.send((None, error))


def _finite(value: Any) -> Any:
    """Return JSON values with text in the place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_targets(report: Report) -> None:
    """Print each target beside its value."""
    for line in report.content["targets"]:
        value = "not measured" if line["value"] is None else f"{line['value']:,.2f}"
        targets = ", then ".join(f"{target:,}" for target in line["targets"])
        print(f"{line['part'] + ': ' + line['result']:50} {value:>12}  target {targets}")
