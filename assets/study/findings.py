"""The findings on the study page: sentences that follow from the statistics by fixed rules, whichever method wins."""

import math
from collections.abc import Sequence

from assets.study.numbers import auc, difference, plain, rate, small
from assets.study.results import (
    BEST,
    CHANCE,
    TARGET_OVERLAP,
    Cascade,
    Overlap,
    Sensitivity,
    Separation,
    Study,
    Variant,
)

SHOWN_OVERLAPS = 3  # of more, the largest and the smallest
VARIED = ("τ", "B", "K")


def findings(study: Study) -> list[tuple[str, str]]:
    """Return the subject and the sentences of each finding."""
    found = []
    if study.truth is None:
        found.append(("No truth was given", "the page can't show which score finds which fault. Pass --truth."))
    for group in study.separations:
        if group.within is None and group.auc:
            found.append(_separation(group, [g for g in study.separations if g.within == group.name]))
    found += [*_agreement(study), *_selections(study), *map(_cascade, study.cascades)]
    for sensitivity in study.sensitivities:
        found.append(_sensitivity(sensitivity))
        found += _gains(sensitivity)
    return found


def _separation(group: Separation, variants: Sequence[Separation]) -> tuple[str, str]:
    best = group.best
    blind = [score for score in group.auc if group.auc[score].holds(CHANCE) and score != best]
    inverse = [score for score in group.auc if group.auc[score].high < CHANCE]
    text = f"{_best(group)}."
    if blind:
        text += f" No different from chance: {', '.join(blind)}."
    if inverse:
        order = "ranking these rows below the others" if group.wanted else "ranking the fault above clean rows"
        text += f" Worse than chance, {order}: {', '.join(inverse)}."
    reached = [variant for variant in variants if best in variant.auc]
    if reached:
        hardest = min(reached, key=lambda variant: variant.auc[best].value)
        text += f" {best} does worst on the variant {plain(hardest.name)} ({hardest.rows:,} rows): "
        text += auc(hardest.auc[best])
        if hardest.best != best:
            text += f"; the highest there is {hardest.best}, {auc(hardest.auc[hardest.best])}"
        text += "."
    name = plain(group.name)
    return f"{name[0].upper()}{name[1:]}{' above others' if group.wanted else ''}, {group.rows:,} rows", text


def _best(group: Separation) -> str:
    """Return which score has the highest AUC, and how far the next one is behind."""
    best = group.best
    top = group.auc[best]
    if top.low > CHANCE:
        text = f"{best} has the highest AUC, {auc(top)}"
    else:
        text = f"no score is better than chance; the highest AUC is that of {best}, {auc(top)}"
    if group.covered[best] < 1:
        text += f" on the {group.covered[best]:.0%} of the rows that have it"
    others = sorted(group.ahead, key=lambda score: (-group.auc[score].value, score))
    if others:
        second, ahead = others[0], group.ahead[others[0]]
        overlap = "overlap" if group.auc[second].high >= top.low else "do not overlap"
        zero = "includes" if ahead.holds(0) else "excludes"
        text += f"; the next is {second} with {auc(group.auc[second])}. The intervals {overlap}; "
        text += f"the paired difference, {difference(ahead)}, {zero} 0"
    return text


def _agreement(study: Study) -> list[tuple[str, str]]:
    names = list(study.scores)
    pairs = [
        (study.spearman[i][j], names[j], names[i])
        for i in range(len(names))
        for j in range(i)
        if not math.isnan(study.spearman[i][j])
    ]
    if not pairs:
        return []
    most, least = max(pairs), min(pairs, key=lambda pair: abs(pair[0]))
    text = f"{most[1]} and {most[2]} rank the rows most alike (Spearman {rate(most[0])})"
    if len(pairs) > 1:
        text += f", {least[1]} and {least[2]} are least related ({rate(least[0])})"
    return [("Scores", text + ".")]


def _selections(study: Study) -> list[tuple[str, str]]:
    def shared(overlap: Overlap) -> str:
        share_a, share_b = (overlap.rows_both / rows for rows in (overlap.rows_a, overlap.rows_b))
        return (
            f"{overlap.rows_both:,} rows are in both, {share_a:.1%} of the one (by chance "
            f"{overlap.rows_b / study.pool_rows:.1%}) and {share_b:.1%} of the other (by chance "
            f"{overlap.rows_a / study.pool_rows:.1%}); Jaccard {overlap.jaccard:.3f}."
        )

    ordered = sorted(study.overlaps, key=lambda overlap: -overlap.jaccard)
    shown = ordered if len(ordered) <= SHOWN_OVERLAPS else [ordered[0], ordered[-1]]
    return [(f"{overlap.a} and {overlap.b}", shared(overlap)) for overlap in shown]


def _cascade(cascade: Cascade) -> tuple[str, str]:
    embedded = " and ".join(f"{name} embeds {share:.1%} of the rows" for name, share in cascade.embedded.items())
    text = f"keeps {cascade.overlap:.1%} of {cascade.full}, and {embedded}."
    if cascade.needed is not None:
        text += f" {TARGET_OVERLAP:.0%} of {cascade.full} are within the top {cascade.needed:.1%} by {cascade.cheap}."
    return cascade.cascade, text


def _sensitivity(sensitivity: Sensitivity) -> tuple[str, str]:
    configured, *others = sensitivity.variants
    sentences = [
        f"Another seed alone gives {_agrees(variant)}; that is the noise of the draw."
        for variant in others
        if variant.what == "seed"
    ]
    for what in VARIED:
        settings = [variant for variant in others if variant.what == what]
        if settings:
            far = min(settings, key=lambda variant: variant.spearman)
            sentences.append(f"{what} changes the ranking most at {_setting(far)}: {_agrees(far)}.")
    for variant in others:
        if variant.what == "estimator":
            size = "" if variant.batch_size == configured.batch_size else f" with B = {variant.batch_size:,}"
            sentences.append(f"{_setting(variant).capitalize()}{size} give {_agrees(variant)}.")
    return sensitivity.score, " ".join(sentences)


def _gains(sensitivity: Sensitivity) -> list[tuple[str, str]]:
    configured, *others = sensitivity.variants
    judged = [(variant, variant.gain) for variant in others if variant.gain is not None]
    if not judged or configured.all_faults is None:
        return []
    better = [f"{_setting(variant)} ({small(gain.value)})" for variant, gain in judged if gain.low > 0]
    worse = [f"{_setting(variant)} ({small(gain.value)})" for variant, gain in judged if gain.high < 0]
    equal = [_setting(variant) for variant, gain in judged if gain.holds(0)]
    text = (
        f"AUC {auc(configured.all_faults)} as configured. Higher, with a difference that excludes 0: "
        f"{', '.join(better) or 'none'}; lower: {', '.join(worse) or 'none'}; no clear difference: "
        f"{', '.join(equal) or 'none'}."
    )
    return [(f"{sensitivity.score} and all faults", text)]


def _agrees(variant: Variant) -> str:
    if math.isnan(variant.best_overlap):
        return f"Spearman {variant.spearman:.4f}"
    return f"Spearman {variant.spearman:.4f}, with {variant.best_overlap:.1%} of the best {BEST:.0%} kept"


def _setting(variant: Variant) -> str:
    return {
        "τ": f"τ = {variant.temperature:.3g}",
        "B": f"B = {variant.batch_size:,}",
        "K": f"K = {variant.draws}",
        "seed": "another seed",
        "estimator": plain(variant.estimator),
    }.get(variant.what, variant.what)
