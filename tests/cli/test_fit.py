"""``diffalign fit linear-ag``: the policy is the library's, it is written whole or not at all, and
bad input ends before any step."""

import functools
import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

import diffalign as da
from diffalign.calibration.linear import fit_linear_ag
from diffalign.cli.measurement import spread
from diffalign.families import refusals
from diffalign.guidance.linear_policy import LinearPolicy
from diffalign.tasks.geneval.verdict import prompts

FIT = ("fit", "linear-ag")


def refused(result, *words):
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("diffalign: error: ")
    for word in words:
        assert word in result.stderr


@pytest.fixture
def unmoved(monkeypatch):
    """Fails when a pipeline begins to compute."""
    monkeypatch.setattr(
        StableDiffusionPipeline, "encode_prompt", lambda *a, **k: pytest.fail("computed")
    )


@pytest.mark.slow
def test_policy_is_the_librarys_and_acts(run, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\ntwo cats\n")
    arguments = (
        "-m",
        folder,
        "-s",
        4,
        "--scale",
        3,
        "-c",
        3,
        "-b",
        2,
        "--seed",
        7,
        "--prompts-file",
        tmp_path / "prompts.txt",
    )
    result = run(*FIT, *arguments, "-o", tmp_path / "new" / "w3.0")
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["w3.0.json", "w3.0.safetensors"]
    assert "3 trajectories, 5 NFE per image (CFG: 8)" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(
        f"diffalign generate --model {folder} --steps 4 --scale 3 --technique linear-ag:policy="
    )
    pipe = DiffusionPipeline.from_pretrained(folder)
    expected = fit_linear_ag(
        pipe, ["a red apple", "two cats", "a red apple"], scale=3.0, steps=4, batch=2, seed=7
    )
    made = LinearPolicy.load(tmp_path / "new" / "w3.0")
    assert made.identity == expected.identity
    assert torch.equal(made.coefficients[1], expected.coefficients[1])
    line = result.stdout.splitlines()[-1].split()[1:]  # the printed line works as it is
    done = run(*line, "-p", "a bench", "-o", tmp_path / "images")
    assert done.exit_code == 0, done.stderr
    assert "guided 1 of 4 steps, 5 NFE per image (CFG: 8)" in done.stdout


def test_json_says_the_same_and_nothing_else(run, folder, tmp_path):
    result = run(
        *FIT,
        "-m",
        folder,
        "-s",
        6,
        "-c",
        2,
        "-o",
        tmp_path / "a.json",
        "--plan",
        "ggeecc",
        "--json",
    )
    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert data["policy"] == str(tmp_path / "a")
    assert data["files"] == [str(tmp_path / "a.json"), str(tmp_path / "a.safetensors")]
    assert (data["nfe"], data["nfe_cfg"], data["trajectories"], data["identity"]["scale"]) == (
        8,
        12,
        2,
        7.5,
    )
    assert data["plan"] == [
        "guided",
        "guided",
        "estimated",
        "estimated",
        "conditional",
        "conditional",
    ]
    assert set(data["r2"]) == set(data["gain"]) == {"2", "3"}
    assert LinearPolicy.load(tmp_path / "a").identity.model == data["identity"]["model"]
    quiet = run(*FIT, "-m", folder, "-s", 4, "-c", 1, "-o", tmp_path / "b", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_scheduler_with_one_step_more_than_asked_for(run, folder, tmp_path):
    """PNDM as Stable Diffusion ships it: the plan covers what is really sampled."""
    import shutil

    other = tmp_path / "pndm"
    shutil.copytree(folder, other)
    (other / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "PNDMScheduler",
                "skip_prk_steps": True,
                "beta_schedule": "scaled_linear",
                "steps_offset": 1,
            }
        )
    )
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", "PNDMScheduler"]})
    )
    assert run(*FIT, "-m", other, "-s", 4, "-c", 2, "-o", tmp_path / "p", "-q").exit_code == 0
    policy = LinearPolicy.load(tmp_path / "p")
    assert (len(policy.plan), policy.identity.steps, policy.identity.scheduler) == (
        5,
        4,
        "PNDMScheduler",
    )
    pipe = DiffusionPipeline.from_pretrained(other)
    with da.apply(pipe, da.LinearAG(policy=str(tmp_path / "p"))) as session:
        pipe("x", num_inference_steps=4, guidance_scale=7.5, output_type="latent")
    assert session.report().nfe == 5 + policy.plan.count("guided")


def test_prompts_are_spread_over_all_of_genevals_or_repeated():
    official = tuple(str(entry["prompt"]) for entry in prompts())
    some = spread(official, 200)
    assert len(set(some)) > 190
    assert {e["tag"] for e in prompts() if e["prompt"] in some} == {e["tag"] for e in prompts()}
    assert spread(official, 553) == list(official)
    assert spread(("a", "b"), 5) == ["a", "b", "a", "b", "a"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "0"], ["--count"]),
        (["--steps", "0"], ["--steps"]),
        (["--steps", "1"], ["steps", "at least 4"]),
        (["--scale", "1"], ["nothing to fit", "scale above 1"]),
        (["--scale", "nan"], ["--scale"]),
        (["--scheduler", "heun"], ["one evaluation per step", "HeunDiscreteScheduler takes 2"]),
        (["--plan", "gec"], ["plan needs 20 modes"]),
        (["--steps", "4", "--plan", "gxcc"], ["plan needs", "x"]),
        (["--steps", "4", "--plan", "gece"], ["only conditional ones after"]),
        (["--prompts-file", "missing.txt"], ["missing.txt"]),
        (["--size", "15"], ["--size", "multiple of 2"]),
        (["--seed", "-1"], ["--seed"]),
    ],
)
def test_bad_options(run, unmoved, folder, tmp_path, arguments, words):
    refused(run(*FIT, "-m", folder, "-o", tmp_path / "policy", *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_bad_model_and_output(run, unmoved, folder, index, tmp_path):
    import diffusers

    refused(run(*FIT, "-m", "emojii", "-o", tmp_path / "p"), "emojii")
    name = next(name for name in refusals() if isinstance(getattr(diffusers, name, None), type))
    refused(run(*FIT, "-m", index(name), "-o", tmp_path / "p"), " ".join(refusals()[name].split()))
    (tmp_path / "file").write_text("in the way")
    refused(
        run(*FIT, "-m", folder, "-o", tmp_path / "file" / "p"),
        "--output",
        "is a file; give a folder",
    )
    refused(run(*FIT, "-m", folder, "-o", tmp_path), "--output", "is a folder")
    (tmp_path / "taken.json").mkdir()
    refused(
        run(*FIT, "-m", folder, "-o", tmp_path / "taken"), "--output", "taken.json", "is a folder"
    )


def test_output_is_required(program):
    code, out, err = program(*FIT)
    assert (code, out) == (2, "")
    assert "--output" in err
    assert len(err.splitlines()) == 1


def test_interrupt_writes_nothing(run, folder, tmp_path, monkeypatch):
    forward, calls = UNet2DConditionModel.forward, []

    @functools.wraps(forward)
    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # in the second batch
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", interrupted)
    result = run(*FIT, "-m", folder, "-s", 4, "-c", 4, "-b", 2, "-o", tmp_path / "policy")
    assert (result.exit_code, result.stderr) == (130, "diffalign: stopped: nothing was written\n")
    assert list(tmp_path.iterdir()) == []
