"""The error of unreadable pools, apart from the pools, which need pyarrow."""

from core.errors import UserError


class PoolError(UserError, ValueError):
    """A pool or a shard cannot be read; the message names the file and the remedy."""
