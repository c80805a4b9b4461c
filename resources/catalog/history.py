"""Macros over the versions of subsets: versions, lineage, diff, overlap.

They read lineage records and manifests, which never change once written. `explain`, which reads today's scores, is in
`resources.catalog.explain`. The SQL is in the .sql files of this package.
"""

from importlib import resources

from core import sql

_MACROS = ("uid_word", "overlap", "versions", "lineage", "diff")


def history_macros(root: str) -> list[str]:
    """Return the statements that create the macros; diff uses `score_asset`.

    Args:
        root: folder of the lake.
    """
    folder = sql.pattern(root, "subset/")
    return [_statement(name).replace("{folder}", folder) for name in _MACROS]


def _statement(name: str) -> str:
    return resources.files(__package__).joinpath(f"{name}.sql").read_text(encoding="utf-8")
