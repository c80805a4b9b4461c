"""`evaluation/<name>`: models trained on several subsets under equal conditions, and which subset trains a better one.

It trains, so `clip-select run` skips it: `clip-select evaluate` or the UI computes it. What it has decoded and trained
lies in `<lake>/evaluation_work/<name>`, so an interrupted evaluation resumes.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from assets.base.asset import Declared, Dep, FileAsset, Step
from assets.base.context import Context, Snapshot
from assets.base.freshness import embedded_shards
from assets.base.results import Result
from assets.base.settings import ProjectSettings, json_settings
from assets.base.unpartitioned import unpartitioned
from assets.evaluations.arms import Arm, Samples, find_arms, needed_rows, without_evaluation_images
from assets.evaluations.page import Evaluated, write_page
from assets.evaluations.results import SCHEMA, Curve, Key, how_much_to_keep, measured, results_table
from assets.subsets.evaluated import show_on_pages
from core.hashing import digest
from resources.inputs.pairs import list_pairs, read_pairs
from resources.storage import files
from resources.training.decoded import DECODED, Decoder, EvaluationError, TaskImages, decode_samples, decode_task
from resources.training.heads import HeadsRun, HeadsTask, train_heads
from resources.training.launch import devices, run_all, threads_each
from resources.training.measures import RETRIEVAL
from resources.training.process import SMALL_TOWERS, Run
from resources.training.settings import POOL, RANDOM, EvaluationSettings

_EXTRA = ("braceexpand", "pandas", "webdataset")
_UNRECORDED = {"device", "processes", "cache_gib"}
"""Settings of training that change where it runs and not what comes out."""
SMALL_SIZE, USUAL_SIZE = 64, 224
"""Pixels of the small towers, and of an open_clip model whose configuration does not say."""


def configured(settings: ProjectSettings, asset: Declared) -> EvaluationSettings:
    """Return the settings of an evaluation."""
    found: EvaluationSettings = settings.evaluations[asset.names["name"]]
    return found


def _deps(asset: Declared) -> Sequence[str | Dep]:
    settings = configured(asset.settings, asset)
    embedded = [Dep(f"embeddings/{settings.encoder}", recorded=False)] if settings.encoder is not None else []
    return [Dep("raw_pool", recorded=False), *embedded, *(f"subset/{recipe}" for recipe in settings.recipes)]


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = configured(asset.settings, asset)
    if settings.tier != "heads" and (missing := [name for name in _EXTRA if find_spec(name) is None]):
        raise EvaluationError(
            f"{asset.key}: open_clip_train needs {', '.join(missing)}. Remedy: pip install '.[evaluate]'"
        )
    if settings.train.model is not None:
        _check_model(asset.key, settings.train.model)
    found = json_settings(settings)
    found["train"] = {name: value for name, value in found["train"].items() if name not in _UNRECORDED}
    found["tasks"].pop("retrieval", None)  # its files are an input
    return found


def _check_model(key: str, model: str) -> None:
    import open_clip

    if model not in open_clip.list_models():
        raise EvaluationError(f"{key}: train.model: open_clip has no model {model!r}. Remedy: open_clip.list_models()")


def _inputs(asset: FileAsset, snapshot: Snapshot, shard: str | None) -> Mapping[str, str]:
    settings = configured(asset.declared.settings, asset.declared)
    found = {}
    for target in settings.tasks.zero_shot:
        found[f"target/{target}"] = snapshot.target_fingerprint(target, "")
    if settings.tasks.retrieval is not None:
        found[RETRIEVAL] = files.fingerprint(list_pairs(settings.tasks.retrieval.path))
    if {RANDOM, POOL} & set(settings.arms):
        found["raw_pool"] = digest(embedded_shards(snapshot, "raw_pool"))
    if settings.encoder is not None:
        found[f"embeddings/{settings.encoder}"] = digest(embedded_shards(snapshot, f"embeddings/{settings.encoder}"))
    return found


@unpartitioned(
    key="evaluation/{name}",
    deps=_deps,
    columns=SCHEMA,
    checks=[],
    code_version="1",
    group_name="evaluations",
    kinds={"pytorch", "parquet"},
    pool="gpu",
    description="Models trained on several subsets under equal conditions, and the differences between them. Trains: "
    "materialize it when you want the answer.",
    parameters=_parameters,
    inputs=_inputs,
)
def evaluation(step: Step) -> Result:
    """Train and compare the models of one evaluation."""
    started = time.monotonic()
    name, context = step.names["name"], step.context
    settings = configured(context.settings, step.asset.declared)
    read = ["raw_pool", *([f"embeddings/{settings.encoder}"] if settings.encoder is not None else [])]
    shards = sorted(set.intersection(*(set(embedded_shards(step.snapshot, key)) for key in read)))
    provenance = step.wanted[None]
    work = _work_folder(context, name, provenance.digest())
    arms = find_arms(context, settings, shards)
    rows = needed_rows(context, arms, shards)
    train = _train_heads if settings.tier == "heads" else _train_models
    samples, curves = train(step, settings, _Inputs(arms, rows, work))
    measures = measured(curves, settings.compared_with, settings.arms)
    sizes = {arm: len(samples.by_arm[arm][0]) for arm in samples.by_arm}
    pool = sum(context.lake.rows("raw_pool", shards).values())
    law = []
    if settings.how_much is not None:
        own = {arm.name: sizes[arm.name] for arm in arms if arm.recipe in settings.how_much.arms and _is_own(arm, arms)}
        law = how_much_to_keep(measures, settings.how_much, own, pool)
    table = results_table(
        measures, settings.compared_with, settings.tier, {arm.name: (arm.recipe, arm.version) for arm in arms}, sizes
    )
    found = Evaluated(name, settings, measures, samples, sizes, pool, law, time.monotonic() - started)
    page = write_page(context.lake, found)
    show_on_pages(context.lake, name, table)
    _clear(work)
    return Result(table, {**found.summary, "report": page})


def _is_own(arm: Arm, arms: Sequence[Arm]) -> bool:
    """Whether an arm has all samples of its recipe: the longest of the arms of that recipe."""
    return len(arm.orders[0]) == max(len(other.orders[0]) for other in arms if other.recipe == arm.recipe)


def _work_folder(context: Context, name: str, provenance: str) -> Path:
    """Return the folder of an evaluation that is under way; remove those of earlier settings or inputs."""
    folder = context.lake.scratch_folder / "evaluation_work" / name
    work = folder / provenance[:16]
    for other in folder.iterdir() if folder.is_dir() else ():
        if other != work:
            shutil.rmtree(other)
    work.mkdir(parents=True, exist_ok=True)
    return work


def _clear(work: Path) -> None:
    """Remove what was decoded; measures and logs stay until the next evaluation, in case the result is not written."""
    for name in ("pictures.npy", "thumbs.npy", DECODED):
        (work / name).unlink(missing_ok=True)
    shutil.rmtree(work / "tasks", ignore_errors=True)


@dataclass(frozen=True)
class _Inputs:
    """The arms, the rows that they share, and the work folder."""

    arms: Sequence[Arm]
    rows: pl.DataFrame
    work: Path


def _task_images(context: Context, settings: EvaluationSettings, work: Path, decoder: Decoder) -> dict[str, TaskImages]:
    """Decode the images of all tasks."""
    found = {}
    for name in settings.tasks.zero_shot:
        target = context.target(name)
        labelled = ((image.data, image.label) for image in target.images())
        found[name] = decode_task(name, labelled, work, decoder, target.settings.max_pixels)
        if len(found[name].classes) < 2 or "" in found[name].classes:
            raise EvaluationError(
                f"tasks.zero_shot: target {name} has no class labels. Remedy: class folders, or .cls members in a tar"
            )
    if settings.tasks.retrieval is not None:
        pairs = read_pairs(settings.tasks.retrieval.path)
        found[RETRIEVAL] = decode_task(RETRIEVAL, pairs, work, decoder, context.settings.pool.max_pixels)
    return found


# Training from scratch


def _train_models(step: Step, settings: EvaluationSettings, inputs: _Inputs) -> tuple[Samples, dict[Key, Curve]]:
    work, rows, train = inputs.work, inputs.rows, settings.train
    places = devices(train)  # before hours of decoding: it may be an error
    size = train.image_size or _own_size(train.model)
    cached = len(rows) * 3 * size * size <= train.cache_gib * 2**30
    runs = len(inputs.arms) * train.seeds
    step.expect(len(rows) + runs * sum(train.steps(budget) * train.batch_size for budget in train.samples_seen))
    decoder = Decoder.of(size)
    tasks = _task_images(step.context, settings, work, decoder)
    rows.write_parquet(work / "samples.parquet")
    of_rows = decoder if cached else Decoder.of(None)
    decode_samples(step.context.pool, rows, work, of_rows, step.progress)
    thumbs = np.load(work / "thumbs.npy")
    of_tasks = {name: task.thumbs for name, task in tasks.items()}
    samples = without_evaluation_images(inputs.arms, rows, thumbs, tasks, of_tasks, settings.near_duplicate)
    folders: dict[Key, Path] = {}
    for budget in train.samples_seen:
        for arm, by_seed in samples.by_arm.items():
            for seed, chosen in enumerate(by_seed):
                key = (arm, budget, seed)
                folders[key] = work / "runs" / f"{arm.replace(' ', '_')}-{budget}-{seed}"
                run = _run(settings, work, size, budget, seed, list(tasks), len(places), places[0])
                pool = None if cached else step.context.settings.pool.model_dump(mode="json")
                Run(**{**run, "pool": pool}).write(folders[key], chosen)
    run_all(list(folders.values()), places, step.progress)
    return samples, {key: read_curve(folder) for key, folder in folders.items()}


def _own_size(model: str | None) -> int:
    if model is None:
        return SMALL_SIZE
    import open_clip

    return int(open_clip.get_model_config(model)["vision_cfg"].get("image_size", USUAL_SIZE))


def _run(
    settings: EvaluationSettings,
    work: Path,
    size: int,
    budget: int,
    seed: int,
    tasks: list[str],
    at_a_time: int,
    place: str | None,
) -> dict[str, Any]:
    train = settings.train
    steps = train.steps(budget)
    return {
        "work": str(work),
        "model": train.model or SMALL_TOWERS.stem,
        "image_size": size,
        "seed": seed,
        "points": min(train.checkpoints, steps),
        "steps": steps,
        "batch_size": train.batch_size,
        "learning_rate": train.rate(settings.tier),
        "weight_decay": train.weight_decay,
        "warmup": train.warmup,
        "precision": train.precision,
        "device": "cpu" if place is None else "cuda",
        "threads": threads_each(at_a_time),
        "templates": list(settings.tasks.templates),
        "tasks": tasks,
    }


def read_curve(folder: Path) -> Curve:
    """Read the points of a run; of a point that was measured again after a kill, the last."""
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return sorted({line["seen"]: line for line in lines}.values(), key=lambda line: line["seen"])


# Linear heads


def _train_heads(step: Step, settings: EvaluationSettings, inputs: _Inputs) -> tuple[Samples, dict[Key, Curve]]:
    assert settings.encoder is not None
    train, encoder = settings.train, step.context.models.encoder(settings.encoder)
    image, text = _embeddings(step, settings.encoder, inputs.rows)
    tasks = _task_images(step.context, settings, inputs.work, Decoder.of(None))
    embedded = {name: _embedded(step.context, settings, name) for name in tasks}
    samples = without_evaluation_images(inputs.arms, inputs.rows, image, tasks, embedded, settings.near_duplicate)
    frozen = [HeadsTask(name, task.texts, embedded[name]) for name, task in tasks.items()]
    runs = [
        (arm, budget, seed, chosen)
        for budget in train.samples_seen
        for arm, by_seed in samples.by_arm.items()
        for seed, chosen in enumerate(by_seed)
    ]
    step.expect(sum(train.steps(budget) * train.batch_size for _, budget, _, _ in runs))
    curves: dict[Key, Curve] = {}
    for arm, budget, seed, chosen in runs:
        steps = train.steps(budget)
        run = HeadsRun(
            samples=chosen,
            seed=seed,
            steps=steps,
            points=min(train.checkpoints, steps),
            batch_size=train.batch_size,
            learning_rate=train.rate("heads"),
            weight_decay=train.weight_decay,
        )
        templates = settings.tasks.templates
        curves[arm, budget, seed] = train_heads(run, image, text, encoder.loaded, frozen, templates, step.progress)
    return samples, curves


def _embeddings(step: Step, encoder: str, rows: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Read the embeddings of rows, float16 [n, d] each; the rows of a shard are neighbours."""
    parts: dict[str, list[np.ndarray]] = {"image": [], "text": []}
    for (shard,), of_shard in rows.group_by("shard", maintain_order=True):
        vectors = step.context.lake.vectors(f"embeddings/{encoder}", str(shard), columns=["image", "text"])
        for name, found in zip(parts, vectors, strict=True):
            parts[name].append(found[of_shard["place"].to_numpy()])
    return np.concatenate(parts["image"]), np.concatenate(parts["text"])


def _embedded(context: Context, settings: EvaluationSettings, task: str) -> np.ndarray:
    """Embed the images of a task with the frozen encoder."""
    assert settings.encoder is not None
    encoder = context.models.encoder(settings.encoder)
    if task == RETRIEVAL:
        assert settings.tasks.retrieval is not None
        named = ((str(n), data) for n, (data, _) in enumerate(read_pairs(settings.tasks.retrieval.path)))
        return encoder.embed_images(named, max_pixels=context.settings.pool.max_pixels).image
    target = context.target(task)
    named = ((image.name, image.data) for image in target.images())
    return encoder.embed_images(named, max_pixels=target.settings.max_pixels).image
