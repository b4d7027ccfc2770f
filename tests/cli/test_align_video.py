"""``diffalign align`` on a model of videos: what is written, clips that go on, and bad input."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from diffalign.cli.align import resumable
from diffalign.drawing.video import read_frames, save_gif, save_mp4

METHOD = "tree-of-frames:branch=(2,1),keep=(1)"
SHORT = ("-s", 1, "--size", 32, "--frames", 9, "--method", METHOD, "--reward", "emoji-clip")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """An AnyFlow-FAR folder: chunks of 1, 8 and 4 frames, tiny random weights."""
    from diffalign.testing.tiny import tiny_pipeline

    path = tmp_path_factory.mktemp("videos")
    tiny_pipeline("AnyFlowFARPipeline", text=True).save_pretrained(path)
    return path


def noise(count, size=32):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)) for _ in range(count)]


@pytest.mark.slow
def test_a_video_search_writes_its_folder(run, videos, tmp_path):
    result = run("align", "a dog moving left", "-m", videos, *SHORT, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["reward"] == "mean(emoji-clip)"
    names = {path.name for path in tmp_path.iterdir()}
    assert {"video.mp4", "video.gif", "frames.png", "tree.png", "best.png", "image.png"} <= names
    assert len(read_frames(tmp_path / "video.mp4")) == 9
    assert len(read_frames(tmp_path / "video.gif")) == 9


@pytest.mark.slow
def test_a_clip_goes_on(run, videos, tmp_path):
    save_gif(noise(9), tmp_path / "clip.gif")
    command = ("align", "a dog", "-m", videos, *SHORT, "--continue", tmp_path / "clip.gif")
    result = run(*command, "--frames", 13, "-o", tmp_path / "out", "-q")
    assert result.exit_code == 0, result.stderr
    assert len(read_frames(tmp_path / "out" / "video.gif")) == 13


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    save_mp4(noise(4), path / "four.mp4")
    save_mp4(noise(1, 16), path / "small.mp4")
    (path / "none.mp4").write_bytes(b"nothing")
    return path


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--continue", "none.mp4"), "--continue: 'none.mp4' cannot be read as a video"),
        (("--continue", "gone.mp4"), "--continue: there is no file"),
        (("--frames", "0"), "--frames must be at least 1; got 0"),
        (("--continue", "four.mp4"), "F one of 1 of the video's 9 frames; got [4, 3, 32, 32]"),
        (("--continue", "small.mp4"), "The clip is 16 x 16 and the call makes 32 x 32"),
        (("--frames", "8"), "num_frames=8 does not end where a chunk"),
        (("--fps", "0"), "--fps must be in (0, 240]"),
        (("--method", "beam"), "AnyFlowFARPipeline"),
        (("--reward", "flicker"), "a choice after chunk 1 sees 1 frames, and the reward needs 2"),
        (("--budget", "nfe=2"), "The budget is too small"),
    ],
)
def test_bad_input_is_one_line(run, videos, clips, tmp_path, monkeypatch, options, text):
    monkeypatch.chdir(clips)
    result = run("align", "a dog", "-m", videos, "-o", tmp_path / "new", *SHORT, *options)
    assert result.exit_code == 2
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_without_pyav_nothing_runs(run, videos, clips, tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.drawing.video.has_pyav", lambda: False)
    result = run("align", "a dog", "-m", videos, "-o", tmp_path / "new", *SHORT)
    assert result.exit_code == 2
    assert "a video is written as MP4, and PyAV is not installed; pip install" in result.stderr
    monkeypatch.setitem(sys.modules, "av", None)
    result = run("align", "a dog", "-m", videos, "--continue", clips / "four.mp4", *SHORT)
    assert "--continue: PyAV is not installed" in result.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--frames", 9), "--frames: "),
        (("--method", "tree-of-frames"), "TreeOfFrames cannot act here"),
    ],
)
def test_a_model_of_images_has_no_frames(run, folder, tmp_path, options, text):
    common = ("-s", 2, "-o", tmp_path / "new", "--reward", "emoji-clip")
    result = run("align", "a dog", "-m", folder, *common, *options)
    assert result.exit_code == 2
    assert text in result.stderr


def test_other_commands_say_that_it_makes_videos(run, videos, tmp_path):
    result = run("generate", "-p", "a dog", "-m", videos, "-o", tmp_path)
    assert result.exit_code == 2
    assert "makes videos" in result.stderr or "not supported" in result.stderr


def test_ctrl_c_without_a_result_says_how_to_go_on(tmp_path):
    with pytest.raises(KeyboardInterrupt) as plain, resumable(tmp_path):
        raise KeyboardInterrupt
    assert not plain.value.args
    (tmp_path / "state.pt").touch()
    with pytest.raises(KeyboardInterrupt, match="no result yet; the same"), resumable(tmp_path):
        raise KeyboardInterrupt
