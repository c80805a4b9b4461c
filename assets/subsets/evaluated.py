"""The evaluations of a subset's version, on its report page.

The tables `evaluation/<name>` of the lake say which versions they compared. A page has them between two comments, and
this section is replaced whenever an evaluation is complete or the page is written again.
"""

import re
from collections.abc import Iterator

import polars as pl
import pyarrow as pa

from assets.base.pages import render
from resources.lake.files import Lake
from resources.lake.versions import Versions
from resources.training.measures import COMPARED

_BEGIN, _END = "<!-- evaluations -->", "<!-- end of evaluations -->"
_SECTION = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)
_BEFORE = ("<h2>Scores before and after</h2>", "</body>")
"""Where the section goes on a page that has none."""


def with_evaluations(lake: Lake, recipe: str, version: str, page: str, new: tuple[str, pa.Table] | None = None) -> str:
    """Return a version's page with the evaluations that compared it; unchanged where none did.

    Args:
        lake: the lake.
        recipe: the recipe.
        version: the version.
        page: its page.
        new: an evaluation that is about to be written: its name and table.
    """
    rows = []
    for name, table in _tables(lake, new):
        final = pl.DataFrame(table).filter(
            pl.col("recipe") == recipe,
            pl.col("version") == version,
            pl.col("seen") == pl.col("samples_seen"),
            pl.col("measure").is_in(COMPARED),
        )
        rows += [{"evaluation": name, **row} for row in final.iter_rows(named=True)]
    if not rows:
        return page
    section = f"{_BEGIN}{render('evaluations.html', rows=rows)}{_END}"
    if _SECTION.search(page):
        return _SECTION.sub(lambda _: section, page)
    before = next(mark for mark in _BEFORE if mark in page)
    return page.replace(before, f"{section}\n{before}", 1)


def _tables(lake: Lake, new: tuple[str, pa.Table] | None) -> Iterator[tuple[str, pa.Table]]:
    names = {*lake.shards("evaluation"), *([new[0]] if new is not None else [])}
    for name in sorted(names):
        yield name, new[1] if new is not None and name == new[0] else lake.read(f"evaluation/{name}")


def show_on_pages(lake: Lake, name: str, table: pa.Table) -> None:
    """Show an evaluation that is about to be written on the page of every version that it compared.

    A version without a page gets the section when its page is written.
    """
    compared = {(row["recipe"], row["version"]) for row in table.select(["recipe", "version"]).to_pylist()}
    for recipe, version_name in sorted(pair for pair in compared if pair[0] is not None):
        versions = Versions(lake, recipe)
        version = versions.read(version_name)
        path = f"{version.folder}/report/index.html"
        if not lake.exists(path) or versions.report_damage(version):
            continue
        page = lake.store.read(path).decode()
        lake.put(path, with_evaluations(lake, recipe, version_name, page, (name, table)).encode())
        versions.write_report_checksums(version)
