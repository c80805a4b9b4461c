"""The report of a subset, parsed as a browser would."""

from html.parser import HTMLParser
from pathlib import Path

from tests.support.scenario import Scenario


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: every tag, in order.
        references: every `src` and `href`.
        sections: the captions below each `h2`.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.sections: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._title = ""
        self.feed(text)

    def handle_starttag(  # noqa: D102
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:  # noqa: D102
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:  # noqa: D102
        if self._open and self._open[-1] == "h2":
            self._title = data
            self.sections[data] = []
        elif self._open and self._open[-1] == "small":
            self.sections[self._title].append(data)


def report_folder(scenario: Scenario, recipe: str) -> Path:
    """Return the folder of the report on a recipe's newest version."""
    return Path(scenario.subset(recipe).folder) / "report"


def report_page(scenario: Scenario, recipe: str) -> Page:
    """Parse the report on a recipe's newest version."""
    return Page((report_folder(scenario, recipe) / "index.html").read_text())
