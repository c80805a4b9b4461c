"""The engine `ray`: workers are actors of a Ray cluster, which RAY_ADDRESS names; otherwise a local Ray is started.

dagster-ray's `LocalRay` connects when the first shard is computed. Even a local Ray listens on all network interfaces.
Its token authentication, on by default, is left on, and nothing starts it unasked.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import dagster as dg

from assets.base.context import Context
from core.errors import UserError
from dagster_project.engines.crew import Crew
from dagster_project.engines.work import Done, Job, Worker


class RayMissingError(UserError):
    """Ray is not installed."""


class RayCluster(Crew):
    """Workers on a Ray cluster.

    Args:
        workers: their number; by default one per GPU of the cluster or, without GPUs, per core.
        connected: the caller has connected this process to the cluster, and closes the connection.
    """

    name = "ray"

    def __init__(self, workers: int | None = None, *, connected: bool = False) -> None:
        super().__init__(workers or 0)
        self.gpu_share = 0.0
        self._connected = connected
        self._opened = False
        self._connection = contextlib.ExitStack()
        self._answers: dict[Any, Any] = {}

    def open(self) -> None:
        """Connect to the cluster, or start a local Ray, and count its GPUs and cores."""
        if self._opened:
            return
        ray = _ray()
        if not self._connected and not ray.is_initialized():
            self._connection.enter_context(_connection(self.workers))
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        self.workers = self.workers or gpus or int(found["CPU"])
        self.gpu_share, self.decode = gpu_share(gpus, self.workers), gpus > 0
        self._opened = True

    def start(self, busy: Sequence[Any]) -> Any:
        """Start an actor."""
        del busy
        return _ray().remote(Worker).options(num_cpus=1, num_gpus=self.gpu_share).remote()

    def has_files(self, context: Context) -> bool:
        """Check whether the lake is a folder, which nodes share, or Ray is on this machine."""
        return context.lake.is_local or not (self._connected or os.environ.get("RAY_ADDRESS"))

    def send(self, worker: Any, job: Job) -> None:
        """Send a job."""
        self._answers[worker] = worker.compute.remote(job)

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
        self._connection.close()
        self._opened = False


def gpu_share(gpus: int, workers: int) -> float:
    """Return the part of a GPU that each worker asks Ray for: 0 without GPUs; workers beyond their number share them.

    Ray counts in ten-thousandths. More than 1/10,000 of a GPU each would leave the last workers without a place, so the
    part is rounded down.
    """
    if not gpus:
        return 0.0
    each = -(-workers // gpus)  # workers that share one GPU
    return 10_000 // each / 10_000


def _connection(workers: int) -> Any:
    """Return a context in which this process is connected to the cluster at RAY_ADDRESS, or to a Ray of its own."""
    from dagster_ray import LocalRay

    class Quiet(LocalRay):
        """Logs nothing on a terminal, where a progress bar is."""

        def on_connect(self, context: Any) -> None:
            """Do nothing."""

        def on_cleanup(self, context: Any, *, deleted: bool) -> None:
            """Do nothing."""

    # dagster-ray 0.4.8 sets options of Ray Data, whose defaults have names that Ray 2.60 deprecates
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.data\.context")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        options |= {"num_cpus": workers} if workers else {}
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    return Quiet(ray_init_options=options).yield_for_execution(dg.build_init_resource_context())


def _ray() -> Any:
    try:
        import dagster_ray
        import ray
    except ImportError as error:
        raise RayMissingError(
            "The engine `ray` needs Ray and dagster-ray, which are not installed. Remedy: pip install "
            "'clip-data-selection[ray]'"
        ) from error
    del dagster_ray
    return ray
