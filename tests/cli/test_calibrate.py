"""``diffalign calibrate adaptive-guidance``: the preset it writes is used, its figures are the
library's, bad input ends early."""

import datetime
import functools
import json

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import diffalign as da
from diffalign.calibration.adaptive import calibrate_adaptive_guidance
from diffalign.cli.calibrate import Trials
from diffalign.core.presets import VARIABLE

CALIBRATE = ("calibrate", "adaptive-guidance")


@pytest.mark.slow
def test_preset_is_written_and_used(run, folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red apple\ntwo cats\na bench\n")
    arguments = (
        "-m",
        folder,
        "-s",
        6,
        "--scale",
        3,
        "-c",
        5,
        "-b",
        2,
        "--seed",
        7,
        "--prompts-file",
        tmp_path / "prompts.txt",
    )
    result = run(
        *CALIBRATE, *arguments, "--saving", 0.2, "--space", "x0", "-o", tmp_path / "new" / "mine"
    )
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["mine.json", "mine.png"]
    assert Image.open(tmp_path / "new" / "mine.png").size == (900, 960)
    texts = ["a red apple", "two cats", "a bench", "a red apple", "two cats"]
    pipe = DiffusionPipeline.from_pretrained(folder)
    expected = calibrate_adaptive_guidance(
        pipe, texts, scale=3.0, steps=6, saving=0.2, space="x0", batch=2, seed=7
    )
    space, entry = json.loads((tmp_path / "new" / "mine.json").read_text())["adaptive-guidance"]
    assert (space["option"], space["value"]) == ("space", "x0")
    assert (entry["option"], entry["value"], entry["when"]) == (
        "threshold",
        expected.threshold,
        expected.when,
    )
    for word in (
        da.__version__,
        datetime.date.today().isoformat(),
        str(folder),
        "5 prompts",
        "seeds from 7",
        "saved",
        "pixel difference",
    ):
        assert word in entry["source"]
    assert "of GenEval" not in entry["source"]
    assert f"{expected.threshold:g} *" in result.stdout
    assert f"{float(expected.difference.mean()):.4f}" in result.stdout
    use = (
        "generate",
        "-m",
        folder,
        "-p",
        "a bench",
        "-s",
        6,
        "--scale",
        3,
        "-t",
        "adaptive-guidance",
        "-o",
        tmp_path / "i",
        "--json",
    )
    assert (
        json.loads(run(*use).stdout)["report"]["resolved"]["adaptive-guidance"]["threshold"][0]
        == 0.991
    )
    assert f"{VARIABLE}={tmp_path / 'new' / 'mine.json'} " in result.stdout
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new" / "mine.json"))
    used = json.loads(run(*use).stdout)["report"]["resolved"]["adaptive-guidance"]
    assert (used["space"], used["threshold"]) == (
        ["x0", entry["source"]],
        [expected.threshold, entry["source"]],
    )


def test_json_and_defaults(run, folder, tmp_path):
    result = run(*CALIBRATE, "-m", folder, "-s", 8, "-c", 3, "-o", tmp_path / "a.json", "--json")
    data = json.loads(result.stdout)
    assert (data["preset"], data["plot"]) == (str(tmp_path / "a.json"), str(tmp_path / "a.png"))
    space, entry = json.loads((tmp_path / "a.json").read_text())["adaptive-guidance"]
    assert (space["option"], space["value"], space["source"]) == ("space", "eps", entry["source"])
    assert data["threshold"] == entry["value"]
    assert data["when"] == entry["when"]
    assert (data["when"]["space"], data["when"]["scale"], data["when"]["steps"]) == ("eps", 7.5, 8)
    assert "3 prompts of GenEval" in data["source"]
    assert data["nfe_cfg"] == 16
    assert data["nfe"] <= 0.75 * 16
    (chosen,) = [row for row in data["table"] if row["threshold"] == data["threshold"]]
    assert chosen["nfe"] == pytest.approx(data["nfe"])
    assert data["difference"] > 0


def test_agreement_in_pure_noise_is_pointed_out(run, folder, tmp_path):
    """Saving as much as is possible latches every image at the first step that may."""
    result = run(
        *CALIBRATE, "-m", folder, "-s", 4, "-c", 2, "--saving", 0.25, "-o", tmp_path / "a", "-q"
    )
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("diffalign: warning: 2 of 2 images that latch do so at step 2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--saving", "0"], ["saving", "above 0"]),
        (["--saving", "0.46"], ["saving", "at most 0.450", "20 steps"]),
        (["--steps", "2", "--saving", "0.1"], ["2 steps leave nothing to save"]),
        (["--scale", "1"], ["nothing to save"]),
        (["--count", "0"], ["--count"]),
        (["--seed", "-1"], ["--seed"]),
        (["--scheduler", "eulr"], ["eulr", "euler"]),
    ],
)
def test_bad_options(run, folder, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(
        StableDiffusionPipeline, "encode_prompt", lambda *a, **k: pytest.fail("computed")
    )
    result = run(*CALIBRATE, "-m", folder, "-s", 20, "-o", tmp_path / "preset", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_taken(run, folder, tmp_path):
    (tmp_path / "preset.png").mkdir()
    result = run(*CALIBRATE, "-m", folder, "-o", tmp_path / "preset.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "preset.png" in result.stderr


def test_too_few_steps_to_save_any(run, folder, tmp_path):
    result = run(*CALIBRATE, "-m", folder, "-o", tmp_path / "preset.json", "--steps", "1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "give more steps" in result.stderr


def test_a_broken_preset_file_is_bad_input(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone.json"))
    result = run(
        "generate", "-m", folder, "-p", "x", "-s", 2, "-t", "adaptive-guidance", "-o", tmp_path
    )
    assert result.exit_code == 2
    assert VARIABLE in result.stderr
    assert "gone.json" in result.stderr


def test_interrupt_writes_nothing(run, folder, tmp_path, monkeypatch):
    forward, calls = UNet2DConditionModel.forward, []

    @functools.wraps(forward)
    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # in the second generation
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", interrupted)
    result = run(
        *CALIBRATE, "-m", folder, "-s", 4, "-c", 2, "--saving", 0.2, "-o", tmp_path / "preset"
    )
    assert (result.exit_code, result.stderr) == (130, "diffalign: stopped: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_loss_comes_with_a_promise(run, folder, tmp_path):
    arguments = ("-m", folder, "-s", 4, "--scale", 3, "-c", 12, "-b", 6, "--loss", 0.4)
    result = run(
        *CALIBRATE, *arguments, "--confidence", 0.9, "--json", "-o", tmp_path / "mine.json"
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    promise = told["guarantee"]
    assert (promise["loss"], promise["confidence"], promise["images"]) == (0.4, 0.9, 9)
    assert told["threshold"] in [trial["threshold"] for trial in promise["trials"]]
    words = "mean loss (pixels) at most 0.4 at confidence 0.9, tested on 9 images"
    assert told["source"].endswith(words)
    entries = json.loads((tmp_path / "mine.json").read_text())["adaptive-guidance"]
    assert words in entries[1]["source"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--loss", 0.02), "needs at least 149 images to test on, 199 in all; got 64"),
        (("--loss", 0.5, "--saving", 0.1), "exclude each other"),
        (("--loss", 0.5, "--measure", "verdict"), "only embedded models have a judge"),
    ],
)
def test_a_promise_that_cannot_be_given_ends_early(run, folder, tmp_path, more, words):
    result = run(*CALIBRATE, "-m", folder, "-s", 6, "--scale", 3, "-o", tmp_path / "a.json", *more)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_policy_is_searched_written_and_used(run, folder, tmp_path):
    where = ("-m", folder, "-s", 4, "--scale", 3, "-c", 4, "--nfe", 7)
    result = run("calibrate", "policy", *where, "--json", "-o", tmp_path / "new" / "p")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.json"]
    assert json.loads((tmp_path / "new" / "p.json").read_text()) == told
    assert sum(bool(share) for share in told["shares"]) == 3
    assert 0 < told["error"] < told["unguided"]
    assert told["technique"] in told["use"]
    again = run(
        "generate", "-m", folder, "-s", 4, "--scale", 3, "-p", "a cat", "-o", tmp_path / "out",
        "--json", "-t", told["technique"],
    )  # fmt: skip
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["report"]["nfe"] == 7


def test_a_policy_that_leaves_nothing_to_search(run, folder, tmp_path):
    where = ("-m", folder, "-s", 4, "--scale", 3, "-c", 4)
    result = run("calibrate", "policy", *where, "--nfe", 8, "-o", tmp_path / "p.json")
    assert result.exit_code == 2
    assert "below 8, plain guidance" in result.stderr


def test_trials_outlive_a_search_and_another_setting_drops_them(tmp_path):
    path = tmp_path / "p.trials.json"
    trials = Trials(path, "a")
    trials[1.0, 0.0] = 0.25
    trials[1.0, 0.5] = 0.5
    assert Trials(path, "a") == {(1.0, 0.0): 0.25, (1.0, 0.5): 0.5}
    assert not Trials(path, "b")
