"""Which attention is chosen, depending on the flags, the installation, the device and the precision."""

from types import SimpleNamespace

import pytest
import torch

from tests.tiny import tiny_llava
from tests.train.test_arguments import parse
from tinyllava_switchkd.train.attention import attention_of

FLASH = {"text_config": "flash_attention_2"}


def choose(asked, *, device, dtype, packing=False):
    training = SimpleNamespace(device=torch.device(device), compute_dtype=dtype, packing=packing)
    return attention_of(SimpleNamespace(model=SimpleNamespace(attn_implementation=asked), training=training))


@pytest.fixture
def installed(monkeypatch):
    """Sets whether flash-attn is installed."""
    return lambda there: monkeypatch.setattr(
        "tinyllava_switchkd.train.attention.is_flash_attn_2_available", lambda: there
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flash_is_chosen_for_packing_where_it_runs_and_sdpa_otherwise(installed, packing, there, device, dtype):
    installed(there)
    runs = there and device == "cuda:1" and dtype != torch.float32
    expected = FLASH if packing and runs else None
    assert choose(None, device=device, dtype=dtype, packing=packing) == expected
    for asked in ("sdpa", "eager"):
        assert choose(asked, device=device, dtype=dtype, packing=packing) == {"text_config": asked}
    if runs:
        assert choose("flash_attention_2", device=device, dtype=dtype, packing=packing) == FLASH


@pytest.mark.parametrize(
    ("device", "dtype", "there", "words"),
    [
        ("cuda", torch.bfloat16, False, "needs the package flash-attn"),
        ("cuda", torch.float32, True, "computes in bfloat16 or float16 and this run in float32; add --bf16 True"),
        ("cpu", torch.bfloat16, True, "needs a CUDA GPU and this run is on cpu"),
    ],
)
def test_unavailable_flash_attention_is_refused(installed, device, dtype, there, words):
    installed(there)
    with pytest.raises(ValueError, match=f"--attn_implementation flash_attention_2 {words}"):
        choose("flash_attention_2", device=device, dtype=dtype)


def test_the_command_line_decides(installed, monkeypatch):
    installed(True)
    assert attention_of(parse()) is attention_of(parse("--packing", "True")) is None  # on the CPU
    assert attention_of(parse("--attn_implementation", "eager")) == {"text_config": "eager"}
    arguments = parse("--packing", "True", "--bf16", "True")
    assert arguments.training.compute_dtype == torch.bfloat16
    monkeypatch.setattr(type(arguments.training), "device", torch.device("cuda", 0))
    assert attention_of(arguments) == FLASH


def test_by_default_language_model_and_tower_compute_with_sdpa():
    config = tiny_llava().config
    assert {config.text_config._attn_implementation, config.vision_config._attn_implementation} == {"sdpa"}
