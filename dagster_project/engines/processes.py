"""The engine `processes`: workers on this machine, reached by pairs of sockets without a name. It opens no port.

A worker has a session of its own, so that Ctrl-C reaches the main process alone. It ends when the main process does,
also when that one is killed.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from dagster_project.engines.crew import Crew
from dagster_project.engines.work import Done, Job

MODULE = "dagster_project.engines.processes"


@dataclass(eq=False)
class _Process:
    popen: "subprocess.Popen[bytes]"
    connection: Connection
    lifeline: int
    place: int


class Processes(Crew):
    """Worker processes: each with one GPU, or with its part of the cores.

    Args:
        workers: their number.
        gpus: number of GPUs; worker i gets GPU i modulo this.
    """

    name = "processes"

    def __init__(self, workers: int, gpus: int = 0) -> None:
        super().__init__(workers, decode=gpus > 0)
        self.gpus = gpus

    def start(self, busy: Sequence[_Process]) -> _Process:
        """Start a process in the first free place."""
        taken = {worker.place for worker in (*busy, *self._idle)}
        place = next(number for number in range(self.workers) if number not in taken)
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno()), str(read)],
                env=self._environment(place),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), read),
                start_new_session=True,
            )
        os.close(read)
        return _Process(popen, Connection(ours.detach()), write, place)

    def _environment(self, place: int) -> dict[str, str]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        if self.gpus:
            own = {"CUDA_VISIBLE_DEVICES": visible_gpu(place, self.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))}
        else:
            each = str(max(1, len(os.sched_getaffinity(0)) // self.workers))
            own = {name: os.environ.get(name) or each for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return {**os.environ, "PYTHONPATH": path, **own}

    def send(self, worker: _Process, job: Job) -> None:
        """Send a job; a worker that is gone is noticed by `wait`."""
        with contextlib.suppress(OSError):
            _send(worker.connection, job)

    def wait(self, busy: Sequence[_Process]) -> list[tuple[_Process, Done | None]]:
        """Wait for answers and deaths."""
        by_connection = {worker.connection: worker for worker in busy}
        found: list[tuple[_Process, Done | None]] = []
        for connection in wait(list(by_connection)):
            assert isinstance(connection, Connection)
            try:
                found.append((by_connection[connection], pickle.loads(connection.recv_bytes())))
            except (EOFError, OSError):
                found.append((by_connection[connection], None))
        return found

    def end(self, worker: _Process) -> None:
        """Kill a process with the decoding processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.popen.pid, signal.SIGKILL)
        worker.popen.wait()
        worker.connection.close()
        os.close(worker.lifeline)


def visible_gpu(place: int, gpus: int, visible: str | None) -> str:
    """Return the one GPU that a worker sees, as CUDA_VISIBLE_DEVICES names it.

    Args:
        place: number of the worker, from 0.
        gpus: number of GPUs that the main process sees; workers beyond it share them.
        visible: the main process's own CUDA_VISIBLE_DEVICES: numbers, or the ids of GPUs or of parts of one (MIG).
    """
    listed = [name.strip() for name in (visible or "").split(",") if name.strip()][:gpus]
    devices = listed or [str(number) for number in range(gpus)]
    return devices[place % len(devices)]


def _send(connection: Connection, message: object) -> None:
    """Send a message as plain pickle: `Connection.send` would pass tensors by descriptors, which end with a worker."""
    connection.send_bytes(pickle.dumps(message))


def _end_with(lifeline: int) -> None:
    """End this process and its children when the main process has ended, which closes the pipe."""
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def main(connection: Connection, lifeline: int) -> None:
    """Answer jobs until the main process closes the connection."""
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    from dagster_project.engines.work import Worker, WorkerError

    worker = Worker()
    with contextlib.suppress(EOFError):
        while True:
            done = worker.compute(pickle.loads(connection.recv_bytes()))
            try:
                _send(connection, done)
            except (pickle.PicklingError, AttributeError, TypeError) as error:  # of a function's result
                _send(connection, Done(WorkerError(f"The result can't be sent: {error}")))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
