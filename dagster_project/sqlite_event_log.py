"""Dagster's event log in SQLite files, which are kept open while a process makes a run.

Dagster opens and closes a file for every event, and each time SQLite carries its log over into the file and waits
for the disk: seven times the work (`docs/performance.md`). Other processes read and write as before. Not here: what
is logged.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage  # exported nowhere

DOOR = "_connect"
"""The one method of the storage that opens its files; `tests/test_event_log.py` holds that it is."""


@contextmanager
def kept_open(instance: dg.DagsterInstance) -> Iterator[None]:
    """Keep the files of an instance's event log open for the block; where it is not in SQLite files, do nothing.

    If the machine stops, the last events may be lost, and no file is damaged; what is computed is never asked of them.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, SqliteEventLogStorage) or DOOR in vars(storage):
        yield
        return
    opening, turn = getattr(storage, DOOR), threading.Lock()
    connections: dict[str, sa.Connection] = {}
    with ExitStack() as stack:

        def open_file(file: str) -> sa.Connection:
            with opening(file):
                pass  # makes the tables of a new file
            engine = sa.create_engine(
                storage.conn_string_for_shard(file),
                poolclass=sa.StaticPool,
                connect_args={"timeout": 30, "check_same_thread": False},
            )
            stack.callback(engine.dispose)
            connection = stack.enter_context(engine.connect())
            with connection.begin():
                connection.exec_driver_sql("PRAGMA synchronous=NORMAL")
            return connection

        @contextmanager
        def connect(file: str) -> Iterator[sa.Connection]:
            with turn:
                if file not in connections:
                    connections[file] = open_file(file)
                with connections[file].begin():
                    yield connections[file]
            # The web server follows a run by its file's time, which new events alone do not change now.
            os.utime(storage.path_for_shard(file))

        setattr(storage, DOOR, connect)
        try:
            yield
        finally:
            delattr(storage, DOOR)
