"""A subset's versions: one folder for each materialization, never changed.

Here: paths of versions, writing and reading them. `lineage.json` is written last, so a folder without it is being
written, or was left by a killed run; then its number is used again.

A writer claims a number by renaming a folder to it, which the file system does for one writer only. The folder holds
the claim, an empty file that identifies the writer, until the version is complete. An object store has no rename: there
the claim is an object that is written only if there is none, and stays; the number of a killed run is not used again.

The record has the SHA-256 of every file and a checksum of itself; the report's are in `report/checksums.json`.
"""

import contextlib
import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.hashing import digest, sha256
from core.uids import UID_DTYPE
from resources.lake.files import DAMAGED_SUFFIX, TEMPORARY_SUFFIX, DamagedError, Lake, LakeError
from resources.lake.owners import STRAY_AFTER_SECONDS, create_temporary, is_abandoned, is_ended, token
from resources.storage.stores import Entry

NAME = re.compile(r"^v\d{4,}$")
NUMBERED = re.compile(r"^\.?v(\d{4,})(?:\..+\.damaged)?$")
"""Folders whose numbers are taken: those of versions, and of versions that were set aside."""
ROW_GROUP = 1 << 20
CLAIM_SUFFIX = ".writing"
REMOTE_CLAIM = ".claim"
"""Object of a version in an object store that holds its number."""
RECORD, REPORT_CHECKSUMS = "lineage.json", "report/checksums.json"
_REQUIRED = {"recipe", "rows", "shards", "source", "steps"}


@dataclass(frozen=True)
class Manifest:
    """The selected rows, not read yet.

    Attributes:
        rows: their number.
        reader: opens them, sorted by (f0, f1): uid, f0, f1, shard, key, `step{n}_value` of each ranking, and `copies`
            if rows were sampled.
        ranks: `step{n}_rank` of each ranking, int64, in the same order; masked where a row has none.
        samples: entries of DataComp's array: each row as often as it was sampled.
        tables: opens a table that explains a step, by the name of its file, for steps whose verdict on a row depends
            on other rows.
    """

    rows: int
    reader: Callable[[], pa.RecordBatchReader]
    ranks: Mapping[str, np.ndarray]
    samples: int
    tables: Mapping[str, Callable[[], pa.RecordBatchReader]]


@dataclass(frozen=True)
class Version:
    """A version of a subset.

    Attributes:
        recipe: the recipe's name.
        name: `v0001`, `v0002`, ...
        folder: the folder of manifest.parquet, subset.npy and lineage.json.
        lineage: the lineage record.
    """

    recipe: str
    name: str
    folder: str
    lineage: dict[str, Any]

    @property
    def manifest(self) -> str:
        """Path of the selected rows."""
        return f"{self.folder}/manifest.parquet"

    @property
    def uids(self) -> str:
        """Path of DataComp's `.npy`."""
        return f"{self.folder}/subset.npy"

    @property
    def sealed(self) -> bool:
        """Whether the record has a checksum; records from before checksums have none."""
        return "checksum" in self.lineage

    @property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of the files that have one, by their path in the folder."""
        return {**self.lineage.get("files", {}), **self.lineage.get("checksums", {})}

    @property
    def samples(self) -> int:
        """Entries of DataComp's `.npy`; records from before sampling existed have one for each row."""
        return int(self.lineage.get("samples", self.lineage["rows"]))


class Versions:
    """The versions of one recipe's subset.

    Args:
        lake: the lake.
        recipe: the recipe's name.
    """

    def __init__(self, lake: Lake, recipe: str) -> None:
        self.lake = lake
        self.recipe = recipe
        self.folder = f"{lake.root}/subset/{recipe}"

    def names(self) -> list[str]:
        """List the complete versions, oldest first."""
        if self.lake.is_local:
            return [name for name in self._numbered() if self.lake.exists(self._lineage_path(name))]
        # One listing, and not one request for each version.
        there = {entry.location for entry in self.lake.store.files(self.folder, deep=True)}
        return [name for name in self._numbered() if self._lineage_path(name) in there]

    def newest(self) -> str | None:
        """Return the name of the newest complete version; None before the first."""
        return next((name for name in reversed(self._numbered()) if self.lake.exists(self._lineage_path(name))), None)

    def _numbered(self) -> list[str]:
        """List the folders of versions, also of incomplete ones, by number."""
        found = self.lake.store.folders(self.folder)
        return sorted(filter(NAME.match, found), key=lambda name: int(name[1:]))

    def read(self, name: str) -> Version:
        """Read a version.

        Raises:
            LakeError: there is no such version.
            DamagedError: its record is damaged.
        """
        version = self._read(name)
        if version is None:
            known = ", ".join(self.names()) or "none"
            raise LakeError(f"{self._lineage_path(name)}: recipe {self.recipe} has no version {name}. Known: {known}")
        return version

    def _read(self, name: str) -> Version | None:
        path = self._lineage_path(name)
        try:
            lineage = json.loads(self.lake.store.read(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise _damaged(path, f"not a lineage record ({error})") from error
        if not isinstance(lineage, dict) or not ("checksum" in lineage or lineage.keys() >= _REQUIRED):
            raise _damaged(path, "not a lineage record")
        if lineage.get("checksum", checksum(lineage)) != checksum(lineage):
            raise _damaged(path, "it does not have its checksum")
        return self.of_record(name, lineage)

    def of_record(self, name: str, lineage: dict[str, Any]) -> Version:
        """Return a version by its name and record."""
        return Version(self.recipe, name, f"{self.folder}/{name}", lineage)

    def damage(self, version: Version) -> dict[str, str]:
        """Read a version's files, without its report, and return what is wrong with which path."""
        return self._all_wrong(version, version.checksums)

    def report_damage(self, version: Version) -> dict[str, str]:
        """Read the files of a version's report, and return what is wrong with which path.

        A version from before checksums may have no report, or one without checksums.
        """
        path = f"{version.folder}/{REPORT_CHECKSUMS}"
        if not self.lake.exists(path):
            return {path: "missing"} if version.sealed else {}
        try:
            files = dict(json.loads(self.lake.store.read(path)))
        except (ValueError, TypeError):
            files = {}
        if not files:
            return {path: "not a table of checksums"}
        return self._all_wrong(version, {f"report/{file}": str(sha) for file, sha in files.items()})

    def _all_wrong(self, version: Version, checksums: Mapping[str, str]) -> dict[str, str]:
        """Compare files with their SHA-256; of a remote lake, one listing answers which are there."""
        there = {entry.location: entry for entry in self.lake.store.files(version.folder, deep=True)}
        paths = {f"{version.folder}/{file}": sha for file, sha in checksums.items()}
        found = {path: self._wrong(there.get(path), sha) for path, sha in paths.items()}
        return {path: why for path, why in found.items() if why is not None}

    def _wrong(self, entry: Entry | None, sha: str) -> str | None:
        if entry is None:
            return "missing"
        found = sha256(self.lake.store.local(entry.location, entry))
        return None if found == sha else "it does not have its SHA-256"

    def write_report_checksums(self, version: Version) -> None:
        """Write the SHA-256 of the files of a version's report, which is complete then."""
        folder = f"{version.folder}/report"
        found = {
            entry.location.removeprefix(f"{folder}/"): sha256(self.lake.store.local(entry.location, entry))
            for entry in self.lake.store.files(folder, deep=True)
            if not entry.location.endswith(f"/{REPORT_CHECKSUMS}")
        }
        self.lake.put(f"{version.folder}/{REPORT_CHECKSUMS}", json.dumps(found, indent=1).encode())

    def verified_path(self, version: Version, file: str = "manifest.parquet") -> str:
        """Verify one of a version's files, and return its local path.

        Raises:
            DamagedError: it is missing or damaged.
        """
        path = f"{version.folder}/{file}"
        sha = version.checksums.get(file)
        entry = self.lake.store.stat(path)
        if entry is None:
            raise _damaged(path, "missing")
        why = None if sha is None else self._wrong(entry, sha)
        if why is not None:
            raise _damaged(path, why)
        return str(self.lake.store.local(path, entry))

    def set_damaged_aside(self) -> dict[str, str]:
        """Set the newest versions aside as far as they are damaged: rename `v0003` to `.v0003.<random>.damaged`.

        Returns:
            What was wrong, by path.
        """
        found: dict[str, str] = {}
        while (newest := self.newest()) is not None:
            try:
                wrong = self.damage(self.read(newest))
            except DamagedError as error:
                wrong = {self._lineage_path(newest): str(error).partition(". Remedy")[0].rpartition("damaged: ")[2]}
            if not wrong:
                break
            found |= wrong
            self.set_aside(newest)
        self.lake.damaged.update(found)
        return found

    def set_aside(self, name: str) -> None:
        """Rename a version's folder, so that it is no version any more."""
        aside = f"{self.folder}/.{name}.{token()}{DAMAGED_SUFFIX}"
        self.lake.store.move(f"{self.folder}/{name}", aside)

    def current(self) -> Version | None:
        """Read the newest version, or None before the first."""
        return next((version for name in reversed(self._numbered()) if (version := self._read(name))), None)

    def write(
        self,
        manifest: Manifest,
        lineage: dict[str, Any],
        examine: Callable[[Version], None],
        sets: Mapping[str, pa.Table] | None = None,
    ) -> Version:
        """Write the next version.

        Args:
            manifest: the selected rows.
            lineage: the record; its `version` and `files` (the SHA-256 of the written files) are set here.
            examine: checks the files before the record is written; raises if something is wrong.
            sets: the uids of each recipe and uid list that was read, by name: columns f0 and f1.
        """
        name = self._claim()
        try:
            return self._write(name, manifest, lineage, examine, sets)
        except BaseException:
            self._remove_folder(name)
            raise

    def _write(
        self,
        name: str,
        manifest: Manifest,
        lineage: dict[str, Any],
        examine: Callable[[Version], None],
        sets: Mapping[str, pa.Table] | None,
    ) -> Version:
        version = self.of_record(name, {**lineage, "version": name})
        with self.lake.replacing(version.manifest) as path, self.lake.replacing(version.uids) as uids_path:
            version.lineage["files"] = write_selection(manifest, path, uids_path)
        for other, listed in (sets or {}).items():
            with self.lake.replacing(f"{version.folder}/{set_file(other)}") as path:
                pq.write_table(listed, path, compression="zstd", row_group_size=ROW_GROUP)
        for file, table in manifest.tables.items():
            with (
                self.lake.replacing(f"{version.folder}/{file}") as path,
                table() as reader,
                pq.ParquetWriter(path, reader.schema, compression="zstd") as writer,
            ):
                for rows in _in_row_groups(reader):
                    writer.write_table(rows, row_group_size=ROW_GROUP)
        version.lineage["checksums"] = {
            file: self._sha256(f"{version.folder}/{file}") for file in (*map(set_file, sets or {}), *manifest.tables)
        }
        version.lineage["checksum"] = checksum(version.lineage)
        examine(version)
        self.lake.put(self._lineage_path(name), json.dumps(version.lineage, indent=1, sort_keys=True).encode())
        if self.lake.is_local:
            for claim in Path(version.folder).glob(f".*{CLAIM_SUFFIX}"):
                claim.unlink(missing_ok=True)
        return version

    def _claim(self) -> str:
        """Return the next free number, now taken by this writer."""
        folder = Path(self.folder)
        if not self.lake.is_local:
            return self._claim_remote()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".claims.lock", "w") as lock:
            # Only against clearing a folder that another writer has just claimed again; the rename decides on numbers.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._clear_abandoned(folder)
            mine = create_temporary(folder, ".", TEMPORARY_SUFFIX, is_folder=True)
            create_temporary(mine, ".", CLAIM_SUFFIX)
            taken = (NUMBERED.match(path.name) for path in folder.iterdir())
            number = max((int(found[1]) for found in taken if found is not None), default=0)
            while True:
                number += 1
                with contextlib.suppress(OSError):
                    mine.rename(folder / f"v{number:04d}")
                    return f"v{number:04d}"
                if not mine.exists() or not (folder / f"v{number:04d}").exists():
                    raise LakeError(f"{folder}: no version can be written here. Remedy: make the folder writable")

    def _claim_remote(self) -> str:
        """Take the next number by writing its claim if there is none; the claim stays, so that it is taken once."""
        self._clear_abandoned_remote()
        taken = (NUMBERED.match(name) for name in self.lake.store.folders(self.folder))
        number = max((int(found[1]) for found in taken if found is not None), default=0)
        while True:
            number += 1
            name = f"v{number:04d}"
            if self.lake.store.put_if_absent(f"{self.folder}/{name}/{REMOTE_CLAIM}", token().encode()):
                return name

    def _clear_abandoned_remote(self) -> None:
        """Remove the files of versions whose writer was killed, but not their claims."""
        store = self.lake.store
        for name in set(self._numbered()) - set(self.names()):
            there = {entry.name: entry for entry in store.files(f"{self.folder}/{name}", deep=True)}
            claim = there.pop(REMOTE_CLAIM, None)
            if claim is None or not there:
                continue
            is_old = time.time() - claim.modified > STRAY_AFTER_SECONDS
            if is_old or is_ended(store.read(claim.location).decode()):
                for entry in there.values():
                    store.delete(entry.location)

    def _clear_abandoned(self, folder: Path) -> None:
        """Remove folders whose writer was killed; one without a claim is from before claims, and stays for a day."""
        for path in folder.iterdir():
            if path.is_dir() and path.name.endswith(TEMPORARY_SUFFIX):
                abandoned = is_abandoned(path, path.name[1:].removesuffix(TEMPORARY_SUFFIX))
            elif NAME.match(path.name) and not (path / "lineage.json").exists():
                claims = [claim.name[1:].removesuffix(CLAIM_SUFFIX) for claim in path.glob(f".*{CLAIM_SUFFIX}")]
                abandoned = is_abandoned(path, claims[0] if claims else "")
            else:
                continue
            if abandoned:
                shutil.rmtree(path, ignore_errors=True)

    def _remove_folder(self, name: str) -> None:
        self.lake.store.delete_folder(f"{self.folder}/{name}")

    def remove(self, name: str) -> None:
        """Remove a version that is not the newest. Its record goes first, so an interrupted removal leaves no version.

        Raises:
            LakeError: it is the newest, whose number the next one follows.
        """
        if name == self.newest():
            raise LakeError(f"{self.folder}/{name}: the newest version stays. Remedy: choose an older one")
        self.lake.store.delete(self._lineage_path(name))
        self.lake.store.delete_folder(f"{self.folder}/{name}")

    def read_uids(
        self, version: Version, file: str = "manifest.parquet", *, columns: Sequence[str] = ("f0", "f1")
    ) -> pa.Table:
        """Read columns of a version's manifest, or of the uids of a set that it read (`set_file`).

        Raises:
            DamagedError: the file is missing or damaged.
        """
        with pq.ParquetFile(self.verified_path(version, file)) as opened:
            return opened.read(columns=list(columns))

    def _sha256(self, path: str) -> str:
        return sha256(self.lake.store.local(path))

    def _lineage_path(self, name: str) -> str:
        return f"{self.folder}/{name}/{RECORD}"


def _damaged(path: str, why: str) -> DamagedError:
    return DamagedError(
        f"{path}: damaged: {why}. Remedy: clip-select run selects the newest version again; clip-select verify "
        "--repair sets an older one aside"
    )


def checksum(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a lineage record without its `checksum`."""
    return digest(json.loads(json.dumps({name: value for name, value in record.items() if name != "checksum"})))


def set_file(name: str) -> str:
    """Return the name of a version's file with the uids of a recipe or uid list that it read."""
    return f"sets/{quote(name, safe='')}.parquet"


def step_file(number: int, kind: str) -> str:
    """Return the name of a version's file that explains a step whose verdict on a row depends on other rows."""
    return f"steps/{number}_{kind}.parquet"


def write_selection(manifest: Manifest, path: Path, uids_path: Path) -> dict[str, str]:
    """Write a manifest and DataComp's array. The same rows give the same bytes.

    One row group is written at a time; memory holds two numbers and the ranks of each row.

    Args:
        manifest: the selected rows.
        path: the manifest's path.
        uids_path: the array's path: dtype `u8,u8`, sorted by (f0, f1), each uid as often as it was sampled.

    Returns:
        The SHA-256 of both files by name.
    """
    uids = np.empty(manifest.samples, dtype=UID_DTYPE)
    with manifest.reader() as reader:
        schema = reader.schema
        for name in manifest.ranks:
            value = schema.get_field_index(name.replace("rank", "value"))
            schema = schema.insert(value + 1, pa.field(name, pa.int64()))
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=["shard"]) as writer:
            done = filled = 0
            for rows in _in_row_groups(reader):
                group = slice(done, done := done + rows.num_rows)
                for name, ranks in manifest.ranks.items():
                    values, absent = np.ma.getdata(ranks[group]), np.ma.getmaskarray(ranks[group])
                    rows = rows.append_column(name, pa.array(values, mask=absent))
                writer.write_table(rows.select(schema.names), row_group_size=ROW_GROUP)
                f0, f1 = rows["f0"].to_numpy(), rows["f1"].to_numpy()
                if "copies" in schema.names:
                    copies = rows["copies"].to_numpy()
                    f0, f1 = np.repeat(f0, copies), np.repeat(f1, copies)
                samples = slice(filled, filled := filled + len(f0))
                uids["f0"][samples], uids["f1"][samples] = f0, f1
    with open(uids_path, "wb") as file:
        np.save(file, uids, allow_pickle=False)
    return {"manifest.parquet": sha256(path), "subset.npy": sha256(uids_path)}


def _in_row_groups(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yield the rows in tables of ROW_GROUP rows, whatever the size of the reader's batches."""
    waiting: list[pa.RecordBatch] = []
    for batch in reader:
        waiting.append(batch)
        while sum(len(part) for part in waiting) >= ROW_GROUP:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, ROW_GROUP).combine_chunks()
            waiting = table.slice(ROW_GROUP).to_batches()
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks()
