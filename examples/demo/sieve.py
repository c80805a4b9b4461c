"""SIEVE on two shards of the demo's pool: `python -m examples.demo.sieve`, some minutes.

Captions come from the demo's captioner, vectors from the text tower of its encoder. Prints how SIEVE and CLIPScore tell
clean rows from each planted fault. Not part of `make demo`, because describing pictures takes too long for it.
"""

import argparse
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from assets.settings import open_project
from dagster_project import cli as command
from dagster_project.definitions import DEMO_CONFIG
from examples.demo.pool import make_pool, make_truth
from examples.demo.truth import auc
from resources.catalog.build import read_catalog

SHARDS = range(2)
CONFIG = DEMO_CONFIG.parent / "demo-sieve.yaml"


def separation(rows: pl.DataFrame, names: list[str]) -> Table:
    """Give a table of the AUC of each score against each fault, and against each variant of a wrong attribute.

    Args:
        rows: kind, variant, and the scores.
        names: of the scores.
    """
    clean = rows.filter(pl.col("kind") == "clean")
    table = Table(title="AUC: chance that a clean row scores above a faulty one")
    for column in ("fault", "rows", *names):
        table.add_column(column, justify="left" if column == "fault" else "right")
    faulty = rows.filter(pl.col("kind") != "clean")
    groups = {kind: faulty.filter(pl.col("kind") == kind) for kind in faulty["kind"].unique().sort()}
    wrong = groups["wrong_attribute"]
    groups |= {f"  {name}": wrong.filter(pl.col("variant") == name) for name in wrong["variant"].unique().sort()}
    for name, group in (groups | {"all faults": faulty}).items():
        values = [f"{auc(clean[score].to_numpy(), group[score].to_numpy()):.3f}" for score in names]
        table.add_row(name.replace("_", " "), f"{len(group):,}", *values)
    return table


def main() -> int:
    """Draw the shards, run the project, print the table; give the exit status."""
    parser = argparse.ArgumentParser(description="Run SIEVE on two shards of the demo's pool.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="a copy of it with other captioners or encoders")
    project = open_project(parser.parse_args().config)
    console = Console()
    pool = Path(project.settings.pool.path)
    missing = [number for number in SHARDS if not (pool / f"{number:05d}_stats.json").exists()]
    if missing:
        make_pool(pool, missing)
    make_truth(pool.parent / "truth.parquet", SHARDS)
    if status := command.run(project, console):
        return status
    names = [name for name in project.settings.score_columns if name.startswith(("clip_score/", "sieve/"))]
    with read_catalog(project.catalog_path()) as con:
        rows = con.sql("FROM scores").pl().join(pl.read_parquet(pool.parent / "truth.parquet"), on="uid")
        example = con.sql(
            f"""SELECT caption, "{names[-1].replace("sieve", "sieve_caption", 1)}" AS said, "{names[-1]}" AS score
            FROM pool_scores USING SAMPLE reservoir(8 ROWS) REPEATABLE (1)"""
        ).pl()
    console.print(separation(rows, names))
    for row in example.iter_rows(named=True):
        console.print(f"{row['score']:.3f}  {row['caption']!r}  said of the picture: {row['said']!r}", highlight=False)
    return 0


if __name__ == "__main__":
    command.leave(main())
