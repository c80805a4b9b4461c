"""Ordering names by what they depend on."""

from collections.abc import Callable, Iterable


def dependencies_first(names: Iterable[str], dependencies: Callable[[str], Iterable[str]]) -> list[str]:
    """List names and everything that they depend on, each once and after its dependencies.

    Args:
        names: the names; they keep their order where dependencies allow it.
        dependencies: returns the names that a name depends on directly; they have no cycle.
    """
    placed: dict[str, None] = {}

    def place(name: str) -> None:
        if name not in placed:
            for other in dependencies(name):
                place(other)
            placed[name] = None

    for name in names:
        place(name)
    return list(placed)
