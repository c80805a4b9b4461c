"""`caption_length/<name>`: the length of each caption, up to a limit. The example of docs/extending.md."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from assets.base.asset import Declared
from assets.base.columns import Column
from assets.base.context import Context
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind, recorded_entries
from assets.base.settings import Name, ProjectSettings
from assets.base.shard import Shard
from assets.base.standard_checks import rows_aligned, within_bounds
from resources.settings import Settings


class CaptionLengthSettings(Settings):
    """How long a caption is long enough.

    Attributes:
        limit: characters from which longer captions are not better.
    """

    limit: int = Field(default=100, ge=1)


def configured(settings: ProjectSettings) -> Mapping[str, CaptionLengthSettings]:
    """Return the settings by name."""
    found: Mapping[str, CaptionLengthSettings] = settings.scores.caption_length
    return found


def _parameters(context: Context, asset: Declared) -> Mapping[str, Any]:
    return {"limit": configured(asset.settings)[asset.names["name"]].limit}


@partitioned(
    key="caption_length/{name}",
    deps=["raw_pool"],
    columns=[
        Column(
            name="caption_length",
            type=pa.float32(),
            description="Characters of the caption over the limit, at most 1.",
            direction="larger",
            bounds=(0, 1),
        )
    ],
    checks=[rows_aligned, within_bounds],
    code_version="1",
    group_name="captions",
    kinds={"parquet"},
    description="Length of each caption as a fraction of the limit of `{name}`, at most 1.",
    parameters=_parameters,
)
def caption_length(shard: Shard) -> Result:
    """Compute the caption lengths of one shard."""
    limit = configured(shard.step.context.settings)[shard.step.names["name"]].limit
    captions = shard.read("raw_pool", ["caption"])["caption"].to_pylist()
    lengths = np.array([min(len(caption), limit) / limit for caption in captions], np.float32)
    shard.step.progress(len(captions), shard.name)
    return shard.scores(caption_length=lengths)


CAPTION_LENGTH = ScoreKind(
    name="caption_length",
    asset=caption_length,
    settings=dict[Name, CaptionLengthSettings],
    default={},
    configured=configured,
    instances=lambda settings: [{"name": name} for name in configured(settings)],
    upstream=lambda settings: (),
    validate=lambda settings: None,
    recorded=lambda settings, wanted: recorded_entries(
        "caption_length", configured(settings), wanted, lambda name: [f"caption_length/{name}"]
    ),
)
