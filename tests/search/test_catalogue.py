"""Catalogue, registry and recipes say the same, and every recipe runs on the embedded model."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import diffalign as da

ROOT = Path(__file__).parents[2]
ROOMS = ("search", "noise_opt")
PAGES = {room: (ROOT / room / "README.md").read_text(encoding="utf-8") for room in ROOMS}
RECIPES = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))
LONG = ("many_images", "failures", "describe")
TASK = re.compile(r"^\| [^|]+ \| \[(\w+\.py)\]\(\1\) \| ([^|]+) \|$", re.M)
ROW = re.compile(r"^\| \[`([\w-]+)`\]\(([\w./]+)\) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", re.M)


def shown(path):
    """Methods that a recipe makes, by their names in ``diffalign``."""
    names = re.findall(r"da\.([A-Z]\w+)\(", path.read_text(encoding="utf-8"))
    return {name for name in names if getattr(da, name) in da.methods().values()}


@pytest.mark.parametrize("room", ROOMS)
def test_every_method_has_a_row_with_its_paper_and_its_code(room):
    found = ROW.findall(PAGES[room])
    rows = {name: (target, needs, paper) for name, target, _, needs, paper in found}
    home = f"diffalign.{room}."
    assert set(rows) == {n for n, cls in da.methods().items() if cls.__module__.startswith(home)}
    for name, (target, needs, paper) in rows.items():
        cls = da.methods()[name]
        path = (ROOT / room / target).resolve()
        assert path == ROOT / Path(*cls.__module__.split(".")).with_suffix(".py"), name
        text = path.read_text(encoding="utf-8")
        assert all(identifier in text for identifier in re.findall(r"\d{4}\.\d{5}", paper)), name
        assert ("draws noise" in needs) is cls.branches
        assert ("gradient" in needs) is cls.needs_gradient


@pytest.mark.parametrize("room", ROOMS)
def test_every_recipe_has_a_task_and_says_what_it_shows(room):
    tasks = dict(TASK.findall(PAGES[room]))
    recipes = [path for path in RECIPES if path.parent.name == room]
    assert set(tasks) == {path.name for path in recipes}
    for path in recipes:
        assert set(re.findall(r"`(\w+)`", tasks[path.name])) == shown(path), path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def cases():
    """Recipes of minutes run on demand only."""
    for path in RECIPES:
        mark = pytest.mark.exhaustive if path.stem in LONG else pytest.mark.slow
        yield pytest.param(path, id=path.stem, marks=mark)


@pytest.mark.parametrize("path", cases())
def test_recipe_runs(path, monkeypatch, tmp_path, capsys):
    """It leaves an image named after it, prints its cost, and draws from no global generator."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    runpy.run_path(str(path), run_name="__main__")
    assert torch.equal(torch.get_rng_state(), before)
    assert " NFE, " in capsys.readouterr().out
    assert list(tmp_path.glob(f"{path.stem}*.png"))
