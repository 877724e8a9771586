"""Distributed data parallel: two processes with half the batch each take the same steps as one with all of it."""

import functools
import os

import numpy as np
import pytest
from torch.utils.data import SequentialSampler

from tests.train.ranks import codes_on_ranks, train_on_ranks, train_once
from tests.train.world import command_line, write_world
from tinyllava_switchkd.train.reliability.reliable import Filled

COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
SETTINGS = {
    "accumulated": {"batch_size": 1, "gradient_accumulation_steps": 2},
    "adapters, checkpointed and compiled": {"batch_size": 2, "lora": True, "gradient_checkpointing": True, **COMPILED},
}


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
def test_two_processes_equal_one(tmp_path):
    """Samples differ in length, and some have only text, so the ranks have unequal numbers of tokens and images."""
    both = train_on_ranks(2, SETTINGS, str(tmp_path))
    for name, settings in SETTINGS.items():
        one = train_once(str(tmp_path / "one"), batch_size=4, lora=settings.get("lora", False))
        assert set(both[name]) == set(one) and one, name
        assert max(float(np.abs(both[name][key] - one[key]).max()) for key in one) < 1e-5, name


def fail_on(rank, check, stage):
    """For example, a disk is not mounted on one machine."""
    from tinyllava_switchkd.train.preflight import checks
    from tinyllava_switchkd.train.reliability import resume

    def fails(*args, **kwargs):
        raise FileNotFoundError(f"{check} fails on rank {rank}")

    if os.environ["RANK"] == str(rank):
        setattr({"checks": checks, "resume": resume}[stage], check, fails)


@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
@pytest.mark.parametrize(
    ("rank", "check", "stage"), [(1, "check_paths", "checks"), (0, "find_checkpoint", "resume")], ids=str
)
def test_a_check_that_fails_on_one_rank_ends_all_of_them(tmp_path, rank, check, stage):
    """No rank waits: each ends with 1, whether all ranks checked or only the main process, which prints the reason."""
    world = write_world(tmp_path / "world", samples=4)
    line = command_line(world, tmp_path / "run", ddp_backend="gloo")
    codes = codes_on_ranks(2, line, tmp_path / "log", functools.partial(fail_on, rank, check, stage))
    said = "".join((tmp_path / f"log.{each}").read_text() for each in (0, 1))
    assert codes == [1, 1] and "Traceback" not in said
    assert f"error: {'On rank 1: ' if rank else ''}{check} fails on rank {rank}" in said


def test_samples_in_sequence_are_filled_up_too():
    """Such a sampler has no epochs."""
    filled = Filled(SequentialSampler(range(3)), 2, 3)
    filled.set_epoch(1)
    assert list(filled) == [0, 1, 2, 5]
