"""Checks of `evaluations` in the YAML that need its other parts: recipes, targets, encoders and the pool's format."""

from typing import Any

from assets.base.score_kind import Scores
from assets.base.settings import ProjectSettings
from core.names import suggestion
from resources.pools.formats import pool_format
from resources.training.measures import RETRIEVAL
from resources.training.settings import POOL, RANDOM, EvaluationSettings


def check_evaluation(settings: ProjectSettings, field: str, evaluation: EvaluationSettings) -> None:
    """Check the names that an evaluation refers to.

    Args:
        settings: the project's.
        field: the evaluation's place in the YAML.
        evaluation: its settings.

    Raises:
        ValueError: one does not exist or does not fit; the message names the field and the remedy.
    """
    recipes = settings.recipes
    for name in {RANDOM, POOL} & set(recipes):
        raise ValueError(f"recipes.{name}: evaluations have an arm of this name. Remedy: rename the recipe")
    for recipe in evaluation.recipes:
        if recipe not in recipes:
            known = [*recipes, RANDOM, POOL]
            raise ValueError(f"{field}.arms: there is no recipe {recipe!r}; {suggestion(recipe, known)}")
    for target in evaluation.tasks.zero_shot:
        if target == RETRIEVAL:
            raise ValueError(f"targets.{RETRIEVAL}: evaluations have a task of this name. Remedy: rename the target")
        if target not in settings.targets:
            raise ValueError(
                f"{field}.tasks.zero_shot: there is no target {target!r}; {suggestion(target, settings.targets)}"
            )
        if settings.targets[target].path is None:
            raise ValueError(f"{field}.tasks.zero_shot: target {target!r} has no images. Remedy: give its path")
    if not pool_format(settings.pool).has_images:
        raise ValueError(f"{field}: a pool of format {settings.pool.format} has no images to train on")
    tasks = [*evaluation.tasks.zero_shot, *([RETRIEVAL] if evaluation.tasks.retrieval is not None else [])]
    if evaluation.how_much is not None and evaluation.how_much.task not in (None, *tasks):
        task = evaluation.how_much.task
        raise ValueError(f"{field}.how_much.task: there is no task {task!r}; {suggestion(str(task), tasks)}")
    if evaluation.encoder is not None:
        _check_encoder(settings, field, evaluation)


def _check_encoder(settings: ProjectSettings, field: str, evaluation: EvaluationSettings) -> None:
    """Check that the encoder of linear heads has a model, and that no score of an arm comes from it."""
    name = evaluation.encoder
    if name not in settings.encoders:
        raise ValueError(f"{field}.encoder: there is no encoder {name!r}; {suggestion(str(name), settings.encoders)}")
    models = {other: (found.model, found.pretrained) for other, found in settings.encoders.items()}
    if settings.encoders[name].model is None:
        raise ValueError(f"{field}.encoder: encoder {name!r} has no model to embed the tasks with. Remedy: another one")
    if settings.encoders[name].of is not None:
        raise ValueError(
            f"{field}.encoder: encoder {name!r} embeds only {settings.encoders[name].of}, and the arms have other rows "
            "too. Remedy: an encoder without `of`"
        )
    scores = Scores(settings)
    for recipe in evaluation.recipes:
        for asset in sorted(_read(scores, recipe, settings.recipes)):
            scored_by = scores.assets[asset].names.get("encoder")
            if scored_by is not None and models[scored_by] == models[name]:
                raise ValueError(
                    f"{field}.encoder: recipe {recipe!r} selects by {asset}, which comes from the model of {name!r}: "
                    "the comparison would favour it. Remedy: an encoder that no arm's scores come from"
                )


def _read(scores: Scores, recipe: str, recipes: dict[str, Any]) -> set[str]:
    """List the score assets that a recipe and the recipes that it starts from read."""
    found = scores.of_recipe(recipe)
    return found.union(*(_read(scores, other, recipes) for other in recipes[recipe].recipes))
