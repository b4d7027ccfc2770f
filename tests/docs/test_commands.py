"""Every command of every page runs, in an empty folder, after those that stand above it; smaller,
where a page asks for much."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from diffalign import cli
from diffalign.tasks.geneval.verdict import prompts

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted(ROOT.glob("*/README.md"))

SMALLER = {"--limit": "2", "--count": "2", "--budget": "nfe=64", "--workers": "1"}
"""Values that take a moment, of options that a page sets high."""
HERE = {
    "MODEL": "emoji",
    "my-folder": "tiny",
    "cuda": "cpu",
    "bf16": "fp32",
    "mask2former": "emoji-judge",
}
"""What stands for what a reader has and this machine lacks."""
ABSENT = {
    "eval geneval": {"--limit": "2", "--steps": "2", "--samples": "1"},
    "eval generate": {"--limit": "2", "--steps": "2", "--samples": "1"},
    "align": {"--steps": "4"},
    "compare": {"--steps": "2"},
    "generate": {"--steps": "2"},
    "check": {"--seconds": "1"},
    "calibrate adaptive-guidance": {"--steps": "6", "--count": "4"},
    "fit linear-ag": {"--count": "8"},
}
"""Options that make a command small, where the page leaves them out."""


def commands(page):
    """The commands of a page's bash blocks, as lists of words."""
    text = "".join(re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S))
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


WITH_COMMANDS = [page for page in PAGES if commands(page)]


def smaller(words):
    """The command of diffalign with the same options and less work."""
    words = [HERE.get(word, word) for word in words]
    name = next((name for name in ABSENT if words[1:3] == name.split()), words[1])
    for place, word in enumerate(words[:-1]):
        if word in SMALLER:
            words[place + 1] = SMALLER[word]
    absent = ABSENT.get(name, {})
    return words + [part for item in absent.items() if item[0] not in words for part in item]


def diffalign(words):
    result = CliRunner().invoke(cli.app, smaller(words)[1:])
    assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"


def in_processes(words):
    """``torchrun`` and ``accelerate launch``, by this interpreter."""
    place = words.index("-m")
    launcher = {
        "torchrun": ["torch.distributed.run"],
        "accelerate": ["accelerate.commands.launch", "--cpu"],
    }[words[0]]
    before = [word for word in words[1:place] if word != "launch"]
    job = ["-m", *smaller(words[place + 1 :])]
    subprocess.run([sys.executable, "-m", *launcher, *before, *job], check=True)


def install(words):
    """An installation is seen to by whoever runs this test; its extras exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\[(.*)\]", " ".join(words))
    assert {name for part in extras for name in part.split(",")} <= set(
        project["optional-dependencies"]
    )
    assert words[1] == "install"


def make(words):
    """Targets run in CI, not inside of it; here they are only named."""
    subprocess.run([*words, "-n", "-C", str(ROOT)], check=True, stdout=subprocess.DEVNULL)


PROGRAMS = {
    "diffalign": diffalign,
    "torchrun": in_processes,
    "accelerate": in_processes,
    "pip": install,
    "make": make,
}


@pytest.fixture
def reader(folder_of_a_reader, monkeypatch):
    """The folder in which a reader types: a model ``tiny``, and ``FOLDER`` of pictures in GenEval's
    layout."""
    monkeypatch.chdir(folder_of_a_reader)


@pytest.fixture
def folder_of_a_reader(tmp_path):
    from diffalign.testing.tiny import tiny_pipeline

    tiny_pipeline("StableDiffusionPipeline", text=True).save_pretrained(tmp_path / "tiny")
    for number, prompt in enumerate(prompts()[:2]):
        samples = tmp_path / "FOLDER" / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt))
        Image.new("RGB", (64, 64)).save(samples / "00000.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_run(page, reader):
    for words in commands(page):
        if "ray" in words and importlib.util.find_spec("ray") is None:
            result = CliRunner().invoke(cli.app, smaller(words)[1:])
            assert "pip install 'diffalign[ray]'" in result.output
        else:
            PROGRAMS[words[0]](words)


@pytest.mark.slow
def test_the_file_of_settings_runs(reader):
    (text,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs/evaluation.md").read_text(), re.M | re.S
    )
    Path("run.yaml").write_text(text)
    diffalign(["diffalign", "eval", "run.yaml", "--limit", "1", "--steps", "2", "--samples", "1"])


def test_every_option_that_makes_a_command_small_exists():
    program = get_command(cli.app)
    for name, options in ABSENT.items():
        command = program
        for word in name.split():
            command = command.commands.get(word) or command.commands["run"]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(options) <= known, name
