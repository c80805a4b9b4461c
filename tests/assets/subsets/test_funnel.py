"""The funnel of a lineage record, as rows and as Markdown."""

from assets.subsets.funnel import COLUMNS, funnel_markdown, funnel_rows

LINEAGE = {
    "source": {"rows": 2400},
    "steps": [
        {"text": "where a | b", "entered": 2400, "kept": 2400, "threshold": None},
        {"text": "keep the top 0.3 of the pool by s", "entered": 2400, "kept": 720, "threshold": -0.2106723},
    ],
}


def test_a_row_has_the_share_of_the_source_and_the_threshold() -> None:
    first, second = funnel_rows(LINEAGE)
    assert len(COLUMNS) == len(first)
    assert first == ("where a | b", "2,400", "2,400", "100.0%", "")
    assert second[1:] == ("2,400", "720", "30.0%", "-0.210672")
    assert funnel_rows(LINEAGE, ".2f")[1].threshold == "-0.21"


def test_markdown_is_a_list_in_short_lines_in_which_nothing_of_the_steps_is_markup() -> None:
    assert funnel_markdown(LINEAGE).splitlines() == [
        "1. where a \\| b  ",
        "   2,400 of 2,400, 100.0%",
        "1. keep the top 0.3 of the pool by s  ",
        "   720 of 2,400, 30.0%  ",
        "   threshold -0.210672",
    ]
