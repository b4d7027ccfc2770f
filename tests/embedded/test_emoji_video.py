"""The shipped model of clips: plain diffusers runs it, it shows what is asked, and it goes on from
a clip that its own encoder reads."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnyFlowFARPipeline
from PIL import Image
from typer.testing import CliRunner

import diffalign as da
from diffalign.cli import app
from diffalign.drawing.video import save_gif
from diffalign.embedded.load import MODELS, folder_of
from diffalign.embedded.nets.video_judge import VideoJudge
from diffalign.embedded.world.clips import ClipWorld
from diffalign.embedded.world.scenes import HELD_OUT
from diffalign.embedded.world.stories import reading

CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 13,
    "max_sequence_length": 24,
    "num_inference_steps": 6,
    "guidance_scale": 3.0,
}
PROMPTS = [
    "a photo of a cat",
    "a photo of a red car",
    "a photo of a dog moving left",
    "a photo of a clock moving down",
]


@pytest.fixture(scope="module")
def pipe() -> AnyFlowFARPipeline:
    result = AnyFlowFARPipeline.from_pretrained(folder_of("emoji-video"))
    result.set_progress_bar_config(disable=True)
    return result


@pytest.mark.slow
def test_it_shows_what_is_asked(pipe: AnyFlowFARPipeline) -> None:
    """Half of eight clips at least; a share of .8 fails so rarely, of .25 nearly always."""
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    films = pipe(prompt=PROMPTS * 2, generator=generators, output_type="pt", **CALL).frames
    assert films.shape == (8, 13, 3, 64, 64)
    judge = VideoJudge(da.load("emoji-judge"))
    verdicts = judge.verdicts(films.float(), [reading(prompt) for prompt in PROMPTS * 2])
    assert sum(verdict.right for verdict in verdicts) >= 4


def test_the_command_line_knows_its_size_and_length() -> None:
    from diffalign.generate.models import open_model

    model = open_model("emoji-video", media="videos")
    assert model.videos
    assert (model.steps, model.scale) == (6, 3.0)
    assert model.call == CALL
    assert "num_frames" not in open_model("emoji").call
    assert MODELS["emoji-video"].videos


def test_images_are_not_asked_of_it() -> None:
    from diffalign.generate.models import open_model

    with pytest.raises(ValueError, match="makes videos, and only images are made here"):
        open_model("emoji-video")


@pytest.mark.slow
def test_a_tree_on_the_command_line_and_a_clip_that_goes_on(tmp_path) -> None:
    """The first five frames of the result are those of the clip, as the model's autoencoder draws
    them: its object stays where it was."""
    clip = next(ClipWorld({"still": 1.0}, plain=1.0).clips(HELD_OUT.start + 3, 1))
    frames = [Image.fromarray(frame) for frame in clip.pictures()[:5]]
    save_gif(frames, tmp_path / "clip.gif")
    method = "tree-of-frames:branch=(2,1),keep=(1),splitter=whole"
    words = ["align", clip.caption, "--model", "emoji-video", "--method", method, "--steps", "4"]
    words += ["--reward", "emoji-story", "--continue", str(tmp_path / "clip.gif"), "--quiet"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out" / "video.gif") as gif:
        first = np.asarray(gif.convert("RGB")).astype(float)
    own = clip.pictures()[0].astype(float)
    assert first.shape == own.shape
    # the background keeps its brightness only; a picture of another object differs by 30 and more
    assert np.abs(first.mean(-1) - own.mean(-1)).mean() < 15
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"frames.png", "tree.png"}
