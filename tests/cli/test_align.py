"""``diffalign align`` and ``diffalign methods``: what is written and printed, and bad input."""

import json

import pytest
from PIL import Image

from diffalign.core.registry import methods
from diffalign.core.seeds import seed_of
from diffalign.drawing.png import read_settings

REWARD = "emoji-clip"
SHORT = ("-s", 2, "--method", "best-of-n:n=2", "--reward", REWARD)


def test_a_search_writes_its_folder(run, folder, tmp_path):
    result = run("align", "a red apple", "-m", folder, *SHORT, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["seed"] in [seed_of("a red apple", index) for index in (0, 1)]
    assert data["ledger"]["decodes"] == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert {"image.png", "before_after.png", "best.png", "curve.png", "result.json"} <= names


def test_a_folder_with_a_run_needs_resume(run, folder, tmp_path):
    command = ("align", "a red apple", "-m", folder, *SHORT, "-o", tmp_path)
    assert run(*command, "-q").exit_code == 0
    again = run(*command)
    assert again.exit_code == 2
    assert "continue it with --resume" in again.stderr
    resumed = run(*command, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["scored"] == 2


@pytest.mark.slow
def test_several_prompts_have_a_folder_each(run, folder, tmp_path):
    result = run(
        "align", "a red apple", "-p", "a dog", "-m", folder, *SHORT, "-o", tmp_path, "--json"
    )
    assert result.exit_code == 0, result.stderr
    entries = json.loads(result.stdout)
    assert [entry["prompt"] for entry in entries] == ["a red apple", "a dog"]
    for name in ("000-a-red-apple", "001-a-dog"):
        assert (tmp_path / name / "image.png").is_file()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--method", "best-of-m"), "Unknown method 'best-of-m'. Nearest: best-of-n"),
        (("--method", "best-of-n:m=2"), "best-of-n has no option 'm'"),
        (("--reward", "clap"), "Unknown reward 'clap'"),
        (("--budget", "nfe"), "'nfe' is not one of nfe, rewards"),
        (("--budget", "nfe=many"), "nfe must be a number; got 'many'"),
        (("--budget", "nfe=1.5"), "nfe must be a whole number"),
        (("--budget", "nfe=inf"), "--budget: nfe must be a whole number; got 'inf'"),
        (("--budget", "seconds=nan"), "--budget: Budget(seconds=...) must be positive"),
        (("--budget", "nfe=0"), "must be positive"),
        (("--budget", "nfe=3"), "The budget is too small: BestOfN needs at least nfe=8"),
        (("--kernel", "etta"), "Unknown kernel 'etta'. Nearest: eta"),
        (("--resume",), "there is no run in"),
    ],
)
def test_bad_input_is_one_line(run, folder, tmp_path, options, text):
    command = ("align", "a red apple", "-m", folder, "-o", tmp_path / "new", *SHORT)
    result = run(*command, *options)
    assert result.exit_code == 2
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_model_from_elsewhere_needs_a_reward(run, folder, tmp_path):
    result = run("align", "a red apple", "-m", folder, "-o", tmp_path / "new", "-s", 2)
    assert result.exit_code == 2
    assert f"--reward is needed for {folder}" in result.stderr
    assert not (tmp_path / "new").exists()


def test_embedded_pipelines_have_a_reward_for_their_edition():
    from diffalign.cli.align import usual_reward
    from diffalign.embedded.load import pipelines
    from diffalign.rewards.base import REWARDS

    usual = {name: usual_reward(name) for name in pipelines()}
    assert usual == dict.fromkeys(usual, "emoji-clip") | {"emoji-dit": "emoji-clip-2"}
    for name in usual.values():
        REWARDS.get(name)


def test_too_few_seconds_for_one_image_are_one_line(run, folder, tmp_path):
    """Nobody knows before an image was timed."""
    command = ("align", "a red apple", "-m", folder, "-o", tmp_path / "new", *SHORT)
    result = run(*command, "--budget", "seconds=0.001", "--quiet")
    assert result.exit_code == 2
    assert "diffalign: error: The budget seconds=0.001 has no room for one more im" in result.stderr
    assert result.stderr.strip().endswith("Give a larger --budget.")
    assert "Traceback" not in result.stderr


def test_a_method_that_branches_gets_a_kernel_and_says_so(run, folder, tmp_path):
    command = ("align", "a red apple", "-m", folder, "-s", 3, "--reward", REWARD)
    command += ("--budget", "nfe=60", "--scheduler", "ddim", "--method", "dts-star:preset=small")
    alone = run(*command, "-o", tmp_path / "a")
    assert alone.exit_code == 0, alone.stderr
    line = "Kernel: eta, since dts-star needs a sampler that draws noise"
    assert line in alone.stderr.splitlines()
    given = run(*command, "--kernel", "eta", "-o", tmp_path / "b")
    assert "Kernel" not in given.stderr
    one, other = (json.loads((tmp_path / n / "result.json").read_text()) for n in "ab")
    assert one["kernel"] == "Eta(eta=1.0)"
    for key in ("kernel", "moves", "score", "scored", "method"):
        assert one[key] == other[key]


def test_the_best_image_so_far_is_a_file(run, folder, tmp_path, monkeypatch):
    from diffalign.alignment.result import Result, picture

    place, images = tmp_path / "new", []

    def save(result, *rest):
        images.append((read_settings(place / "image.png"), Image.open(place / "image.png").copy()))
        assert images[-1][1].tobytes() == picture(result.top[0].image).tobytes()
        return []

    monkeypatch.setattr(Result, "save", save)
    result = run("align", "a red apple", "-m", folder, *SHORT, "-o", place)
    assert result.exit_code == 0, result.stderr
    assert f"Best image so far: {place / 'image.png'}" in result.stderr.splitlines()
    assert images[0][0].keys() == {"score"}
    assert sorted(p.name for p in place.iterdir()) == ["image.png", "run.json", "state.pt"]


def test_a_prompt_is_needed(run, folder, tmp_path):
    result = run("align", "-m", folder, *SHORT, "-o", tmp_path)
    assert result.exit_code == 2
    assert "no prompt" in result.stderr


def test_methods_are_listed_with_their_options(run):
    entries = json.loads(run("methods", "--json").stdout)
    assert [entry["name"] for entry in entries] == list(methods())
    for entry in entries:
        assert entry["what"].endswith(".")
        assert entry["cost"]
        assert all(option["meaning"] for option in entry["options"]), entry["name"]
    assert "best-of-n" in run("methods").stdout
    assert "arXiv:2501.09732" in run("methods", "best-of-n").stdout
    assert "Nearest: best-of-n" in run("methods", "best-of").stderr
