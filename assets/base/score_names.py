"""Names in recipes and DuckDB types of the columns of score assets."""

from collections.abc import Mapping, Sequence


def score_names(scores: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Give the names by which recipes call the columns of each score asset.

    The column stands in the place of the asset's kind, `norm_sim_2/b32/pets`; columns from elsewhere have names that
    somebody else chose, so they stand behind, `external_scores/flyt/dfn`, or are left out where there is but one.
    """
    names = {}
    for asset, columns in scores.items():
        kind, _, rest = asset.partition("/")
        if kind != EXTERNAL:
            names[asset] = [f"{column}/{rest}" for column in columns]
        else:
            names[asset] = [asset] if len(columns) == 1 else [f"{asset}/{column}" for column in columns]
    return names


EXTERNAL = "external_scores"
"""Kind of the assets whose columns are named by the user."""


_SCORE_TYPES = {
    "nearest_target": "BIGINT",
    "cluster": "BIGINT",
    "in_target_cluster": "BOOLEAN",
    "language": "VARCHAR",
    "sieve_caption": "VARCHAR",
    "near_duplicate_of": "VARCHAR",
    "names_synset": "BOOLEAN",
    "words": "BIGINT",
    "characters": "BIGINT",
}


def score_type(column: str) -> str:
    """Give the DuckDB type by which the catalog tells a score's column."""
    return _SCORE_TYPES.get(column, "FLOAT")
