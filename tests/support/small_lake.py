"""A lake of handwritten files: rows, scores, targets and subset versions, without Dagster or an encoder.

Here: the lake, filling it and querying it. Not here: projects that run assets (`tests.support.scenario`).
"""

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assets.subsets.lineage import recorded_steps
from assets.subsets.subset import manifest
from core.uids import format_uids
from resources.catalog.build import build_catalog, read_catalog
from resources.catalog.scores import CatalogColumn, CatalogScore
from resources.catalog.views import POOL_COLUMNS
from resources.lake.files import Lake, Provenance, vectors_to_column
from resources.lake.pool_scores import mark_sets, source_relation
from resources.lake.versions import set_file, write_selection
from selection.recipes.execute import select, set_column
from selection.recipes.recipe import Recipe, set_kind

CLIP, NEAR = "clip_score/b32", "norm_sim_inf/b32/flowers"


CLIP_SCORE = CatalogScore("clip_score/b32", (CatalogColumn("clip_score", CLIP),))
NORM_SIM = CatalogScore(
    "norm_sim/b32/flowers",
    (
        CatalogColumn("norm_sim_2", "norm_sim_2/b32/flowers"),
        CatalogColumn("norm_sim_inf", NEAR),
        CatalogColumn("nearest_target", "nearest_target/b32/flowers", "BIGINT"),
    ),
    nearest_target="nearest_target/b32/flowers",
    targets="target_embeddings/b32/flowers",
)
SCORES = (CLIP_SCORE, NORM_SIM)


TARGETS = ["target_embeddings/b32/flowers"]


RECIPES = {
    "wide": {"steps": [{"where": "width >= 202"}, {"keep_top": {"score": CLIP, "fraction": 0.5}}]},
    "narrow": {"from": "wide", "steps": [{"keep_top": {"score": NEAR, "count": 4}}]},
    "listed": {
        "from": "list.npy",
        "steps": [{"keep_top": {"score": NEAR, "threshold": 0.5}}, {"where": "caption LIKE '%1%'"}],
    },
}


COLUMNS = {"clip": CLIP, "near": NEAR}


LABELS = ["daisy", "rose", "tulip"]


class SmallLake:
    """A lake with raw pool rows, two scores of them, targets and subset versions.

    Attributes:
        root: the lake's folder.
        lake: the lake.
        rows: by shard, the rows as dicts, with their scores by score name.
        catalog: where `build` writes the catalog.
    """

    def __init__(self, root):
        self.root, self.lake, self.rows = root, Lake(str(root)), {}
        self.catalog = root / "catalog.duckdb"

    def write(self, asset, shard, columns):
        """Write one file of an asset."""
        self.lake.write(pa.table(columns), Provenance(asset, shard, "1"))

    def add_shard(self, shard, f0s, *, f1s=None, scored=True, **changed):
        """Write a shard.

        Args:
            shard: its name.
            f0s: first halves of its uids.
            f1s: second halves; 2⁶⁴ − 1 − f0 by default.
            scored: write its scores too.
            changed: for `clip` or `near`, a function from f0 to the score.
        """
        f1s = f1s or [2**64 - 1 - f0 for f0 in f0s]
        rows = [
            {
                "f0": f0,
                "f1": f1,
                "shard": shard,
                "key": f"{shard}{i:04d}",
                "source_row": i,
                "width": 200 + (f0 + int(shard)) % 7,
                "caption": f"picture {f0 % 13}",
                CLIP: float(np.float32((f0 % 5) / 10)),
                NEAR: float(np.float32((f0 % 3) / 3 + 0.1)),
                "nearest": f0 % 3,
            }
            for i, (f0, f1) in enumerate(zip(f0s, f1s, strict=True))
        ]
        self.rows[shard] = [
            {**row, **{COLUMNS[name]: float(np.float32(value(row["f0"]))) for name, value in changed.items()}}
            for row in rows
        ]
        n = len(rows)

        def column(name, kind):
            return pa.array([row[name] for row in self.rows[shard]], type=kind)

        identity = {"f0": column("f0", pa.uint64()), "f1": column("f1", pa.uint64())}
        nulls = {
            "url": pa.string(),
            "height": pa.int32(),
            "original_width": pa.int32(),
            "original_height": pa.int32(),
            "image_format": pa.string(),
            "sha256": pa.string(),
            "image_offset": pa.int64(),
            "image_size": pa.int64(),
            "clip_b32_similarity_score": pa.float32(),
            "clip_l14_similarity_score": pa.float32(),
        }
        table = {
            "uid": format_uids(identity["f0"].to_numpy(), identity["f1"].to_numpy()),
            **identity,
            "shard": [shard] * n,
            "key": column("key", pa.string()),
            "source_row": column("source_row", pa.int64()),
            "caption": column("caption", pa.string()),
            "width": column("width", pa.int32()),
            "caption_repaired": [False] * n,
            **{name: pa.nulls(n, kind) for name, kind in nulls.items()},
        }
        self.write("raw_pool", shard, {name: table[name] for name in POOL_COLUMNS})
        rejected = {"shard": [shard], "key": [f"{shard}9999"], "source_row": pa.array([n], pa.int64())}
        self.write("rejects", shard, {**rejected, "reason": ["broken image"], "detail": ["cut off"]})
        if scored:
            row = {"shard": [shard] * n, **identity}
            self.write("clip_score/b32", shard, {**row, "clip_score": column(CLIP, pa.float32())})
            values = {
                "norm_sim_2": column(NEAR, pa.float32()),
                "norm_sim_inf": column(NEAR, pa.float32()),
                "nearest_target": column("nearest", pa.int64()),
            }
            self.write("norm_sim/b32/flowers", shard, {**row, **values})

    def add_targets(self):
        """Write three target embeddings."""
        table = {
            "target_index": pa.array([0, 1, 2], pa.int64()),
            "label": LABELS,
            "name": [f"{label}/000.jpg" for label in LABELS],
            "image": vectors_to_column(np.ones((3, 4), dtype=np.float16)),
        }
        self.lake.write(pa.table(table), Provenance(TARGETS[0], None, "1"))

    def add_version(self, name, number, *, listed=None, recipe=None, missing=(), made_again=()):
        """Select a subset, write it as a version and return its (f0, f1).

        Args:
            name: the recipe's name.
            number: the version's number.
            listed: uid arrays by the file names that the recipe uses.
            recipe: the recipe; that of `RECIPES` by default.
            missing: shards that the version leaves out.
            made_again: files as (shard, asset) whose fingerprint differs from other versions'.
        """
        recipe, version = Recipe.model_validate(recipe or RECIPES[name]), f"v{number:04d}"
        used = [shard for shard in self.rows if shard not in missing]
        folder = self.root / "subset" / name / version
        folder.mkdir(parents=True)
        with duckdb.connect() as con:
            sets = {}
            for other in recipe.sets:
                if set_kind(other) == "recipe":
                    newest = max(p.name for p in (self.root / "subset" / other).iterdir())
                    before = self.root / "subset" / other / newest / "manifest.parquet"
                    uids = pq.read_table(before, columns=["f0", "f1"])
                    sets[other] = {"kind": "recipe", "name": other, "version": newest, "file": set_file(other)}
                else:
                    uids = pa.table({name: listed[other][name].copy() for name in ("f0", "f1")})
                    sets[other] = {"kind": "uids", "name": other, "file": set_file(other)}
                (folder / "sets").mkdir(exist_ok=True)
                pq.write_table(uids, folder / set_file(other))
                con.from_arrow(uids).create(f'"uids of {other}"')

            def files(asset):
                return {shard: Path(self.lake.path(asset, shard)) for shard in used}

            made = source_relation(
                con,
                "source",
                raw_pool=list(files("raw_pool").items()),
                scores={
                    CLIP: ("clip_score", files("clip_score/b32")),
                    NEAR: ("norm_sim_inf", files("norm_sim/b32/flowers")),
                },
                pool_columns=recipe.columns().pool,
            )
            mark_sets(con, "source", {set_column(other): f"uids of {other}" for other in sets})
            selection = select(con, name, recipe)
            written = manifest(selection)
            write_selection(written, folder / "manifest.parquet", folder / "subset.npy")
            for file, table in written.tables.items():
                (folder / file).parent.mkdir(exist_ok=True)
                with table() as reader:
                    pq.write_table(reader.read_all(), folder / file)
            members = selection.subset().tolist()
            scores = {"clip_score/b32", "norm_sim/b32/flowers"} & {
                score.replace("norm_sim_inf", "norm_sim") for score in recipe.columns().scores
            }
            read = {"raw_pool": "fp", **dict.fromkeys(sorted(scores), "fq")}
            record = {
                "format": 3,
                "recipe": name,
                "version": version,
                "created": f"2026-01-{number:02d}T00:00:00Z",
                "definition": recipe.definition(),
                "source": {
                    **sets.pop(recipe.source, {"kind": "pool", "name": "pool"}),
                    "rows": selection.source_rows,
                    "duplicates": made.duplicates,
                },
                "sets": sets,
                "steps": recorded_steps(selection),
                "rows": selection.rows,
                "samples": selection.samples,
                "shards": {
                    shard: {
                        asset: f"{fingerprint}{number}" if (shard, asset) in made_again else fingerprint
                        for asset, fingerprint in read.items()
                    }
                    for shard in used
                },
                "shards_missing": dict.fromkeys([*missing, "00007"], "not scored"),
            }
        (folder / "lineage.json").write_text(json.dumps(record))
        return members

    def build(self, recipes=tuple(RECIPES)):
        """Build the catalog and return a read-only connection to it."""
        build_catalog(Lake(str(self.root)), self.catalog, scores=SCORES, targets=TARGETS, recipes=recipes)
        return read_catalog(self.catalog)


def fetch(con, sql, *parameters):
    """Run a query and return its rows as dicts."""
    relation = con.execute(sql, list(parameters))
    names = [column[0] for column in relation.description]
    return [dict(zip(names, row, strict=True)) for row in relation.fetchall()]
