"""The order in which a run sees its samples."""

import numpy as np
import pytest

from resources.training.order import training_order


@pytest.mark.parametrize("cut", [1, 7, 10, 23, 49])
def test_a_resumed_run_continues_with_the_same_samples(cut: int) -> None:
    whole = training_order(10, 0, 50, seed=4)
    parts = [training_order(10, 0, cut, seed=4), training_order(10, cut, 50, seed=4)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_every_pass_has_every_sample_once_in_another_order() -> None:
    passes = training_order(40, 0, 160, seed=0).reshape(4, 40)
    assert (np.sort(passes, axis=1) == np.arange(40)).all()
    assert len({tuple(order) for order in passes.tolist()}) == 4


def test_seeds_differ() -> None:
    assert training_order(40, 0, 40, seed=0).tolist() != training_order(40, 0, 40, seed=1).tolist()
