"""The catalogue of token pruning and the registry say the same, and its recipe runs."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import diffalign as da

FOLDER = Path(__file__).parents[2] / "pruning"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(FOLDER.glob("*.py"))


def test_every_technique_has_a_row_that_points_to_its_code():
    rows = dict(re.findall(r"^\| \[`([\w-]+)`\]\(([\w./]+)\)", PAGE, flags=re.M))
    assert set(rows) == {name for name, cls in da.techniques().items() if cls.seam == "tokens"}
    for name, target in rows.items():
        module = da.techniques()[name].__module__
        path = (FOLDER / target).resolve()
        assert path.relative_to(FOLDER.parent).with_suffix("").as_posix() == module.replace(
            ".", "/"
        )


def test_every_recipe_has_a_task():
    assert set(re.findall(r"\[(\w+\.py)\]", PAGE)) == {path.name for path in RECIPES}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.name, "--steps", "12"])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "CAT: 4 of 16 image tokens in 4 of 12 steps" in printed
    assert "fewer steps: PSNR to the full run" in printed


def test_the_recipe_says_when_nothing_is_left_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fewer_tokens.py", "--steps", "9", "--keep", "1"])
    with pytest.raises(SystemExit, match="Every token was computed"):
        runpy.run_path(str(FOLDER / "fewer_tokens.py"), run_name="__main__")
