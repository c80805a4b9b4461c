"""The YAML of a project as data. Scores are added by their kinds (`assets.settings`)."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from resources.settings import (
    NAME_PATTERN,
    CaptionerSettings,
    EncoderSettings,
    ExternalScores,
    ExternalUids,
    Location,
    PoolSettings,
    Settings,
    SubsetKey,
    TargetSettings,
    TextEncoderSettings,
    recipe_of,
)
from resources.training.settings import EvaluationSettings
from selection.recipes.recipe import Recipe

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class OfSubset(Settings):
    """Settings of a score that compares many rows with each other.

    Attributes:
        of: the subset whose rows are compared, as `subset/<recipe>`; by default the whole pool.
    """

    of: SubsetKey | None = None

    @property
    def recipe(self) -> str | None:
        """Name of the recipe of that subset."""
        return recipe_of(self.of)


class ProjectSettings(BaseModel):
    """The YAML of a project.

    Attributes:
        kinds: the score kinds that the project knows, each a `ScoreKind`.
        scores: the settings of each kind, by its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kinds: ClassVar[tuple[Any, ...]] = ()

    name: Name
    lake: Location
    pool: PoolSettings
    encoders: dict[Name, EncoderSettings] = Field(min_length=1)
    targets: dict[Name, TargetSettings] = Field(default_factory=dict)
    captioners: dict[Name, CaptionerSettings] = Field(default_factory=dict)
    text_encoders: dict[Name, TextEncoderSettings] = Field(default_factory=dict)
    scores: Any = None
    external_scores: dict[Name, ExternalScores] = Field(default_factory=dict)
    external_uids: dict[Name, ExternalUids] = Field(default_factory=dict)
    recipes: dict[Name, Recipe] = Field(default_factory=dict)
    evaluations: dict[Name, EvaluationSettings] = Field(default_factory=dict)


def json_settings(model: BaseModel) -> dict[str, Any]:
    """Return a settings model as JSON values, for provenance."""
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)
