"""Catalogue, registry and recipes say the same, and every recipe runs on the embedded model."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import diffalign as da

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "search"
RECIPES = sorted(FOLDER.glob("*.py"))
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
TASK = re.compile(r"^\| [^|]+ \| \[(\w+\.py)\]\(\1\) \| ([^|]+) \|$", re.M)
ROW = re.compile(r"^\| \[`([\w-]+)`\]\(([\w./]+)\) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", re.M)


def shown(path):
    """Methods that a recipe makes, by their names in ``diffalign``."""
    names = re.findall(r"da\.([A-Z]\w+)\(", path.read_text(encoding="utf-8"))
    return {name for name in names if getattr(da, name) in da.methods().values()}


def test_every_method_has_a_row_with_its_paper_and_its_code():
    rows = {name: (target, needs, paper) for name, target, _, needs, paper in ROW.findall(PAGE)}
    room = "diffalign.search."
    assert set(rows) == {n for n, cls in da.methods().items() if cls.__module__.startswith(room)}
    for name, (target, needs, paper) in rows.items():
        cls = da.methods()[name]
        path = (FOLDER / target).resolve()
        assert path == ROOT / Path(*cls.__module__.split(".")).with_suffix(".py"), name
        text = path.read_text(encoding="utf-8")
        assert all(identifier in text for identifier in re.findall(r"\d{4}\.\d{5}", paper)), name
        assert ("draws noise" in needs) is cls.branches


def test_every_recipe_has_a_task_and_says_what_it_shows():
    tasks = dict(TASK.findall(PAGE))
    assert set(tasks) == {path.name for path in RECIPES}
    for path in RECIPES:
        assert set(re.findall(r"`(\w+)`", tasks[path.name])) == shown(path), path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, monkeypatch, tmp_path, capsys):
    """It leaves an image named after it, prints its cost, and draws from no global generator."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    runpy.run_path(str(path), run_name="__main__")
    assert torch.equal(torch.get_rng_state(), before)
    assert " NFE, " in capsys.readouterr().out
    assert list(tmp_path.glob(f"{path.stem}*.png"))
