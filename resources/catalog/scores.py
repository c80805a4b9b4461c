"""The score assets as the catalog sees them: columns, names in recipes, and companions that `explain` shows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core import sql


@dataclass(frozen=True)
class CatalogColumn:
    """A value column of a score asset.

    Attributes:
        name: its name in the asset's files.
        recipe_name: its name in recipes and in the views `scores` and `pool_scores`, such as `norm_sim_2/b32/pets`.
        type: its DuckDB type.
    """

    name: str
    recipe_name: str
    type: str = "FLOAT"


@dataclass(frozen=True)
class CatalogScore:
    """A score asset.

    The companions are recipe names of columns, here or of another asset. `explain` shows their values at each step that
    uses one of this asset's columns.

    Attributes:
        asset: its key, such as `norm_sim/b32/pets`.
        columns: its value columns.
        nearest_target: column with the index of the nearest target image, shown with its label and name.
        targets: key of the target embeddings that the index points into.
        best_caption: column with a generated caption.
        in_favour_of: column with the uid of the row that a deduplication kept instead.
    """

    asset: str
    columns: tuple[CatalogColumn, ...]
    nearest_target: str | None = None
    targets: str | None = None
    best_caption: str | None = None
    in_favour_of: str | None = None


Scores = Sequence[CatalogScore]


def by_recipe_name(scores: Scores) -> dict[str, CatalogScore]:
    """Return the asset of each score by the name that recipes use."""
    return dict(_named(scores))


def score_asset_macro(scores: Scores) -> str:
    """Write the macro score_asset(score): the key of the asset that holds a score.

    A score that the project no longer has is returned as it is.
    """
    renamed = [(name, score.asset) for name, score in _named(scores) if name != score.asset]
    cases = " ".join(f"WHEN {sql.text(name)} THEN {sql.text(asset)}" for name, asset in renamed)
    return f"CREATE MACRO score_asset(score) AS {f'CASE score {cases} ELSE score END' if cases else 'score'}"


def _named(scores: Scores) -> Iterator[tuple[str, CatalogScore]]:
    for score in scores:
        for column in score.columns:
            yield column.recipe_name, score
