"""A saved folder of a tiny pipeline, the command line on it, and a stand-in for the embedded model
and its judge."""

import dataclasses
import json
import sys

import pytest
from typer.testing import CliRunner

from diffalign import cli
from diffalign.embedded.load import MODELS, Entry
from diffalign.tasks.geneval.verdict import Detection, Thresholds

STEPS = 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Stable Diffusion folder as ``save_pretrained`` writes it: 16 x 16 pixels, tiny random
    weights."""
    from diffalign.testing.tiny import tiny_pipeline

    path = tmp_path_factory.mktemp("tiny")
    tiny_pipeline("StableDiffusionPipeline", text=True).save_pretrained(path)
    return path


@pytest.fixture
def index(tmp_path):
    """A folder with nothing but a model index of the given class."""

    def make(class_name, **components):
        path = tmp_path / f"index-{class_name}"
        path.mkdir()
        (path / "model_index.json").write_text(
            json.dumps({"_class_name": class_name, **components})
        )
        return path

    return make


@pytest.fixture
def run():
    """``run("generate", ...)``: the command in this process; the result has exit_code, stdout,
    stderr."""

    def call(*arguments):
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def program(monkeypatch, capsys):
    """The installed program, ``main()``: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffalign", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


@dataclasses.dataclass
class FakeJudge:
    """Sees one bench in the left half of every picture, whatever it shows."""

    thresholds: Thresholds = dataclasses.field(default_factory=Thresholds)
    seen: list = dataclasses.field(default_factory=list)

    def detect(self, images):
        self.seen.append(images)
        return [[Detection("bench", 0.95, (0.0, 0.0, 8.0, 8.0), "red")] for _ in images]


@pytest.fixture
def emoji(folder, tmp_path, monkeypatch):
    """The tiny folder under the name of the embedded model, with a fake judge, which it returns."""
    root, judge = tmp_path / "models", FakeJudge()
    root.mkdir()
    (root / "emoji").symlink_to(folder, target_is_directory=True)
    (root / "emoji-judge").mkdir()
    (root / "emoji-judge" / "weights").write_text("none")
    monkeypatch.setattr(sys.modules["diffalign.embedded.load"], "FOLDER", root)
    monkeypatch.setitem(MODELS, "emoji-judge", Entry("emoji-judge", "fake", lambda path: judge))
    return judge
