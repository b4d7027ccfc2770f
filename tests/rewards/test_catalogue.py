"""Names, facts, catalogue and recipes of rewards say the same."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import diffalign as da
from diffalign.rewards import BaseReward
from diffalign.rewards.base import REWARDS, options_of_reward

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rewards"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(FOLDER.glob("*.py"))
TEXT = (
    "clip hps-v2 hps-v2-1 hps-v3 pick-score image-reward mps aesthetic aesthetic-v1 blip-vqa "
    "da-score blip-itm vqa-score vqa-score-t5 tifa dsg clip-i dino"
)
NETWORKS = TEXT.split()


def test_every_reward_has_a_row_and_every_row_a_reward():
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(\.\./([\w./]+)\)", PAGE, flags=re.M)
    assert [name for name, _ in rows] == [info.name for info in da.rewards.available()]
    assert all((ROOT / path).is_file() for _, path in rows)


@pytest.mark.parametrize("name", NETWORKS)
def test_facts_of_rewards_that_have_weights(name):
    info = next(info for info in da.rewards.available() if info.name == name)
    facts = info.facts
    assert "–" not in (facts.licence, facts.source, facts.size, facts.memory, facts.best)
    assert info.differentiable
    known = options_of_reward(REWARDS.get(name))
    assert {"source", "dtype", "batch", "cache", "offload"} <= set(known)
    cls = REWARDS.get(name)
    assert issubclass(cls, BaseReward)
    assert cls.name == name


def test_every_reward_says_what_it_is_in_a_line():
    for info in da.rewards.available():
        assert 10 < len(info.description) <= 130, info
        assert "`" not in info.description


def test_an_unknown_reward_names_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown reward 'image-rewards'\. Nearest: image-reward"):
        da.rewards.load("image-rewards")
    with pytest.raises(ValueError, match="brightness has no option 'source'"):
        da.rewards.load("brightness:source=x")


def test_every_recipe_has_a_task():
    for path in RECIPES:
        assert f"[{path.name}]({path.name})" in PAGE
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
