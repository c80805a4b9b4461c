"""Names in an order in which each follows what it depends on."""

from core.ordering import dependencies_first

DEPENDENCIES = {"subset": ["score", "pool"], "score": ["embeddings"], "embeddings": ["pool"], "pool": [], "other": []}


def test_each_name_follows_its_dependencies_and_comes_once() -> None:
    assert dependencies_first(["other", "subset", "pool"], DEPENDENCIES.__getitem__) == [
        "other",
        "pool",
        "embeddings",
        "score",
        "subset",
    ]


def test_names_that_depend_on_nothing_keep_their_order() -> None:
    assert dependencies_first("cab", lambda _: ()) == ["c", "a", "b"]
