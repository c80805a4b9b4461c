"""Results of checks that ran after their file was written: `checks/<asset>[/<shard>]/<check>.json` in the lake.

Here: writing and reading them. The results of the checks that run before a file is written are in the file's own
summary (`resources.lake.files`). A record holds the fingerprint of the file that was checked, so that it says nothing
about another file that took its place.
"""

import json
from collections.abc import Mapping
from typing import Any

from resources.lake.files import Lake, LakeError, Stored


def write_check(lake: Lake, stored: Stored, check: str, finding: Mapping[str, Any]) -> None:
    """Write the result of a check of a stored file, in place of an earlier one.

    Args:
        lake: the lake.
        stored: the file's record.
        check: name of the check.
        finding: its result, JSON values.
    """
    record = {"fingerprint": stored.fingerprint, "finding": dict(finding)}
    folder = _folder(lake, stored.provenance.asset, stored.provenance.shard)
    lake.put(f"{folder}/{check}.json", json.dumps(record, indent=1, sort_keys=True).encode())


def read_checks(lake: Lake, stored: Stored) -> dict[str, Any]:
    """Return the results that were written about a stored file as it is now, by the check's name.

    Raises:
        LakeError: a record can't be read.
    """
    folder = _folder(lake, stored.provenance.asset, stored.provenance.shard)
    found = {}
    for path in (entry.location for entry in lake.store.files(folder)):
        file, _, suffix = path.rsplit("/", 1)[-1].rpartition(".")
        if suffix != "json" or file.startswith("."):
            continue
        try:
            record = json.loads(lake.store.read(path))
            if record["fingerprint"] == stored.fingerprint:
                found[file] = record["finding"]
        except (KeyError, TypeError, ValueError) as error:
            raise LakeError(f"{path}: not the result of a check ({error!r}). Remedy: remove it") from error
    return found


def remove_checks(lake: Lake, asset: str, shard: str) -> None:
    """Remove the results about a shard's file."""
    lake.store.delete_folder(_folder(lake, asset, shard))


def has_checks(lake: Lake, asset: str) -> bool:
    """Check whether anything was written about an asset, so that its shards need not be asked one by one."""
    folder = f"{lake.root}/checks/{asset}"
    return bool(lake.store.folders(folder) or lake.store.files(folder))


def _folder(lake: Lake, asset: str, shard: str | None) -> str:
    return f"{lake.root}/checks/{asset}" if shard is None else f"{lake.root}/checks/{asset}/{shard}"
