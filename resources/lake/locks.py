"""Locks in an object store: one object with its owner and its expiry, which the owner moves on while it works."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from resources.lake.files import LakeError
from resources.lake.owners import is_ended, token
from resources.storage.stores import StorageError, Store

EXPIRES_AFTER = 300.0
"""Seconds after its last renewal at which a lock is free, whoever held it."""
RENEWED_EVERY = 60.0


@contextmanager
def held_lock(
    store: Store, location: str, *, expires_after: float = EXPIRES_AFTER, renewed_every: float = RENEWED_EVERY
) -> Iterator[None]:
    """Hold a lock in an object store within the block.

    Clocks of machines that share a lock must agree to a minute.

    Args:
        store: the store.
        location: URL of the lock's object.
        expires_after: seconds after the last renewal at which others may take it.
        renewed_every: seconds between renewals.

    Raises:
        LakeError: another process holds it.
    """
    owner = token()
    _take(store, location, owner, expires_after)
    ended = threading.Event()
    thread = threading.Thread(
        target=_renew, args=(store, location, owner, expires_after, renewed_every, ended), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _owner(store, location)[0] == owner:
            store.delete(location)


def _take(store: Store, location: str, owner: str, expires_after: float) -> None:
    content = _content(owner, expires_after)
    if store.put_if_absent(location, content):
        return
    entry = store.stat(location)
    if entry is None:  # released meanwhile
        _take(store, location, owner, expires_after)
        return
    held_by, expires = _owner(store, location)
    if (is_ended(held_by) or expires < time.time()) and store.put_if_unchanged(location, content, entry.tag):
        return
    raise LakeError(
        f"{location}: another `clip-select` ({held_by}) is working on this lake. Remedy: wait for it to end; the lock "
        f"of a process that died is free {expires_after:.0f} seconds after its last renewal"
    )


def _renew(store: Store, location: str, owner: str, expires_after: float, every: float, ended: threading.Event) -> None:
    while not ended.wait(every):
        try:
            entry = store.stat(location)
            if entry is not None and _owner(store, location)[0] == owner:
                store.put_if_unchanged(location, _content(owner, expires_after), entry.tag)
        except StorageError:  # tried again at the next renewal; until it expires, the lock is held
            continue


def _content(owner: str, expires_after: float) -> bytes:
    return json.dumps({"owner": owner, "expires": time.time() + expires_after}).encode()


def _owner(store: Store, location: str) -> tuple[str, float]:
    try:
        record = json.loads(store.read(location))
        return str(record["owner"]), float(record["expires"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return "unknown", 0.0
