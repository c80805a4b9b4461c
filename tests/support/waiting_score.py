"""A score that waits in the middle of each shard until a test lets it go on, and a pass over a project that has it.

`python -m tests.support.waiting_score CONFIG [--json]` is `clip-select run` for such a project. Each shard waits for
a byte in the named pipe `go` beside CONFIG.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from assets.base.columns import Column
from assets.base.partitioned import partitioned
from assets.base.results import Result
from assets.base.score_kind import ScoreKind
from assets.base.shard import Shard
from assets.base.standard_checks import rows_aligned
from assets.scores import KINDS
from assets.settings import open_project

PIPE = "go"


@partitioned(
    key="waits",
    deps=["raw_pool"],
    columns=[Column(name="waits", type=pa.float32(), description="Zero.", direction="larger", bounds=(0, 0))],
    checks=[rows_aligned],
    code_version="1",
    group_name="waits",
    kinds={"parquet"},
    description="Zero, after a while.",
)
def waits(shard: Shard) -> Result:
    """Report half of the rows, wait, and report the others."""
    rows = shard.read("raw_pool", ["f0"]).num_rows
    shard.step.progress(rows // 2, shard.name)
    sys.stdout.write("what a library prints\n")
    with open(shard.step.context.config.parent / PIPE, "rb", buffering=0) as pipe:
        pipe.read(1)
    shard.step.progress(rows - rows // 2, shard.name)
    return shard.scores(waits=np.zeros(rows, np.float32))


WAITS = ScoreKind(
    name="waits",
    asset=waits,
    settings=bool,
    default=True,
    configured=lambda settings: settings.scores.waits,
    instances=lambda settings: [{}] if settings.scores.waits else [],
    upstream=lambda settings: (),
    validate=lambda settings: None,
    recorded=lambda settings, wanted: {},
)


def main(config: Path, *options: str) -> int:
    """Run the pass and return the exit status."""
    from rich.console import Console

    from dagster_project import console

    project = open_project(config, (*KINDS, WAITS))
    if "--json" not in options:
        return console.run(project, Console())
    with console.json_document() as document:
        return console.run(project, document, as_json=True)


if __name__ == "__main__":
    from dagster_project.console import leave

    leave(main(Path(sys.argv[1]), *sys.argv[2:]))
