"""For all tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that one worker runs one after another come first, so that the other is not idle at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
