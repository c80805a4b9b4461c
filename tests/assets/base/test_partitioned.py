"""Every shard of a run is computed, fails with a reason, or was not attempted, however the asset's function ends."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from assets.base.asset import Step
from assets.base.partitioned import PartitionedTemplate
from assets.base.results import Outcome
from assets.base.shard import Shard
from assets.scores import KINDS
from dagster_project.headless import Outcome as PassOutcome
from tests.support.caption_length import CAPTION_LENGTH, caption_length
from tests.support.scenario import SHARDS, Scenario, keep

KEY = "caption_length/short"
RECIPES = {
    "longest": {"steps": [keep(KEY, count=5)]},
    "among": {"from": "longest", "steps": [keep("clip_score/tiny", count=2)]},
    "clip": {"steps": [keep("clip_score/tiny", count=5)]},
}


def ends_early(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Compute the first shard."""
    yield shards[0], caption_length.function(Shard(step, shards[0]))


def breaks(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Compute the first shard, fail the second one, and raise at the third."""
    yield from ends_early(step, shards)
    yield shards[1], ValueError("no captions")
    raise RuntimeError("CUDA error: out of memory")


def repeats(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Yield the first shard twice."""
    yield from ends_early(step, shards)
    yield from ends_early(step, shards)


def strays(step: Step, shards: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Yield a shard that was not asked for."""
    yield from ends_early(step, shards)
    yield "99999", ValueError("no such shard")


def run_with(scenario: Scenario, template: PartitionedTemplate) -> PassOutcome:
    scenario.kinds = (*KINDS, replace(CAPTION_LENGTH, asset=template))
    scenario.set("scores", "caption_length", value={"short": {"limit": 20}})
    scenario.set("recipes", value=RECIPES)
    return scenario.run()


@pytest.mark.parametrize(
    ("function", "failed", "left", "message"),
    [
        (ends_early, [], ["00001", "00002"], "not attempted (the asset's function returned before): 00001, 00002"),
        (breaks, ["00001"], ["00002"], "not attempted (RuntimeError: CUDA error: out of memory): 00002"),
        (repeats, [], ["00001", "00002"], "shard 00000, which was not to be computed, or a second time"),
        (strays, [], ["00001", "00002"], "shard 99999, which was not to be computed, or a second time"),
    ],
)
@pytest.mark.usefixtures("finished")
def test_a_shard_that_is_never_yielded_was_not_attempted_and_nothing_is_selected_without_it(
    scenario: Scenario, function: object, failed: list[str], left: list[str], message: str
) -> None:
    outcome = run_with(scenario, replace(caption_length, function=function, streams=True))
    assert set(outcome.failures) == {KEY}
    assert message in outcome.failures[KEY]
    assert f"{len(left)} of 3 shards were not attempted; the others are computed" in outcome.failures[KEY]
    assert (f"{len(failed)} of 3 shards failed" in outcome.failures[KEY]) == bool(failed)
    assert all(f"{shard}: no captions" in outcome.failures[KEY] for shard in failed)
    assert outcome.unfinished == {KEY: len(left)}
    needed = f"{KEY} ({len(left)} of its shards were not attempted)"
    assert outcome.not_attempted == {"subset/longest": needed, "subset/among": needed}
    assert "subset/clip" in outcome.computed
    assert scenario.open().lake.shards(KEY) == [shard for shard in SHARDS if shard not in {*failed, *left}]

    again = run_with(scenario, caption_length)
    assert again.failures == {}
    assert again.computed[KEY] == [*failed, *left]
    assert scenario.subset("longest").lineage["shards_missing"] == {}


@pytest.mark.usefixtures("finished")
def test_a_shard_that_fails_on_its_own_is_left_out_of_the_subset(scenario: Scenario) -> None:
    def fails(shard: Shard) -> Outcome:
        if shard.name == "00001":
            raise RuntimeError("no captions")
        return caption_length.function(shard)

    outcome = run_with(scenario, replace(caption_length, function=fails))
    assert "1 of 3 shards failed; the others are computed.\n00001: no captions" in outcome.failures[KEY]
    assert outcome.unfinished == outcome.not_attempted == {}
    assert list(scenario.subset("longest").lineage["shards_missing"]) == ["00001"]


@pytest.mark.usefixtures("finished")
def test_an_error_before_the_first_shard_leaves_all_of_them_not_attempted(scenario: Scenario) -> None:
    def prepare(_: Step) -> None:
        raise RuntimeError("CUDA error: no device")

    outcome = run_with(scenario, replace(caption_length, prepare=prepare))
    assert outcome.unfinished == {KEY: 3}
    assert f"not attempted (RuntimeError: CUDA error: no device): {', '.join(SHARDS)}" in outcome.failures[KEY]
    assert "subset/longest" in outcome.not_attempted
