"""Settings of `evaluations`, as a user writes them in the YAML.

Here: fields with their units and defaults, and checks that need no other part of the YAML. Nothing here opens a file.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from resources.settings import Location, ModelName, Settings, check_templates

RANDOM, POOL = "random", "pool"
"""Arms that are no recipes: samples drawn at random, and the whole pool."""

Tier = Literal["heads", "small", "full"]
_BUDGET = 131_072
_BATCH = 256
_RATES = {"heads": 1e-3, "small": 1e-3, "full": 5e-4}


def _listed(value: object) -> object:
    """Accept one value in place of a list."""
    return value if isinstance(value, list | tuple) else [value]


class TrainSettings(Settings):
    """How every run of an evaluation trains. All runs share these settings, so arms differ in their samples alone."""

    model: ModelName | None = Field(
        default=None,
        description="open_clip model name (ViT-B-32), trained from scratch. Required by the tier full; small brings "
        "its own small towers, and heads trains on the embeddings of `encoder`.",
    )
    image_size: int | None = Field(
        default=None, ge=16, description="Pixels of a side. Default: the model's own, 64 for the tier small."
    )
    samples_seen: Annotated[tuple[PositiveInt, ...], BeforeValidator(_listed)] = Field(
        default=(_BUDGET,), min_length=1, description="Training budget in samples, or a list of budgets."
    )
    batch_size: int = Field(default=_BATCH, ge=2, description="Samples per step.")
    seeds: int = Field(default=3, ge=1, description="Runs of each arm and budget. Runs with the same seed are paired.")
    learning_rate: float | None = Field(
        default=None, gt=0, description="Of AdamW, after the warm-up. Default: 5e-4 for the tier full, else 1e-3."
    )
    weight_decay: float = Field(default=0.2, ge=0, description="Of AdamW.")
    warmup: int | None = Field(
        default=None, ge=0, description="Steps of linear warm-up. Default: a tenth of all steps, at most 500."
    )
    precision: Literal["fp32", "amp", "amp_bf16"] = Field(
        default="fp32", description="open_clip_train's --precision; amp_bf16 for a recent GPU."
    )
    checkpoints: int = Field(
        default=8, ge=1, description="Points of the learning curve. A killed run resumes from the last of them."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda)$",
        description="auto (CUDA if available, else CPU), cpu or cuda.",
    )
    processes: int | None = Field(
        default=None,
        ge=1,
        description="Runs at a time. Default: one for each GPU, or for each core where there is none, at most 8.",
    )
    cache_gib: float = Field(
        default=64,
        ge=0,
        description="Largest size of the decoded pictures that all runs share. Above it, each run decodes from the "
        "pool.",
    )

    def rate(self, tier: Tier) -> float:
        """Return the learning rate."""
        return self.learning_rate if self.learning_rate is not None else _RATES[tier]

    def steps(self, samples_seen: int) -> int:
        """Return the number of steps of a budget: a whole number for each checkpoint."""
        points = min(self.checkpoints, samples_seen // self.batch_size)
        return samples_seen // self.batch_size // points * points


class RetrievalSettings(Settings):
    """Pairs of image and caption that no arm contains."""

    path: Location = Field(description="A webdataset tar, or a folder of them.")


class TaskSettings(Settings):
    """What the trained models are measured on."""

    zero_shot: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(), description="Targets with class labels."
    )
    templates: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=("a photo of a {}.",), min_length=1, description="Captions of a class, in which {} is its name."
    )
    retrieval: RetrievalSettings | None = Field(default=None, description="Held-out pairs.")

    @model_validator(mode="after")
    def _something(self) -> "TaskSettings":
        if not self.zero_shot and self.retrieval is None:
            raise ValueError("give `zero_shot` targets, or `retrieval` with held-out pairs")
        check_templates(self.templates)
        return self


class HowMuchSettings(Settings):
    """Fractions of one recipe, to find how much of the pool to keep.

    They keep their own sizes. The law of data filtering is fitted to their errors (docs/evaluation.md).
    """

    arms: tuple[str, ...] = Field(min_length=3, description="Recipes that differ in how much they keep.")
    samples_seen: Annotated[tuple[PositiveInt, ...], BeforeValidator(_listed)] = Field(
        min_length=1, description="Samples seen for which the best fraction is computed."
    )
    task: str | None = Field(
        default=None, description="Task whose error is fitted: a target, or retrieval. Default: the mean of all."
    )


class EvaluationSettings(Settings):
    """One comparison of subsets by the models trained on them."""

    tier: Tier = Field(
        default="full",
        description="heads: two linear heads on the frozen embeddings of `encoder`, seconds, a proxy. small: small "
        "towers at 64 pixels, minutes. full: any open_clip model.",
    )
    arms: tuple[str, ...] = Field(min_length=2, description="Recipes; random draws as many samples, pool has all.")
    baseline: str | None = Field(
        default=None,
        description="The arm that others are compared with. Default: random if it is an arm, else the first.",
    )
    size: Literal["equal", "own"] | PositiveInt = Field(
        default="equal",
        description="Samples of each arm. equal: those of the smallest recipe, drawn at random from larger ones. own: "
        "each keeps its own. A number: that many. `pool` always has all.",
    )
    encoder: str | None = Field(default=None, description="Tier heads: an encoder that no arm's scores come from.")
    near_duplicate: float = Field(
        default=0.98,
        gt=0,
        le=1,
        description="An evaluation image and a sample this similar are near duplicates: correlation of their pictures "
        "at 16 x 16 pixels, or in the tier heads the cosine of their embeddings.",
    )
    train: TrainSettings = Field(default_factory=TrainSettings)
    tasks: TaskSettings
    how_much: HowMuchSettings | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluationSettings":
        train, arms = self.train, self.arms
        if len(set(arms)) < len(arms):
            raise ValueError("arms: an arm is given twice. Remedy: keep one")
        if self.baseline is not None and self.baseline not in arms:
            raise ValueError(f"baseline: {self.baseline!r} is no arm. Remedy: one of {', '.join(arms)}")
        if set(arms) <= {RANDOM, POOL}:
            raise ValueError("arms: give a recipe, whose size `random` takes")
        if self.tier == "full" and train.model is None:
            raise ValueError("train.model is missing. Remedy: an open_clip model name, or `tier: small`")
        if self.tier != "full" and train.model is not None:
            raise ValueError(
                f"train.model is for the tier full. Remedy: leave it out, or leave out `tier: {self.tier}`"
            )
        if (self.tier == "heads") != (self.encoder is not None):
            raise ValueError("`encoder` is what the tier heads needs, and no other. Remedy: give both or neither")
        least = min(train.samples_seen)
        if least < train.batch_size:
            raise ValueError(f"train.samples_seen: {least} is less than one batch of {train.batch_size}")
        if self.how_much is not None and set(self.how_much.arms) & {RANDOM, POOL}:
            raise ValueError("how_much.arms: recipes only")
        return self

    @property
    def compared_with(self) -> str:
        """The arm that others are compared with."""
        return self.baseline or (RANDOM if RANDOM in self.arms else self.arms[0])

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes of all arms, each once."""
        named = [*self.arms, *(self.how_much.arms if self.how_much is not None else ())]
        return tuple(dict.fromkeys(arm for arm in named if arm not in (RANDOM, POOL)))
