"""What tests of the demo share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def uploads_of_this_process(tmp_path_factory):
    """Gradio names uploads by their content in one folder of the machine; another worker's tests would remove ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield
