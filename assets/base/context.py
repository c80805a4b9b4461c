"""What assets are computed from and with: the frozen `Context`, a `Snapshot` of the inputs, and a run's state.

Here: values that are passed to assets. Not here: what an asset does with them.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from assets.base.results import NotReady
from assets.base.settings import ProjectSettings
from resources.inputs.external import find
from resources.inputs.targets import Target, open_target
from resources.lake.files import Lake
from resources.models.by_name import Models
from resources.pools.base import Pool
from resources.storage import files

T = TypeVar("T")
Progress = Callable[[str, str, int], None]
"""Called as `progress(asset, shard, rows)` when rows are done."""


@dataclass(frozen=True)
class Context:
    """A project, opened. Holds no state of a run, so several runs may share one.

    Attributes:
        settings: the checked YAML.
        config: path of the YAML, for messages and for paths that are relative to it.
        lake: the files that assets write.
        pool: the raw pool.
        models: encoders, captioners and text encoders by name.
    """

    settings: ProjectSettings
    config: Path
    lake: Lake
    pool: Pool
    models: Models

    def target(self, name: str) -> Target:
        """Return a target set."""
        return open_target(name, self.settings.targets[name])

    def catalog_path(self) -> Path:
        """Return the path of the catalog, in the lake; that of a remote lake is on this machine (`Lake.home`)."""
        return self.lake.catalog


class Snapshot:
    """The pool, target sets and external files as listed at one moment, and answers that follow from them.

    Freshness is a function of a snapshot and of the lake. Answers that take long, such as whether an unpartitioned
    asset is up to date, are memoized, so a snapshot is valid until the lake is written to; `after_writes` returns the
    next one.

    Args:
        context: the project.
        shards: the shards that count as the pool; by default all.
    """

    def __init__(self, context: Context, shards: Collection[str] | None = None) -> None:
        self.context = context
        self._shards = shards
        self._memo: dict[str, object] = {}
        self._fingerprints: dict[tuple[str, ...], str] = {}

    @cached_property
    def listing(self) -> dict[str, str]:
        """The pool's shards and their fingerprints."""
        found = self.context.pool.list_shards()
        return found if self._shards is None else {name: found[name] for name in found if name in self._shards}

    def refresh_listing(self) -> None:
        """Have the pool listed again when it is next asked for."""
        self.__dict__.pop("listing", None)

    def target_fingerprint(self, target: str, encoder: str) -> str:
        """Return the fingerprint of the files that an encoder's embeddings of a target set are made from."""
        key = ("target", target, encoder)
        if key not in self._fingerprints:
            self._fingerprints[key] = self.context.target(target).fingerprint(encoder)
        return self._fingerprints[key]

    def files_fingerprint(self, field: str, name: str) -> str:
        """Return the fingerprint of external files; `field` is the YAML's, `name` the name there.

        Raises:
            ExternalError: a file is missing.
        """
        key = (field, name)
        if key not in self._fingerprints:
            patterns = getattr(self.context.settings, field)[name].files
            self._fingerprints[key] = files.fingerprint(find(patterns))
        return self._fingerprints[key]

    def memoized(self, question: str, answer: Callable[[], T]) -> T:
        """Return `answer()`, computed once for each question; a `NotReady` is memoized too."""
        if question not in self._memo:
            try:
                self._memo[question] = answer()
            except NotReady as error:
                self._memo[question] = error
        found = self._memo[question]
        if isinstance(found, NotReady):
            raise found.with_traceback(None)
        return found  # type: ignore[return-value]

    def after_writes(self, shards: Collection[str] | None = None) -> "Snapshot":
        """Return a snapshot with the same listings that asks the lake again; `shards` restricts the pool further."""
        following = Snapshot(self.context, self._shards if shards is None else shards)
        following._fingerprints = self._fingerprints
        if shards is None and "listing" in self.__dict__:
            following.__dict__["listing"] = self.listing
        return following


def _no_progress(asset: str, shard: str, rows: int) -> None:
    del asset, shard, rows


def _no_expectation(asset: str, rows: int) -> None:
    del asset, rows


@dataclass(frozen=True)
class RunState:
    """The state of one run, shared by its steps.

    Attributes:
        progress: called when rows are done.
        expect: called as `expect(asset, rows)` when a step knows how many rows it has to do.
        written_for_others: fingerprints of files that one asset's step wrote for another asset of the run.
        written: how many files each asset has written, by key; versions count as one.
    """

    progress: Progress = _no_progress
    expect: Callable[[str, int], None] = _no_expectation
    written_for_others: set[str] = field(default_factory=set)
    written: Counter[str] = field(default_factory=Counter)
