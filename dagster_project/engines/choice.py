"""The choice of an engine: from the command line, or from the environment of a deployment."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from assets.base.engines import Engine, InProcess
from core.errors import UserError
from dagster_project.location import ENGINES

ENGINE_VARIABLE = "CLIP_SELECTION_ENGINE"
WORKERS_VARIABLE = "CLIP_SELECTION_WORKERS"


class EngineError(UserError):
    """The engine or the number of its workers is wrong."""


@contextmanager
def opened_engine(
    name: str | None = None, workers: int | None = None, environment: Mapping[str, str] = os.environ
) -> Iterator[Engine]:
    """Open an engine, and end its workers at the end.

    Args:
        name: one of `ENGINES`; by default CLIP_SELECTION_ENGINE, else `processes` with workers, `in_process` without.
        workers: their number; by default CLIP_SELECTION_WORKERS, else one per GPU or, without GPUs, per core: of this
            machine, or of the Ray cluster.
        environment: the environment variables.

    Raises:
        EngineError: there is no such engine, or the number is wrong.
    """
    engine = _engine(name, workers, environment)
    try:
        yield engine
    finally:
        engine.close()


def _engine(name: str | None, workers: int | None, environment: Mapping[str, str]) -> Engine:
    given = environment.get(WORKERS_VARIABLE, "")
    if workers is None and given:
        if not given.isascii() or not given.isdigit() or int(given) < 1:
            raise EngineError(f"{WORKERS_VARIABLE}: {given!r} is not a number of workers. Remedy: 1 or more")
        if name != "in_process":
            workers = int(given)
    name = name or environment.get(ENGINE_VARIABLE) or ("in_process" if workers is None else "processes")
    if name not in ENGINES:
        raise EngineError(f"{ENGINE_VARIABLE}: no engine {name!r}. Remedy: one of {', '.join(ENGINES)}")
    if name == "in_process":
        if workers not in (None, 1) and not given:
            raise EngineError(
                "The engine in_process has no workers. Remedy: leave --workers out, or --engine processes"
            )
        return InProcess()
    if name == "ray":
        from dagster_project.engines.ray_cluster import RayCluster

        return RayCluster(workers)
    import torch

    from dagster_project.engines.processes import Processes

    gpus = torch.cuda.device_count()
    return Processes(workers or gpus or len(os.sched_getaffinity(0)), gpus)
