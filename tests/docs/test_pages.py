"""The site builds without a warning and needs nothing from elsewhere; what pages say of the code is so."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.docs.messages import pattern, texts
from tests.docs.pages import DOCS, ROOT, codes_of, first_cells, import_from, read, section, without_code
from tests.tiny import tiny_llava

PAGES = sorted(path.name for path in DOCS.glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # not --quiet: warnings that are not shown do not fail a strict build
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_site_builds_strictly(site):
    """Links, anchors and the navigation are checked by the strict build."""
    assert {path.name for path in site.glob("*.html")} >= {page.replace(".md", ".html") for page in PAGES}
    assert not list(site.rglob("*.py"))


def test_site_loads_nothing_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for page in site.glob("*.html"):
        found = [tag for tag in loaded.findall(page.read_text()) if "canonical" not in tag]
        assert not found, (page.name, found)
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()[^;)]*//", style.read_text()), style.name


def test_flags_are_in_sync(tmp_path):
    generator = import_from(tmp_path, "generate_flags.py", (DOCS / "_generate_flags.py").read_text(encoding="utf-8"))
    assert generator.page() == read("flags.md"), "run python docs/_generate_flags.py"
    tables = ROOT / "tinyllava_switchkd" / "train" / "command_line"
    for name, text in (("flags.json", generator.flags_table()), ("names.json", generator.names_table())):
        assert text == (tables / name).read_text(encoding="utf-8"), "run python docs/_generate_flags.py"


@pytest.fixture(scope="module")
def program():
    return list(texts())


def fragments():
    ours = read("troubleshooting.md").split("## From other libraries")[0]
    return [
        code for line in ours.splitlines() if line.startswith("* **") for code in re.findall(r"\*\*`([^`]+)`\*\*", line)
    ]


@pytest.mark.parametrize("fragment", fragments())
def test_quoted_messages_are_the_programs(fragment, program):
    wanted = pattern(fragment)
    assert any(wanted.search(text) for text in program), f"no message of the program reads {fragment!r}"


def test_there_are_quoted_messages():
    assert len(fragments()) > 25


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page):
    """Paths of the repository in backticks, and scripts in commands."""
    named = set(
        re.findall(r"`((?:scripts|tinyllava_switchkd|benchmarks|tests|docs)/[\w./-]*)`", without_code(read(page)))
    )
    named |= set(re.findall(r"\bbash (scripts/[\w./-]+\.sh)", read(page)))
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_pages_run_exist(page):
    for module in set(re.findall(r"python -m (tinyllava_switchkd[\w.]+|benchmarks[\w.]+)", read(page))):
        assert importlib.util.find_spec(module.rstrip(".")) is not None, module


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_commands_exist(page):
    """Options of ``python -m tinyllava_switchkd.…`` commands are those that the page of flags lists."""
    for block in codes_of(page, "bash"):
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            module = re.search(r"python -m tinyllava_switchkd\.([\w.]+)", line)
            if module is not None:
                options = set(re.findall(r"\s(--[\w-]+)", line))
                unknown = {name for name in options if f"`{name}`" not in section("flags.md", module[1])}
                assert not unknown, (line, unknown)


def test_names_that_migration_keeps():
    for row in section("migration.md", "From TinyLLaVA v1").splitlines():
        cells = [re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[1:-1]]
        if row.startswith("| `tinyllava_switchkd."):
            module = importlib.import_module(cells[0][0])
            assert all(hasattr(module, name) for name in cells[1]), row


def test_migration_snippet():
    (snippet,) = codes_of("migration.md", "python")
    batch = {
        "input_ids": torch.tensor([[1, -200, 5, 6]]),
        "labels": torch.tensor([[-100, -100, 5, 6]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.bool),
        "images": torch.randn(1, 3, 28, 28),
    }
    names = {"student": tiny_llava(), "teacher": tiny_llava(seed=1), "batch": batch}
    exec(snippet, names)
    assert all(torch.isfinite(value) for value in names["losses"].values())
    assert names["student"].connector._connector[0].weight.grad is not None


def test_files_that_the_quickstart_leaves():
    source = "\n".join(path.read_text() for path in (ROOT / "tinyllava_switchkd" / "quickstart").glob("*.py"))
    for cell in first_cells(section("quickstart.md", "What it leaves")):
        for name in re.findall(r"`([^`]+)`", cell):
            assert f'"{name.rstrip("/")}"' in source, name
    from tinyllava_switchkd.quickstart.report import TYPE_TITLES

    printed = section("quickstart.md", "What it prints")
    titles = {*TYPE_TITLES.values(), "overall", "probe", "steps", "seconds"}
    assert titles <= {title for cell in first_cells(printed) for title in cell.split(", ")}


def test_extras_that_install_lists():
    documented = set(re.findall(r"`([^`]+)`", "\n".join(first_cells(read("install.md")))))
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[tool")[0]
    assert documented == set(re.findall(r"^(\w+) = \[", text, re.MULTILINE))
