"""Execute `match_distribution`: read features and quality of the rows that entered, select, and explain.

Here: from a relation to the selected rows. Not here: the objective and its maximisation
(`selection.recipes.distribution`), nor how features are computed.
"""

import tempfile
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from core.sql import literal, one, quoted
from selection.recipes.distribution import Features, Matched, last_gains, match_distribution
from selection.recipes.ranking import StepError, nth, ranked_value, with_column_at
from selection.recipes.set_steps import MatchDistribution, SelectedSet, feature_columns
from selection.recipes.steps import Ranking

_BATCH = 1 << 16  # rows read at once
# log(1 + m) is nearly linear in concepts of small mass; a note says so if they hold much of the target.
_SMALL, _THIN = 10, 0.25
CONCEPTS = "concepts"
"""Ends the name of the table with a step's concepts."""


def match(
    con: duckdb.DuckDBPyConnection, step: MatchDistribution, column: str, relation: str, inside: str, wanted: int
) -> SelectedSet:
    """Select the rows that match a target's distribution.

    Args:
        con: The connection that holds the source, and the target's distribution under each of `step.tables`.
        step: The step.
        column: Prefix for the names of new tables and columns.
        relation: The source as an SQL identifier.
        inside: SQL over one row: whether it entered the step.
        wanted: Rows to keep, at least 1; all, if fewer entered.

    Returns:
        The set. `value` is what a selected row added to F when it was taken, and what another would add now. Each of
        `rows`, which were selected (f0, f1), has its `position` from 1, `gain`, and the `concepts` that added most of
        it with their `parts`. `concepts` has by number in F `features`, `concept`, `label`, and their shares of the
        `target`, of the rows that `entered`, and of those that were `selected`; and the `mass` of those.

    Raises:
        StepError: A row that entered has no features or no quality, or features and target do not fit.
    """
    target = _target(con, step)
    bins, note = _quality_bins(con, step, relation, inside)
    with tempfile.TemporaryDirectory(prefix="features-") as folder:
        features = _read_features(con, step, relation, inside, target, folder)
        found = con.execute(
            f"SELECT * EXCLUDE entered FROM (SELECT row_number() OVER () - 1 AS place, f0, f1, {bins} AS quality, "
            f"{inside} IS TRUE AS entered FROM {relation}) WHERE entered"
        ).fetchnumpy()
        matched, gains, entered = _match(features, np.asarray(target["share"]), found, step, wanted)
        # The features are a mapped file, which is removed here.
    kept = len(matched.rows)
    notes = [note]
    if kept < wanted:
        notes.append(f"{kept} rows entered, fewer than the {wanted} wanted: all stay")
    thin = float(target["share"][matched.mass < _SMALL].sum())
    if thin > _THIN:
        notes.append(
            f"{thin:.0%} of the target lies in concepts of which the {kept} rows hold little, and there "
            "the match is poor. Remedy: fewer concepts, or more rows"
        )
    place = found["place"]
    relation = with_column_at(con, relation, f"{column}_gain", place, gains, np.nan)
    ranks = np.arange(1.0, kept + 1)
    relation = with_column_at(con, relation, f"{column}_rank", place[matched.rows], ranks, np.nan)
    rows, concepts = quoted(f"{column}_matched"), quoted(f"{column}_{CONCEPTS}")
    _store_rows(con, rows, matched, found)
    _store_concepts(con, concepts, target, entered, matched.mass)
    return SelectedSet(
        relation=relation,
        predicate=f"{quoted(f'{column}_rank')} IS NOT NULL",
        value=f"({quoted(f'{column}_gain')} + 0.0)",
        kept=kept,
        rows=f"SELECT * FROM {rows} ORDER BY f0, f1",
        concepts=f"SELECT * FROM {concepts} ORDER BY number",
        note="; ".join(filter(None, notes)) or None,
    )


def _match(
    features: Features, share: NDArray[np.float64], found: dict[str, Any], step: MatchDistribution, wanted: int
) -> tuple[Matched, NDArray[np.float64], NDArray[np.float64]]:
    """Return the selection, the value of each row, and the mass of each concept over the rows that entered."""
    matched = match_distribution(
        features,
        share,
        found["quality"],
        found["f0"],
        found["f1"],
        count=min(wanted, len(found["f0"])),
        trade_off=step.trade_off,
        epsilon=step.epsilon,
        seed=step.seed,
    )
    gains = last_gains(features, share, found["quality"], matched, trade_off=step.trade_off)
    gains[matched.rows] = matched.gain
    return matched, gains, features.mass(len(share))


def _target(con: duckdb.DuckDBPyConnection, step: MatchDistribution) -> dict[str, Any]:
    """Return the concepts of all encoders in one order, as arrays of length d, each encoder with an equal share."""
    tables = [
        con.execute(f"SELECT concept, label, share FROM {quoted(table)} ORDER BY concept").fetchnumpy()
        for table in step.tables
    ]
    for key, table in zip(step.tables, tables, strict=True):
        if not np.array_equal(table["concept"], np.arange(len(table["concept"]))) or not np.any(table["share"] > 0):
            raise StepError(f"{key} is not a distribution over concepts from 0. Remedy: materialize it again")
    found = {name: np.concatenate([table[name] for table in tables]) for name in ("concept", "label", "share")}
    found["share"] = found["share"] / len(tables)
    found["features"] = np.repeat(list(step.features), [len(table["concept"]) for table in tables])
    return found


def _quality_bins(
    con: duckdb.DuckDBPyConnection, step: MatchDistribution, relation: str, inside: str
) -> tuple[str, str | None]:
    """Return SQL for the bin of a row, 0 to 2: the thirds by quality of the rows that entered; equal values share one.

    The upper third is the rows at or above the value at place ceil(n / 3) in falling order, and so on.
    """
    if not step.scores:
        return "0::TINYINT", None
    ranked = ranked_value(con, Ranking(score=step.scores[0]), "", relation, inside)
    n = one(con, f"SELECT count(*) FROM {relation} WHERE {inside}")[0]
    high, middle = (nth(con, ranked, inside, -(-n * third // 3))[0] for third in (1, 2))
    note = None
    if ranked.least == ranked.most:
        note = f"{step.scores[0]}: the same for every row that entered, so without effect"
    return " + ".join(f"({ranked.value} >= {literal(value)})::TINYINT" for value in (high, middle)), note


def _read_features(
    con: duckdb.DuckDBPyConnection,
    step: MatchDistribution,
    relation: str,
    inside: str,
    target: dict[str, Any],
    folder: str,
) -> Features:
    """Copy the features of the rows that entered into two mapped files, in the order of a scan."""
    columns = [feature_columns(encoder) for encoder in step.encoders]
    (n, *widths) = one(
        con,
        f"SELECT count(*), {', '.join(f'max(len({quoted(index)}))' for index, _ in columns)} "
        f"FROM {relation} WHERE {inside}",
    )
    for (index, value), width in zip(columns, widths, strict=True):
        _check_widths(con, index, value, width, f"FROM {relation} WHERE {inside}")
    shape = (n, sum(widths))
    index_file = np.memmap(f"{folder}/index", np.int32, mode="w+", shape=shape)
    value_file = np.memmap(f"{folder}/value", np.float16, mode="w+", shape=shape)
    sizes = [int(np.sum(target["features"] == name)) for name in step.features]
    firsts = np.concatenate([[0], np.cumsum(sizes)])
    names = ", ".join(quoted(name) for pair in columns for name in pair)
    row = 0
    for batch in con.sql(f"SELECT {names} FROM {relation} WHERE {inside}").to_arrow_reader(_BATCH):
        rows, at = slice(row, row + batch.num_rows), 0
        for number, width in enumerate(widths):
            found = batch.column(2 * number).flatten().to_numpy()
            if found.size and not 0 <= found.min() <= found.max() < sizes[number]:
                raise StepError(
                    f"{step.features[number]} has concepts that {step.tables[number]} lacks. Remedy: materialize both"
                )
            part = (rows, slice(at, at + width))
            index_file[part] = found.reshape(-1, width) + firsts[number]
            value_file[part] = batch.column(2 * number + 1).flatten().to_numpy().reshape(-1, width)
            at += width
        row += batch.num_rows
    return Features(index_file, value_file)


def _check_widths(con: duckdb.DuckDBPyConnection, index: str, value: str, width: int | None, rows: str) -> None:
    other = f"len({quoted(index)}) IS DISTINCT FROM {width or 0} OR len({quoted(value)}) IS DISTINCT FROM {width or 0}"
    absent = one(con, f"SELECT count(*) {rows} AND ({other})")[0]
    if absent or not width:
        raise StepError(
            f"{index} and {value} do not have {width or 'any'} entries in {absent or 'all'} of the rows that entered. "
            "Remedy: materialize the features again"
        )


def _store_rows(con: duckdb.DuckDBPyConnection, table: str, matched: Matched, found: dict[str, Any]) -> None:
    shown = range(matched.concepts.shape[1])
    columns: dict[str, NDArray[Any]] = {
        "f0": found["f0"][matched.rows],
        "f1": found["f1"][matched.rows],
        "position": np.arange(1, len(matched.rows) + 1),
        "gain": matched.gain,
        **{f"c{n}": np.ascontiguousarray(matched.concepts[:, n]) for n in shown},
        **{f"p{n}": np.ascontiguousarray(matched.parts[:, n]) for n in shown},
    }
    concepts, parts = (f"[{', '.join(f'{name}{n}' for n in shown)}]" for name in "cp")
    _store(con, table, columns, f"f0, f1, position, gain, {concepts} AS concepts, {parts} AS parts")


def _store_concepts(
    con: duckdb.DuckDBPyConnection,
    table: str,
    target: dict[str, Any],
    entered: NDArray[np.float64],
    mass: NDArray[np.float64],
) -> None:
    columns: dict[str, Any] = {
        "number": np.arange(len(mass)),
        "features": target["features"].astype(object),
        "concept": target["concept"],
        "label": np.asarray(target["label"], object),
        "target": target["share"],
        "entered": _shares(entered),
        "selected": _shares(mass),
        "mass": mass,
    }
    _store(con, table, columns, "*")


def _shares(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    total = mass.sum()
    return mass / total if total else mass


def _store(con: duckdb.DuckDBPyConnection, table: str, columns: dict[str, Any], selected: str) -> None:
    con.register("beside", columns)
    con.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS SELECT {selected} FROM beside")
    con.unregister("beside")
