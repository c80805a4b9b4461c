"""The project's event log storage, for a Dagster daemon that does not pause for 30 seconds between rounds of backfills.

Dagster has no setting for that pause. Its daemon imports the storage that `dagster.yaml` names before its rounds begin,
and so this module, which shortens it. Sensors keep their own intervals.
"""

from dagster._daemon import controller

from dagster_project.sqlite_event_log import KeptOpenSqliteEventLogStorage

__all__ = ["KeptOpenSqliteEventLogStorage"]

PAUSE = 2
controller.DEFAULT_DAEMON_INTERVAL_SECONDS = PAUSE
