import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava_switchkd.registry import Registry


@pytest.fixture
def towers():
    registry = Registry("vision tower", fuzzy=True)
    for name in ("clip", "siglip", "siglip2"):
        registry.register(name)(type(name, (), {}))
    return registry


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("siglip", "siglip"),
        ("SigLIP", "siglip"),
        ("google/siglip-so400m-patch14-384", "siglip"),
        ("google/siglip2-base-patch16-224", "siglip2"),
        ("/data/clip/models/siglip-b/", "siglip"),
        ("openai/clip-vit-large-patch14-336", "clip"),
    ],
)
def test_lookup_is_exact_then_longest_on_the_base_name(towers, name, expected):
    assert towers.name_of(name) == expected


def test_a_parent_folder_never_decides(towers):
    with pytest.raises(ValueError, match=r"Unknown vision tower 'models/siglip/vit'.*clip, siglip, siglip2"):
        towers("models/siglip/vit")


def test_equally_long_matches_are_ambiguous():
    registry = Registry("language model", fuzzy=True)
    for name in ("gemma", "llama"):
        registry.register(name)(object())
    with pytest.raises(ValueError, match=r"ambiguous.*gemma, llama"):
        registry("my-llama-gemma")


def test_aliases_of_one_entry_are_not_ambiguous():
    registry = Registry("language model", fuzzy=True)
    entry = object()
    registry.register("gemma", "llama")(entry)
    assert registry("my-llama-gemma") is entry


def test_second_registration_needs_override(towers):
    with pytest.raises(ValueError, match="already registered"):
        towers.register("clip")(object)
    replacement = towers.register("clip", override=True)(type("Mine", (), {}))
    assert towers("clip") is replacement


def test_a_refused_alias_registers_nothing(towers):
    with pytest.raises(ValueError, match="already registered"):
        towers.register("new", "clip")(object)
    assert "new" not in towers


def test_fallback_is_asked_last():
    registry = Registry("language model", fuzzy=True, fallback=lambda name: "qwen2" if name.endswith("model") else None)
    entry = registry.register("qwen2")(object())
    assert registry("some/local-model") is entry
    with pytest.raises(ValueError, match="Unknown language model"):
        registry("something-else")


def test_without_fuzzy_only_exact_names_match():
    registry = Registry("recipe")
    registry.register("lora")(object())
    with pytest.raises(ValueError, match="Unknown recipe 'qlora'"):
        registry("qlora")


def test_list_takes_a_pattern(towers):
    assert towers.list("sig*") == ["siglip", "siglip2"]


def test_an_installed_entry_point_is_found(tmp_path: Path):
    """An installed third-party package registers its judge (which needs no torch)."""
    (tmp_path / "my_plugin.py").write_text(
        "from tinyllava_switchkd.eval.benchmarks import register_judge\n"
        "@register_judge('from_plugin')\n"
        "def mine(reading):\n"
        "    return None\n"
    )
    info = tmp_path / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tinyllava_switchkd.plugins]\nmine = my_plugin\nbroken = no_such_module_at_all\n"
    )
    code = "from tinyllava_switchkd.eval.benchmarks import JudgeFactory; print(JudgeFactory('from_plugin').__name__)"
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "", "HOME": str(tmp_path)},
    )
    assert result.stdout.strip() == "mine", result.stderr
    assert "broken" in result.stderr  # reported, but not fatal


def test_an_override_ends_with_its_block(towers):
    clip = towers("clip")
    with towers.override("clip", "mine"), towers.override("new", "other"):
        assert (towers("CLIP"), towers("new")) == ("mine", "other")
        towers.register("third")(object())
    assert towers("clip") is clip
    assert towers.list() == ["clip", "siglip", "siglip2"]


def test_an_override_ends_when_its_block_fails(towers):
    with pytest.raises(ZeroDivisionError), towers.override("clip", "mine"):
        raise ZeroDivisionError
    assert towers("clip") != "mine"
