"""Starting training runs, some at a time, and waiting for them.

Here: processes, their devices and their progress. Not here: the training (`resources.training.process`).
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from resources.settings import available_cores
from resources.training.decoded import EvaluationError
from resources.training.settings import TrainSettings

_LOOK = 0.5
_MOST_AT_A_TIME = 8
"""Runs at a time on the CPU. A run on one thread wastes least, and each holds a model and its optimizer in memory."""
ROOT = Path(__file__).resolve().parents[2]


def devices(train: TrainSettings) -> list[str | None]:
    """List the device of each run at a time: the index of a GPU, or None for the CPU.

    Raises:
        EvaluationError: the settings want a GPU, and there is none.
    """
    import torch

    gpus = torch.cuda.device_count() if train.device != "cpu" else 0
    if train.device == "cuda" and not gpus:
        raise EvaluationError("train.device: cuda is not available. Remedy: device: auto, or a machine with a GPU")
    at_a_time = train.processes or gpus or min(available_cores(), _MOST_AT_A_TIME)
    return [str(number % gpus) if gpus else None for number in range(at_a_time)]


def threads_each(at_a_time: int) -> int:
    """Return the cores of each run."""
    return max(1, available_cores() // at_a_time)


def run_all(folders: Sequence[Path], places: Sequence[str | None], on_samples: Callable[[int], None]) -> None:
    """Run every training run that is not done yet.

    Args:
        folders: of the runs.
        places: the device of each run at a time.
        on_samples: called with the number of samples that the runs have seen since the last call.

    Raises:
        EvaluationError: a run failed; the others are ended, and resume from their checkpoints.
    """
    waiting = [folder for folder in folders if not (folder / "done.json").exists()]
    running: dict[subprocess.Popen[bytes], tuple[Path, str | None]] = {}
    free, seen = list(places), dict.fromkeys(folders, 0)
    try:
        while waiting or running:
            while waiting and free:
                folder, place = waiting.pop(0), free.pop()
                running[_start(folder, place)] = (folder, place)
            first = next(iter(running))
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.wait(_LOOK)
            for process in [process for process in running if process.poll() is not None]:
                folder, place = running.pop(process)
                free.append(place)
                _end(process)
                if process.returncode != 0:
                    raise _failed(folder, process.returncode)
            now = {folder: _position(folder) for folder in folders}
            if (more := sum(now.values()) - sum(seen.values())) > 0:
                on_samples(more)
                seen = now
    finally:
        for process in running:
            process.kill()
            _end(process)


def _start(folder: Path, place: str | None) -> "subprocess.Popen[bytes]":
    """Start a run in a session of its own, so that Ctrl-C reaches only the process that waits for it."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from the other runs
    environment["CUDA_VISIBLE_DEVICES"] = _visible(place)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "resources.training.process", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def _visible(place: str | None) -> str:
    """Return CUDA_VISIBLE_DEVICES of a run: its GPU among those that this process sees."""
    if place is None:
        return ""
    outer = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return outer[int(place)] if outer else place


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _position(folder: Path) -> int:
    try:
        return int((folder / "position").read_text() or 0)
    except FileNotFoundError:
        return 0


def _failed(folder: Path, status: int) -> EvaluationError:
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no message"
    if "CUDA out of memory" in last:
        last += " Remedy: a smaller train.batch_size"
    return EvaluationError(f"a training run failed with status {status}: {last}. Its log: {folder / 'log.txt'}")
