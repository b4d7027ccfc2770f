"""Frames into GIF and MP4 files and out of them again."""

import sys

import numpy as np
import pytest
from PIL import Image

from diffalign.drawing.video import evenly, has_pyav, read_frames, save_gif, save_mp4


def clip(count=5, size=(48, 32)):
    """A red bar that moves over grey."""
    frames = []
    for i in range(count):
        pixels = np.full((size[1], size[0], 3), 128, np.uint8)
        pixels[:, 8 * i : 8 * i + 8] = (220, 30, 30)
        frames.append(Image.fromarray(pixels))
    return frames


def distance(a, b):
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


def test_a_gif_holds_its_frames(tmp_path):
    save_gif(clip(), tmp_path / "a.gif", rate=4)
    frames = read_frames(tmp_path / "a.gif")
    assert len(frames) == 5
    assert max(map(distance, frames, clip())) < 1.0
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.info["duration"], image.info["loop"]) == (250, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_still_frames_stay_in_a_gif(tmp_path):
    save_gif([clip()[0]] * 3, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        total = sum(_durations(image))
    assert total == 3 * 120


def _durations(image):
    for frame in range(getattr(image, "n_frames", 1)):
        image.seek(frame)
        yield image.info["duration"]


def test_an_mp4_holds_its_frames(tmp_path):
    save_mp4(clip(), tmp_path / "a.mp4", rate=12)
    frames = read_frames(tmp_path / "a.mp4")
    assert len(frames) == 5
    # lossy, with colours at half the resolution
    assert max(map(distance, frames, clip())) < 12.0


def test_odd_sides_are_made_even(tmp_path):
    save_mp4(clip(size=(49, 33)), tmp_path / "a.mp4")
    frame = read_frames(tmp_path / "a.mp4")[0]
    assert frame.size == (50, 34)
    corner = np.asarray(frame, float)[-1, -1]
    assert np.abs(corner - 128).max() < 12


def test_what_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    (tmp_path / "b.gif").write_bytes(b"no picture at all")
    for name in ("a.mp4", "b.gif"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be read as a video"):
            read_frames(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        read_frames(tmp_path / "c.mp4")


def test_bad_frames(tmp_path):
    for save in (save_gif, save_mp4):
        with pytest.raises(ValueError, match="at least one frame"):
            save([], tmp_path / "a")
        with pytest.raises(ValueError, match="rate must be in"):
            save(clip(), tmp_path / "a", rate=0)
        with pytest.raises(ValueError, match="have one size"):
            save([*clip(1), *clip(1, (16, 16))], tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'diffalign\[video\]'.*to write MP4"):
        save_mp4(clip(), tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    with pytest.raises(ImportError, match=r"diffalign\[video\].*a GIF needs none"):
        read_frames(tmp_path / "b.mp4")


def test_pyav_is_there():
    assert has_pyav()


def test_frames_evenly_spread():
    assert evenly(3, 6) == [0, 1, 2]
    assert evenly(13, 4) == [0, 4, 8, 12]
    assert evenly(13, 1) == [0]
