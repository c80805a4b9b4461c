"""`sieve/<captioner>/<text_encoder>`: how near each caption is to what a captioner says of its image."""

import numpy as np
import pyarrow as pa

from assets.base.partitioned import NotReady, Result, ShardAsset, each, input_fingerprint, sharded_asset
from assets.base.score_tables import IDENTITY, figures
from assets.project import Project
from resources.lake.files import Provenance

CODE_VERSION = "1"
ROWS_AT_ONCE = 4096
SCHEMA = pa.schema(
    [
        *IDENTITY,
        pa.field("sieve", pa.float32(), nullable=True),
        pa.field("sieve_caption", pa.string(), nullable=True),
    ]
)


def sieve(project: Project, text_encoder: str, captions: ShardAsset) -> ShardAsset:
    """Make the asset `sieve/<captioner>/<text_encoder>`; `captions` is the captioner's `captions/<captioner>`."""
    captioner = captions.key.removeprefix("captions/")
    key = f"sieve/{captioner}/{text_encoder}"

    def provenance(shard: str) -> Provenance:
        if not captions.is_fresh(project, shard):
            raise NotReady(f"{captions.key} of shard {shard} is not there yet, or out of date. Remedy: materialize it")
        inputs = {name: input_fingerprint(project, name, shard) for name in ("raw_pool", captions.key)}
        parameters = {"text_encoder": project.text_encoder(text_encoder).identity()}
        return Provenance(key, shard, CODE_VERSION, parameters, inputs)

    def score(shard: str) -> Result:
        pool = project.lake.read("raw_pool", shard, ["f0", "f1", "caption"])
        said = project.lake.read(captions.key, shard, ["captions"])["captions"]
        described = np.flatnonzero(said.is_valid())
        values = np.full(pool.num_rows, np.nan, np.float32)
        best: list[str | None] = [None] * pool.num_rows
        for start in range(0, len(described), ROWS_AT_ONCE):
            rows = described[start : start + ROWS_AT_ONCE]
            spoken = said.take(pa.array(rows)).to_pylist()
            values[rows], chosen = _scores(
                project, text_encoder, pool["caption"].take(pa.array(rows)).to_pylist(), spoken
            )
            for row, captions_of_row, place in zip(rows.tolist(), spoken, chosen.tolist(), strict=True):
                best[row] = captions_of_row[place]
            project.on_progress(key, shard, len(rows))
        table = pa.table(
            [
                pa.array([shard] * pool.num_rows, pa.string()),
                pool["f0"],
                pool["f1"],
                pa.array(values, from_pandas=True),
                pa.array(best, pa.string()),
            ],
            schema=SCHEMA,
        )
        return Result(table, {"described": len(described), **figures("sieve", values[described])})

    return sharded_asset(
        project,
        key=key,
        deps=("raw_pool", captions.key),
        provenance=provenance,
        compute=each(score),
        code_version=CODE_VERSION,
        group="sieve",
        kinds={"pytorch", "parquet"},
        description=f"SIEVE by captioner `{captioner}` and text encoder `{text_encoder}`: the largest cosine of the "
        "caption and what was said of the image, with the medium masked in both, and what was said. NULL where nothing "
        "was said. Larger is better.",
        columns=SCHEMA,
        pool="gpu",
    )


def _scores(
    project: Project, text_encoder: str, alts: list[str], spoken: list[list[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Give SIEVE of some rows and the place of each one's best caption; equal texts are embedded once."""
    from selection.scores.sieve import mask, sieve

    texts = [[mask(alt), *(mask(caption) for caption in said)] for alt, said in zip(alts, spoken, strict=True)]
    places = {text: place for place, text in enumerate(dict.fromkeys(text for row in texts for text in row))}
    vectors = project.text_encoder(text_encoder).encode(list(places))
    found = np.array([[places[text] for text in row] for row in texts])
    empty = np.array([[not text for text in row] for row in texts])
    return sieve(vectors[found[:, 0]], vectors[found[:, 1:]], empty[:, 0], empty[:, 1:])
