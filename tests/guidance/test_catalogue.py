"""Catalogue, registry and recipes say the same, and every recipe runs on the embedded model."""

import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest
import torch

import diffalign as da
from diffalign.core.registry import TECHNIQUES, kebab
from diffalign.testing import tiny_pipeline

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "guidance"
RECIPES = sorted(FOLDER.glob("*.py"))
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
TASK = re.compile(r"^\| [^|]+ \| \[(\w+\.py)\]\(\1\) \| ([^|]+) \|$", re.M)
ROW = re.compile(r"^\| \[`([\w-]+)`\]\(([\w./]+)\) \| ([^|]+) \|", re.M)
QUICK = {"save_time"}


def rows():
    """Name -> target of its link, and paper."""
    return {name: (target, paper) for name, target, paper in ROW.findall(PAGE)}


def shown(path):
    """Classes that a recipe makes, by their names in ``diffalign``."""
    return set(re.findall(r"da\.([A-Z]\w+)\(", path.read_text(encoding="utf-8")))


def test_every_guidance_has_a_row_and_every_row_a_guidance():
    listed = {
        name for name, cls in da.techniques().items() if cls.seam in ("denoiser", "attention")
    }
    assert set(rows()) == listed
    assert len(ROW.findall(PAGE)) == len(listed)


def test_rows_point_to_the_code_and_name_its_paper():
    for name, (target, paper) in rows().items():
        module = da.techniques()[name].__module__
        path = (FOLDER / target).resolve()
        assert path == ROOT / Path(*module.split(".")).with_suffix(".py"), name
        text = path.read_text(encoding="utf-8")
        assert all(identifier in text for identifier in re.findall(r"\d{4}\.\d{5}", paper)), name


def test_every_recipe_has_a_task_and_says_what_it_shows():
    tasks = dict(TASK.findall(PAGE))
    assert set(tasks) == {path.name for path in RECIPES}
    assert 4 <= len(tasks) <= 6
    for path in RECIPES:
        assert set(re.findall(r"`(\w+)`", tasks[path.name])) == shown(path), path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def test_the_folder_is_not_a_package():
    assert not (FOLDER / "__init__.py").exists()


@pytest.fixture
def models(monkeypatch):
    """Where the embedded models are not installed, random weights take their place."""

    class Brightness:
        differentiable = True

        def __call__(self, images, prompts):
            assert len(images) == len(prompts)
            assert images.shape[1] == 3
            return images.mean((1, 2, 3))

    names = {model.name for model in import_module("diffalign.embedded").available()}
    if "emoji" not in names:
        pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
        monkeypatch.setattr(da, "load", lambda name: pipe)
        monkeypatch.setattr(da.rewards, "load", lambda name: Brightness())


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow) for p in RECIPES],
    ids=lambda path: path.stem,
)
@pytest.mark.slow
def test_recipe_runs(path, models, monkeypatch, tmp_path, capsys):
    """It leaves an image named after it, and every technique that it makes reports."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    runpy.run_path(str(path), run_name="__main__")
    assert torch.equal(torch.get_rng_state(), before)
    printed = capsys.readouterr().out
    for name in shown(path):
        assert kebab(name) in TECHNIQUES.names()
        assert f"\n{kebab(name)}(" in printed
    assert "NFE per image" in printed
    assert list(tmp_path.glob(f"{path.stem}*.png"))
