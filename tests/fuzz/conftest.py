"""A test that draws for minutes has no time limit."""

import pytest

from .drawn import MINUTES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if MINUTES and "fuzz" in item.path.parts:
            item.add_marker(pytest.mark.timeout(0))
