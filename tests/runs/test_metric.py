"""The page of metrics is the table, and the table has each of its names once."""

from pages import PAGES
from sft.runs.metric import METRICS, find, page


def test_the_page_is_the_table() -> None:
    (text,) = (text for path, text in PAGES.items() if path.name == "metrics.md")
    assert page() in text, f"docs/metrics.md should have\n\n{page()}"


def test_a_column_is_found_by_its_name_or_its_pattern() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for column, name in {"val/loss": "val/loss", "val/loss/maths": "val/loss/{set}", "val/losses": None}.items():
        metric = find(column)
        assert (metric.name if metric else None) == name
