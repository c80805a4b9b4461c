"""Dagster's event log in SQLite files that stay open while a process executes runs.

Dagster's own storage opens and closes a file for every event; each time, SQLite merges its write-ahead log into the
file and waits for the disk, which takes about seven times as long (`docs/performance.md`). `dagster.yaml` names this
class as the instance's `event_log_storage`. Outside a `kept_open` block, as in the web server and the daemon, it reads
and writes as Dagster's own does. Not here: the events themselves.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage  # exported nowhere
from dagster._serdes import ConfigurableClassData

INDEX = "index"
"""The file with the events of all runs that concern assets."""


class KeptOpenSqliteEventLogStorage(SqliteEventLogStorage):
    """Dagster's SQLite event log, which can keep its files open.

    The files lie where Dagster puts them by default, `history/runs` in the instance's folder. `dagster.yaml` can't name
    that folder relative to itself, so the storage opens when the instance registers itself, and takes no settings.

    Args:
        inst_data: of the configuration, for other processes to open the same storage.
    """

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._turn = threading.Lock()
        self._connections: dict[str, sa.Connection] | None = None
        self._stack: ExitStack | None = None

    def register_instance(self, instance: dg.DagsterInstance) -> None:
        """Open the storage in the folder of its instance."""
        super().__init__(os.path.join(instance.root_directory, "history", "runs"), self._inst_data)
        super().register_instance(instance)

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Return the settings in `dagster.yaml`: none."""
        return {}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Any
    ) -> "KeptOpenSqliteEventLogStorage":
        """Build the storage from the section of `dagster.yaml`."""
        return cls(inst_data, **config_value)

    @contextmanager
    def keep_open(self) -> Iterator[None]:
        """Keep the files open for the block. An inner block does nothing.

        If the machine stops, the last events may be lost; no file is damaged, and no result depends on the events.
        """
        if self._connections is not None:
            yield
            return
        with ExitStack() as stack:
            self._connections, self._stack = {}, stack
            try:
                yield
            finally:
                with self._turn:
                    self._connections = self._stack = None

    def run_connection(self, run_id: str | None = None) -> AbstractContextManager[sa.Connection]:
        """Connect to the file of a run; events that belong to no run have the id "" and a file of their own."""
        if run_id is None or self._connections is None:
            return super().run_connection(run_id)
        return self._kept(run_id)

    def index_connection(self) -> AbstractContextManager[sa.Connection]:
        """Connect to the file of all runs."""
        return self._kept(INDEX) if self._connections is not None else super().index_connection()

    @contextmanager
    def _kept(self, file: str) -> Iterator[sa.Connection]:
        with self._turn:
            assert self._connections is not None
            if file not in self._connections:
                self._connections[file] = self._open(file)
            with self._connections[file].begin():
                yield self._connections[file]
        # The web server watches the file's modification time, which events in the write-ahead log don't change.
        os.utime(self.path_for_shard(file))

    def _open(self, file: str) -> sa.Connection:
        with super().index_connection() if file == INDEX else super().run_connection(file):
            pass  # creates the tables of a new file
        assert self._stack is not None
        engine = sa.create_engine(
            self.conn_string_for_shard(file),
            poolclass=sa.StaticPool,
            connect_args={"timeout": 30, "check_same_thread": False},
        )
        self._stack.callback(engine.dispose)
        connection = self._stack.enter_context(engine.connect())
        with connection.begin():
            connection.exec_driver_sql("PRAGMA synchronous=NORMAL")
        return connection


@contextmanager
def kept_open(instance: dg.DagsterInstance) -> Iterator[None]:
    """Keep the files of an instance's event log open for the block.

    Does nothing for other storages: PostgreSQL, memory, or a `dagster.yaml` without our `event_log_storage`.
    """
    storage = instance.event_log_storage
    if isinstance(storage, KeptOpenSqliteEventLogStorage):
        with storage.keep_open():
            yield
    else:
        yield
