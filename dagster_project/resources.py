"""The project's Dagster resources, which the UI lists under Resources: lake, pool, models, catalog, run and engine.

Their fields are plain settings, which the UI shows. Of lake, pool, models and run, a step gets the object that
`open()` returns. To run on others, as tests and deployments do, pass `resource_overrides` to
`build_defs`. Not here: assets.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import dagster as dg
import polars as pl
from pydantic import BaseModel, Field

from assets.base.context import RunState
from assets.base.engines import Engine, InProcess
from assets.base.settings import ProjectSettings
from assets.settings import ConfigError
from dagster_project.engines.choice import EngineError, opened_engine
from resources.catalog.build import read_catalog
from resources.lake.files import Lake
from resources.models.by_name import Models
from resources.pools.base import Pool
from resources.pools.formats import open_pool
from resources.settings import CaptionerSettings, EncoderSettings, PoolSettings, TextEncoderSettings

Settings = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)


class LakeResource(dg.ConfigurableResource[Lake]):
    """The lake: the folder of files that assets read and write."""

    root: str = Field(description="Path of the folder, or a URL: s3://, gs://, az://.")

    def open(self) -> Lake:
        """Return the lake; its folder is created by the first write."""
        return Lake(self.root)

    def create_resource(self, context: dg.InitResourceContext) -> Lake:
        """Return the lake to a step."""
        del context
        return self.open()


class PoolResource(dg.ConfigurableResource[Pool]):
    """The pool of image-text pairs that everything is selected from."""

    settings: Settings = Field(description="`pool` in the project's YAML.")
    encoders: Settings = Field(description="`encoders` there: a pool may carry an encoder's embeddings.")
    lake: str | None = Field(default=None, description="The lake, which records the groups of `tars_per_shard`.")

    def open(self) -> Pool:
        """Return the pool; nothing is read yet.

        Raises:
            PoolError: its format and the encoders don't match.
        """
        return open_pool(PoolSettings.model_validate(self.settings), _each(EncoderSettings, self.encoders), self.lake)

    def create_resource(self, context: dg.InitResourceContext) -> Pool:
        """Return the pool to a step."""
        del context
        return self.open()


class ModelsResource(dg.ConfigurableResource[Models]):
    """Encoders, captioners and text encoders by name."""

    encoders: Settings = Field(description="`encoders` in the project's YAML.")
    captioners: Settings = Field(default={}, description="`captioners` there.")
    text_encoders: Settings = Field(default={}, description="`text_encoders` there.")

    def open(self) -> Models:
        """Return the models; each is loaded when it first computes something."""
        return Models(
            _each(EncoderSettings, self.encoders),
            _each(CaptionerSettings, self.captioners),
            _each(TextEncoderSettings, self.text_encoders),
        )

    def create_resource(self, context: dg.InitResourceContext) -> Models:
        """Return the models to a step."""
        del context
        return self.open()


@dg.resource(description="The state of one run: progress, and files that one step wrote for another.")
def run_state(context: dg.InitResourceContext) -> RunState:
    """Return a new state to a run."""
    del context
    return RunState()


def engine(overridden: Collection[str] = ()) -> dg.ResourceDefinition:
    """Return the resource of the engine that the environment names.

    Args:
        overridden: names of the resources that stand in for the project's own: workers open the project's, so that
            these are computed with in process only.
    """

    @dg.resource(
        description="Where shards are computed: the environment variables CLIP_SELECTION_ENGINE (in_process, "
        "processes, ray) and CLIP_SELECTION_WORKERS choose it."
    )
    def chosen(context: dg.InitResourceContext) -> Iterator[Engine]:
        del context
        with opened_engine() as opened:
            if overridden and not isinstance(opened, InProcess):
                raise EngineError(
                    f"{', '.join(sorted(overridden))}: overridden resources, which workers don't have: they open the "
                    "project's own. Remedy: CLIP_SELECTION_ENGINE=in_process, or override `engine` as well"
                )
            yield opened

    return chosen


class CatalogResource(dg.ConfigurableResource):
    """The catalog: one DuckDB file of views and macros over the lake, opened read-only."""

    path: str = Field(description="Path of catalog.duckdb.")

    def sql(self, query: str, **parameters: object) -> pl.DataFrame:
        """Return the rows of a query, in which `$name` stands for the parameter `name`.

        Raises:
            FileNotFoundError: there is no catalog yet.
        """
        with read_catalog(Path(self.path)) as con:
            return con.sql(query, params=parameters).pl()


def build_resources(settings: ProjectSettings) -> dict[str, Any]:
    """Build the resources of a project.

    Args:
        settings: the checked YAML.

    Returns:
        The resources by key: lake, pool, models, catalog, run, engine.

    Raises:
        ConfigError: a URL contains a password, which the UI would show.
    """
    for field, location in (("lake", settings.lake), ("pool.path", settings.pool.path)):
        if "://" in location and (urlsplit(location).password is not None or urlsplit(location).query):
            raise ConfigError(
                f"{field}: the URL contains a password or a query, which Dagster's UI would show. Remedy: leave it "
                "out, and set the store's environment variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
    encoders = _dumped(settings.encoders)
    return {
        "lake": LakeResource(root=settings.lake),
        "pool": PoolResource(settings=_dump(settings.pool), encoders=encoders, lake=settings.lake),
        "models": ModelsResource(
            encoders=encoders,
            captioners=_dumped(settings.captioners),
            text_encoders=_dumped(settings.text_encoders),
        ),
        "catalog": CatalogResource(path=str(Lake(settings.lake).catalog)),
        "run": run_state,
        "engine": engine(),
    }


def _each(model: type[Model], settings: Settings) -> dict[str, Model]:
    return {name: model.model_validate(value) for name, value in settings.items()}


def _dump(model: BaseModel) -> Settings:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)


def _dumped(models: Mapping[str, BaseModel]) -> Settings:
    return {name: _dump(model) for name, model in models.items()}
