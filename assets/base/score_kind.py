"""`ScoreKind`: everything the project knows about one kind of score, declared once.

A kind is declared in the module of its asset and listed in `assets.scores`. Settings, the graph, checks, the catalog,
recipes, lineage records and the study iterate over that list. `docs/extending.md` adds a kind step by step.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from assets.base.asset import Declared
from assets.base.columns import Column
from assets.base.partitioned import PartitionedTemplate
from assets.base.settings import ProjectSettings, json_settings
from core.names import suggestion
from resources.settings import recipe_of

S = TypeVar("S")

Names = Mapping[str, str]
"""The names in an asset's key, such as encoder and target."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreKind(Generic[S]):
    """A kind of score.

    Attributes:
        name: its name in the YAML, under `scores`.
        asset: the template of its asset.
        settings: the type of the YAML's field, as pydantic takes it; None for a kind whose field is one of
            `ProjectSettings` itself.
        default: the value of the field where the YAML leaves it out.
        configured: the effective settings, with defaults that depend on the rest of the YAML filled in.
        instances: the names in the key of each score asset that the settings ask for.
        upstream: further assets that these need, such as targets or reference negatives, apart from `embeddings`.
        validate: checks names that the settings refer to; raises ValueError naming field and remedy.
        validate_recipes: the same, of recipes that the settings refer to, once all recipes are known to be valid.
        starts_from: the recipe whose subset an asset is computed over; None for the whole pool.
        made_from: keys of score assets that an asset is computed from and that are not among its `deps`.
        recorded: the parts of the YAML that a lineage record keeps, given the keys of the score assets it needs.
        extra_settings: further fields under `scores` in the YAML: type and default, by name.
        user_columns: the user names the columns, so recipes call them `<asset>/<column>`.
        partial: its scores may be computed from embeddings of a subset's rows alone (`of` of an encoder).
    """

    name: str
    asset: PartitionedTemplate
    settings: Any
    default: Any = None
    configured: Callable[[ProjectSettings], S]
    instances: Callable[[ProjectSettings], Iterable[Names]]
    upstream: Callable[[ProjectSettings], Iterable[Declared]]
    validate: Callable[[ProjectSettings], None]
    validate_recipes: Callable[[ProjectSettings], None] = lambda settings: None
    starts_from: Callable[[Declared], str | None] = lambda asset: None
    made_from: Callable[[Declared], Collection[str]] = lambda asset: ()
    recorded: Callable[[ProjectSettings, Collection[str]], dict[str, Any]]
    extra_settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    user_columns: bool = False
    partial: bool = False

    def declared(self, settings: ProjectSettings) -> list[Declared]:
        """Return the score assets that the settings ask for."""
        return [self.asset.declare(settings, **names) for names in self.instances(settings)]


@dataclass(frozen=True)
class Score:
    """A score as recipes name it.

    Attributes:
        name: `norm_sim_inf/b32/imagenet`.
        asset: key of the asset that holds it.
        column: its column there.
        kind: its kind.
    """

    name: str
    asset: str
    column: Column
    kind: ScoreKind[Any]


class Scores:
    """All scores of a project.

    Args:
        settings: the project's.

    Attributes:
        assets: every score asset as declared, by key.
        kinds: the kind of each, by key.
        by_name: every score by its name in recipes.
    """

    def __init__(self, settings: ProjectSettings) -> None:
        self.settings = settings
        self.assets: dict[str, Declared] = {}
        self.kinds: dict[str, ScoreKind[Any]] = {}
        self.by_name: dict[str, Score] = {}
        for kind in settings.kinds:
            for declared in kind.declared(settings):
                self.assets[declared.key] = declared
                self.kinds[declared.key] = kind
                for column in declared.columns:
                    name = recipe_name(declared, column, kind)
                    self.by_name[name] = Score(name, declared.key, column, kind)

    def names_of(self, asset: str) -> list[str]:
        """List the names by which recipes call the columns of a score asset."""
        declared, kind = self.assets[asset], self.kinds[asset]
        return [recipe_name(declared, column, kind) for column in declared.columns]

    def places(self, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return the asset and the column of scores, by their names in recipes."""
        return {name: (self.by_name[name].asset, self.by_name[name].column.name) for name in names}

    def starts_from(self, asset: str) -> str | None:
        """Return the recipe whose subset a score asset is computed over; None for the whole pool."""
        return self.kinds[asset].starts_from(self.assets[asset]) or recipe_of(self.assets[asset].of)

    def of_recipe(self, recipe: str) -> set[str]:
        """List the score assets that a recipe reads, and those that they are computed from."""
        scores = self.settings.recipes[recipe].columns().scores
        return self.with_upstream({self.by_name[score].asset for score in scores})

    def with_upstream(self, assets: set[str]) -> set[str]:
        """Add the score assets that some score assets are computed from."""
        found = assets.union(*(self._made_from(asset) for asset in assets))
        return found if found == assets else self.with_upstream(found)

    def _made_from(self, asset: str) -> set[str]:
        declared = self.assets[asset]
        read = {dep.key for dep in declared.deps if dep.key in self.assets}
        return read.union(self.kinds[asset].made_from(declared))


def recipe_name(asset: Declared, column: Column, kind: ScoreKind[Any]) -> str:
    """Return the name by which recipes call a column.

    The column takes the place of the asset's kind, `norm_sim_2/b32/pets`. A column that a user named follows the key,
    `external_scores/flyt/dfn`, or is left out where the asset has only one.
    """
    if not kind.user_columns:
        return f"{column.name}/{asset.key.partition('/')[2]}"
    return asset.key if len(asset.columns) == 1 else f"{asset.key}/{column.name}"


def require_encoders(settings: ProjectSettings, field: str, names: Iterable[str]) -> None:
    """Check that names are encoders of the project.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if name not in settings.encoders:
            raise ValueError(f"{field}: there is no encoder {name!r}; {suggestion(name, settings.encoders)}")


def require_targets(settings: ProjectSettings, field: str, encoder: str, targets: Iterable[str]) -> None:
    """Check that target sets exist and can be embedded by an encoder.

    Raises:
        ValueError: one does not, or cannot.
    """
    for target in targets:
        if target not in settings.targets:
            raise ValueError(f"{field}: there is no target {target!r}; {suggestion(target, settings.targets)}")
    for target in targets:
        features = settings.targets[target].features
        if encoder in features:
            continue
        if settings.targets[target].path is None:
            raise ValueError(
                f"targets.{target}: no features for encoder {encoder!r} and no images. Remedy: give "
                f"features.{encoder} or path, or leave the pair out of scores.norm_sim"
            )
        if settings.encoders[encoder].model is None:
            raise ValueError(
                f"targets.{target}: encoder {encoder!r} has no model to embed images with. Remedy: give "
                f"features.{encoder}, or leave the pair out of scores.norm_sim"
            )


def require_recipe(settings: ProjectSettings, field: str, recipe: str | None) -> None:
    """Check that a recipe exists.

    Raises:
        ValueError: it does not.
    """
    if recipe is not None and recipe not in settings.recipes:
        raise ValueError(f"{field}: there is no recipe {recipe!r}; {suggestion(recipe, settings.recipes)}")


def check_embedded_subsets(settings: ProjectSettings) -> None:
    """Check the subsets whose rows encoders embed, `of`: that they exist, and what is computed from the embeddings.

    Raises:
        ValueError: a recipe does not exist or reads a score of its encoder, or a score needs the embeddings of all
            rows.
    """
    for name, encoder in settings.encoders.items():
        require_recipe(settings, f"encoders.{name}.of", encoder.recipe)
    fields = {f"embeddings/{name}": f"encoders.{name}.of" for name, model in settings.encoders.items() if model.of}
    for kind in settings.kinds:
        if fields and not kind.partial:
            for asset in (*kind.declared(settings), *kind.upstream(settings)):
                for field in (fields[dep.key] for dep in asset.deps if dep.key in fields):
                    raise ValueError(
                        f"{field}: {asset.key} needs the embeddings of all rows. Remedy: leave `of` out, or another "
                        "encoder for that score"
                    )
    for key, asset in Scores(settings).assets.items():
        if asset.of is not None:
            require_no_cycle(settings, fields[f"embeddings/{asset.names['encoder']}"], key, recipe_of(asset.of))


def require_no_cycle(settings: ProjectSettings, field: str, asset: str, recipe: str | None) -> None:
    """Check that a score is not computed over the subset of a recipe that reads that score.

    Raises:
        ValueError: it is.
    """
    scores = Scores(settings)
    waiting, seen = [recipe], {recipe}
    while waiting:
        name = waiting.pop()
        if name is None or name not in settings.recipes:  # which `require_recipe` refuses
            continue
        read = scores.of_recipe(name)
        if asset in read:
            raise ValueError(
                f"{field}: recipe {name!r} reads {asset}, which is computed over its subset. Remedy: another recipe"
            )
        starts = {scores.starts_from(score) for score in read}
        found = {*settings.recipes[name].recipes, *starts} - seen
        waiting.extend(found)
        seen |= found


def recorded_entries(
    name: str, configured: Mapping[str, BaseModel], wanted: Collection[str], keys: Callable[[str], Iterable[str]]
) -> dict[str, Any]:
    """Return the entries of a kind's settings of which a score asset is wanted, as a lineage record keeps them.

    Args:
        name: the kind's field under `scores`.
        configured: settings by the first name of the key.
        wanted: keys of the wanted score assets.
        keys: the keys of an entry's score assets.
    """
    kept = {entry: json_settings(model) for entry, model in configured.items() if set(keys(entry)) & set(wanted)}
    return {"scores": {name: kept}}


def recorded_targets(settings: ProjectSettings, targets: Iterable[str]) -> dict[str, Any]:
    """Return the settings of target sets, as a lineage record keeps them."""
    return {"targets": {target: json_settings(settings.targets[target]) for target in targets}}
