"""Every bad input: exit code 2 and one line that says what to do, before weights are read or
anything is computed."""

import functools
import sys

import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from diffalign import cli
from diffalign.families import refusals
from diffalign.generate import schedulers
from diffalign.generate.errors import BadOption

PROMPT = ("--prompt", "a bench")


@pytest.fixture
def untouched(monkeypatch):
    """Fails when weights are loaded or a pipeline is called."""

    def never(*args, **kwargs):
        raise AssertionError("bad input was noticed too late")

    monkeypatch.setattr("diffalign.generate.models.Blueprint.load", never)
    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", never)


def computed(monkeypatch):
    """Fails when a pipeline begins to compute."""
    monkeypatch.setattr(
        StableDiffusionPipeline, "encode_prompt", lambda *a, **k: pytest.fail("computed")
    )


def refused(result, *words):
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("diffalign: error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("command", ["generate", "compare"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-t", "adaptive-guidence"], ["adaptive-guidence", "Nearest", "adaptive-guidance"]),
        (["-t", "adaptive-guidance:treshold=0.9"], ["treshold", "threshold"]),
        (["-t", "adaptive-guidance:threshold"], ["key=value"]),
        (["-t", "adaptive-guidance:space=pixels"], ["space", "eps", "x0", "pixels"]),
        (["-t", "adaptive-guidance:threshold=high"], ["threshold", "number", "high"]),
        (["-t", "cfg:scale=nan"], ["scale", "finite"]),
        (["-t", "cfg:scale=inf"], ["scale", "finite"]),
        (["-t", ""], ["empty part"]),
        (["-t", "cfg+"], ["empty part"]),
        (["-t", "cfg+adaptive-guidance"], ["CFG", "AdaptiveGuidance", "only one"]),
        (["-t", "cfg:scale=2+cfg:scale=3"], ["twice"]),
        (["--scale", "nan"], ["--scale", "finite"]),
        (["--scale", "inf"], ["--scale", "finite"]),
        (["--scale", "0.5"], ["--scale", "at least 1", "0.5"]),
        (["--steps", "0"], ["--steps", "at least 1", "0"]),
        (["--steps", "-3"], ["--steps", "-3"]),
        (["--count", "0"], ["--count"]),
        (["--batch", "0"], ["--batch"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--size", "big"], ["--size", "768x512", "big"]),
        (["--size", "0"], ["--size"]),
        (["--scheduler", "eulr"], ["eulr", "euler"]),
        (["--device", "abacus"], ["--device", "abacus", "cpu"]),
        (["--dtype", "fp8"], ["--dtype", "fp32", "fp8"]),
        (["--prompt", "  "], ["--prompt", "empty"]),
        (["--prompts-file", "missing.txt"], ["missing.txt"]),
    ],
)
def test_options(run, untouched, folder, tmp_path, command, arguments, words):
    refused(run(command, "-m", folder, "-o", tmp_path / "out", *PROMPT, *arguments), *words)
    assert not (tmp_path / "out" / "images").exists()


def test_absent_device(run, untouched, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(
        run("generate", "-m", folder, "-o", tmp_path, *PROMPT, "--device", "cuda:77"),
        "--device",
        "cuda:77",
        "'cpu' can",
    )


def test_no_prompt(run, untouched, folder, tmp_path):
    refused(run("generate", "-m", folder, "-o", tmp_path), "--prompt")
    refused(run("generate", "-m", folder, "-o", tmp_path, "--prompt", ""), "--prompt", "empty")
    (tmp_path / "blank.txt").write_text("\n  \n")
    refused(
        run("generate", "-m", folder, "-o", tmp_path, "--prompts-file", tmp_path / "blank.txt"),
        "blank.txt",
        "no prompt",
    )


def test_unknown_model(run, untouched, emoji, tmp_path):
    refused(run("generate", "-m", "emojii", "-o", tmp_path, *PROMPT), "emojii", "emoji")
    refused(
        run("generate", "-m", "emoji-judge", "-o", tmp_path, *PROMPT),
        "emoji-judge",
        "does not make images",
    )
    (tmp_path / "empty").mkdir()
    refused(run("generate", "-m", tmp_path / "empty", "-o", tmp_path, *PROMPT), "model_index.json")


def test_embedded_model_that_is_not_installed(run, untouched, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["diffalign.embedded.load"], "FOLDER", tmp_path)
    refused(run("generate", "-m", "emoji", "-o", tmp_path, *PROMPT), "emoji", "not installed")


def test_hub_id_without_network(run, untouched, tmp_path):
    refused(
        run("generate", "-m", "nobody/no-such-pipeline", "-o", tmp_path, *PROMPT),
        "nobody/no-such-pipeline",
        "hub",
    )


def test_a_hub_that_cannot_be_reached_is_not_called_a_bad_repository(
    run, untouched, tmp_path, monkeypatch
):
    def unreachable(name):
        try:
            raise ConnectionError("Name or service not known")
        except ConnectionError as error:
            raise OSError(
                f"{name} does not appear to have a file named model_index.json"
            ) from error

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", unreachable)
    refused(
        run("generate", "-m", "nobody/pipeline", "-o", tmp_path, *PROMPT),
        "hub cannot be reached",
        "give a folder",
    )


def test_pipelines_that_cannot_serve(run, untouched, index, tmp_path):
    import diffusers

    name = next(name for name in refusals() if isinstance(getattr(diffusers, name, None), type))
    refused(
        run("compare", "-m", index(name), "-o", tmp_path, *PROMPT),
        name,
        " ".join(refusals()[name].split()),
    )
    refused(
        run("compare", "-m", index("NoSuchPipeline"), "-o", tmp_path, *PROMPT),
        "NoSuchPipeline",
        diffusers.__version__,
    )
    refused(
        run("compare", "-m", index("WanPipeline"), "-o", tmp_path, *PROMPT), "WanPipeline", "videos"
    )
    refused(
        run("compare", "-m", index("StableDiffusionImg2ImgPipeline"), "-o", tmp_path, *PROMPT),
        "image",
    )
    refused(run("compare", "-m", index("DiTPipeline"), "-o", tmp_path, *PROMPT), "class_labels")


def test_output_that_cannot_be_written(run, untouched, folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(
        run("generate", "-m", folder, "-o", tmp_path / "file", *PROMPT),
        "--output",
        "is a file; give a folder",
    )
    refused(
        run("generate", "-m", folder, "-o", tmp_path / "file" / "below", *PROMPT),
        "--output",
        "cannot be written",
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["compare.png", "compare.json", "images"])
def test_names_that_are_taken(run, untouched, folder, tmp_path, name):
    (tmp_path / name).touch() if name == "images" else (tmp_path / name).mkdir()
    refused(run("compare", "-m", folder, "-o", tmp_path, *PROMPT), name, "Give another --output")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_prompts_file_that_is_no_text(run, untouched, folder, tmp_path):
    (tmp_path / "picture").write_bytes(b"\xd0\xff\x00")
    refused(
        run("generate", "-m", folder, "-o", tmp_path, "--prompts-file", tmp_path / "picture"),
        "--prompts-file",
        "UTF-8",
    )


@pytest.mark.parametrize(
    "command", [["generate", *PROMPT], ["fit", "linear-ag"], ["calibrate", "adaptive-guidance"]]
)
def test_more_steps_than_the_scheduler_has(run, folder, tmp_path, monkeypatch, command):
    computed(monkeypatch)
    refused(
        run(*command, "-m", folder, "-o", tmp_path / "out", "--steps", "5000"),
        "--steps",
        "at most 1000",
        "5000",
    )


def test_what_only_the_loaded_model_can_tell_stops_before_the_first_step(
    run, folder, tmp_path, monkeypatch
):
    computed(monkeypatch)
    refused(
        run("compare", "-m", folder, "-o", tmp_path, *PROMPT, "--size", "15"),
        "--size",
        "multiple of 2",
    )


def test_a_techniques_own_refusal_stops_before_the_first_step(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "diffalign.attention.nag.nag.NAG.refuses",
        lambda self, context: f"{context.family} is not for me",
    )
    computed(monkeypatch)
    refused(
        run("compare", "-m", folder, "-o", tmp_path, *PROMPT, "-t", "nag"),
        "NAG",
        "sd is not for me",
    )
    refused(
        run("compare", "-m", folder, "-o", tmp_path, *PROMPT, "-t", "skip-layer-guidance"),
        "layers=",
    )


def test_distilled_model_is_refused_before_the_first_step(run, folder, tmp_path, monkeypatch):
    import diffusers

    load = diffusers.DiffusionPipeline.from_pretrained.__func__

    def distilled(cls, *args, **kwargs):
        pipe = load(cls, *args, **kwargs)
        pipe.unet.register_to_config(time_cond_proj_dim=8)
        return pipe

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(distilled))
    computed(monkeypatch)
    refused(
        run("compare", "-m", folder, "-o", tmp_path, *PROMPT, "-t", "adaptive-guidance"),
        "AdaptiveGuidance",
        "distilled",
    )


def test_the_pipelines_own_refusal_is_bad_input_too(run, folder, tmp_path, monkeypatch):
    def check_inputs(self, *args, **kwargs):
        raise ValueError("`height` has to be\n divisible by 8.")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.check_inputs", check_inputs)
    refused(
        run("generate", "-m", folder, "-o", tmp_path, *PROMPT), "`height` has to be divisible by 8."
    )


def test_an_error_that_is_not_the_users_is_not_called_bad_input(run, folder, tmp_path, monkeypatch):
    @functools.wraps(UNet2DConditionModel.forward)
    def broken(self, *args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(UNet2DConditionModel, "forward", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("generate", "-m", folder, "-o", tmp_path, *PROMPT)


def test_plot_without_guidance(run, untouched, folder, tmp_path):
    refused(
        run("generate", "-m", folder, "-o", tmp_path, *PROMPT, "--plot"),
        "--plot",
        "--technique cfg",
    )


def test_usage_errors_are_one_line_as_well(program):
    for arguments in (["generate", "--stepz", "4"], ["generate", "--steps", "many"], ["generat"]):
        code, out, err = program(*arguments)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert err.startswith("diffalign: error: ")
    assert "--steps" in program("generate", "--stepz", "4")[2]


def test_abort_outside_a_command_is_an_interrupt_too(capsys):
    def aborted(standalone_mode):
        raise typer.Abort

    with pytest.raises(SystemExit) as ended:
        cli.main(aborted)
    assert (ended.value.code, capsys.readouterr().err) == (130, "diffalign: stopped: interrupted\n")


def test_techniques_and_models_refuse_unknown_names(run):
    refused(run("techniques", "adaptive"), "adaptive", "adaptive-guidance")
    refused(run("models", "StableDiffusionPipelin"), "StableDiffusionPipeline")
    refused(run("models", "Xyzzy"), "Xyzzy", "Nearest: none")


def test_models_without_a_scale_say_so(run):
    assert "no guidance scale to set" in run("models", "FluxControlPipeline").stdout


@pytest.mark.parametrize(
    ("name", "current", "expected"),
    [
        ("ddim", "DDIMScheduler", "DDIMScheduler"),
        ("dpm++", "DDIMScheduler", "DPMSolverMultistepScheduler"),
        ("euler", "PNDMScheduler", "EulerDiscreteScheduler"),
        ("euler", "FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_scheduler_names(name, current, expected):
    assert schedulers.class_name(name, current) == expected


def test_scheduler_that_does_not_fit():
    with pytest.raises(
        BadOption,
        match=r"ddim .* cannot replace .*FlowMatchEulerDiscreteScheduler; euler can be used",
    ):
        schedulers.class_name("ddim", "FlowMatchEulerDiscreteScheduler")


def test_bad_input_makes_no_folder(run, untouched, folder, tmp_path):
    for arguments in (["-m", "emojii"], ["-m", folder, "--scheduler", "eulr"]):
        refused(run("generate", *arguments, "-o", tmp_path / "new" / "out", *PROMPT))
    assert list(tmp_path.iterdir()) == []
