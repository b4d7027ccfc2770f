"""``diffalign generate``: what is written, what is printed, and that the images are the pipeline's
own."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

import diffalign as da
from diffalign.core.registry import parse
from diffalign.core.seeds import seed_of
from diffalign.drawing.png import read_settings
from diffalign.generate.schedulers import NAMES

QUICK = ("ddim", "dpm++", "heun")
"""Schedulers of each kind: plain, with several steps behind it, with two evaluations a step."""
PROMPTS = ("--prompt", "a red apple", "--prompt", "a Bench, seen from above!")


def pixels(path):
    return np.asarray(Image.open(path))


def direct(folder, prompts, seeds, **options):
    """The pipeline called as its documentation says, without this project; one call."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    rng = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return [np.asarray(image) for image in pipe(prompts, generator=rng, **options).images]


def test_plain_images_are_the_pipelines_own(run, folder, tmp_path):
    result = run(
        "generate",
        "-m",
        folder,
        "-o",
        tmp_path,
        *PROMPTS,
        "-c",
        2,
        "--seed",
        7,
        "-s",
        3,
        "--scale",
        5,
        "-n",
        "blurry",
        "-b",
        4,
    )
    assert result.exit_code == 0, result.stderr
    prompts = ["a red apple"] * 2 + ["a Bench, seen from above!"] * 2
    expected = direct(
        folder,
        prompts,
        [seed_of(prompt, i, base=7) for prompt in prompts[::2] for i in (0, 1)],
        num_inference_steps=3,
        guidance_scale=5.0,
        negative_prompt=["blurry"] * 4,
    )
    names = [
        f"00{p}-{slug}-s7-{i}.png"
        for p, slug in enumerate(("a-red-apple", "a-bench-seen-from-above"))
        for i in (0, 1)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, image in zip(names, expected):
        assert np.array_equal(pixels(tmp_path / name), image)


def test_technique_acts_and_settings_repeat_the_image(run, folder, tmp_path):
    text = "adaptive-guidance:threshold=-1,scale=4"
    result = run("generate", "-m", folder, "-o", tmp_path, "-p", "a red apple", "-t", text, "-s", 6)
    assert result.exit_code == 0, result.stderr
    # the cosine is above -1, so the first permitted step (the second) latches: 2 guided steps of 6
    # cost 6 + 2
    assert "guided 2 of 6 steps, 8 NFE per image (CFG: 12)" in result.stdout
    path = tmp_path / "000-a-red-apple-s0-0.png"
    assert result.stdout.splitlines()[-1] == str(path)
    settings = read_settings(path)
    assert da.techniques_of(settings) == parse(text)
    assert {settings[key] for key in ("pipeline", "scheduler", "dtype", "device")} == {
        "StableDiffusionPipeline",
        "DDIMScheduler",
        "float32",
        "cpu",
    }
    assert (settings["prompt"], settings["seed"], settings["steps"], settings["scale"]) == (
        "a red apple",
        seed_of("a red apple", 0),
        6,
        7.5,
    )
    pipe = DiffusionPipeline.from_pretrained(folder)
    with da.apply(pipe, *da.techniques_of(settings)):
        again = pipe(
            ["a red apple"],
            generator=[torch.Generator("cpu").manual_seed(settings["seed"])],
            num_inference_steps=6,
        ).images[0]
    assert np.array_equal(pixels(path), np.asarray(again))


def test_several_techniques_act_together(run, folder, tmp_path):
    result = run(
        "generate",
        "-m",
        folder,
        "-o",
        tmp_path,
        "-p",
        "x",
        "-t",
        "cfg:scale=3",
        "-t",
        "pladis",
        "-s",
        2,
    )
    assert result.exit_code == 0, result.stderr
    assert [t["name"] for t in read_settings(next(tmp_path.glob("*.png")))["techniques"]] == [
        "cfg",
        "pladis",
    ]


def test_noise_of_an_image_does_not_depend_on_its_batch(run, folder, tmp_path):
    for batch in (1, 3, 8):
        arguments = ("-o", tmp_path / str(batch), "-b", batch, *PROMPTS, "-c", 3, "-s", 3)
        assert run("generate", "-m", folder, *arguments).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 6
    for name in names:
        one, three, eight = (
            pixels(tmp_path / batch / name).astype(int) for batch in ("1", "3", "8")
        )
        # the composition of a batch may change the last bits, which rounding to 8 bits can turn
        # into one grey level
        assert max(abs(one - three).max(), abs(one - eight).max()) <= 1
    first = pixels(tmp_path / "1" / names[0]).astype(int)
    assert abs(first - pixels(tmp_path / "1" / names[1])).max() > 1


def test_global_random_state_is_untouched(run, folder, tmp_path):
    before = torch.get_rng_state()
    assert (
        run("generate", "-m", folder, "-o", tmp_path, "-p", "x", "-t", "cfg", "-s", 2).exit_code
        == 0
    )
    assert torch.equal(before, torch.get_rng_state())


def test_json_is_all_there_is_on_standard_output(run, folder, tmp_path):
    result = run(
        "generate",
        "-m",
        folder,
        "-o",
        tmp_path,
        "-p",
        "x",
        "-t",
        "cfg",
        "-s",
        2,
        "-c",
        2,
        "--json",
        "--plot",
    )
    data = json.loads(result.stdout)
    assert [image["seed"] for image in data["images"]] == [seed_of("x", 0), seed_of("x", 1)]
    assert all(Image.open(image["file"]).size == (16, 16) for image in data["images"])
    assert data["report"]["nfe"] == 4
    assert data["report"]["scale"] == pytest.approx([7.5, 7.5], rel=1e-3)
    assert Image.open(data["plot"]).size == (900, 480)
    assert result.stderr == ""


def test_quiet_prints_nothing(run, folder, tmp_path):
    result = run("generate", "-m", folder, "-o", tmp_path, "-p", "x", "-s", 1, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_plot_of_a_run_without_guidance_says_so(run, folder, tmp_path):
    result = run(
        "generate", "-m", folder, "-o", tmp_path, "-p", "x", "-s", 2, "-t", "cfg:scale=1", "--plot"
    )
    assert result.exit_code == 0
    assert [
        line for line in result.stderr.splitlines() if "Nothing to plot" in line
    ] == result.stderr.splitlines()[-1:]
    assert not (tmp_path / "scale.png").exists()


def test_prompts_file_and_size(run, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n\n  ein grüner Apfel  \n", encoding="utf-8")
    arguments = (
        "-o",
        tmp_path / "out",
        "--prompts-file",
        tmp_path / "prompts.txt",
        "-p",
        "first",
        "--size",
        "24x16",
        "-s",
        1,
        "--json",
    )
    data = json.loads(run("generate", "-m", folder, *arguments).stdout)
    assert [image["prompt"] for image in data["images"]] == [
        "first",
        "a red apple",
        "ein grüner Apfel",
    ]
    assert {Image.open(image["file"]).size for image in data["images"]} == {(24, 16)}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES],
)
@pytest.mark.few(1)
def test_every_scheduler_samples(run, folder, tmp_path, name):
    result = run(
        "generate",
        "-m",
        folder,
        "-o",
        tmp_path,
        "-p",
        "x",
        "-s",
        4,
        "-t",
        "cfg",
        "--scheduler",
        name,
    )
    assert result.exit_code == 0, result.stderr
    assert read_settings(tmp_path / "000-x-s0-0.png")["scheduler"] == NAMES[name]
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = getattr(diffusers, NAMES[name]).from_config(pipe.scheduler.config)
    expected = pipe(
        ["x"],
        generator=[torch.Generator("cpu").manual_seed(seed_of("x", 0))],
        num_inference_steps=4,
    ).images[0]
    assert np.array_equal(pixels(tmp_path / "000-x-s0-0.png"), np.asarray(expected))


def test_interrupt_keeps_finished_images(run, folder, tmp_path, monkeypatch):
    forward, calls = UNet2DConditionModel.forward, []

    def interrupted(self, sample, timestep, encoder_hidden_states, **rest):
        calls.append(1)
        if len(calls) == 6:  # the second step of the second batch
            raise KeyboardInterrupt
        return forward(self, sample, timestep, encoder_hidden_states, **rest)

    monkeypatch.setattr(UNet2DConditionModel, "forward", interrupted)
    result = run(
        "generate", "-m", folder, "-o", tmp_path, "-p", "x", "-s", 4, "-c", 5, "-b", 2, "-t", "cfg"
    )
    assert result.exit_code == 130
    assert result.stderr == f"diffalign: stopped: 2 of 5 images are kept in {tmp_path}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000-x-s0-0.png",
        "000-x-s0-1.png",
    ]


def test_interrupt_of_the_program(program, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "diffalign.generate.models.Blueprint.load",
        lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    assert program("generate", "-m", folder, "-o", tmp_path, "-p", "x") == (
        130,
        "",
        "diffalign: stopped: interrupted\n",
    )
