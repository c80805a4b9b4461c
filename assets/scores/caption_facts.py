"""`captions/facts`: what DataComp's baseline filters (arXiv 2304.14108) ask of a caption: language, words, length."""

from typing import Any

import pyarrow as pa

from assets.base.partitioned import Result, ShardAsset, each, input_fingerprint, sharded_asset
from assets.base.score_tables import IDENTITY
from assets.project import Project
from resources.inputs.languages import Languages
from resources.inputs.wordnet import WordNet, digest, existing, read_synsets
from resources.lake.files import Provenance

CODE_VERSION = "1"
KEY = "captions/facts"
COLUMNS = {"language": pa.string(), "words": pa.int32(), "characters": pa.int32()}
OF_SYNSETS = {"names_synset": pa.bool_()}


def captions(project: Project) -> ShardAsset:
    """Make the asset `captions/facts`."""
    settings = project.settings.scores.captions
    assert settings is not None
    languages = Languages(settings.language_model)
    wordnet = None if settings.wordnet is None else WordNet(settings.wordnet)
    told = COLUMNS if wordnet is None else COLUMNS | OF_SYNSETS
    schema = pa.schema([*IDENTITY, *(pa.field(name, kind, nullable=False) for name, kind in told.items())])

    def provenance(shard: str) -> Provenance:
        parameters = {"language_model": languages.digest()}
        if wordnet is not None and settings.synsets is not None:
            parameters["wordnet"] = digest(wordnet.files)
            parameters["synsets"] = digest([existing(settings.synsets)])
        return Provenance(
            KEY, shard, CODE_VERSION, parameters, {"raw_pool": input_fingerprint(project, "raw_pool", shard)}
        )

    def facts(shard: str) -> Result:
        pool = project.lake.read("raw_pool", shard, ["shard", "f0", "f1", "caption"])
        texts = pool["caption"].to_pylist()
        found: dict[str, list[Any]] = {
            "language": languages.identify(texts),
            "words": [len(text.split()) for text in texts],
            "characters": [len(text) for text in texts],
        }
        if wordnet is not None and settings.synsets is not None:
            wanted = read_synsets(settings.synsets)
            found["names_synset"] = [
                any(wordnet.first_synset(word) in wanted for word in text.split()) for text in texts
            ]
        columns = [pool[field.name] for field in IDENTITY]
        columns += [pa.chunked_array([pa.array(found[name], kind)]) for name, kind in told.items()]
        project.on_progress(KEY, shard, len(texts))
        english = sum(language == "en" for language in found["language"])
        figures = {"english": english, "languages": len(set(found["language"]))}
        return Result(pa.table(columns, schema=schema), figures)

    return sharded_asset(
        project,
        key=KEY,
        deps=("raw_pool",),
        provenance=provenance,
        compute=each(facts),
        code_version=CODE_VERSION,
        group="captions",
        kinds={"parquet"},
        description="Each caption's language (fastText), words (between white space) and characters, for DataComp's "
        "baseline filters"
        + ("; and whether a word of it names one of the synsets asked for." if wordnet is not None else "."),
        columns=schema,
    )
