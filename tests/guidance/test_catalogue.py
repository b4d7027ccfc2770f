"""Catalogue, registry and recipes say the same, and every recipe runs."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import diffalign as da
from diffalign.core.registry import techniques
from diffalign.testing import tiny_pipeline

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "guidance"
RECIPES = sorted(FOLDER.glob("*.py"))
ROW = re.compile(
    r"^\| \[`([\w-]+)`\]\(([\w.]+)\) \| (.+) \| \[(code)\]\(([\w./]+)\) \[test\]\(.+\) \|$", re.M
)


def rows():
    found = {
        match[1]: match
        for match in ROW.finditer((FOLDER / "README.md").read_text(encoding="utf-8"))
    }
    assert len(found) == sum(
        line.startswith("| [`")
        for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    )
    return found


def guidances():
    return {name for name, cls in techniques().items() if cls.seam in ("denoiser", "attention")}


def test_every_guidance_has_a_row_and_every_row_a_guidance():
    assert set(rows()) == guidances()


def test_every_recipe_has_a_row_and_every_row_a_recipe():
    assert {match[2] for match in rows().values()} == {path.name for path in RECIPES}


def test_rows_point_to_the_code():
    for name, match in rows().items():
        module = techniques()[name].__module__
        assert (FOLDER / match[5]).resolve() == ROOT / Path(*module.split(".")).with_suffix(
            ".py"
        ), name
        identifiers = re.findall(r"\d{4}\.\d{5}", match[3])
        assert all(
            identifier
            in techniques()[name].__doc__ + (FOLDER / match[5]).read_text(encoding="utf-8")
            for identifier in identifiers
        )


def test_the_folder_is_not_a_package():
    assert not (FOLDER / "__init__.py").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, monkeypatch, tmp_path, capsys):
    """On random weights of the emoji model's kind, which need no files; the technique that the
    recipe is named after must report."""

    class Brightness:
        differentiable = True

        def __call__(self, images, prompts):
            assert len(images) == len(prompts)
            assert images.shape[1] == 3
            return images.mean((1, 2, 3))

    def load(name):
        assert name == "emoji"
        pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    monkeypatch.setattr(da, "load", load)
    monkeypatch.setattr(da.rewards, "load", lambda name: Brightness())
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    runpy.run_path(str(path), run_name="__main__")
    assert torch.equal(torch.get_rng_state(), before)
    said = capsys.readouterr().out
    assert f"\n{path.stem.replace('_', '-')}(" in said
    assert "NFE per image" in said
