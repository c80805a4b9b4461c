"""negCLIPLoss of the studied rows under other settings: other τ, B and K, another seed, the other estimator."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from assets.base.context import Context, Snapshot
from assets.base.freshness import embedded_shards
from assets.base.score_tables import to_tensor
from assets.scores.draws import draw, read_draws, with_content
from assets.scores.neg_clip_loss_settings import configured
from assets.study.results import (
    BEST,
    CONFIGURED,
    FAULTS,
    SEED,
    Group,
    Interval,
    Sensitivity,
    StudyError,
    Variant,
    interval,
)
from core.uids import UID_DTYPE
from resources.lake.gather import gather
from selection.scores.negatives import membership
from selection.statistics import auc, best_overlap, bootstrap_auc, spearman

_TEMPERATURES = (1 / 4, 1 / 2, 2, 4)  # times τ
_SMALLER_BATCHES = (64, 16, 4)  # B divided by these
_OTHER_ESTIMATOR = {"reference_negatives": "random_partitions", "random_partitions": "reference_negatives"}


class _Setting(NamedTuple):
    """A setting of negCLIPLoss; `seed` is added to the configured one."""

    what: str
    temperature: float
    batch_size: int
    draws: int
    estimator: str
    seed: int = 0


def sensitivity(
    project: Context, encoder: str, frame: pl.DataFrame, groups: Sequence[Group], resamples: int
) -> Sensitivity | None:
    """Score the studied rows under other settings; return None if the score is not stored, or no studied row has it."""
    name = f"neg_clip_loss/{encoder}"
    stored = next((s for shard in project.lake.shards(name) if (s := project.lake.stored(name, shard))), None)
    if stored is None or name not in frame.columns or not frame[name].cast(pl.Float64).is_finite().any():
        return None
    scorer = _Scorer(project, encoder, frame, stored.provenance.parameters)
    before = frame[name].cast(pl.Float64).to_numpy()[scorer.places]
    settings = _settings(scorer, stored.provenance.parameters)
    scored = np.stack([scorer.score(setting) for setting in settings], axis=1)
    by_fault, overall, gains = _fault_aucs(scored, groups, scorer.places, resamples)
    variants = [
        Variant(
            what=setting.what,
            temperature=float(setting.temperature),
            batch_size=int(setting.batch_size),
            draws=int(setting.draws),
            estimator=setting.estimator,
            spearman=float(spearman(np.stack([before, scored[:, i]], axis=1))[0, 1]),
            best_overlap=best_overlap(before, scored[:, i], BEST) if len(before) * BEST >= 1 else math.nan,
            auc={fault: float(values[i]) for fault, values in by_fault.items()},
            all_faults=overall[i] if overall else None,
            gain=gains[i] if gains else None,
        )
        for i, setting in enumerate(settings)
    ]
    return Sensitivity(name, len(before), float(np.abs(before - scored[:, 0]).max()), variants)


def _settings(scorer: "_Scorer", parameters: Mapping[str, Any]) -> list[_Setting]:
    """Return the settings to compare: the configured one, then others that differ from it in one value."""
    tau, estimator = parameters["temperature"], parameters["estimator"]
    size, draws = scorer.size, scorer.draws
    configured = _Setting(CONFIGURED, tau, size, draws, estimator)
    shared = min(size, len(scorer.places))  # the largest batch that both estimators can have
    temperatures = [tau * factor for factor in _TEMPERATURES if 0.001 <= tau * factor <= 10]
    sizes = sorted({size // d for d in _SMALLER_BATCHES if size // d >= 2} | {shared} - {size})
    return [
        configured,
        *(configured._replace(what="τ", temperature=temperature) for temperature in temperatures),
        *(configured._replace(what="B", batch_size=smaller) for smaller in sizes),
        *(configured._replace(what="K", draws=k) for k in sorted({1, 2, draws // 2}) if 0 < k < draws),
        configured._replace(what="seed", seed=1),
        configured._replace(what="estimator", batch_size=shared, estimator=_OTHER_ESTIMATOR[estimator]),
    ]


def _fault_aucs(
    scored: np.ndarray, groups: Sequence[Group], places: np.ndarray, resamples: int
) -> tuple[dict[str, np.ndarray], list[Interval], list[Interval]]:
    """Compute the AUCs of every setting.

    Args:
        scored: Scores `[n, settings]`.
        groups: The comparisons of the study.
        places: Positions of the scored rows among the studied ones `[n]`.
        resamples: Number of resamples.

    Returns:
        The AUCs `[settings]` by fault; for all faults together, the AUC of each setting and its difference to the first
        one, paired, with intervals. The lists are empty if there are no faults.
    """
    sides = {
        group.name: (scored[group.better[places]], scored[group.worse[places]])
        for group in groups
        if not group.within and not group.wanted
    }
    sides = {name: (better, worse) for name, (better, worse) in sides.items() if len(better) and len(worse)}
    by_fault = {name: auc(better, worse) for name, (better, worse) in sides.items()}
    if FAULTS not in sides:
        return by_fault, [], []
    exact, drawn = by_fault[FAULTS], bootstrap_auc(*sides[FAULTS], resamples=resamples, seed=SEED)
    overall = [interval(exact[i], drawn[:, i]) for i in range(len(exact))]
    gains = [interval(exact[i] - exact[0], drawn[:, i] - drawn[:, 0]) for i in range(len(exact))]
    return by_fault, overall, gains


class _Scorer:
    """negCLIPLoss of the studied rows, by the functions that the asset uses.

    Draws are nested: the first rows of a draw are a smaller draw. So the stored negatives serve every smaller B and K.

    Attributes:
        places: Positions in the frame of the rows that have embeddings and the score `[n]`, ascending.
        size: B as configured.
        draws: K as configured.
    """

    def __init__(self, project: Context, encoder: str, frame: pl.DataFrame, parameters: Mapping[str, Any]) -> None:
        self.project, self.encoder = project, encoder
        self.arithmetic = parameters["arithmetic"]
        self.places, self.uids, self.image, self.text = _embedded(project, encoder, frame)
        settings = configured(project.settings)[encoder]
        self.seed = settings.seed
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        if parameters["estimator"] == "reference_negatives":
            self._drawn[0] = read_draws(project.lake.read(f"negatives/{encoder}"))
            self.draws, self.size = self._drawn[0][0].shape
        else:
            self.draws, self.size = settings.draws, settings.batch_size

    def score(self, setting: _Setting) -> np.ndarray:
        """Return the scores of the rows under a setting, float64 `[n]`."""
        import torch

        import selection

        image, text = to_tensor(self.image), to_tensor(self.text)
        if setting.estimator == "random_partitions":
            found = selection.neg_clip_loss_in_batches(
                image,
                text,
                temperature=setting.temperature,
                batch_size=setting.batch_size,
                draws=setting.draws,
                seed=self.seed + setting.seed,
                arithmetic=self.arithmetic,
            )
            return np.asarray(found.cpu().numpy(), np.float64)
        if setting.seed not in self._drawn:
            self._drawn[setting.seed] = self._draw(setting.seed)
        uids, *vectors = (part[: setting.draws, : setting.batch_size] for part in self._drawn[setting.seed])
        rows = with_content(self.uids, self.image, self.text)
        member = membership(with_content(uids, *vectors), rows["f0"].copy(), rows["f1"].copy())
        found, _ = selection.neg_clip_loss(
            image,
            text,
            *(to_tensor(v) for v in vectors),
            temperature=setting.temperature,
            member=torch.from_numpy(member).to(image.device),
            arithmetic=self.arithmetic,
        )
        return np.asarray(found.cpu().numpy(), np.float64)

    def _draw(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw negatives from the current pool, as the asset would with another seed."""
        key = f"embeddings/{self.encoder}"
        snapshot = Snapshot(self.project)
        shards = embedded_shards(snapshot, key)
        drawn = draw(snapshot, key, shards, draws=self.draws, batch_size=self.size, seed=self.seed + seed)
        return read_draws(drawn.table)


def _embedded(
    project: Context, encoder: str, frame: pl.DataFrame
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read the embeddings of the studied rows that have the score.

    Returns:
        The positions of these rows in the frame `[n]`, ascending; their uids as records of f0 and f1 `[n]`; float16
        image and text `[n, d]`.
    """
    asset = f"embeddings/{encoder}"
    numbered = frame.with_row_index("place").filter(pl.col(f"neg_clip_loss/{encoder}").is_finite())
    shards: list[str] = []
    parts = []
    for (shard,), rows in numbered.group_by("shard", maintain_order=True):
        if project.lake.stored(asset, str(shard)) is None:
            continue
        stored = pl.DataFrame(project.lake.read(asset, str(shard), ["f0", "f1"])).with_row_index("row")
        found = rows.join(stored.unique(["f0", "f1"], keep="first"), on=["f0", "f1"], how="inner")
        parts.append(found.select("place", "f0", "f1", "row", number=pl.lit(len(shards))))
        shards.append(str(shard))
    if not shards:
        raise StudyError(f"{asset}: no studied row has embeddings. Remedy: run the project")
    chosen = pl.concat(parts).sort("place")
    image, text = gather(
        project.lake, asset, ["image", "text"], shards, chosen["number"].to_numpy(), chosen["row"].to_numpy()
    )
    uids = np.empty(len(chosen), dtype=UID_DTYPE)
    uids["f0"], uids["f1"] = chosen["f0"].to_numpy(), chosen["f1"].to_numpy()
    return chosen["place"].to_numpy(), uids, image, text
