"""For all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session", autouse=True)
def disks_that_answer_at_once() -> Generator[None, None, None]:
    """No test cuts the power: what a process writes need not be on the disk before it goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports and items are no garbage: nothing is looked for meanwhile."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that one worker runs one after another come first, so that the other is not idle at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: the garbage collector need not look at it again.

    Every training asks accelerate for a full collection, which takes as long as a tenth of a tiny one: Python's own
    collections are enough here.
    """
    gc.collect()
    gc.freeze()
    if memory := sys.modules.get("accelerate.utils.memory"):
        memory.gc = SimpleNamespace(collect=lambda: 0)
