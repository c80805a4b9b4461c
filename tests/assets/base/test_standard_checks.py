"""What `within_bounds` checks and says of columns with bounds, without bounds, and that do not rank."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from assets.base.asset import Declared
from assets.base.checks import Tables
from assets.base.columns import Column
from assets.base.settings import ProjectSettings
from assets.base.standard_checks import within_bounds
from tests.support.caption_length import CAPTION_LENGTH

SETTINGS = ProjectSettings.model_construct()


def column(name: str, direction: str | None, bounds: tuple[float, float] | None) -> Column:
    return Column(name=name, type=pa.float32(), description="A score.", direction=direction, bounds=bounds)


def declared(*columns: Column) -> Declared:
    return replace(CAPTION_LENGTH.asset, columns=columns).declare(SETTINGS, name="short")


def test_a_score_without_bounds_is_checked_to_be_finite_and_the_description_says_so() -> None:
    asset = declared(column("free", "larger", None), column("spread", None, None))
    check = within_bounds(asset)
    assert check is not None
    assert check.description == "Every value is finite."
    for value, passed in ((1e30, True), (np.nan, False), (np.inf, False)):
        table = pa.table({"free": pa.array([0.0, value], pa.float32()), "spread": [np.nan, np.nan]})
        found = check.run(Tables(None, asset.key, None, {asset.key: table}))
        assert found.passed is passed
        assert passed or found.why == f"free: 1 rows are not finite, the first is row 1: {value}"


def test_bounds_are_stated_and_an_asset_without_a_score_has_no_check() -> None:
    check = within_bounds(declared(column("cosine", "larger", (-1, 1)), column("free", "larger", None)))
    assert check is not None
    assert check.description == "Every value is finite, cosine in [-1, 1]."
    assert within_bounds(declared(column("index", None, None))) is None
