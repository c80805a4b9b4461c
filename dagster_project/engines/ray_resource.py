"""The engine `ray` as a Dagster resource on a cluster of dagster-ray, such as a KubeRay cluster that a run creates.

A deployment's code location passes it to `build_defs`. Only it imports this module, because dagster-ray is an extra.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from dagster_ray import RayResource
from pydantic import Field

from dagster_project.engines.ray_cluster import RayCluster


class RayEngine(dg.ConfigurableResource[RayCluster]):
    """Computes shards on the cluster of another resource, which connects before the run's first step.

    ```python
    from dagster_ray.kuberay import KubeRayCluster

    engine = RayEngine(cluster=KubeRayCluster(...), workers=64)
    defs = build_defs(open_project(config_path()), resource_overrides={"engine": engine})
    ```
    """

    cluster: dg.ResourceDependency[RayResource]
    workers: int | None = Field(default=None, ge=1, description="By default one per GPU of the cluster, or per core.")

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[RayCluster]:
        """Yield the engine to a run, and end its workers with the run."""
        del context
        engine = RayCluster(self.workers, connected=True)
        try:
            yield engine
        finally:
            engine.close()
