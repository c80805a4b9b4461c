"""`clip-select verify`: every file of a lake compared with its checksum, and the files that others were made from.

Here: which files a lake should have, and what to do about each. Not here: checksums (`resources.storage.checksums`,
`resources.lake.versions`). Work files of interrupted computations, exported tars and locks have no checksums and are
not looked at.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import yaml
from rich.console import Console

from assets.base.context import Context
from assets.base.partitioned import PartitionedAsset, PartitionedTemplate
from assets.graph import Graph, build_graph
from dagster_project.instance import REMEDY_RECORDS, damaged_records, home_of, only_pass
from dagster_project.tables import print_json
from resources.catalog.build import TARGETS_FILE, CatalogError, read_catalog, verify_targets
from resources.lake.files import DAMAGED_SUFFIX, DamagedError, Lake
from resources.lake.sealed import mapped, read_arrow, read_parquet
from resources.lake.versions import CLAIM_SUFFIX, RECORD, REMOTE_CLAIM, Version, Versions
from resources.storage.checksums import ChecksumError

DAMAGED, MISSING, UNVERIFIED, SET_ASIDE, OK = "damaged", "missing", "unverified", "set aside", "ok"
_RUN = "clip-select run computes it again"
_REPAIR = f"{_RUN} if a step reads it; clip-select verify --repair sets it aside in any case, for the next run"
_WITHOUT_RECORD = ("captioning", "catalog", "evaluation_work", "subset")
"""Folders of the lake whose Parquet files are no files of assets."""


@dataclass(frozen=True)
class Verified:
    """The state of one file.

    Attributes:
        file: its path.
        state: damaged, missing, unverified (it has no checksum), set aside, or ok.
        detail: what is wrong.
        remedy: what to do about it.
    """

    file: str
    state: str
    detail: str = ""
    remedy: str = ""


def verify(project: Context, console: Console, *, repair: bool = False, as_json: bool = False) -> int:
    """Verify a project's lake, and print what is damaged or missing.

    Args:
        project: the opened project.
        console: where to print.
        repair: set damaged files and versions aside, so that the next run computes them again.
        as_json: print every file that is not ok, and the counts, as JSON.

    Returns:
        The exit status: 1 if a file is damaged or missing, else 0.

    Raises:
        LakeError: `repair`, and another process works on the lake.
    """
    with only_pass(project) if repair else nullcontext():
        found = list(verified_files(project, build_graph(project), repair=repair))
    counts = Counter(file.state for file in found)
    shown = [file for file in found if file.state != OK]
    if as_json:
        print_json({"counts": dict(counts), "files": [asdict(file) for file in shown]}, console)
    else:
        for file in shown:
            if file.state != UNVERIFIED:
                remedy = f". Remedy: {file.remedy}" if file.remedy else ""
                console.print(
                    f"{file.state}: {file.file}: {file.detail}{remedy}", markup=False, highlight=False, soft_wrap=True
                )
        console.print(f"Files: {', '.join(f'{number:,} {state}' for state, number in counts.items()) or 'none'}")
        if counts[UNVERIFIED]:
            console.print(
                "Unverified files have no checksum: those from before checksums existed, which stay valid, and "
                "Dagster's records.",
                soft_wrap=True,
            )
    return 1 if counts[DAMAGED] or counts[MISSING] else 0


def verified_files(project: Context, graph: Graph, *, repair: bool = False) -> Iterator[Verified]:
    """Yield the state of every file of a lake; see `verify`."""
    lake, root = project.lake, project.lake.root
    recipes = [name for name in lake.store.folders(f"{root}/subset") if not name.startswith(".")]
    if not lake.store.folders(root):
        yield Verified(root, MISSING, "there is no lake", "correct `lake` in the YAML, or clip-select run makes it")
        return
    yield from _asset_files(lake, repair=repair)
    yield from _missing_inputs(lake, graph)
    for recipe in recipes:
        yield from _versions(Versions(lake, recipe), repair=repair)
    yield from _catalog(lake, project.catalog_path())
    yield from _dagster(home_of(project))


def _asset_files(lake: Lake, *, repair: bool) -> Iterator[Verified]:
    for entry in lake.store.files(lake.root, deep=True):
        *folders, name = entry.location.removeprefix(f"{lake.root}/").split("/")
        if not folders or any(part.startswith(".") for part in folders) or folders[0] in _WITHOUT_RECORD:
            continue
        if name.startswith("."):
            if name.endswith(DAMAGED_SUFFIX):
                yield Verified(entry.location, SET_ASIDE, "it was damaged", "remove it when you no longer need it")
        elif name.endswith((".parquet", ".arrow")):
            yield _asset_file(lake, entry.location, repair=repair)


def _asset_file(lake: Lake, path: str, *, repair: bool) -> Verified:
    try:
        _, sealed = lake.read_stored(path)
        if path.endswith(".parquet"):
            read_parquet(lake.store.local(path), None)
        else:
            read_arrow(*mapped(lake.store.local(path)), None)
    except (ChecksumError, pa.ArrowInvalid, OSError) as error:
        if repair:
            lake.set_aside(path, str(error))
        return Verified(path, DAMAGED, str(error), _RUN if repair else _REPAIR)
    return Verified(path, OK if sealed else UNVERIFIED)


def _missing_inputs(lake: Lake, graph: Graph) -> Iterator[Verified]:
    """Find files that are missing although a file that was made from them, or beside them, is there."""
    nodes = {node.key: node for node in graph.nodes}
    missing: dict[str, str] = {}
    for node in graph.nodes:
        template = node.declared.template
        beside = template.beside if isinstance(template, PartitionedTemplate) else ()
        for shard in lake.shards(node.key) if isinstance(node, PartitionedAsset) else [None]:
            if not lake.exists(lake.path(node.key, shard)):
                continue
            for dep in (*node.deps, *beside):
                if dep not in nodes and dep not in beside:
                    continue  # a subset
                partitioned = dep in beside or nodes[dep].partitioned
                if partitioned and shard is None:
                    continue  # made from many shards, of which some may be gone from the pool
                missing.setdefault(lake.path(dep, shard if partitioned else None), lake.path(node.key, shard))
    for subset in graph.subsets:
        for shard, read in _newest_shards(Versions(lake, subset.recipe)).items():
            for asset in read:
                missing.setdefault(lake.path(asset, shard), f"the newest version of {subset.key}")
    for path, needed_by in sorted(missing.items()):
        if not lake.exists(path):
            yield Verified(path, MISSING, f"{needed_by} was made from it or beside it", _RUN)


def _newest_shards(versions: Versions) -> dict[str, dict[str, str]]:
    try:
        newest = versions.current()
    except DamagedError:
        return {}
    return {} if newest is None else newest.lineage["shards"]


def _versions(versions: Versions, *, repair: bool) -> Iterator[Verified]:
    complete, lake = versions.names(), versions.lake
    for name in lake.store.folders(versions.folder):
        folder = f"{versions.folder}/{name}"
        if name.endswith(DAMAGED_SUFFIX):
            yield Verified(folder, SET_ASIDE, "it was damaged", "remove it when you no longer need it")
        no_record = not name.startswith(".") and name not in complete and lake.exists(f"{folder}/subset.npy")
        claims = (CLAIM_SUFFIX, REMOTE_CLAIM)
        if no_record and not any(entry.name.endswith(claims) for entry in lake.store.files(folder)):
            remedy = "clip-select verify --repair sets the folder aside; clip-select run selects the subset again"
            if repair:
                versions.set_aside(name)
                remedy = "the folder was set aside; clip-select run selects the subset again"
            yield Verified(f"{folder}/{RECORD}", MISSING, "a version without a record", remedy)
    for name in complete:
        try:
            version = versions.read(name)
        except DamagedError as error:
            wrong = {f"{versions.folder}/{name}/{RECORD}": _why(error, f"{versions.folder}/{name}/{RECORD}")}
            report: dict[str, str] = {}
        else:
            wrong, report = versions.damage(version), versions.report_damage(version)
            yield from _sound_files(lake, version, wrong)
        newest = name == complete[-1]
        remedy = "clip-select run selects it again" if newest else "clip-select verify --repair sets the version aside"
        if wrong and repair and not newest:
            versions.set_aside(name)
            remedy = "the version was set aside; clip-select run builds the catalog without it"
        for path, why in wrong.items():
            yield Verified(path, MISSING if why == "missing" else DAMAGED, why, remedy)
        for path, why in report.items():
            remedy = "clip-select run writes the report again" if newest else "none; the subset itself is complete"
            yield Verified(path, MISSING if why == "missing" else DAMAGED, why, remedy)


def _sound_files(lake: Lake, version: Version, wrong: dict[str, str]) -> Iterator[Verified]:
    yield Verified(f"{version.folder}/{RECORD}", OK if version.sealed else UNVERIFIED)
    for entry in lake.store.files(version.folder, deep=True):
        name = entry.location.removeprefix(f"{version.folder}/")
        if name not in (RECORD, REMOTE_CLAIM) and not name.startswith("report/") and entry.location not in wrong:
            yield Verified(entry.location, OK if name in version.checksums else UNVERIFIED)


def _why(error: Exception, path: str) -> str:
    """Return a message without the path that it begins with, and without the remedy."""
    return str(error).partition(". Remedy")[0].removeprefix(f"{path}: ").removeprefix("damaged: ")


def _catalog(lake: Lake, path: Path) -> Iterator[Verified]:
    labels = f"{lake.root}/catalog/{TARGETS_FILE}"
    was_built = lake.exists(labels) or path.exists()
    try:
        if was_built:
            verify_targets(lake.store.local(labels))
    except (CatalogError, FileNotFoundError) as error:
        state = DAMAGED if lake.exists(labels) else MISSING
        why = _why(error, labels) if state == DAMAGED else "it is missing"
        yield Verified(labels, state, why, "clip-select run builds the catalog again")
        return
    try:
        read_catalog(path).close()
    except FileNotFoundError:
        if was_built:
            yield Verified(str(path), MISSING, "the catalog was built before", "clip-select run builds it again")
    except CatalogError as error:
        yield Verified(str(path), DAMAGED, _why(error, str(path)), "clip-select run builds it again")
    else:
        yield Verified(str(path), OK)


def _dagster(home: Path) -> Iterator[Verified]:
    damaged = damaged_records(home, thorough=True)
    for path in sorted(home.rglob("*.db")):
        remedy = REMEDY_RECORDS.removeprefix("Remedy: ")
        yield (
            Verified(str(path), DAMAGED, damaged[path], remedy) if path in damaged else Verified(str(path), UNVERIFIED)
        )
    settings = home / "dagster.yaml"
    if not home.exists():
        return
    try:
        content = yaml.safe_load(settings.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield Verified(str(settings), MISSING, "the instance has no settings", "clip-select run writes it again")
    except (ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        yield Verified(str(settings), DAMAGED, f"not YAML: {why}", "remove it; clip-select run writes it again")
    else:
        sound = isinstance(content, dict) and bool(content)
        yield (
            Verified(str(settings), UNVERIFIED)
            if sound
            else Verified(str(settings), DAMAGED, "it holds no settings", "remove it; clip-select run writes it again")
        )
