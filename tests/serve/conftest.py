"""Fixtures of the demo's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def uploads_of_this_process(tmp_path_factory):
    """All Gradio servers share one upload folder; another worker's tests would remove ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield
