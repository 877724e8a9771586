"""Fixtures and hooks for all tests."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Generator
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session", autouse=True)
def disks_that_answer_at_once() -> Generator[None, None, None]:
    """Disable fsync, which is slow and which no test needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def a_log_of_its_own() -> Generator[None, None, None]:
    """A command that a test runs sets up the package's logger; the next test finds it as this one did."""
    logger = logging.getLogger("tinyllava_switchkd")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Disable garbage collection during test collection, which only creates objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests of an xdist group first: one worker runs them in turn, and the other should not be idle at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish() -> None:
    """Exempt everything imported and collected from garbage collection.

    Every training also asks accelerate for a full collection, which takes a tenth of the time of a tiny training and is
    not needed here.
    """
    gc.collect()
    gc.freeze()
    if memory := sys.modules.get("accelerate.utils.memory"):
        memory.gc = SimpleNamespace(collect=lambda: 0)
