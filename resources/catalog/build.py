"""Building the catalog, one DuckDB file of views and macros over the lake's files, and opening it.

The catalog stores no data: the files are the truth, and views see files that arrive later. `explain` alone shows the
versions that existed when the catalog was built, because a step's predicate is part of the macro's text.

The file is built under a temporary name and swapped in, and it is only opened read-only: DuckDB allows one writing
process and then no readers.

Views (`views.py`): pool, rejects, shards, scores, pool_scores, targets, one for each score asset under its key,
subsets, subset_members, subset_shards, lineage_records, funnel, step_reports, evaluations, evaluation_curves. Macros:
explain(uid) (`explain.py`);
versions, lineage, diff and overlap (`history.py`); score_asset and uid_word, which these use.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from core import sql
from core.errors import UserError
from resources.catalog.explain import explain_macro
from resources.catalog.history import history_macros
from resources.catalog.remote_files import remote_files
from resources.catalog.scores import Scores, score_asset_macro
from resources.catalog.views import Place, catalog_views, moved
from resources.lake.files import Lake
from resources.lake.sealed import mapped
from resources.lake.versions import Versions
from resources.pools.groups import FOLDER
from resources.storage.checksums import ChecksumError, seal

_TARGETS = pa.schema(
    [
        ("target_index", pa.int64()),
        ("label", pa.string()),
        ("name", pa.string()),
        ("asset", pa.string()),
    ]
)


_REMOTE_ROOT = "catalog_remote_root"
"""Macro of the catalog of a remote lake."""
TARGETS_FILE = "targets.parquet"
"""The labels of targets, in the folder `catalog`."""


def build_catalog(
    lake: Lake,
    path: Path,
    *,
    scores: Scores,
    targets: Sequence[str],
    recipes: Sequence[str],
) -> None:
    """Build the catalog beside the old one and swap it in; processes that read the old one are not disturbed.

    Writes the targets' labels to `<lake>/catalog/` as well, because DuckDB cannot read Arrow files; and, of a remote
    lake, a catalog for other clients (`remote_catalog`).

    Args:
        lake: the lake; files may be missing, and may arrive later.
        path: where to write the catalog, ending in .duckdb.
        scores: the score assets.
        targets: keys of the target embeddings, such as `target_embeddings/b32/imagenet`.
        recipes: recipes that `explain` covers, as far as they have a version.
    """
    _write_targets(lake, targets)
    newest = [Versions(lake, recipe).current() for recipe in recipes]
    records = [version.lineage for version in newest if version is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with Lake(str(path.parent)).replacing(str(path.absolute())) as temporary:
        temporary.unlink()  # DuckDB refuses an empty file
        _write(temporary, lake, Place(lake.root, path), records, scores)
    if not lake.is_local:
        with lake.replacing(remote_catalog(lake.root)) as temporary:
            _write(temporary, lake, Place(lake.root, None), records, scores)


def remote_catalog(root: str) -> str:
    """Return the URL of the catalog that other clients of a remote lake read, `<root>/catalog.duckdb`."""
    return f"{root}/catalog.duckdb"


def _write(path: Path, lake: Lake, place: Place, records: Sequence[Mapping[str, Any]], scores: Scores) -> None:
    with duckdb.connect(str(path)) as con:
        if not lake.is_local:
            con.register_filesystem(remote_files(lake.root))
            con.execute(f"CREATE MACRO {_REMOTE_ROOT}() AS {sql.text(lake.root)}").fetchall()
        for name, query in catalog_views(place, scores, grouped=_has_groups(lake)).items():
            con.execute(f"CREATE VIEW {sql.quoted(name)} AS {query}").fetchall()
        con.execute(f"CREATE MACRO catalog_place() AS {sql.text(place.listed)}").fetchall()
        for macro in (
            score_asset_macro(scores),
            *history_macros(lake.root),
            explain_macro(con, place, records, scores),
        ):
            con.execute(macro).fetchall()


class CatalogError(UserError):
    """The catalog can't answer; the message has the remedy."""


def _has_groups(lake: Lake) -> bool:
    return any(entry.name.endswith(".json") for entry in lake.store.files(f"{lake.root}/{FOLDER}"))


def read_catalog(path: Path) -> duckdb.DuckDBPyConnection:
    """Open a catalog read-only, as any number of processes may at once.

    A process that has the catalog open gets the same file again, even after a newer one was swapped in: close the old
    connection first.

    Raises:
        FileNotFoundError: there is none.
        CatalogError: it is damaged, or its lake was moved or copied.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no catalog. Remedy: clip-select run, or materialize the asset catalog."
        )
    try:
        con = duckdb.connect(str(path), read_only=True)
        try:
            ((built_as,),) = con.execute("SELECT catalog_place()").fetchall()
        except duckdb.Error:
            con.close()
            raise
        remote = _remote_root(con)
        if remote is not None:
            con.register_filesystem(remote_files(remote))
    except duckdb.CatalogException as error:
        raise CatalogError(f"{path}: an earlier version built this catalog. Remedy: clip-select run") from error
    except duckdb.Error as error:
        why = str(error).splitlines()[0]
        raise CatalogError(f"{path}: damaged: {why}. Remedy: clip-select run builds the catalog again") from error
    if not os.path.exists(built_as) or not os.path.samefile(built_as, path):
        con.close()
        raise CatalogError(f"{path}: {moved(built_as)}")
    try:
        verify_targets(targets_path(path) if remote is None else _remote_targets(remote))
    except CatalogError:
        con.close()
        raise
    return con


def _remote_root(con: duckdb.DuckDBPyConnection) -> str | None:
    """Return the URL of the lake that a catalog reads; None for a local one."""
    query = f"SELECT count(*) FROM duckdb_functions() WHERE function_name = '{_REMOTE_ROOT}'"
    if sql.one(con, query) == (0,):
        return None
    return str(sql.one(con, f"SELECT {_REMOTE_ROOT}()")[0])


def _remote_targets(root: str) -> Path:
    location = f"{root}/catalog/{TARGETS_FILE}"
    try:
        return Lake(root).store.local(location)
    except FileNotFoundError as error:
        raise CatalogError(f"{location}: it is missing. Remedy: clip-select run builds the catalog again") from error


def targets_path(catalog: Path) -> Path:
    """Return the path of the targets' labels that belong to a catalog."""
    return catalog.with_suffix("") / TARGETS_FILE


def verify_targets(path: Path) -> None:
    """Verify the targets' labels.

    Raises:
        CatalogError: they are missing or damaged.
    """
    try:
        mapped(path)[1].verify()
    except (OSError, ChecksumError) as error:
        why = "it is missing" if isinstance(error, FileNotFoundError) else f"damaged: {error}"
        raise CatalogError(f"{path}: {why}. Remedy: clip-select run builds the catalog again") from error


def _write_targets(lake: Lake, targets: Sequence[str]) -> None:
    tables = [_TARGETS.empty_table()]
    for asset in targets:
        if lake.exists(lake.path(asset)):
            labels = lake.read(asset, columns=["target_index", "label", "name"])
            labels = labels.append_column("asset", pa.array([asset] * len(labels), pa.string()))
            tables.append(labels.cast(_TARGETS))
    with lake.replacing(f"{lake.root}/catalog/{TARGETS_FILE}") as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
        seal(temporary)
