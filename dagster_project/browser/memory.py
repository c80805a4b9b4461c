"""Results that are kept in memory, up to a number of bytes."""

from collections.abc import Callable
from threading import Lock, RLock
from typing import Generic, TypeVar

T = TypeVar("T")


class Memory(Generic[T]):
    """Results by key. Each is computed once, also for several threads; the least recently used ones are dropped.

    Args:
        size: returns the bytes of a result.
        most: bytes of all results; the newest one stays, however large.
    """

    def __init__(self, size: Callable[[T], int], most: int) -> None:
        self._size, self._most = size, most
        self._found: dict[str, T] = {}
        self._reading, self._computing = Lock(), RLock()

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """Return the result of a key. One result is computed at a time; known ones are returned meanwhile."""
        with self._reading:
            if key in self._found:
                return self._used(key)
        with self._computing:
            with self._reading:
                if key in self._found:
                    return self._used(key)
            found = compute()
            with self._reading:
                self._found[key] = found
                while len(self._found) > 1 and self.bytes > self._most:
                    del self._found[next(iter(self._found))]
            return found

    @property
    def bytes(self) -> int:
        """Bytes of all results."""
        return sum(map(self._size, self._found.values()))

    def _used(self, key: str) -> T:
        found = self._found[key] = self._found.pop(key)
        return found
