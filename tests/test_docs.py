"""The page that explains the house: its picture shows the rooms, a word has one meaning."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# rooms that stand outside the levels
ASIDE = {"testing"}


def constant(path, name):
    """The value of a constant of a script, without running it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no {name}")


def test_the_picture_of_the_rooms_shows_the_rooms():
    levels = constant(ROOT / "docs" / "pictures.py", "LEVELS")
    drawn = [name for names, _ in levels for name in names]
    rooms = {path.parent.name for path in (ROOT / "diffalign").glob("*/__init__.py")}
    assert set(drawn) == rooms - ASIDE
    assert len(drawn) == len(set(drawn))


def test_the_picture_has_the_levels_that_are_tested():
    layers = constant(ROOT / "tests" / "test_package.py", "LAYERS")
    drawn = [set(names) for names, _ in constant(ROOT / "docs" / "pictures.py", "LEVELS")]
    shown = set().union(*drawn)
    assert [part for names in layers if (part := set(names) & shown)] == drawn


def test_a_step_of_the_picture_stands_in_a_file():
    steps = constant(ROOT / "docs" / "pictures.py", "STEP")
    files = [where for where, _, _ in steps if where.endswith(".py")]
    folder = ROOT / "diffalign" / "seams" / "denoiser"
    assert files
    for name in files:
        assert (folder / Path(name).name).is_file(), name


def test_every_word_of_the_glossary_has_one_meaning():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Words") :]
    words = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", table, flags=re.M)[1:]
    names, meanings = zip(*((word, text) for word, text in words if set(word) != {"-"}))
    assert len(names) > 10
    assert len(set(names)) == len(names)
    assert len(set(meanings)) == len(meanings)


def test_files_that_the_page_names_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)+\.py)`", page):
        assert (ROOT / name).exists() or (ROOT / "diffalign" / name).exists(), name
