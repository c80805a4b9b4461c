"""The engine `ray`: workers are actors of a Ray cluster, which RAY_ADDRESS names; otherwise a local Ray is started.

Even a local Ray listens on all network interfaces. Its token authentication, on by default, is left on, and
nothing starts it unasked. Ray is imported when the first shard is computed.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from core.errors import UserError
from dagster_project.engines.crew import Crew
from dagster_project.engines.work import Done, Task, Worker


class RayMissingError(UserError):
    """Ray is not installed."""


class RayCluster(Crew):
    """Workers on a Ray cluster.

    Args:
        workers: their number.
        gpus: whether each worker gets a GPU.
    """

    name = "ray"

    def __init__(self, workers: int, gpus: int = 0) -> None:
        super().__init__(workers, decode=gpus > 0)
        self.gpus = gpus
        self._started = False
        self._answers: dict[Any, Any] = {}

    def start(self, busy: Sequence[Any]) -> Any:
        """Start an actor, and Ray before the first."""
        del busy
        ray = _ray()
        if not ray.is_initialized():
            options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
            if os.environ.get("RAY_ADDRESS"):
                options = {"address": os.environ["RAY_ADDRESS"], "log_to_driver": False}
            else:
                options |= {"num_cpus": self.workers, "_node_ip_address": "127.0.0.1"}
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}, **options)
            self._started = True
        return ray.remote(Worker).options(num_cpus=1, num_gpus=1 if self.gpus else 0).remote()

    def send(self, worker: Any, task: Task) -> None:
        """Send a task."""
        self._answers[worker] = worker.compute.remote(task)

    def wait(self, busy: Sequence[Any]) -> list[tuple[Any, Done | None]]:
        """Wait for answers and deaths."""
        ray = _ray()
        by_answer = {self._answers[worker]: worker for worker in busy}
        ready, _ = ray.wait(list(by_answer), num_returns=1)
        found: list[tuple[Any, Done | None]] = []
        for answer in ready:
            del self._answers[by_answer[answer]]
            try:
                found.append((by_answer[answer], ray.get(answer)))
            except ray.exceptions.RayActorError:
                found.append((by_answer[answer], None))
        return found

    def end(self, worker: Any) -> None:
        """Kill an actor."""
        self._answers.pop(worker, None)
        with contextlib.suppress(Exception):  # it has died already
            _ray().kill(worker)

    def close(self) -> None:
        """End all workers, and Ray where this engine started it or connected to it."""
        super().close()
        if self._started:
            _ray().shutdown()
            self._started = False


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RayMissingError(
            "The engine `ray` needs Ray, which is not installed. Remedy: pip install 'clip-data-selection[ray]'"
        ) from error
    return ray
