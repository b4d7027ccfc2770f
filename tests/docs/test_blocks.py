"""Every Python block of every page runs, as it stands, in an empty folder."""

import re
from pathlib import Path

import pytest
import yaml

import diffalign as da
from diffalign.core.registry import TECHNIQUES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted(ROOT.glob("*/README.md"))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def run(code, page):
    exec(compile(code, page, "exec"), {"__name__": "page"})


WITH_PYTHON = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"), "python")]


@pytest.fixture
def empty_folder(loaded, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(da, "load", loaded)
    monkeypatch.setattr(TECHNIQUES, "registered", {})


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_of_a_page_run(page, empty_folder):
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        run(code, page.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", da.techniques())
def test_the_block_of_a_technique_runs_and_reports(name, docs_module, empty_folder, capsys):
    (code,) = blocks(docs_module("technique_page").page(name), "python")
    run(code, name)
    assert f"\n{name}(" in capsys.readouterr().out


def test_yaml_of_every_page_is_yaml():
    texts = [code for page in PAGES for code in blocks(page.read_text("utf-8"), "yaml")]
    assert texts
    assert all(isinstance(yaml.safe_load(text), dict) for text in texts)
