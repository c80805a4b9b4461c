"""A recipe over a part of the pool: which steps keep the rows of a version, and the limits of the others.

Numbers of rows of the part and of the pool are interpolated between those that are known of both: of a version that
was selected from the same inputs, the rows that entered a step and those that it kept. So with nothing changed the same
rows stay, and a limit that keeps all rows keeps all of the pool.
"""

from dataclasses import dataclass, replace
from typing import Any

from dagster_project.browser.parts import Part
from dagster_project.browser.recorded import Recorded
from dagster_project.browser.trial import Scale, Scaled, Trial
from resources.lake.versions import Version
from selection.recipes.model import POOL, part_of
from selection.recipes.recipe import Recipe
from selection.recipes.steps import Step

LIMITED = ("keep_top", "match_distribution", "balance")
"""Kinds of steps whose fraction or count is the number of rows that stay."""
COUNTED = ("cap", "batch")
"""Other settings that are numbers of rows."""
_LIMITS = {"fraction", "count", "threshold", "rule", "above"}


@dataclass(frozen=True)
class Reference:
    """A version that was selected from the same inputs.

    Attributes:
        version: the version.
        recorded: its steps.
        trial: its verdicts on the part; None while they are found.
    """

    version: Version
    recorded: Recorded
    trial: Trial | None = None


def in_part(recipe: Recipe, part: Part, reference: Reference | None) -> Scaled:
    """Return a recipe as it is executed over a part.

    Args:
        recipe: for the whole pool.
        part: the part.
        reference: the version that a recipe with other limits is compared with, if there is one.
    """
    if part.is_whole:
        return Scaled(recipe, (Scale(),) * (len(recipe.steps) + 1))
    if reference is None:
        scales = (Scale.through((part.rows, part.total)),) * (len(recipe.steps) + 1)
        return _with_limits(Scaled(recipe, scales, source_rows=part.total if recipe.source == POOL else None))
    old = Recipe.model_validate(reference.version.lineage["definition"])
    same = next((n for n, (a, b) in enumerate(zip(recipe.steps, old.steps, strict=False)) if a != b), len(old.steps))
    same = min(same, len(recipe.steps))
    if not same == len(recipe.steps) == len(old.steps):
        same = min(same, reference.recorded.known)
    return _with_limits(
        Scaled(
            recipe,
            _scales(recipe, old, part, reference),
            begun=reference.recorded.reports[:same],
            sets=reference.recorded.sets if same else {},
            source_rows=reference.version.lineage["source"]["rows"],
        )
    )


def _scales(recipe: Recipe, old: Recipe, part: Part, reference: Reference) -> tuple[Scale, ...]:
    """Return the scale of each step, from the version's step that is the same but for its limit, if there is one."""
    if reference.trial is None:
        return (Scale.through((part.rows, part.total)),) * (len(recipe.steps) + 1)
    reports = reference.recorded.reports
    of_part = [reference.trial.source_rows, *(step["sampled"] for step in reference.trial.steps)]
    of_pool = [reference.version.lineage["source"]["rows"], *(report.kept for report in reports)]
    whole = (part.rows, part.total)
    scales = [Scale.through((of_part[0], of_pool[0]), whole)]
    for number, step in enumerate(recipe.steps, start=1):
        scale = scales[-1]
        for other in (number, number + len(old.steps) - len(recipe.steps)):  # counted from the first or the last step
            known = 1 <= other <= reference.recorded.known or other == len(old.steps)
            if known and _without_limits(step) == _without_limits(old.steps[other - 1]):
                known_rows = [(of_part[n], of_pool[n]) for n in (other, other - 1, 0)]
                scale = Scale.through(*known_rows, whole)
        scales.append(scale)
    return tuple(scales)


def _without_limits(step: Step) -> dict[str, Any]:
    found = step.model_dump(by_alias=True, exclude_defaults=True)
    settings = found[step.kind]
    if isinstance(settings, dict):
        found[step.kind] = {name: value for name, value in settings.items() if name not in _LIMITS}
    return found


def _with_limits(scaled: Scaled) -> Scaled:
    """Return the recipe with the limits of the steps that are executed divided by their scale."""
    steps, wanted, basis = list(scaled.recipe.steps[: len(scaled.begun)]), {}, scaled.source_rows
    if any(step.kind == "within" for step in steps):
        basis = None  # a fraction of what a `within` kept is that fraction of it in the part
    for number, step in enumerate(scaled.recipe.steps[len(steps) :], start=len(steps) + 1):
        basis = None if step.kind == "within" else basis
        divided, asked = _divided(step, scaled.scales[number], basis)
        steps.append(divided)
        if asked is not None and step.kind in LIMITED:
            wanted[number] = asked
    recipe = scaled.recipe.model_copy(update={"steps": tuple(steps)})
    return replace(scaled, recipe=recipe, wanted=wanted)


def _divided(step: Step, scale: Scale, basis: int | None) -> tuple[Step, int | None]:
    """Return a step with its numbers of rows divided, and the number of rows that it asks for of the pool."""
    settings = getattr(step, step.kind, None)
    definition = step.model_dump(by_alias=True, exclude_defaults=True)
    limits = definition[step.kind]
    if not isinstance(limits, dict):
        return step, None
    limits, asked = dict(limits), limits.get("count")
    if "fraction" in limits and basis is not None and step.kind != "stratify" and limits.get("rule") != "datacomp":
        asked = part_of(basis, limits.pop("fraction"))
    if asked == 0:
        return step, None  # which is an error where it is executed
    if asked is not None:
        limits["count"] = max(1, scale.to_part(asked))
    for name in COUNTED:
        if (value := getattr(settings, name, None)) is not None:
            limits[name] = max(1, scale.to_part(value))
    return Step.model_validate({**definition, step.kind: limits}), asked
