"""Distributed data parallel: two processes on half the batch each take the steps of one on all of it."""

import numpy as np
import pytest

from tests.train.ranks import train_on_ranks, train_once

COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
SETTINGS = {
    "accumulated": {"batch_size": 1, "gradient_accumulation_steps": 2},
    "adapters, checkpointed and compiled": {"batch_size": 2, "lora": True, "gradient_checkpointing": True, **COMPILED},
}


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
def test_two_processes_equal_one(tmp_path):
    """Samples differ in length, and some are text alone: the ranks' shares of tokens and of images are unequal."""
    both = train_on_ranks(2, SETTINGS, str(tmp_path))
    for name, settings in SETTINGS.items():
        one = train_once(str(tmp_path / "one"), batch_size=4, lora=settings.get("lora", False))
        assert set(both[name]) == set(one) and one, name
        assert max(float(np.abs(both[name][key] - one[key]).max()) for key in one) < 1e-5, name
